"""Many low-rank adapters on one decoder, each token of a batch with its own (arXiv 2106.09685, 2310.18547, 2311.03285).

The pass exchanges the linears that loaded adapters change by :class:`SlotLinear`; the weights of all adapters lie
stacked, slot by slot, their ranks padded with zeros to the largest. Before a forward :meth:`AdapterSlots.route` says
which tokens use which slot. Shape letters: N tokens, I in, O out features, R padded rank, S slots.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from research.core import lora as common
from research.core.errors import WeightsError
from research.core.lora import pattern_value, read_adapter_config
from research.core.spec import DecoderSpec
from research.core.torch.decoder import Decoder
from research.core.torch.lora import read_pairs
from research.core.torch.packed_linear import linear
from research.core.torch.tensor_parallel import RowLinear
from research.core.weights.keys import QWEN1_LAYER, parameter_shapes

# Fewer tokens than this in a row with one adapter, on average: one product with all adapters at once is cheaper.
_LONG_RUN = 16
Run = tuple[int, int, int]  # first token, token behind the last, slot


@dataclass(eq=False)
class Routing:
    """Which tokens of one forward use an adapter. ``runs``: those that do, in order, neighbours of one slot joined.

    ``mask_NS`` (None: the runs are taken one by one): 1 where token n uses slot ``first + s``, in the weights' dtype.
    """

    runs: tuple[Run, ...]
    mask_NS: Tensor | None = None
    first: int = 0


def join_runs(rows: Iterable[tuple[int, int]]) -> tuple[Run, ...]:
    """(tokens, slot or 0 for the base) of each row of a flat batch, in its order -> the adapted runs."""
    runs: list[Run] = []
    at = 0
    for tokens, slot in rows:
        if slot and tokens:
            if runs and runs[-1][1:] == (at, slot):
                runs[-1] = (runs[-1][0], at + tokens, slot)
            else:
                runs.append((at, at + tokens, slot))
        at += tokens
    return tuple(runs)


class SlotLinear(nn.Module):
    """A linear with the adapters of all slots: ``base(x)``, and for the rows of slot s ``+ scaling_s x A_s^T B_s^T``.

    Keeps the base's parameter names. ``a`` [S * R, I] and ``b`` [S * R, O] hold the slots 1, 2, .. one behind the other,
    b transposed and times the scaling, so that a range of slots is one contiguous matrix.
    """

    def __init__(self, base: nn.Linear, owner: AdapterSlots):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        # Not as submodules: the parameters' names stay, and the owner is no part of the model.
        self.__dict__["base"], self.__dict__["owner"] = base, owner
        self.rank, self.slots = 0, 0
        self.ranks: dict[int, int] = {}  # slot -> its own rank
        self.a = base.weight.new_zeros(0, base.in_features)
        self.b = base.weight.new_zeros(0, base.out_features)

    def set(self, slot: int, a_RI: Tensor, b_OR: Tensor, scaling: float) -> None:
        """Put an adapter into a slot; the stacks grow where its rank or number asks for it."""
        rank = a_RI.shape[0]
        self._grow(max(self.rank, rank), max(self.slots, slot))
        self.clear(slot)
        begin = (slot - 1) * self.rank
        self.a[begin : begin + rank] = a_RI
        self.b[begin : begin + rank] = b_OR.float().t() * scaling
        self.ranks[slot] = rank

    def clear(self, slot: int) -> None:
        if slot <= self.slots:
            rows = slice((slot - 1) * self.rank, slot * self.rank)
            self.a[rows], self.b[rows] = 0, 0
        self.ranks.pop(slot, None)

    def _grow(self, rank: int, slots: int) -> None:
        if (rank, slots) == (self.rank, self.slots):
            return
        for name in ("a", "b"):
            old = getattr(self, name)
            new = old.new_zeros(slots, rank, old.shape[1])
            new[: self.slots, : self.rank] = old.view(self.slots, self.rank, old.shape[1])
            setattr(self, name, new.view(slots * rank, -1))
        self.rank, self.slots = rank, slots

    def forward(self, x: Tensor) -> Tensor:
        routing = self.owner.routing
        if routing is None:
            return self.base(x)
        rows = x.reshape(-1, self.in_features)
        if not isinstance(self.base, RowLinear):
            out = self.base(x)
            self.add_(rows, out.view(-1, self.out_features), routing)
            return out
        out = self.base.product(x)  # of this rank; the adapter's part goes into the same sum over the ranks
        self.add_(rows, out.view(-1, self.out_features), routing)
        return self.base.reduce(out)

    def add_(self, x_NI: Tensor, out_NO: Tensor, routing: Routing) -> None:
        """Add the adapters' part to ``out_NO`` in place. Rows without an adapter get nothing, or a zero."""
        if routing.mask_NS is None:
            for begin, end, slot in routing.runs:
                if slot in self.ranks:
                    rows = slice((slot - 1) * self.rank, (slot - 1) * self.rank + self.ranks[slot])
                    out_NO[begin:end].addmm_(linear(x_NI[begin:end], self.a[rows]), self.b[rows])
            return
        tokens, width = routing.mask_NS.shape
        width = min(width, self.slots - routing.first + 1)
        if width <= 0:
            return
        rows = slice((routing.first - 1) * self.rank, (routing.first - 1 + width) * self.rank)
        low = linear(x_NI[:tokens], self.a[rows])
        low.view(tokens, width, self.rank).mul_(routing.mask_NS[:, :width, None])
        out_NO[:tokens].addmm_(low, self.b[rows])

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, slots={self.slots}, rank={self.rank}"


@dataclass(frozen=True, eq=False)
class _Change:
    """What an adapter does to one linear: A [rank, in] and B [out, rank] of this rank's part, and the factor."""

    a: Tensor
    b: Tensor
    scaling: float


class AdapterSlots:
    """The adapters of one decoder by slot number (1, 2, ..; 0 is the decoder alone), and the routing of the forward under way.

    ``version`` changes when tensors are exchanged: graphs that were captured before must be captured again. With tensor
    parallelism (:mod:`research.core.torch.tensor_parallel`) every rank keeps its part of each adapter.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.parallel = decoder.parallel
        self.spec: DecoderSpec = decoder.spec if self.parallel is None else self.parallel.whole
        self.layers: dict[str, SlotLinear] = {}
        self.used: set[int] = set()
        self.routing: Routing | None = None
        self.version = 0

    def load(self, slot: int, folder: str | os.PathLike, allow_pickle: bool = False) -> None:
        """Put the adapter of a PEFT folder into ``slot``. Raises :class:`WeightsError` naming the tensor when it was made
        for another model, or changes something that is served unchanged; nothing has been changed then."""
        changes = self._changes(Path(folder).expanduser(), allow_pickle)
        self.clear(slot)
        for name, change in changes.items():
            if name not in self.layers:
                layer = SlotLinear(self.decoder.get_submodule(name), self)
                self.decoder.set_submodule(name, layer.train(self.decoder.training))
                self.layers[name] = layer
            self.layers[name].set(slot, change.a, change.b, change.scaling)
        self.used.add(slot)
        self.version += 1

    def clear(self, slot: int) -> None:
        """Empty a slot; linears that no adapter changes any more are the base's own again."""
        for name, layer in list(self.layers.items()):
            layer.clear(slot)
            if not layer.ranks:
                self.decoder.set_submodule(name, layer.base)
                del self.layers[name]
        self.used.discard(slot)
        self.version += 1

    def route(self, tokens: Sequence[int] = (), slots: Sequence[int] = ()) -> None:
        """Until the next call, forwards run over a flat batch of rows with so many tokens and these slots (0: none);
        tokens behind them (filling) use the base. Without arguments: nobody has an adapter."""
        runs = join_runs(zip(tokens, slots, strict=True))
        if not runs:
            self.routing = None
            return
        adapted = sum(end - begin for begin, end, _ in runs)
        self.routing = Routing(runs)
        if adapted < _LONG_RUN * len(runs) and len(runs) > 1:
            first, last = min(slot for *_, slot in runs), max(slot for *_, slot in runs)
            weight = self.decoder.model.norm.weight
            mask = torch.zeros(sum(tokens), last - first + 1, dtype=weight.dtype)
            for begin, end, slot in runs:
                mask[begin:end, slot - first] = 1
            self.routing = Routing(runs, mask.to(weight.device, non_blocking=True), first)

    def bytes(self) -> int:
        """Memory of all stacks."""
        return sum(t.nbytes for layer in self.layers.values() for t in (layer.a, layer.b))

    # --- reading a PEFT folder ----------------------------------------------------------------------------------

    def _changes(self, folder: Path, allow_pickle: bool) -> dict[str, _Change]:
        cfg = read_adapter_config(folder)
        pairs = read_pairs(folder, allow_pickle)
        modules = _modules(self.spec)
        for name in pairs:
            _check_served(name, modules, folder)
        shapes = {name: {part: tuple(tensor.shape) for part, tensor in pair.items()} for name, pair in pairs.items()}
        common.check_shapes(shapes, {name: sizes for name, (sizes, _) in modules.items()}, cfg, folder)
        changes = {}
        for name, pair in pairs.items():
            rank = pattern_value(cfg.rank_pattern, name, cfg.rank)
            scaling = common.scaling(rank, pattern_value(cfg.alpha_pattern, name, cfg.alpha), cfg.rslora)
            parts = modules[name][1]
            for target, b in zip(parts, pair["B"].split([rows for _, rows in parts.values()])):
                changes[target] = _Change(*self._part(target, pair["A"], b), scaling)
        return changes

    def _part(self, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's columns of A and rows of B."""
        if self.parallel is None:
            return a, b
        rows, columns = self.parallel.box(f"{name}.weight", (b.shape[0], a.shape[1]))
        return a[:, slice(*columns)], b[slice(*rows)]


def _modules(spec: DecoderSpec) -> dict[str, tuple[tuple[int, int], dict[str, tuple[int, int]]]]:
    """Linear that an adapter may name -> its (in, out) features, and the decoder's linears that it is made of, each with
    its (in, out). Qwen v1's adapters may name its own fused ones (``attn.c_attn``)."""
    own = {}
    for name, shape in parameter_shapes(spec).items():
        if len(shape) == 2 and name.endswith(".weight") and name not in ("model.embed_tokens.weight", "lm_head.weight"):
            own[name.removesuffix(".weight")] = (shape[1], shape[0])
    found = {name: (sizes, {name: sizes}) for name, sizes in own.items()}
    if spec.model_type == "qwen":
        for stored, targets in QWEN1_LAYER.items():
            targets = (targets,) if isinstance(targets, str) else targets
            for n in range(spec.layers):
                parts = [target.format(n=n).removesuffix(".weight") for target in targets]
                if stored.endswith(".weight") and parts[0] in own:
                    sizes = (own[parts[0]][0], sum(own[part][1] for part in parts))
                    found[stored.format(n=n).removesuffix(".weight")] = (sizes, {part: own[part] for part in parts})
    return found


def _check_served(name: str, modules: dict, folder: Path) -> None:
    if name in modules:
        return
    unchanged = {
        r"(.+\.)?lm_head": "the output matrix",
        r".+\.(embed_tokens|wte)": "the embedding",
        r".+\.experts\.\d+\..+": "the routed experts, which are stacked matrices here",
    }
    for pattern, what in unchanged.items():
        if re.fullmatch(pattern, name):
            raise WeightsError(
                f"tensor {common.tensor_key(name, 'A')} changes {what}; adapters change linears of the layers only",
                where=folder,
                hint="merge it into the weights with PEFT (merge_and_unload) and serve those",
            )
