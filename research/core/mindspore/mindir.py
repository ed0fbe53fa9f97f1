"""An exported model on disk: two folders of graphs, one file per rank, and ``meta.json`` with everything a runner needs.

    mindir_full_checkpoint/rank_0_graph.mindir   prompts -> logits, keys and values
    mindir_inc_checkpoint/rank_0_graph.mindir    one token per row -> logits, keys and values
    .../rank_0_variables/                        beside a graph whose weights are too large for one file
    tokenizer/                                   the vocabulary that belongs to the weights
    meta.json                                    written last

Nothing here imports MindSpore.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from research.core.errors import ConfigError, UserError
from research.core.spec import DecoderSpec, spec_from_hf

META, TOKENIZER = "meta.json", "tokenizer"
FULL, INC = "mindir_full_checkpoint", "mindir_inc_checkpoint"
FORMAT = 1


@dataclass(frozen=True)
class GraphShapes:
    """What is fixed when graphs are exported; the settings are those of ``mindir``.

    ``seq_length``: prompt and answer together. ``dynamic``: fewer rows and shorter prompts than these need no filling.
    """

    seq_length: int
    batch: int = 1
    past: bool = True
    dynamic: bool = False
    paged: bool = False
    block_size: int = 16
    num_blocks: int = 512

    @property
    def blocks_per_row(self) -> int:
        return -(-self.seq_length // self.block_size)

    def check(self, spec: DecoderSpec) -> None:
        """Raise :class:`ConfigError` where these shapes contradict the model or each other."""
        if self.seq_length > spec.usable_length:
            raise ConfigError(
                f"the model is made for {spec.usable_length} positions",
                where=f"mindir.seq_length={self.seq_length}",
                hint=f"mindir.seq_length={spec.usable_length}",
            )
        if not self.paged:
            return
        if not self.past:
            raise ConfigError(
                "paged keys and values are for the incremental graph",
                where="mindir.paged=true mindir.past=false",
                hint="mindir.past=true",
            )
        if self.dynamic:
            raise ConfigError(
                "paged graphs have fixed shapes", where="mindir.paged=true mindir.dynamic=true", hint="one of them"
            )
        needed = self.batch * self.blocks_per_row
        if self.num_blocks < needed:
            raise ConfigError(
                f"{self.num_blocks} blocks of {self.block_size} tokens hold {self.num_blocks * self.block_size} tokens, "
                f"and {self.batch} rows of {self.seq_length} need {needed} blocks",
                where=f"mindir.num_blocks={self.num_blocks}",
                hint=f"mindir.num_blocks={needed}",
            )


@dataclass(frozen=True)
class Port:
    """One input or output of a graph; -1 for a dimension that is open."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Meta:
    """``meta.json``. ``config``: config.json of the model; ``sampling``: its generation_config.json's; ``graphs``: each
    graph's inputs and outputs in order; ``ranks``: tensor-parallel processes, each with its own graph files."""

    model: str
    family: str
    config: dict[str, Any]
    shapes: GraphShapes
    dtype: str
    target: str
    eos_ids: tuple[int, ...]
    sampling: dict[str, float]
    tokenizer: str
    template: str
    template_name: str | None
    system: str | None
    graphs: dict[str, dict[str, list[Port]]]
    ranks: int = 1
    mindspore: str = ""
    weights: str = ""
    format: int = field(default=FORMAT)

    @property
    def spec(self) -> DecoderSpec:
        return spec_from_hf(self.config)

    def text(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"


def graph_file(root: Path, kind: str, rank: int) -> Path:
    """``kind`` is :data:`FULL` or :data:`INC`."""
    return root / kind / f"rank_{rank}_graph.mindir"


def variables_folder(root: Path, kind: str, rank: int) -> Path:
    return root / kind / f"rank_{rank}_variables"


def read_meta(root: Path) -> Meta:
    """Read ``meta.json`` of an export and check that the files it tells of are there. Raises :class:`UserError`."""
    path = root / META
    if not root.is_dir():
        raise UserError("there is no such folder", where=root, hint="the OUTPUT of `make export BACKEND=mindspore`")
    if not path.is_file():
        raise UserError(
            f"no {META}, which `make export BACKEND=mindspore` writes last",
            where=root,
            hint="export again, or the folder that an export wrote",
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != FORMAT:
            raise UserError(f"format {value['format']}, this version reads {FORMAT}", where=path, hint="export again")
        graphs = {
            kind: {
                side: [Port(p["name"], tuple(p["shape"]), p["dtype"]) for p in ports] for side, ports in sides.items()
            }
            for kind, sides in value["graphs"].items()
        }
        shapes = GraphShapes(**value["shapes"])
        meta = Meta(**value | {"graphs": graphs, "shapes": shapes, "eos_ids": tuple(value["eos_ids"])})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as bad:
        raise UserError(f"cannot be read: {bad}", where=path, hint="export again") from None
    for kind in meta.graphs:
        for rank in range(meta.ranks):
            if not graph_file(root, kind, rank).is_file():
                raise UserError("is missing", where=graph_file(root, kind, rank), hint="export again")
    return meta
