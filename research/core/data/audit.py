"""The audit of a prepared dataset: what was read, dropped, cut and supervised; the findings that are errors; the table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research.core.config.schema import DataConfig
from research.core.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

_BAR = 30
_SHOWN = 1500  # characters of the example that are printed


@dataclass
class Report:
    """Everything the audit says; ``to_json`` of it is ``audit.json``.

    ``dropped`` maps a reason to ``[records, where the first one is]``. ``histogram`` lists ``[from, to, documents]``
    in tokens, before truncation. ``splits`` has the counts of ``SplitWriter.counts``. ``example`` is one document as
    ``[text, supervised]`` runs.
    """

    folder: Path
    sources: list[str]
    formats: list[str]
    seq_length: int
    supervise: str
    read: int = 0
    dropped: dict[str, list] = field(default_factory=dict)
    truncated: int = 0
    truncated_tokens: int = 0
    longest: int = 0
    max_id: int = -1
    histogram: list[list[int]] = field(default_factory=list)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    example: list[list[Any]] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def dropped_records(self) -> int:
        return sum(count for count, _ in self.dropped.values())

    @property
    def tokens(self) -> int:
        return sum(split["tokens"] for split in self.splits.values())

    @property
    def supervised(self) -> int:
        return sum(split["supervised"] for split in self.splits.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


class AuditError(DataError):
    """The audit found something that the settings call an error. ``report`` has the audit, to be shown with it."""

    def __init__(self, what: str, *, where: str, hint: str, report: Report):
        super().__init__(what, where=where, hint=hint)
        self.report = report


def check(report: Report, cfg: DataConfig) -> None:
    """Raise :class:`AuditError` for nothing supervised, and for findings over the limits in ``cfg``."""

    def fail(what: str, where: str, hint: str) -> None:
        raise AuditError(what, where=where, hint=hint, report=report)

    if report.splits["train"]["supervised"] == 0:
        reasons = "; ".join(f"{reason}: {n} (first: {where})" for reason, (n, where) in report.dropped.items())
        fail(
            f"no supervised tokens in {report.read} records" + (f"; dropped: {reasons}" if reasons else ""),
            ", ".join(report.sources),
            "records with an assistant's answer, data.supervise=all, or a larger data.seq_length",
        )
    for name, count in (("truncated", report.truncated), ("dropped", report.dropped_records)):
        limit = getattr(cfg, f"max_{name}")
        share = count / max(1, report.read)
        if limit is not None and share > limit:
            hint = f"data.max_{name}={_round_up(share)}" + (
                f" or data.seq_length={1 << max(1, (report.longest - 1).bit_length())}" if name == "truncated" else ""
            )
            first = "".join(f"; {reason}: {n} (first: {where})" for reason, (n, where) in report.dropped.items())
            fail(
                f"{count} of {report.read} records ({share:.2%}) were {name}, at most {limit:.2%} is allowed"
                + (first if name == "dropped" else ""),
                f"data.max_{name}",
                hint,
            )
    share = report.supervised / max(1, report.tokens)
    if cfg.min_supervised is not None and share < cfg.min_supervised:
        fail(
            f"{share:.2%} of the tokens are supervised, at least {cfg.min_supervised:.2%} is asked for",
            "data.min_supervised",
            f"data.min_supervised={int(share * 1000) / 1000} or data.supervise=all",
        )


def _round_up(share: float) -> float:
    return min(1.0, (int(share * 1000) + 1) / 1000)


def print_audit(report: Report, console: Console) -> None:
    """The audit as tables, and the example with its supervised text in colour (in ⟦ ⟧ where there is no colour)."""
    from rich.table import Table
    from rich.text import Text

    def percent(part: int, whole: int) -> str:
        return f"{part / whole:.2%}" if whole else "-"

    table = Table(title="Audit", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    table.add_row("records read", f"{report.read:,}", ", ".join(report.formats))
    table.add_row("records dropped", f"{report.dropped_records:,}", percent(report.dropped_records, report.read))
    for reason, (count, where) in sorted(report.dropped.items(), key=lambda item: -item[1][0]):
        table.add_row(f"  {reason}", f"{count:,}", f"first: {where}")
    table.add_row("records truncated", f"{report.truncated:,}", percent(report.truncated, report.read))
    table.add_row("  tokens cut off", f"{report.truncated_tokens:,}", f"longest record: {report.longest:,} tokens")
    table.add_row("tokens", f"{report.tokens:,}", "")
    table.add_row("  supervised", f"{report.supervised:,}", percent(report.supervised, report.tokens))
    masked = report.tokens - report.supervised
    table.add_row("  masked", f"{masked:,}", percent(masked, report.tokens))
    for name, split in report.splits.items():
        table.add_row(
            f"{name} split",
            f"{split['documents']:,}",
            f"documents in {split['rows']:,} rows of {report.seq_length:,}: {split['density']:.2%} full",
        )
    table.add_row("time", f"{report.seconds:.1f} s", f"{report.read / max(report.seconds, 1e-9):,.0f} records/s")
    console.print(table)
    for note in report.notes:
        console.print(note, markup=False)
    if not report.example:  # nothing was kept
        return

    lengths = Table(title="\nTokens per document", title_justify="left", show_header=False, box=None)
    lengths.add_column(justify="right")
    lengths.add_column(justify="right")
    lengths.add_column()
    most = max((count for _, _, count in report.histogram), default=1)
    for low, high, count in report.histogram:
        lengths.add_row(f"{low:,} - {high:,}", f"{count:,}", "#" * max(1 if count else 0, round(_BAR * count / most)))
    console.print(lengths)

    plain = console.color_system is None
    text = Text("\nOne example, supervised text ")
    text.append("in ⟦ ⟧" if plain else "in green", "" if plain else "bold green")
    text.append(":\n")
    shown = 0
    for piece, supervised in report.example:
        piece = piece[: _SHOWN - shown]
        shown += len(piece)
        if supervised:
            text.append(f"⟦{piece}⟧" if plain else piece, "" if plain else "bold green")
        else:
            text.append(piece, "" if plain else "dim")
        if shown >= _SHOWN:
            text.append(" ...")
            break
    console.print(text, soft_wrap=True)
