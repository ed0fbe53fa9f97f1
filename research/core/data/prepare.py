"""Preparing a dataset folder: sources -> tokens and labels -> held-out split -> packed rows -> files -> audit.

Everything streams: a chunk of the file, two jobs per worker, the packer's window and the held-out documents are all
that is in memory. The folder depends on the sources and settings only, not on the number of workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from research.core.config.names import did_you_mean
from research.core.config.schema import DataConfig
from research.core.data.audit import Report, check
from research.core.data.dataset import AUDIT, FORMAT, IGNORE, META, check_dataset
from research.core.data.encode import (
    BUCKETS,
    MINDRECORD_FORMAT,
    TEXT_FORMATS,
    Block,
    Counts,
    Encoder,
    Job,
    content_key,
)
from research.core.data.folder import SplitWriter, close_synced, write_json, writing
from research.core.data.holdout import HeldOut
from research.core.data.json_stream import Record
from research.core.data.mindrecord.read import holds_mindrecord
from research.core.data.mindrecord.source import Run, check_fits
from research.core.data.readers import TextPart, read_file
from research.core.data.sources import Where, expand_sources, source_bytes
from research.core.data.supervise import MODES, ON_LONG, Rules
from research.core.data.workers import map_in_order
from research.core.errors import ConfigError, DataError

JOB_RECORDS = 256
JOB_CHARACTERS = 1 << 19
_LOG_SECONDS = 10.0
_FIXED = (
    "supervise",
    "packing",
    "on_long",
    "system",
    "max_records",
    "eval_records",
)  # settings a prepared folder keeps


@dataclass
class Progress:
    """How far the preparation is: ``done`` of ``total`` bytes of the source files read, ``records`` encoded."""

    total: int
    done: int = 0
    records: int = 0


def prepare_dataset(
    cfg: DataConfig,
    tokenizer: Any,
    template: Any,
    folder: str | Path,
    *,
    model_length: int | None,
    vocab_size: int | None,
    family: str | None = None,
    allow_special: bool = False,
    log: Callable[[str], None] = print,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Write ``folder/{train,eval}/``, ``meta.json`` and ``audit.json`` from ``cfg.source``; returns the audit.

    ``model_length`` is the longest sequence the model is made for, ``vocab_size`` its number of embedding rows (None:
    not checked), ``family`` the model's (None: the vocabulary's). While it runs, ``progress`` is called often; without it ``log`` gets a line now and then. Raises :class:`ConfigError` for settings that cannot
    work, :class:`DataError` for data that cannot be used and for audit findings; then nothing is left under
    ``folder`` or ``cfg.dump``.
    """
    folder = Path(folder)
    sources = expand_sources(cfg.source)
    _check_settings(cfg, model_length)
    family = family or tokenizer.family
    rules = Rules(
        seq_length=cfg.seq_length,
        mode=cfg.supervise,
        on_long=cfg.on_long,
        first_generation=family == "qwen",
        pad_id=tokenizer.pad_id,
    )
    encoder = Encoder(tokenizer, template, rules, system=cfg.system, allow_special=allow_special, seed=cfg.seed)
    report = Report(folder, [str(s) for s in sources], [], cfg.seq_length, cfg.supervise)
    fits = Run(cfg.seq_length, family, tokenizer.fingerprint, trusted=cfg.format == MINDRECORD_FORMAT)
    for source in sources:
        if isinstance(source, Path) and holds_mindrecord(source):
            report.notes += check_fits(source, fits)
    began = time.monotonic()
    with writing(folder) as aside, _dump(cfg.dump) as dump:
        collector = _Collector(cfg, tokenizer, aside, vocab_size, dump)
        try:
            last_log = began
            state = Progress(total=source_bytes(sources))
            jobs = _jobs(_records(cfg, sources, report.formats, state))
            with contextlib.closing(map_in_order(encoder, jobs, cfg.workers)) as blocks:
                for block in blocks:
                    collector.take(block)
                    state.records = collector.counts.read
                    if progress is not None:
                        progress(state)
                    elif time.monotonic() - last_log > _LOG_SECONDS:
                        last_log = time.monotonic()
                        log(f"prepared {state.records:,} records ({state.records / (last_log - began):,.0f} records/s)")
            collector.finish(report)
        except BaseException:
            collector.abandon()
            raise
        report.seconds = time.monotonic() - began
        check(report, cfg)
        write_json(aside / AUDIT, report.to_json())
        write_json(aside / META, _meta(cfg, report, tokenizer, template, family, allow_special))
    return report


def open_prepared(
    cfg: DataConfig,
    tokenizer: Any,
    template: Any,
    *,
    model_length: int | None,
    vocab_size: int | None,
    log: Callable[[str], None] = print,
) -> Path:
    """The folder ``cfg.folder``, once it is known to fit: same vocabulary, template and seq_length. Raises DataError.

    ``log`` gets a line for each setting that was another when the folder was made, since it has no effect any more.
    """
    _check_length(cfg.seq_length, model_length)
    meta = check_dataset(
        cfg.folder,
        tokenizer=tokenizer.fingerprint,
        template=template.fingerprint,
        seq_length=cfg.seq_length,
        vocab_size=vocab_size,
    )
    for key in _FIXED:
        made, now = meta["settings"].get(key), getattr(cfg, key)
        if made != now:
            log(f"{cfg.folder} was made with data.{key}={made}; data.{key}={now} has no effect")
    return Path(cfg.folder)


def _meta(
    cfg: DataConfig, report: Report, tokenizer: Any, template: Any, family: str, allow_special: bool
) -> dict[str, Any]:
    formats = set(report.formats)
    ready_made = formats <= {*TEXT_FORMATS, MINDRECORD_FORMAT}  # no template to disagree about
    return {
        "format": FORMAT,
        "seq_length": cfg.seq_length,
        "pad_id": tokenizer.pad_id,
        "max_id": report.max_id,
        "tokenizer": tokenizer.fingerprint,
        "family": family,
        "text_only": formats <= set(TEXT_FORMATS),
        "template": None if ready_made else template.fingerprint,
        "template_name": None if ready_made else template.name,
        "allow_special": allow_special,
        "splits": report.splits,
        "settings": asdict(cfg),
    }


def _check_settings(cfg: DataConfig, model_length: int | None) -> None:
    for key, known in (("supervise", MODES), ("on_long", ON_LONG)):
        value = getattr(cfg, key)
        if value not in known:
            raise ConfigError(f"{value!r} is not known", where=f"data.{key}", hint=did_you_mean(value, known))
    if cfg.seq_length < 2:
        raise ConfigError(f"{cfg.seq_length} is too short to predict anything", where="data.seq_length", hint="512")
    _check_length(cfg.seq_length, model_length)


def _check_length(seq_length: int, model_length: int | None) -> None:
    if model_length is not None and seq_length > model_length:
        raise ConfigError(
            f"{seq_length} is longer than the model's {model_length} positions",
            where="data.seq_length",
            hint=f"data.seq_length={model_length}, or rope scaling in the model's config.json",
        )


# --- Sources -> jobs --------------------------------------------------------------------------------------------


def _records(
    cfg: DataConfig, sources: list[str | Path], formats: list[str], state: Progress
) -> Iterator[tuple[str | None, str, Record]]:
    """``(split, format, record)`` of every source in turn; notes the formats met."""
    left = cfg.max_records
    for source in sources:
        before = state.done
        for split, fmt, records in _open_source(cfg, source, left, state):
            if fmt not in formats:
                formats.append(fmt)
            for record in records:
                yield split, fmt, record
                if left is not None and split != "eval":
                    left -= not isinstance(record.raw, TextPart) or record.raw.last
                    if left == 0:
                        break
        if isinstance(source, Path):
            state.done = before + source.stat().st_size
        if left == 0:
            return


def _open_source(
    cfg: DataConfig, source: str | Path, limit: int | None, state: Progress
) -> Iterator[tuple[str | None, str, Iterator[Record]]]:
    if source == "skills":
        from research.core.data.skills import generate

        count = min(cfg.skills_records, limit or cfg.skills_records)
        held_out = min(cfg.eval_records, int(cfg.eval_fraction * count))
        for split, n in (("train", count), ("eval", held_out)):
            examples = generate(cfg.skills, n, cfg.seed, split)
            yield (
                split,
                "messages",
                (Record(Where(f"skills/{split}", None, number), e, 200) for number, e in enumerate(examples, 1)),
            )
    else:
        before = state.done

        def on_bytes(count: int) -> None:
            state.done = before + count

        mindformers = cfg.supervise == "mindformers"
        fmt, records = read_file(source, cfg.format, cfg.documents, on_bytes, mindformers)
        yield None, fmt, records


def _jobs(records: Iterator[tuple[str | None, str, Record]]) -> Iterator[Job]:
    """Group records: the bounds are fixed, so that the grouping does not depend on the workers."""
    held: list[Record] = []
    kind, size = None, 0
    for split, fmt, record in records:
        if held and ((split, fmt) != kind or len(held) == JOB_RECORDS or size + record.size > JOB_CHARACTERS):
            yield Job(kind[1], kind[0], held)
            held, size = [], 0
        kind = (split, fmt)
        held.append(record)
        size += record.size
    if held:
        yield Job(kind[1], kind[0], held)


# --- Blocks -> files --------------------------------------------------------------------------------------------


class _Collector:
    """Receives encoded blocks in order; chooses the held-out documents, writes both splits and the dump."""

    def __init__(self, cfg: DataConfig, tokenizer: Any, aside: Path, vocab_size: int | None, dump: Any):
        self.cfg, self.tokenizer, self.vocab_size, self.dump = cfg, tokenizer, vocab_size, dump
        self.train = SplitWriter(aside / "train", cfg.seq_length, cfg.packing)
        self.eval = SplitWriter(aside / "eval", cfg.seq_length, cfg.packing)
        self.held_out = HeldOut(cfg.eval_records)
        self.counts = Counts()
        self.example: np.ndarray | None = None
        self._choosable = 0  # documents of sources that have no split of their own
        self._rest: np.ndarray | None = None  # of the text document that runs on into the next part
        self._rest_length = self._rest_piece = 0
        self._rest_id: str | int = ""

    def take(self, block: Block) -> None:
        self.counts.add(block.counts)
        if self.vocab_size is not None and self.counts.max_id >= self.vocab_size:
            raise DataError(
                f"token id {self.counts.max_id} does not exist in the model: it has {self.vocab_size}",
                where=f"vocabulary of family {self.tokenizer.family}",
                hint="the vocabulary must be the model's own: check MODEL and tokenizer=",
            )
        start = 0
        for i, length in enumerate(block.lengths):
            document = block.tokens[start : start + length]
            start += length
            if block.last is None:
                self._document(block.ids[i], document, block.keys[i], block.split)
            else:
                self._text(block.ids[i], document, block.last[i], block.split)

    def _text(self, name: str | int, part: np.ndarray, last: bool, split: str | None) -> None:
        """Cut running text into pieces of seq_length tokens; nothing is lost where parts or pieces meet."""
        if self._rest is None:
            self._rest_id, self._rest_length, self._rest_piece = name, 0, 0
        else:
            part = np.concatenate((self._rest, part))
        width, start = self.cfg.seq_length, 0
        while len(part) - start >= width or (last and start < len(part)):
            piece = part[start : start + width].copy()
            start += len(piece)
            self._rest_length += len(piece)
            if piece[0] >= 0:
                piece[0] = ~piece[0]  # nothing precedes it
            name = self._rest_id if self._rest_piece == 0 else f"{self._rest_id}#{self._rest_piece}"
            self._rest_piece += 1
            self._document(name, piece, content_key(piece, self.cfg.seed), split)
        self._rest = None if last else part[start:]
        if last:
            self.counts.measure(self._rest_length)

    def _document(self, name: str | int, document: np.ndarray, key: int, split: str | None) -> None:
        if self.example is None and document.max() >= 0:
            self.example = document.copy()
        if self.dump is not None:
            ids, labels = np.where(document < 0, ~document, document), np.where(document < 0, IGNORE, document)
            line = {"id": name, "input_ids": ids.tolist(), "labels": labels.tolist()}
            self.dump.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        if split is not None:
            (self.train if split == "train" else self.eval).add(document)
            return
        self._choosable += 1
        for freed in self.held_out.offer(key, document):
            self.train.add(freed)

    def finish(self, report: Report) -> None:
        """Decide the held-out documents, complete the files, fill in the report."""
        if self._rest is not None:
            self._text(self._rest_id, np.empty(0, np.int32), True, None)
        held, trained = self.held_out.finish(int(self.cfg.eval_fraction * self._choosable))
        for document in trained:
            self.train.add(document)
        for document in held:
            self.eval.add(document)
        self.train.close()
        self.eval.close()
        counts = self.counts
        report.read, report.dropped = counts.read, counts.dropped
        report.truncated, report.truncated_tokens = counts.truncated, counts.truncated_tokens
        report.longest, report.max_id = counts.longest, counts.max_id
        report.histogram = _histogram(counts.histogram)
        report.splits = {"train": self.train.counts(), "eval": self.eval.counts()}
        report.example = _runs(self.example, self.tokenizer) if self.example is not None else []
        if not self.eval.documents and self.cfg.eval_records:
            report.notes.append(
                f"no held-out split: {self.cfg.eval_fraction:.0%} of {self._choosable} documents is less than one"
                " (data.eval_fraction)"
            )

    def abandon(self) -> None:
        self.train.abandon()
        self.eval.abandon()


def _histogram(buckets: np.ndarray) -> list[list[int]]:
    used = np.flatnonzero(buckets)
    if not len(used):
        return []
    return [
        [1 << (b - 1) if b else 0, (1 << b) - 1 if b < BUCKETS - 1 else 1 << 62, int(buckets[b])]
        for b in range(used[0], used[-1] + 1)
    ]


def _runs(document: np.ndarray, tokenizer: Any) -> list[list[Any]]:
    """A document as ``[text, supervised]`` runs."""
    supervised = document >= 0
    ids = np.where(supervised, document, ~document)
    edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(ids)]
    return [[tokenizer.decode(ids[a:b].tolist()), bool(supervised[a])] for a, b in pairwise(edges)]


@contextlib.contextmanager
def _dump(path: str | None) -> Iterator[Any]:
    """A file that takes the name ``path`` when the block ends without an exception; None for no dump."""
    if path is None:
        yield None
        return
    final = Path(path).expanduser()
    aside = final.with_name(f".{final.name}.{os.getpid()}.partial")
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(aside, "wb", buffering=1 << 20) as file:
            yield file
            close_synced(file)
        os.replace(aside, final)
    finally:
        aside.unlink(missing_ok=True)
