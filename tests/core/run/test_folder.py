"""The run folder: one holder at a time, everything printed is kept, results are not overwritten."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from research.core.errors import UserError
from research.core.run.folder import LOCK, RunFolder, write_text

HOLD = """
import sys, time
from research.core.run.folder import RunFolder
with RunFolder(sys.argv[1], task="t", model="m"):
    print("held", flush=True)
    time.sleep(60)
"""


def _open(path, **settings):
    return RunFolder(path, task="finetune", model="m", **settings)


def test_second_run_is_refused_with_the_pid_and_a_killed_one_leaves_no_lock(tmp_path, repo):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "r")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=repo
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"in use by pid {holder.pid}"), _open(tmp_path / "r"):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert (tmp_path / "r" / LOCK).exists()  # stale, and taken over:
    with _open(tmp_path / "r"):
        assert json.loads((tmp_path / "r" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "r" / LOCK).exists()


def test_output_goes_to_terminal_and_log_without_colours(tmp_path, capsys):
    with _open(tmp_path / "r") as run:
        print("\x1b[31mred\x1b[0m answer")
        run.say("spoken")
    out, err = capsys.readouterr()
    assert out == "\x1b[31mred\x1b[0m answer\n" and "spoken\n" in err
    log = (tmp_path / "r" / "log.txt").read_text()
    assert "red answer\n" in log and "spoken\n" in log and "\x1b" not in log
    assert shlex.split((tmp_path / "r" / "command.txt").read_text())[-len(sys.argv) :] == sys.argv


def test_folder_is_named_at_start_and_end_also_on_failure(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), _open(tmp_path / "r"):
        print(1 / 0)
    err = capsys.readouterr().err
    assert err.count(f"run folder: {tmp_path / 'r'}") == 2 and "(failed)" in err
    assert "ZeroDivisionError" in (tmp_path / "r" / "log.txt").read_text()
    assert not (tmp_path / "r" / LOCK).exists()
    print("still printed")
    assert capsys.readouterr().out == "still printed\n"


@pytest.mark.parametrize("result", ["checkpoints", "weights", "adapter"])
def test_results_of_another_run_are_not_overwritten(tmp_path, result):
    (tmp_path / "r" / result / "x").mkdir(parents=True)
    with pytest.raises(UserError, match=f"already holds {result}/"), _open(tmp_path / "r"):
        pass
    with _open(tmp_path / "r", resume=True):
        pass


def test_resuming_a_missing_folder_is_an_error_and_makes_none(tmp_path):
    with pytest.raises(UserError, match="no such run"), _open(tmp_path / "r", resume=True):
        pass
    assert not (tmp_path / "r").exists()


def test_default_folders_are_under_task_and_model_and_differ(tmp_path):
    a = RunFolder(None, task="lora", model="tiny", root=tmp_path)
    with a:
        b = RunFolder(None, task="lora", model="tiny", root=tmp_path)
    assert a.path.parent == tmp_path / "lora" / "tiny" and a.path != b.path


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_ranks_above_zero_write_nothing(tmp_path, capsys):
    with _open(tmp_path / "r", main=False) as run:
        run.say("nothing")
    assert not (tmp_path / "r").exists() and capsys.readouterr().err == ""


def test_two_racing_processes_never_hold_the_folder_together(tmp_path, repo):
    script = HOLD.replace("time.sleep(60)", "time.sleep(1)")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "r")],
            cwd=repo,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    time.sleep(0.1)
    outputs = [run.communicate(timeout=30)[0] for run in runs]
    assert outputs.count(b"held\n") >= 1
    assert all(run.returncode == (0 if out else 1) for run, out in zip(runs, outputs))
