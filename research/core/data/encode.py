"""Records -> tokens with their supervision: the part of the preparation that runs in worker processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from research.core.data.json_stream import Record
from research.core.data.messages import NOT_UNICODE, Dropped, Example, to_example
from research.core.data.mindrecord.source import read_document
from research.core.data.readers import TextPart
from research.core.data.sources import Where
from research.core.data.supervise import Rules, kept_length, supervised_mask
from research.core.errors import DataError, UserError

TEXT_FORMATS = ("text", "wikitext")
MINDRECORD_FORMAT = "mindrecord"
BUCKETS = 40  # length histogram: bucket b counts 2^(b-1) .. 2^b - 1 tokens


class Job(NamedTuple):
    """Records of one format that are encoded together; ``split`` is set where the source is of one split only."""

    fmt: str
    split: str | None
    records: list[Record]


@dataclass
class Counts:
    """What the audit adds up. Token counts are before packing."""

    read: int = 0
    dropped: dict[str, list] = field(default_factory=dict)  # reason -> [records, where the first one is]
    truncated: int = 0
    truncated_tokens: int = 0
    longest: int = 0  # tokens of the longest document, before truncation
    max_id: int = -1
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))

    def drop(self, reason: str, where: Where) -> None:
        self.dropped.setdefault(reason, [0, str(where)])[0] += 1

    def measure(self, length: int) -> None:
        """Note the length of one document, before truncation."""
        self.longest = max(self.longest, length)
        self.histogram[min(length.bit_length(), BUCKETS - 1)] += 1

    def add(self, other: Counts) -> None:
        self.read += other.read
        for reason, (count, where) in other.dropped.items():
            self.dropped.setdefault(reason, [0, where])[0] += count
        self.truncated += other.truncated
        self.truncated_tokens += other.truncated_tokens
        self.longest = max(self.longest, other.longest)
        self.max_id = max(self.max_id, other.max_id)
        self.histogram += other.histogram


@dataclass
class Block:
    """Encoded records in the order of the source.

    ``tokens`` holds all of them, ``~id`` where a token is not supervised. ``last`` is None for conversations; for
    text it says which stretches end their document, and a document may run on into the next block.
    """

    split: str | None
    tokens: np.ndarray  # int32
    lengths: list[int]
    ids: list[str | int]
    keys: list[int] | None  # conversations: 64-bit hash of each, for choosing the held-out ones
    last: list[bool] | None
    counts: Counts


def content_key(document: np.ndarray, seed: int) -> int:
    """A 64-bit hash of a document's tokens: equal documents have equal keys, so they fall into the same split."""
    digest = hashlib.blake2b(document, digest_size=8, salt=seed.to_bytes(8, "little", signed=True))
    return int.from_bytes(digest.digest(), "little")


class Encoder:
    """Callable ``Job -> Block``; one copy lives in every worker process."""

    def __init__(
        self, tokenizer: Any, template: Any, rules: Rules, *, system: str | None, allow_special: bool, seed: int
    ):
        self.tokenizer, self.template, self.rules = tokenizer, template, rules
        self.system, self.allow_special, self.seed = system, allow_special, seed

    def __call__(self, job: Job) -> Block:
        if job.fmt == MINDRECORD_FORMAT:
            return self._stored(job)
        return self._text(job) if job.fmt in TEXT_FORMATS else self._conversations(job)

    def _conversations(self, job: Job) -> Block:
        counts = Counts(read=len(job.records))
        examples = []
        for record in job.records:
            try:
                examples.append(to_example(record, job.fmt, self.rules.mode == "mindformers"))
            except Dropped as reason:
                counts.drop(str(reason), record.where)
        flat: list[int] = []
        masks = bytearray()
        lengths, names = [], []
        for example, encoded in zip(examples, self._encode(examples)):
            ids, spans = encoded.ids, encoded.spans
            counts.measure(len(ids))
            mask = supervised_mask(ids, spans, self.rules)
            kept, reason = kept_length(spans, mask, self.rules, example.where)
            if reason:
                counts.drop(reason, example.where)
                continue
            if kept < len(ids):
                counts.truncated += 1
                counts.truncated_tokens += len(ids) - kept
                ids, mask = ids[:kept], mask[:kept]
            flat += ids
            masks += mask
            lengths.append(len(ids))
            names.append(example.id)
        tokens = np.array(flat, np.int32)
        tokens = np.where(np.frombuffer(masks, np.uint8) != 0, tokens, ~tokens)
        return self._block(job, tokens, lengths, names, counts)

    def _stored(self, job: Job) -> Block:
        """Rows of a MindRecord file, whose ids and supervision are in it."""
        counts = Counts(read=len(job.records))
        documents, names = [], []
        for record in job.records:
            tokens = read_document(record, self.rules.seq_length, self.rules.pad_id)
            counts.measure(len(tokens))
            kept, reason = kept_length((), bytearray(tokens >= 0), self.rules, record.where)
            if reason:
                counts.drop(reason, record.where)
                continue
            if kept < len(tokens):
                counts.truncated += 1
                counts.truncated_tokens += len(tokens) - kept
            documents.append(tokens[:kept])
            names.append(record.where.name)
        tokens = np.concatenate(documents) if documents else np.empty(0, np.int32)
        return self._block(job, tokens, [len(document) for document in documents], names, counts)

    def _block(self, job: Job, tokens: np.ndarray, lengths: list[int], names: list[str | int], counts: Counts) -> Block:
        """Whole documents, ``~id`` where not supervised, as a block."""
        counts.max_id = int(np.where(tokens < 0, ~tokens, tokens).max(initial=-1))
        keys, start = [], 0
        for length in lengths:
            keys.append(content_key(tokens[start : start + length], self.seed))
            start += length
        return Block(job.split, tokens, lengths, names, keys, None, counts)

    def _encode(self, examples: Sequence[Example]) -> list[Any]:
        encoded = self._try([example.messages for example in examples], [example.tools for example in examples])
        if isinstance(encoded, UserError):
            for example in examples:  # find the one at fault, for its line
                error = self._try([example.messages], [example.tools])
                if isinstance(error, UserError):
                    raise DataError(error.what, where=example.where, hint=error.hint)
            raise encoded
        if self.rules.mode in ("assistant", "last"):
            for example, one in zip(examples, encoded):
                if one.note:
                    raise DataError(
                        f"the chat template {self.template.name} hides which tokens are the assistant's: {one.note}",
                        where=example.where,
                        hint="data.supervise=all, or model.template=<one of the families' templates>",
                    )
        return encoded

    def _try(self, conversations: list, tools: list) -> list[Any] | UserError:
        try:
            return self.template.encode_batch(
                self.tokenizer, conversations, tools, allow_special=self.allow_special, system=self.system
            )
        except UserError as error:
            return error

    def _text(self, job: Job) -> Block:
        # The MindFormers scripts put all paragraphs of WikiText one behind the other, with nothing between them.
        stream = self.rules.mode == "mindformers" and job.fmt == "wikitext"
        counts = Counts()
        parts: list[TextPart] = []
        names, last = [], []
        for record in job.records:
            part = record.raw
            counts.read += part.last
            text = part.text
            if not text.isascii() and not _is_unicode(text):
                counts.drop(NOT_UNICODE, record.where)
                part = TextPart("", part.last)
            parts.append(part)
            last.append(part.last and not stream)
            names.append(record.where.name)
        allowed = "all" if self.allow_special else ()
        encoded = self.tokenizer.encode_batch([part.text for part in parts], allowed_special=allowed)
        for ids, ends in zip(encoded, last):
            if ends:
                ids.append(self.tokenizer.eos_id)
        flat = [token for ids in encoded for token in ids]
        tokens = np.array(flat, np.int32)
        counts.max_id = int(tokens.max(initial=-1))
        return Block(job.split, tokens, [len(ids) for ids in encoded], names, None, last, counts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
