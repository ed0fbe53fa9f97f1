"""metrics.jsonl, TensorBoard events, progress lines and loss.png."""

from __future__ import annotations

import subprocess
import sys

import pytest

from research.core.run.folder import RunFolder
from research.core.run.metrics import Metrics, read_metrics
from research.core.run.plot import plot_losses, smooth
from research.core.run.progress import Progress, clock


def _write(folder, steps, from_step=0):
    metrics = Metrics(folder, from_step=from_step)
    for step in steps:
        metrics.write(step, "train", {"loss": 1.0 / step, "lr": 0.1})
    metrics.write(steps[-1], "eval", {"loss": 2.0})
    metrics.close()


def test_resumed_run_has_no_step_twice(tmp_path):
    _write(tmp_path, [1, 2, 3, 4, 5])
    _write(tmp_path, [4, 5, 6], from_step=3)
    assert [r["step"] for r in read_metrics(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]


def test_new_run_in_the_folder_starts_an_empty_file(tmp_path):
    _write(tmp_path, [1, 2, 3])
    _write(tmp_path, [1])
    assert [r["step"] for r in read_metrics(tmp_path, "train")] == [1]


def test_line_cut_short_by_a_crash_is_left_out(tmp_path):
    _write(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "ki')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 2]
    _write(tmp_path, [3], from_step=2)
    assert [r["step"] for r in read_metrics(tmp_path, "train")] == [1, 2, 3]


def test_tensorboard_reads_the_scalars_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _write(tmp_path, [1, 2, 4])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = events.Scalars("train/loss")
    assert [e.step for e in found] == [1, 2, 4] and found[2].value == pytest.approx(0.25)


def test_loss_plot_is_a_png_and_needs_two_points(tmp_path):
    _write(tmp_path, [1])
    assert plot_losses(tmp_path, "run") is None
    _write(tmp_path, list(range(1, 50)))
    path = plot_losses(tmp_path, "run")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl", "tensorboard"]


def test_smoothing_keeps_a_constant_and_has_no_startup_bias():
    assert smooth([3.0] * 100) == pytest.approx([3.0] * 100)
    assert smooth([5.0])[0] == 5.0


def test_lines_without_a_terminal_say_where_the_work_is(tmp_path, capsys):
    with RunFolder(tmp_path / "r", task="t", model="m") as run, Progress(run, 10, "train") as progress:
        assert not progress.live
        progress.update(5)
        progress.line("loss 1.0")
    assert "train step 5/10  loss 1.0  left 0:00" in capsys.readouterr().err


def test_bar_on_a_terminal_prints_lines_above_and_logs_them(tmp_path):
    code = (
        "import os, pty, sys\n"
        "script = '''\n"
        "import sys\n"
        "from research.core.run.folder import RunFolder\n"
        "from research.core.run.progress import Progress\n"
        "with RunFolder(sys.argv[1], task='t', model='m') as run, Progress(run, 10, 'train') as p:\n"
        "    p.update(4, 'note')\n"
        "    print('a line [b]above[/b]')\n"
        "'''\n"
        "sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, '-c', script, sys.argv[1]])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "r")],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4/10" in done.stdout and "a line [b]above[/b]" in done.stdout
    assert "a line [b]above[/b]\n" in (tmp_path / "r" / "log.txt").read_text()
    assert "4/10" not in (tmp_path / "r" / "log.txt").read_text()


def test_clock():
    assert clock(65) == "1:05" and clock(3661.4) == "1:01:01" and clock(-3) == "0:00"
