"""``auto_trans_ckpt``: a checkpoint of one grid loads on another without a manual step.

As MindFormers documents it: every rank of a run asks for the checkpoint in the run's own grid, given as strategy files
(``output/strategy``); what it then loads is ``output/transformed_checkpoint/<name>/rank_N/checkpoint_N.ckpt``, and
``transform_succeed_rank_N.txt`` or ``transform_failed_rank_N.txt`` tells by which rank it was made. MindFormers lets one
rank per node delete the folders that others are writing; here a lock lets exactly one process do the work, the result
appears whole, only a former transformation of the same checkpoint is ever replaced, and one that is still right is
used again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from research.core.errors import UserError, WeightsError
from research.core.weights.blocks import Stored, crop, index_sources, plain
from research.core.weights.exchange import beside, check_ours, exchange
from research.core.weights.formats.safetensors import MINDSPORE_METADATA
from research.core.weights.opened import TRAINING_STATE, OpenOptions, mindformers_files, some
from research.core.weights.plan import CKPT, SAFETENSORS, Plan, Target, TargetFile
from research.core.weights.rank_folders import Rank, open_ranks, rank_file, rank_folders, read_rank, whole_entries
from research.core.weights.record import file_mark
from research.core.weights.runner import run_plan
from research.core.weights.sharded import kind_of
from research.core.weights.strategy import Strategy, encode_merged, read_strategy

FOLDER = "transformed_checkpoint"
SUCCEEDED, FAILED = "transform_succeed_rank_{rank}.txt", "transform_failed_rank_{rank}.txt"
MARK = "transform.json"  # what a folder was made from; a folder without it is not ours to replace
PREFIX = "checkpoint_"
_FAILURE = re.compile(FAILED.format(rank=r"\d+"))


@dataclass(frozen=True)
class Transformed:
    """Where the ranks' checkpoints lie; ``made``: written now, and not found ready or usable as they were."""

    folder: Path
    made: bool

    def file(self, rank: int) -> Path:
        """What ``rank`` loads."""
        return rank_file(self.folder / f"rank_{rank}")


def auto_transform(
    load_checkpoint: str | os.PathLike,
    target_strategy: str | os.PathLike,
    *,
    output: str | os.PathLike = "output",
    source_strategy: str | os.PathLike | None = None,
    rank: int = 0,
    files: str = CKPT,
    opening: OpenOptions | None = None,
    threads: int = 2,
    log: Callable[[str], None] = lambda line: None,
) -> Transformed:
    """Make ``load_checkpoint`` ready for a run whose parameters lie as ``target_strategy`` says. Call it on every rank.

    ``load_checkpoint``: MindSpore ``rank_N`` folders (of any grid; ``source_strategy`` when their strategy files are not
    beside them), a whole ``.ckpt`` or ``.safetensors`` file, a folder with ``rank_0/``, or a Hugging Face folder, parts
    or a torch distributed checkpoint (then ``opening`` may hold what their layout needs). Training state of MindSpore
    checkpoints goes along. The process that gets the lock first does the work, the others wait and use its result.

    Raises :class:`WeightsError` with the same cause on every rank when the checkpoint and the strategy do not fit.
    """
    source = Path(load_checkpoint).expanduser()
    if not source.exists():
        raise WeightsError(
            "checkpoint not found", where=source, hint="load_checkpoint=<folder with rank_N/, or a file>"
        )
    target = read_strategy(target_strategy)
    work = _Work(source, target, str(target_strategy), source_strategy, files, opening or OpenOptions(), threads, log)
    if work.fits():
        log(f"{source} already lies on the {target.ranks} ranks of this run: loaded as it is")
        return Transformed(source, made=False)
    folder = _folder(Path(output).expanduser() / FOLDER, source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{folder.name}.lock"):
        mark = work.mark()
        if _read_mark(folder) == mark:
            log(f"transformed before: {folder}")
            return Transformed(folder, made=False)
        if not _only_failures(folder):
            check_ours(folder, MARK)
        try:
            _swap_in(folder, work, mark, rank)
        except (UserError, OSError) as error:
            folder.mkdir(exist_ok=True)
            (folder / FAILED.format(rank=rank)).write_text(f"{error}\n", encoding="utf-8")
            raise
    log(f"transformed for {target.ranks} ranks: {folder}")
    return Transformed(folder, made=True)


def _only_failures(folder: Path) -> bool:
    return not folder.exists() or all(_FAILURE.fullmatch(path.name) for path in folder.iterdir())


def _folder(parent: Path, source: Path) -> Path:
    """``<parent>/<name of the checkpoint>``; another name when that is where the checkpoint itself lies."""
    name = source.stem if source.is_file() else source.resolve().name
    while (parent / name).resolve() in (source.resolve(), *source.resolve().parents):
        name += "_transformed"
    return parent / name


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read_mark(folder: Path) -> dict | None:
    try:
        return json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _swap_in(folder: Path, work: _Work, mark: Mapping, rank: int) -> None:
    """Write aside, then exchange: a reader sees the former result or the new one, whole."""
    small = {MARK: (json.dumps(mark, indent=2) + "\n").encode(), SUCCEEDED.format(rank=rank): b""}
    shutil.rmtree(beside(folder), ignore_errors=True)
    try:
        work.write(beside(folder), small)
        exchange(folder)
    finally:
        shutil.rmtree(beside(folder), ignore_errors=True)


@dataclass(frozen=True)
class _Work:
    """One transformation: from where, to what."""

    source: Path
    target: Strategy
    target_name: str
    source_strategy: str | os.PathLike | None
    files: str
    opening: OpenOptions
    threads: int
    log: Callable[[str], None]

    @property
    def is_model(self) -> bool:
        """Whether the source has other names than MindSpore's, so that the model must be known."""
        kind = kind_of(self.source)
        return kind in ("dcp", "parts") or (kind is None and mindformers_files(self.source) is None)

    def fits(self) -> bool:
        """Whether every rank of the source holds already what the target's strategy places on it."""
        if self.is_model or self.source.is_file() or len(rank_folders(self.source)) != self.target.ranks:
            return False
        _, ranks = self.ranks()
        return all(self._fits(number, rank) for number, rank in enumerate(ranks))

    def _fits(self, number: int, rank: Rank) -> bool:
        device = self.target.device(number)
        for name, how in self.target.layouts(number).items():
            if name not in rank.entries:
                if not TRAINING_STATE.fullmatch(name):
                    return False
            elif rank.box(name) != how.box(device, rank.whole_shape(name)):
                return False
        return True

    def ranks(self) -> tuple[Strategy, list[Rank]]:
        if self.source.is_file():
            return Strategy(({},)), [read_rank(self.source, {}, 0)]
        if not rank_folders(self.source):
            return Strategy(({},)), [read_rank(rank_file(self.source), {}, 0)]
        return open_ranks(self.source, self.source_strategy)

    def mark(self) -> dict:
        """Identifies source and target by contents: equal marks mean equal results."""
        patterns = ("*.ckpt", "*.safetensors", "*.bin", "*.distcp", ".metadata", "config.json")
        paths = [self.source] if self.source.is_file() else sorted(p for q in patterns for p in self.source.rglob(q))
        return {
            "version": 1,
            "source": {str(p.relative_to(self.source.parent)): file_mark(p) for p in paths},
            "source_strategy": None if self.is_model else _digest(self.ranks()[0]),
            "target_strategy": _digest(self.target),
            "files": self.files,
        }

    def write(self, folder: Path, small: Mapping[str, bytes]) -> None:
        if self.is_model:
            self._write_model(folder, small)
            return
        _, ranks = self.ranks()
        texts = sorted({name for rank in ranks for name in rank.others})
        if texts:
            self.log(f"left out, for they are no tensors: {some(texts)}")
        plan = transform_plan(ranks, self.target, self.files, self.log)
        run_plan(Plan(plan.files, plan.entries, plan.sources, small), folder, threads=self.threads, log=self.log)

    def _write_model(self, folder: Path, small: Mapping[str, bytes]) -> None:
        from research.core.weights.reshard import ReshardOptions, reshard

        names = {name for table in self.target.stages for name in table}
        concat = self.opening.concat or "none"
        if concat == "none" and any(".w_qkv." in name for name in names):
            raise WeightsError(
                "the run joins q, k and v (w_qkv); in which of the two layouts?",
                where=self.target_name,
                hint="qkv_concat=grouped (r1.5) or stacked (r1.3)",
            )
        tied_head = "copy" if "lm_head.weight" in names else "omit"
        options = ReshardOptions(
            "ranks", strategy=self.target_name, concat=concat, tied_head=tied_head, files=self.files,
            gmm=bool(self.opening.gmm),
        )  # fmt: skip
        reshard(self.source, folder, options, self.opening, extra=small, threads=self.threads, log=self.log)


def _digest(strategy: Strategy) -> str:
    return hashlib.sha256(encode_merged(strategy)).hexdigest()


def transform_plan(
    ranks: Sequence[Rank], target: Strategy, files: str = CKPT, log: Callable[[str], None] = lambda line: None
) -> Plan:
    """From MindSpore ranks to MindSpore ranks, knowing nothing of the model: each parameter by its own two layouts.

    A parameter that the target does not lay out goes whole to every rank when it was whole (step counters); training
    state that was cut is left out; a weight that was cut has no place and is refused.
    """
    whole = whole_entries(ranks)
    placed = {name for table in target.stages for name in table}
    loose = [name for name in whole if name not in placed]
    cut = {name for rank in ranks for name in loose if name in rank.layouts and max(_cuts(rank, name)) > 1}
    homeless = sorted(name for name in cut if not TRAINING_STATE.fullmatch(name))
    if homeless:
        raise WeightsError(
            f"the run's strategy files do not place {len(homeless)} parameters of the checkpoint: {some(homeless)}",
            hint="is this checkpoint of the same model and with the same qkv_concat?",
        )
    if placed and not placed & whole.keys():
        raise WeightsError(
            f"none of the run's {len(placed)} parameters is in the checkpoint; it begins with {some(list(whole), 2)}",
            hint="is this checkpoint of the same model?",
        )
    if cut:
        log(f"left out, for this run has no such state: {some(sorted(cut))}")
    absent = sorted(name for name in placed - whole.keys() if not TRAINING_STATE.fullmatch(name))
    if absent:
        log(f"not in the checkpoint, so left as this run initialises them: {some(absent)}")
    tensors = [((number, name), rank, name) for number, rank in enumerate(ranks) for name in rank.entries]
    sources = index_sources((handle, rank.part(plain(name, whole[name].shape))) for handle, rank, name in tensors)
    entries = {handle: rank.entries[name] for handle, rank, name in tensors}
    out = []
    suffix, metadata = (SAFETENSORS, MINDSPORE_METADATA) if files == SAFETENSORS else (CKPT, {})
    for number in range(target.ranks):
        layouts, device, targets = target.layouts(number), target.device(number), []
        for name, entry in whole.items():
            stored: Stored = plain(name, entry.shape)
            if name in layouts:
                stored = crop(stored, layouts[name].box(device, entry.shape))
            elif name in placed or name in cut:
                continue
            targets.append(Target(stored, entry.dtype, "transform"))
        if files == SAFETENSORS:
            targets.sort(key=lambda item: item.name)
        out.append(TargetFile(f"rank_{number}/{PREFIX}{number}.{suffix}", suffix, tuple(targets), metadata))
    return Plan(out, entries, sources)


def _cuts(rank: Rank, name: str) -> tuple[int, ...]:
    how = rank.layouts[name]
    return (*how.parts(), how.optimizer_parts())
