"""MindSpore's ``rank_N`` folders and the strategy files beside them; nothing about models is known here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from research.core.errors import WeightsError
from research.core.weights.blocks import Box, Stored, crop
from research.core.weights.formats import mindspore, safetensors
from research.core.weights.strategy import Layout, Strategy, read_strategy
from research.core.weights.tensors import Entry

_RANK = re.compile(r"rank_(\d+)")


@dataclass(frozen=True)
class Rank:
    """One rank's checkpoint: its file, its tensors, and how each is cut. ``others``: values in it that are no tensors."""

    file: Path
    entries: Mapping[str, Entry]
    layouts: Mapping[str, Layout]
    device: int
    others: tuple[str, ...] = ()

    def whole_shape(self, name: str) -> tuple[int, ...]:
        how, shape = self.layouts.get(name), self.entries[name].shape
        return shape if how is None else how.full_shape(shape)

    def box(self, name: str) -> Box:
        """The part of the whole tensor that this rank holds; parameters without a layout (counters) are whole."""
        how, shape = self.layouts.get(name), self.whole_shape(name)
        return tuple((0, extent) for extent in shape) if how is None else how.box(self.device, shape)

    def part(self, whole: Stored) -> Stored:
        """The blocks of this rank's shard of a whole tensor."""
        how = self.layouts.get(whole.name)
        return whole if how is None else crop(whole, how.box(self.device, whole.shape))


def rank_folders(folder: Path) -> dict[int, Path]:
    """Rank -> its ``rank_N`` folder, in order."""
    found = {int(m[1]): path for path in folder.iterdir() if path.is_dir() and (m := _RANK.fullmatch(path.name))}
    return dict(sorted(found.items()))


def rank_file(folder: Path) -> Path:
    """The checkpoint of one rank: of several the last by name, as MindFormers takes it."""
    for pattern in ("*.ckpt", "*.safetensors"):
        files = sorted(folder.glob(pattern))
        if files:
            return files[-1]
    raise WeightsError("no .ckpt and no .safetensors file here", where=folder)


def read_rank(path: Path, layouts: Mapping[str, Layout], device: int) -> Rank:
    """A rank from its file; raises :class:`WeightsError` for a damaged one."""
    if path.suffix == ".safetensors":
        return Rank(path, safetensors.read_entries(path), layouts, device)
    entries, others = mindspore.read_entries(path)
    return Rank(path, entries, layouts, device, tuple(others))


def find_strategy(folder: Path) -> Path | None:
    """Strategy files that belong to rank folders: ``strategy/`` inside, or beside them in MindFormers' ``output/``."""
    for place in (folder / "strategy", folder.parent / "strategy", folder.parent.parent / "strategy"):
        if place.is_dir() and any(place.glob("*ckpt_strategy*")):
            return place
    return None


def open_ranks(folder: Path, strategy: str | Path | None = None) -> tuple[Strategy, list[Rank]]:
    """The ranks of a checkpoint, with the strategy files given or found; one rank needs none.

    Raises :class:`WeightsError` when ranks are missing, or nothing says how several of them are cut.
    """
    folders = rank_folders(folder)
    if not folders:
        raise WeightsError("no rank_N folder here", where=folder)
    place = Path(strategy).expanduser() if strategy else find_strategy(folder)
    if place is None:
        if len(folders) > 1:
            raise WeightsError(
                f"{len(folders)} ranks without strategy files: nothing says how they are cut",
                where=folder,
                hint="reshard.strategy=<folder with ckpt_strategy_rank_N.ckpt> (src_strategy_path_or_dir)",
            )
        cut = Strategy(({},))
    else:
        cut = read_strategy(place)
    absent = [rank for rank in range(cut.ranks) if rank not in folders]
    if absent:
        raise WeightsError(
            f"the strategy files are for {cut.ranks} ranks; rank_{absent[0]} is missing",
            where=folder,
            hint="reshard.strategy=<the strategy files of this checkpoint>",
        )
    if len(folders) > cut.ranks:
        raise WeightsError(
            f"{len(folders)} ranks here, the strategy files are for {cut.ranks}",
            where=folder,
            hint="reshard.strategy=<the strategy files of this checkpoint>",
        )
    ranks = [read_rank(rank_file(folders[n]), cut.layouts(n), cut.device(n)) for n in range(cut.ranks)]
    return cut, ranks


def whole_entries(ranks: Sequence[Rank]) -> dict[str, Entry]:
    """Name -> dtype and whole shape (no bytes) of every tensor of the checkpoint; ranks that contradict are refused."""
    whole: dict[str, Entry] = {}
    for number, rank in enumerate(ranks):
        for name, entry in rank.entries.items():
            found = Entry(name, entry.dtype, rank.whole_shape(name), ())
            known = whole.setdefault(name, found)
            if (known.dtype, known.shape) != (found.dtype, found.shape):
                raise WeightsError(
                    f"rank {number} holds a part of {name} of {found.dtype}{list(found.shape)}, "
                    f"others of {known.dtype}{list(known.shape)}",
                    where=rank.file,
                    hint="do the strategy files belong to this checkpoint?",
                )
    for number, rank in enumerate(ranks):
        if rank.layouts and not rank.layouts.keys() & rank.entries.keys():
            raise WeightsError(
                f"none of the {len(rank.layouts)} parameters that the strategy files describe is in rank {number}",
                where=rank.file,
                hint="reshard.strategy=<the strategy files of this checkpoint>",
            )
    return whole
