"""The ordered map over processes: order, bounded memory, errors, killed workers."""

from __future__ import annotations

import os
import signal
import time

import pytest

from research.core.data.workers import map_in_order
from research.core.errors import DataError


def slow_square(n):
    time.sleep(0.02 if n % 3 == 0 else 0)
    return n * n


def fail_at_three(n):
    if n == 3:
        raise DataError("bad record", where="x.json:3", hint="mend it")
    return n


def die_at_three(n):
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_results_come_in_the_order_of_the_jobs(workers, count):
    assert list(map_in_order(slow_square, iter(range(count)), workers)) == [n * n for n in range(count)]


def test_no_more_than_two_jobs_per_worker_are_taken_ahead():
    taken = []

    def jobs():
        for n in range(100):
            taken.append(n)
            yield n

    results = map_in_order(slow_square, jobs(), 2)
    for n in range(10):
        next(results)
        assert len(taken) <= n + 2 * 2 + 1
    results.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_users_error_in_a_worker_arrives_whole(workers):
    with pytest.raises(DataError) as error:
        list(map_in_order(fail_at_three, iter(range(10)), workers))
    assert str(error.value) == "x.json:3: bad record\n  try: mend it"


def test_a_killed_worker_is_reported_not_waited_for():
    with pytest.raises(DataError, match="killed") as error:
        list(map_in_order(die_at_three, iter(range(10)), 2))
    assert "data.workers" in str(error.value)
