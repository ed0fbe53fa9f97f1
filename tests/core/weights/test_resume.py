"""``kill -9`` in the middle, then the same command: it goes on at the tensor it had reached, and the bytes are the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from research.core.errors import WeightsError
from research.core.weights import staging
from research.core.weights.convert import ConvertOptions, convert
from research.core.weights.opened import HUGGINGFACE
from tests.conftest import REPO
from tests.core.weights.cases import Case, folder_tensors, same

CASE = Case("qwen2", layers=3)

# A process that kills itself, without any handler or clean-up, when the given number of tensors is done.
KILLED = """
import os, signal, sys
sys.path.insert(0, {repo!r})
from research.core.weights import staging
from research.core.weights.convert import ConvertOptions, convert
note, done = staging.Staging.note, []
def noting(self, written):
    note(self, written)
    done.append(written)
    if len(done) == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
staging.Staging.note = noting
convert({source!r}, {target!r}, ConvertOptions({options}), threads={threads})
"""


def run_and_kill(source, target, after: int, options: str = "", threads: int = 2) -> None:
    code = KILLED.format(
        repo=str(REPO), source=str(source), target=str(target), after=after, options=options, threads=threads
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def source(tmp_path):
    return CASE.write(tmp_path / "hf", shards=2)


@pytest.mark.parametrize("after", [1, 9, 22])
def test_a_killed_file_is_finished_from_where_it_was(source, tmp_path, after, monkeypatch):
    convert(source, tmp_path / "whole.ckpt", ConvertOptions(concat="grouped", dtype="BF16"))
    target = tmp_path / "x.ckpt"
    run_and_kill(source, target, after, "concat='grouped', dtype='BF16'", threads=1)
    assert not target.exists()
    made = count_made(monkeypatch)
    said: list[str] = []
    summary = convert(source, target, ConvertOptions(concat="grouped", dtype="BF16"), log=said.append)
    assert said[0].startswith(f"going on: {after} of {summary.tensors}")
    assert len(made) == summary.tensors - after  # nothing twice
    assert target.read_bytes() == (tmp_path / "whole.ckpt").read_bytes()
    rounded = json.loads((tmp_path / "conversion.json").read_text())["rounding"]
    again = json.loads((tmp_path / "x.ckpt.conversion.json").read_text())["rounding"]
    assert rounded == again and rounded["rounded"] > 0  # the counts of the killed run are kept too
    assert not list(tmp_path.glob(".*"))


def count_made(monkeypatch) -> list[str]:
    made: list[str] = []
    note = staging.Staging.note
    monkeypatch.setattr(staging.Staging, "note", lambda self, w: (made.append(w.target.name), note(self, w))[1])
    return made


def test_a_killed_folder_of_shards_is_finished(source, tmp_path):
    options = "to='huggingface', shard_bytes=3000"
    run_and_kill(source, tmp_path / "out", 11, options, threads=1)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", ConvertOptions(to=HUGGINGFACE, shard_bytes=3000))
    assert same(folder_tensors(tmp_path / "out"), CASE.weights())
    assert not (tmp_path / "out" / "journal.jsonl").exists()


def test_bytes_that_the_journal_promises_but_the_disk_lost_are_made_again(source, tmp_path, monkeypatch):
    """After a power cut the journal may be ahead of the data."""
    target = tmp_path / "x.ckpt"
    run_and_kill(source, target, 12, threads=1)
    part = tmp_path / ".x.ckpt.partial" / "x.ckpt"
    with part.open("r+b") as file:
        file.seek(part.stat().st_size // 4)
        file.write(bytes(64))
    with (part.parent / "journal.jsonl").open("a") as file:
        file.write('{"file": "x.ckpt", "name": "model.norm_out.wei')  # a line cut off by the kill
    made = count_made(monkeypatch)
    convert(source, target, ConvertOptions())
    convert(source, tmp_path / "whole.ckpt", ConvertOptions())
    assert target.read_bytes() == (tmp_path / "whole.ckpt").read_bytes()
    assert len(made) > 30 - 12


def test_other_options_or_another_source_start_again(source, tmp_path):
    target = tmp_path / "x.ckpt"
    run_and_kill(source, target, 12)
    said: list[str] = []
    convert(source, target, ConvertOptions(concat="stacked"), log=said.append)
    assert not said
    convert(source, tmp_path / "s.ckpt", ConvertOptions(concat="stacked"))
    assert target.read_bytes() == (tmp_path / "s.ckpt").read_bytes()
    target.unlink()
    run_and_kill(source, target, 12, "concat='stacked', overwrite=True")
    os.utime(source / "model-00001-of-00002.safetensors")  # written again since
    convert(source, target, ConvertOptions(concat="stacked", overwrite=True), log=said.append)
    assert not said


def test_two_processes_do_not_write_one_target(source, tmp_path, monkeypatch):
    inside, go = threading.Event(), threading.Event()
    create = staging.Staging.create

    def waiting(self, files):
        inside.set()
        go.wait(10)
        create(self, files)

    monkeypatch.setattr(staging.Staging, "create", waiting)
    first = threading.Thread(target=convert, args=(source, tmp_path / "x.ckpt", ConvertOptions()))
    first.start()
    inside.wait(10)
    with pytest.raises(WeightsError, match="another process"):
        convert(source, tmp_path / "x.ckpt", ConvertOptions())
    go.set()
    first.join()
    assert (tmp_path / "x.ckpt").exists()


def test_ctrl_c_keeps_what_is_done(source, tmp_path):
    """An interrupt is not a failure: the staging folder stays for the next run."""
    code = KILLED.format(
        repo=str(REPO), source=str(source), target=str(tmp_path / "x.ckpt"), after=5, options="", threads=1
    ).replace("os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGINT); time.sleep(5)")
    process = subprocess.Popen([sys.executable, "-c", "import time\n" + code], stderr=subprocess.PIPE, text=True)
    started = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 60 and "KeyboardInterrupt" in errors
    assert not (tmp_path / "x.ckpt").exists()
    said: list[str] = []
    convert(source, tmp_path / "x.ckpt", ConvertOptions(), log=said.append)
    assert said[0].startswith("going on: ")
