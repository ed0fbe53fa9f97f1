"""The errors a user can mend, and the one place that turns them into an exit status."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


class UserError(Exception):
    """Wrong input of a user's: what was wrong, where, and what to change. Ends the program with status 2.

    ``where`` is a file, ``file:line``, setting or record; ``hint`` says what to do next.
    """

    exit_status = 2

    def __init__(self, what: str, *, where: str | os.PathLike | None = None, hint: str | None = None):
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what if self.where is None else f"{self.where}: {self.what}"]
        if self.hint:
            lines.append(f"  try: {self.hint}")
        return "\n".join(lines)


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, out of range, or at odds with another."""


class DataError(UserError):
    """A data file or record that cannot be used."""


class WeightsError(UserError):
    """A weight folder that is missing, damaged, or not of the chosen model."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM after the state was saved; the message says how to go on. Exit status 130."""


def run_cli(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run ``main(argv)`` and return the exit status: 2 for a :class:`UserError`, without a traceback.

    ``DEBUG=1`` in the environment shows the traceback instead. A full disk is a user's error too: the
    operating system's message already names the file.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        if os.environ.get("DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except Interrupted as stop:
        print(str(stop), file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`| head`): not an error, but nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if os.environ.get("DEBUG") == "1" or error.errno not in _USER_ERRNO:
            raise
        print(f"error: {_describe_os_error(error)}", file=sys.stderr)
        return 2


_USER_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG}


def _describe_os_error(error: OSError) -> str:
    name = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{name}: no space left on the disk; nothing was left under a final name\n  try: free space, or another folder (RUN=...)"
    return f"{name}: {error.strerror}"


def require_file(path: str | os.PathLike, what: str, hint: str | None = None) -> Path:
    """Return ``path`` when it is an existing file, else raise a :class:`UserError` that names it."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{what} not found", where=path, hint=hint)
    if not path.is_file():
        raise UserError(f"{what} must be a file, this is a folder", where=path, hint=hint)
    return path
