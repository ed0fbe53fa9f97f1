"""Supervision: the first failure ends everything and is the one that is shown, and nothing is left behind.

The ranks are small Python programs; what MindSpore does in their place is in test_msrun.py.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from research.core.launch.failure import Ending, cause
from research.core.launch.member import Quiet, _copy

# Runs two ranks of the program that is given, the first one shown.
SUPERVISOR = """
import signal, sys, tempfile
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in a background that ignores Ctrl-C
from pathlib import Path
from research.core.launch.failure import Notes
from research.core.launch.member import Member
from research.core.launch.msrun import wrapped
from research.core.launch.processes import supervise
folder, program, patience = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
members = [
    Member(f"rank {r}", wrapped([sys.executable, program, *sys.argv[4:]]), folder / f"rank_{r}.log", {"RANK": str(r)},
           rank=r, shown=r == 0, note=f"rank_{r}")
    for r in range(2)
]
with tempfile.TemporaryDirectory() as notes:
    sys.exit(supervise(members, Notes(Path(notes)), patience_s=patience))
"""


@pytest.fixture
def group(tmp_path, repo):
    """Write a rank's program and start two of it under a supervisor; every process of it is gone afterwards."""
    started = []

    def run(program: str, *args: str, patience: float = 20) -> subprocess.Popen:
        (tmp_path / "program.py").write_text(
            "import os, sys, time\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(program)
        )
        command = [sys.executable, "-c", SUPERVISOR, str(tmp_path), str(tmp_path / "program.py"), str(patience), *args]
        env = {**os.environ, "PYTHONPATH": str(repo), "GROUP_MARK": str(tmp_path)}
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def left_over(folder: Path) -> list[str]:
    """Command lines of processes that carry the mark of ``folder``, once they have had a moment to go."""
    deadline = time.monotonic() + 5
    while (found := _marked(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _marked(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"GROUP_MARK={folder}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_output_of_the_first_rank_is_shown_and_of_the_others_kept(group, tmp_path):
    # The first one's in pieces: its log, where both streams meet, has whole lines all the same.
    done = group(
        """
        print("hello", "from " if rank == 0 else f"from {rank}\\n", end="", flush=True)
        time.sleep(0.2)
        print("note", rank, file=sys.stderr, flush=True)
        time.sleep(0.2)
        print("0" if rank == 0 else "")
        """
    )
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0
    assert out == "hello from 0\n" and err == "note 0\n"
    assert "hello from 1" in (tmp_path / "rank_1.log").read_text()
    assert sorted((tmp_path / "rank_0.log").read_text().split("\n")) == ["", "hello from 0", "note 0"]


def test_a_line_without_an_end_does_not_wait_for_it_in_memory(tmp_path):
    log, size = tmp_path / "log", 3 << 20

    class Endless(io.BytesIO):
        waiting = 0

        def read1(self, count):
            self.waiting = max(self.waiting, self.tell() - (log.stat().st_size if log.exists() else 0))
            return super().read1(count)

    source, shown = Endless(b"x" * size), io.StringIO()
    _copy(source, shown, log, "")
    assert log.stat().st_size == len(shown.getvalue()) == size and source.waiting < 2 << 20


def test_a_failed_rank_ends_the_others_at_once_with_its_own_error(group, tmp_path):
    done = group(
        """
        if rank == 1:
            raise ValueError("the own error of rank 1")
        try:
            time.sleep(600)
        finally:
            open(os.path.join(os.path.dirname(__file__), "saved"), "w")
        """
    )
    begin = time.monotonic()
    _, err = done.communicate(timeout=60)
    assert time.monotonic() - begin < 30 and done.returncode == 1
    assert "rank 1 ended with status 1" in err and "ValueError: the own error of rank 1" in err
    assert "worker.py" not in err, "the wrapper's own frames are no part of the program's traceback"
    assert f"log: {tmp_path}/rank_1.log" in err
    assert not (tmp_path / "saved").exists(), "a rank that outlives a failure may save a wrong state"
    assert left_over(tmp_path) == []


def test_the_error_shown_is_the_cause_and_not_what_follows_from_it(group):
    done = group(
        """
        import socket
        a = os.path.join(os.path.dirname(__file__), "gone")
        if rank == 1:
            open(a, "w")
            raise KeyError("what went wrong")
        while not os.path.exists(a):
            time.sleep(0.001)
        raise RuntimeError("Connection closed by peer")
        """
    )
    _, err = done.communicate(timeout=60)
    assert "rank 1 ended" in err and "what went wrong" in err.split("error: ")[-1]


def test_the_same_error_of_all_ranks_is_told_once(group):
    done = group("print('error: no such setting', file=sys.stderr); time.sleep(0.3); sys.exit(2)")
    _, err = done.communicate(timeout=60)
    assert done.returncode == 2 and err.count("no such setting") == 1


def test_a_killed_rank_is_told_by_its_signal(group):
    done = group("import signal\nif rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)")
    _, err = done.communicate(timeout=60)
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in err and "memory" in err


def test_a_crash_in_a_library_leaves_its_stack(group, tmp_path):
    done = group("import ctypes\nif rank: ctypes.string_at(0)\ntime.sleep(600)")
    _, err = done.communicate(timeout=60)
    assert done.returncode == 128 + signal.SIGSEGV and "rank 1 was ended by SIGSEGV" in err
    assert "program.py" in (tmp_path / "rank_1.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_lets_the_ranks_save_and_leaves_no_process(group, tmp_path, number):
    done = group(
        """
        import signal, subprocess
        from pathlib import Path
        here = Path(__file__).parent
        stop = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.append(1))
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (here / f"ready_{rank}").touch()
        while not stop:
            time.sleep(0.01)
        time.sleep(0.2)
        (here / f"saved_{rank}").touch()
        """
    )
    for rank in range(2):
        wait_for(tmp_path / f"ready_{rank}")
    done.send_signal(number)
    done.communicate(timeout=60)
    assert done.returncode == 128 + number
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()
    assert left_over(tmp_path) == [], "a child of a rank is left"


def test_ranks_that_do_not_stop_are_ended_when_patience_is_over(group, tmp_path):
    done = group(
        """
        import signal
        from pathlib import Path
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (Path(__file__).parent / f"ready_{rank}").touch()
        time.sleep(600)
        """,
        patience=0.5,
    )
    for rank in range(2):
        wait_for(tmp_path / f"ready_{rank}")
    done.terminate()
    _, err = done.communicate(timeout=60)
    assert done.returncode == 143 and "rank 0, rank 1 did not end within 0.5 s" in err
    assert left_over(tmp_path) == []


def test_ranks_end_when_the_launcher_is_killed(group, tmp_path):
    done = group("from pathlib import Path\n(Path(__file__).parent / f'ready_{rank}').touch()\ntime.sleep(600)")
    for rank in range(2):
        wait_for(tmp_path / f"ready_{rank}")
    done.kill()
    done.wait()
    assert left_over(tmp_path) == []


def test_a_question_makes_the_ranks_write_where_they_are(group, tmp_path):
    done = group(
        """
        from pathlib import Path
        def waiting_for_godot():
            (Path(__file__).parent / f"ready_{rank}").touch()
            time.sleep(600)
        waiting_for_godot()
        """
    )
    for rank in range(2):
        wait_for(tmp_path / f"ready_{rank}")
    done.send_signal(signal.SIGQUIT)
    deadline = time.monotonic() + 20
    while "waiting_for_godot" not in (tmp_path / "rank_1.log").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "waiting_for_godot" in (tmp_path / "rank_1.log").read_text()
    assert done.poll() is None, "the question must not end anything"


def test_a_rank_may_be_a_module_or_take_flags_before_its_script(tmp_path, repo):
    (tmp_path / "mod.py").write_text("import sys; print(__name__, sys.argv[1:], sys.path[0])")
    worker = repo / "research" / "core" / "launch" / "worker.py"
    run = subprocess.run([sys.executable, worker, "-m", "mod", "a b"], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == f"__main__ ['a b'] {tmp_path}\n", run.stderr
    run = subprocess.run([sys.executable, worker, "mod.py", "c"], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == f"__main__ ['c'] {tmp_path}\n", run.stderr


def test_the_cause_is_the_earliest_error_of_a_ranks_own():
    def ending(name, at, error, rank=0, status=1, signed=True):
        return Ending(name, status, at, error, None, rank, signed)

    lost = ending("rank 0", 1.0, "RuntimeError: Connection reset by peer")
    own = ending("rank 3", 2.0, "ValueError: 7")
    late = ending("rank 2", 3.0, "TypeError: 8")
    scheduler = ending("scheduler", 0.5, "some node has gone", rank=None)
    killed = ending("rank 1", 9.0, "", status=137, signed=False)
    assert cause([lost, late, own, scheduler]) is own
    assert cause([lost, scheduler, killed]) is killed
    assert cause([lost, scheduler]) is lost
    assert cause([scheduler]) is scheduler


def test_chatter_is_left_out_whole_and_nothing_else_is_held_back():
    quiet = Quiet()
    assert quiet.pass_on(b"[WARNING] DISTR") == b""
    assert quiet.pass_on(b"IBUTED(12,7f,python) something\nloss 1") == b"loss 1"
    assert quiet.pass_on(b".5\n[note] kept\n> ") == b".5\n[note] kept\n> "
    assert quiet.pass_on(b"[WARNING] A(1\n") == b"[WARNING] A(1\n", "the middle of a line is no line of chatter"
    assert quiet.pass_on(b"[ab") == b"" and quiet.pass_on(b"", last=True) == b"[ab"
    every = Quiet(b"[rank 1] ")
    assert every.pass_on(b"a\nb") == b"[rank 1] a\n" and every.pass_on(b"", last=True) == b"[rank 1] b"


def test_only_a_rank_that_is_talked_to_reads_the_terminal(repo, tmp_path):
    launcher = (
        "import sys\nfrom pathlib import Path\n"
        "from research.core.launch.failure import Notes\nfrom research.core.launch.member import Member, start\n"
        "read = [sys.executable, '-c', 'import sys; print(repr(sys.stdin.readline()))']\n"
        "for name, talks in (('trains', False), ('chats', True)):\n"
        "    log = Path(sys.argv[1]) / name\n"
        "    member = Member(name, read, log, rank=0, reads_input=True, reads_terminal=talks)\n"
        "    start(member, Notes(Path(sys.argv[1]))).process.wait()\n"
    )
    master, terminal = os.openpty()
    try:
        os.write(master, b"hello\n")
        command = [sys.executable, "-c", launcher, str(tmp_path)]
        subprocess.run(command, stdin=terminal, cwd=repo, check=True, timeout=60)
    finally:
        os.close(master)
        os.close(terminal)
    assert (tmp_path / "trains").read_text() == "''\n"
    assert (tmp_path / "chats").read_text() == "'hello\\n'\n"
