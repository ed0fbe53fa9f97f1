"""From ``data.source`` to files, and from files to text: globs, gzip, UTF-8, line ends."""

from __future__ import annotations

import codecs
import glob
import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from research.core.config.names import did_you_mean
from research.core.errors import DataError

BUILTIN = ("skills",)
SUFFIXES = (".json", ".jsonl", ".parquet", ".txt", ".tokens", ".raw", ".mindrecord")
MINDRECORD = re.compile(r".+\.mindrecord\d*")  # the files of a set are numbered
CHUNK = 1 << 20
OnBytes = Callable[[int], None]
RECORD_LIMIT = 8 << 20  # characters; a record larger than this is no training record, and would not fit in memory


class Where(NamedTuple):
    """Where a record comes from. ``line`` is the line on which it starts, ``record`` counts from 1 within the file."""

    file: str
    line: int | None
    record: int

    @property
    def name(self) -> str:
        """A name for the record where it has none: the file's, and its number."""
        return f"{self.file.rsplit('/', 1)[-1].split('.', 1)[0]}-{self.record}"

    def __str__(self) -> str:
        return f"{self.file}, record {self.record}" if self.line is None else f"{self.file}:{self.line}"


def expand_sources(source: str) -> list[str | Path]:
    """Built-in names and existing files of a comma-separated list of names, files, folders and globs.

    Files of a folder or glob come in sorted order. One file of a MindRecord set, or the name they share, stands for the
    whole set. Raises :class:`DataError` for what matches nothing, and for a MindRecord set with files missing.
    """
    found: list[str | Path] = []
    for item in (part.strip() for part in source.split(",")):
        if not item:
            continue
        path = Path(item).expanduser()
        if item in BUILTIN:
            found.append(item)
        elif path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and _has_known_suffix(p))
            if not files:
                raise DataError("no data files in this folder", where=path, hint="files of type " + " ".join(SUFFIXES))
            found.extend(files)
        elif _is_index(path):
            raise DataError("this is the index of a MindRecord file", where=path, hint=str(path.with_suffix("")))
        elif path.is_file():
            found.append(path)
        elif MINDRECORD.fullmatch(path.name) and path.with_name(f"{path.name}0").is_file():
            found.append(path.with_name(f"{path.name}0"))
        elif glob.has_magic(item):
            names = glob.glob(str(path), recursive=True)
            files = sorted(Path(p) for p in names if os.path.isfile(p) and not _is_index(Path(p)))
            if not files:
                raise DataError("no file matches this pattern", where=item)
            found.extend(files)
        else:
            raise DataError("data source not found", where=item, hint=_suggest(path))
    if not found:
        raise DataError("no data source given", where="data.source", hint="DATA=<file, folder or glob> or DATA=skills")
    return _whole_sets(found)


def _whole_sets(found: list[str | Path]) -> list[str | Path]:
    """``found`` with every MindRecord file replaced by all files of its set, each set once."""
    from research.core.data.mindrecord.source import complete_set  # which reads what this module finds

    result: list[str | Path] = []
    seen: set[Path] = set()
    for source in found:
        if not (isinstance(source, Path) and MINDRECORD.fullmatch(source.name)):
            result.append(source)
        elif source.resolve() not in seen:
            files = complete_set(source)
            seen.update(path.resolve() for path in files)
            result.extend(files)
    return result


def source_bytes(sources: list[str | Path]) -> int:
    """Bytes of all files among ``sources``; a built-in set has none."""
    return sum(source.stat().st_size for source in sources if isinstance(source, Path))


def _has_known_suffix(path: Path) -> bool:
    name = path.name.removesuffix(".gz")
    return not path.name.startswith(".") and (name.endswith(SUFFIXES) or MINDRECORD.fullmatch(path.name) is not None)


def _is_index(path: Path) -> bool:
    """Whether this is the index that lies beside a MindRecord file."""
    return path.suffix == ".db" and MINDRECORD.fullmatch(path.stem) is not None


def _suggest(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    if names and path.name:
        return did_you_mean(path.name, names[:200]) if len(names) <= 200 else f"look in {folder}"
    return "a file, a folder, a glob such as 'data/*.jsonl', or the built-in name " + " ".join(BUILTIN)


def open_bytes(path: Path):
    """The file's bytes, unpacked when it is gzip (known by its first bytes, not by its name)."""
    stream = open(path, "rb")  # noqa: SIM115
    magic = stream.read(2)
    stream.seek(0)
    return gzip.GzipFile(fileobj=stream, mode="rb") if magic == b"\x1f\x8b" else stream


def text_chunks(path: Path, on_bytes: OnBytes | None = None) -> Iterator[str]:
    """The file's text in pieces of about 1 MiB, a byte order mark removed, ``\\r\\n`` and ``\\r`` made ``\\n``.

    ``on_bytes`` is told how many bytes of the file, packed as it is, have been read. Raises :class:`DataError` for
    damaged gzip and, with the line, for bytes that are not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    held = ""  # a \r at the end of a piece may be half of a \r\n
    with open_bytes(path) as stream:
        while True:
            try:
                block = stream.read(CHUNK)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"damaged gzip file: {error}", where=path) from None
            if on_bytes is not None:
                on_bytes(getattr(stream, "fileobj", stream).tell())
            try:
                text = held + decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                byte = error.object[error.start]
                raise DataError(
                    f"not UTF-8: byte 0x{byte:02x}",
                    where=f"{path}:{line}",
                    hint=f"convert it first, for example `iconv -f gb18030 -t utf-8 {path.name}`",
                ) from None
            held = ""
            if "\r" in text:
                if text.endswith("\r") and block:
                    text, held = text[:-1], "\r"
                text = text.replace("\r\n", "\n").replace("\r", "\n")
            line += text.count("\n")
            if text:
                yield text
            if not block:
                return


def text_lines(path: Path, on_bytes: OnBytes | None = None) -> Iterator[tuple[int, str]]:
    """``(line number, line with its line end)``; a line above CHUNK comes in pieces, cut at a space where it has one."""
    number, rest = 1, ""
    for chunk in text_chunks(path, on_bytes):
        lines = (rest + chunk).split("\n")
        rest = lines.pop()
        for line in lines:
            yield number, line + "\n"
            number += 1
        if len(rest) > CHUNK:
            cut = rest.rfind(" ")
            cut = cut if cut > 0 else len(rest)
            yield number, rest[:cut]
            rest = rest[cut:]
    if rest:
        yield number, rest
