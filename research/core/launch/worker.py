"""One rank of a job: runs a program, notes how it ended, and ends at once when it fails.

    python research/core/launch/worker.py SCRIPT [ARGUMENT ...]
    python research/core/launch/worker.py -m MODULE [ARGUMENT ...]

The launchers put it before the program of every rank. It imports nothing of this repository, so that it can run any
program. In the folder ``QWEN_LAUNCH_NOTES`` it writes ``rank_N.start.json`` and ``rank_N.end.json``; the second one is
written when the error is raised, before anything is cleaned up, so that the supervisor can tell the cause from what other
ranks say of it afterwards. A failed rank leaves by ``os._exit``: cleaning up would wait for the others. The scheduler of
MindSpore's cluster brings workers together and does not run the program.
"""

import ctypes
import faulthandler
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback

NOTES, LAUNCHER = "QWEN_LAUNCH_NOTES", "QWEN_LAUNCHER_PID"  # as in research/core/launch/environment.py
PR_SET_PDEATHSIG = 1


def main(argv):
    sys.path.pop(0)  # the folder of this file: its module names are not for the program
    _end_with_launcher()
    faulthandler.enable()  # a crash inside a library leaves its Python stack in the log
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # where every thread is, on request
    sys.stdout.reconfigure(line_buffering=True)  # progress is seen when it is made, line by line
    _note("start", pid=os.getpid())
    try:
        if os.environ.get("MS_ROLE") == "MS_SCHED":
            _schedule()
        else:
            _run(argv)
    except SystemExit as leaving:
        _leave(leaving)
    except KeyboardInterrupt:
        _fail(130, "interrupted")
    except BaseException as error:
        told = "".join(traceback.format_exception_only(type(error), error)).strip()
        _note("end", status=1, error=told)
        _print_traceback(error)
        _fail(1, told)
    _note("end", status=0)


def _run(argv):
    if not argv:
        raise SystemExit("worker.py: no program is given")
    if argv[0] == "-m":
        if len(argv) < 2:
            raise SystemExit("worker.py: -m needs a module")
        sys.argv = argv[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = list(argv)
    sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))
    runpy.run_path(argv[0], run_name="__main__")


def _schedule():
    from mindspore.communication import init

    init()  # returns when the workers have left


def _leave(leaving):
    code = leaving.code
    if code is None or code == 0:
        _note("end", status=0)
        raise leaving
    if isinstance(code, int):
        _fail(code, "")
    print(code, file=sys.stderr)
    _fail(1, str(code))


def _fail(status, error):
    _note("end", status=status, error=error)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(status & 0xFF or 1)


def _print_traceback(error):
    # Without the frames of this file and of runpy: the program's own begin below them.
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename in _OURS:
        frame = frame.tb_next
    traceback.print_exception(type(error), error, frame)


_OURS = {__file__, runpy.__file__, "<frozen runpy>"}


def _note(kind, **fields):
    """Write a note aside and rename it; the first ``end`` counts."""
    folder = os.environ.get(NOTES)
    if not folder:
        return
    rank = os.environ.get("MS_NODE_ID") or os.environ.get("RANK") or os.environ.get("RANK_ID") or "0"
    who = "scheduler" if os.environ.get("MS_ROLE") == "MS_SCHED" else f"rank_{rank}"
    path = os.path.join(folder, f"{who}.{kind}.json")
    if kind == "end" and os.path.exists(path):
        return
    aside = f"{path}.{os.getpid()}.{threading.get_ident()}"
    try:
        with open(aside, "w", encoding="utf-8") as file:
            json.dump({"time": time.time(), **fields}, file)
        os.replace(aside, path)
    except OSError:
        pass  # the launcher is gone: there is nobody left to tell


def _end_with_launcher():
    """SIGKILL when the launcher dies, so that no rank is left alone with a card (Linux).

    A rank that msrun starts is the launcher's child only when msrun has left.
    """
    launcher = os.environ.get(LAUNCHER, "")
    if sys.platform != "linux" or not launcher.isdigit():
        return

    def bind():
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(launcher):
            os._exit(1)

    def wait_and_bind():
        while os.getppid() != int(launcher):
            if not os.path.exists(f"/proc/{launcher}"):
                os._exit(1)
            time.sleep(0.2)
        bind()
        threading.Event().wait()  # the request belongs to this thread

    if os.getppid() == int(launcher):
        bind()
    else:
        threading.Thread(target=wait_and_bind, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
