"""Exported graphs run: MindSpore Lite where it is installed, MindSpore's own GraphCell everywhere else, behind one interface.

The Lite side follows the library's published Python interface (Context, Model.build_from_file, Tensor, predict).
NOT RUN HERE: the library does not exist for this platform; tests drive it with a stand-in. Shape letters as in
:mod:`research.core.mindspore.export`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from research.core.errors import ConfigError
from research.core.generation.sampler import Sampler
from research.core.generation.sampling import Sampling
from research.core.mindspore.layout import rope_base
from research.core.mindspore.mindir import FULL, INC, Meta, graph_file
from research.core.spec import DecoderSpec


class Graph(Protocol):
    """One exported graph. Inputs are numpy arrays or earlier outputs; outputs stay where they were computed."""

    def __call__(self, inputs: Sequence[Any]) -> list[Any]: ...

    def read(self, output: Any) -> np.ndarray: ...


class Runtime(Protocol):
    """``name`` says which one it is."""

    name: str

    def open(self, meta: Meta, root: Path, rank: int) -> dict[str, Graph]:
        """The graphs of one rank by kind."""


def has_lite() -> bool:
    return importlib.util.find_spec("mindspore_lite") is not None


# --- MindSpore's GraphCell ------------------------------------------------------------------------------------------


class GraphCellRuntime:
    """``threads`` 0: every core."""

    name = "MindSpore GraphCell"

    def __init__(self, device):
        from research.core.mindspore.parallel import World

        World.meet(device)  # graphs of several ranks talk to each other

    def open(self, meta: Meta, root: Path, rank: int) -> dict[str, Graph]:
        return {kind: GraphCellGraph(graph_file(root, kind, rank)) for kind in meta.graphs}


class GraphCellGraph:
    def __init__(self, path: Path):
        import mindspore as ms
        from mindspore import nn

        try:
            self._cell = nn.GraphCell(ms.load(str(path)))
        except (RuntimeError, ValueError, TypeError) as bad:
            raise ConfigError(
                f"is not a graph that this MindSpore ({ms.__version__}) reads: {str(bad).splitlines()[0]}",
                where=path,
                hint="export again with this version",
            ) from None
        self._tensor = ms.Tensor

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        return list(self._cell(*[self._tensor(x) if isinstance(x, np.ndarray) else x for x in inputs]))

    def read(self, output: Any) -> np.ndarray:
        return output.asnumpy()


# --- MindSpore Lite -------------------------------------------------------------------------------------------------

# What the documents give the graph engine.
GE_OPTIONS = {
    "ge.externalWeight": "1",
    "ge.exec.atomicCleanPolicy": "1",
    "ge.event": "notify",
    "ge.exec.staticMemoryPolicy": "2",
    "ge.exec.formatMode": "1",
    "ge.exec.precision_mode": "must_keep_origin_dtype",
}
GRAPH_KERNELS = {
    "opt_level": "2",
    "enable_cce_lib": "true",
    "disable_cce_lib_ops": "MatMul",
    "disable_cluster_ops": "MatMul,Reshape",
}


def lite_ini(meta: Meta, rank_table: str | None = None) -> str:
    """The configuration file of the Lite runtime on Ascend; paged graphs need its graph kernel section."""
    context = {"provider": "ge"}
    if rank_table:
        context["rank_table_file"] = rank_table
    sections = {"ascend_context": context, "ge_session_options": GE_OPTIONS}
    if meta.shapes.paged:
        sections["graph_kernel_param"] = GRAPH_KERNELS
    return "\n".join(
        "\n".join([f"[{name}]", *(f"{key}={value}" for key, value in values.items()), ""])
        for name, values in sections.items()
    )


class LiteRuntime:
    """``configs``: the files for the full and the incremental graph (one for both, or none for the CPU)."""

    name = "MindSpore Lite"

    def __init__(self, target: str, device_id: int, configs: Sequence[Path] = ()):
        self.target, self.device_id, self.configs = target.lower(), device_id, list(configs)

    def open(self, meta: Meta, root: Path, rank: int) -> dict[str, Graph]:
        import mindspore_lite as lite

        context = lite.Context()
        context.target = [self.target]
        if self.target == "ascend":
            context.ascend.device_id = self.device_id
            context.ascend.rank_id = rank
            context.ascend.provider = "ge"
        models = {kind: lite.Model() for kind in meta.graphs}
        if len(models) > 1 and hasattr(lite, "ModelGroup"):  # one copy of the weights for both
            group = lite.ModelGroup(lite.ModelGroupFlag.SHARE_WEIGHT)
            group.add_model(list(models.values()))
        for number, (kind, model) in enumerate(models.items()):
            config = str(self.configs[min(number, len(self.configs) - 1)]) if self.configs else ""
            model.build_from_file(str(graph_file(root, kind, rank)), lite.ModelType.MINDIR, context, config)
        return {kind: LiteGraph(model, lite.Tensor, meta.shapes.dynamic) for kind, model in models.items()}


class LiteGraph:
    def __init__(self, model: Any, tensor: Any, dynamic: bool):
        self._model, self._tensor, self._dynamic = model, tensor, dynamic

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        if self._dynamic:
            self._model.resize(self._model.get_inputs(), [list(x.shape) for x in inputs])
        return self._model.predict([self._tensor(x) if isinstance(x, np.ndarray) else x for x in inputs])

    def read(self, output: Any) -> np.ndarray:
        return output.get_data_to_numpy()


# --- the runner -----------------------------------------------------------------------------------------------------


class LiteCache:
    """Keys and values as the graphs left them. ``lengths`` int32 [B]; ``base`` as the model's; ``ids``: all tokens so far,
    for exports without an incremental graph."""

    def __init__(self, batch: int, length: int):
        self.batch, self.length = batch, length
        self.tensors: list[Any] = []
        self.lengths = np.zeros(batch, np.int32)
        self.base: np.ndarray | None = None
        self.ids: list[list[int]] = []

    @property
    def used(self) -> int:
        return int(self.lengths.max(initial=0))


class LiteRunner:
    """Prefill and decode steps of exported graphs; what :func:`research.core.generation.loop.run_requests` runs."""

    fixed_rows = True

    def __init__(self, meta: Meta, root: Path, runtime: Runtime, rank: int = 0):
        self.meta, self.shapes, self.runtime = meta, meta.shapes, runtime
        self._spec = meta.spec
        self._graphs = runtime.open(meta, root, rank)
        rows = np.arange(self.shapes.batch, dtype=np.int32)[:, None] * self.shapes.blocks_per_row
        # Each row has its own run of blocks for its whole length.
        self._tables = rows + np.arange(self.shapes.blocks_per_row, dtype=np.int32)

    @property
    def spec(self) -> DecoderSpec:
        return self._spec

    @property
    def length_limit(self) -> int:
        """Prompt and answer together may not be longer, in tokens: the graphs' shape."""
        return self.shapes.seq_length

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        yield

    def new_cache(self, batch: int, length: int) -> LiteCache:
        assert batch <= self.shapes.batch and length <= self.shapes.seq_length
        return LiteCache(batch, self.shapes.seq_length)

    def can_extend(self, cache: LiteCache, kept: int, length: int) -> bool:
        return kept == 0  # no graph puts several tokens behind a cache

    def prefill(self, cache: LiteCache, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """-> float32 logits [B, V] after the last token of each prompt."""
        cache.ids = [list(prompt) for prompt in prompts]
        longest = max(len(prompt) for prompt in prompts)
        rows, width = (len(prompts), longest) if self.shapes.dynamic else (self.shapes.batch, self.shapes.seq_length)
        ids, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        cache.lengths = lengths[: len(prompts)].copy()
        if cache.base is None:
            cache.base = rope_base(self._spec, lengths[:, None])
        inputs: list[Any] = [ids, lengths]
        if self.shapes.paged:
            slots = np.full((rows, width), -1, np.int32)
            for row, prompt in enumerate(prompts):
                slots[row, : len(prompt)] = self._slots(row, np.arange(len(prompt)))
            inputs.append(slots.reshape(-1))
        inputs += [] if cache.base is None else [cache.base]
        if self.shapes.paged:
            inputs += [np.zeros(port.shape, port.dtype) for port in self._cache_ports()]
        return self._run(FULL, cache, inputs)

    def step(self, cache: LiteCache, tokens: Sequence[int], greedy: bool = False) -> np.ndarray:
        """One more token in every row -> float32 logits [B, V]."""
        if INC not in self._graphs:
            for row, token in enumerate(tokens):
                cache.ids[row] = [*cache.ids[row], token][: self.shapes.seq_length]
            return self.prefill(cache, cache.ids)
        rows = len(tokens) if self.shapes.dynamic else self.shapes.batch
        ids, positions = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        ids[: len(tokens)] = tokens
        # A row that has ended may stand at the end of its slots; what it computes there is nobody's.
        positions[: len(tokens)] = np.minimum(cache.lengths, self.shapes.seq_length - 1)
        inputs: list[Any] = [ids, positions]
        if self.shapes.paged:
            slots = self._slots(np.arange(rows), positions)
            slots[len(tokens) :] = -1
            inputs += [self._tables, slots]
        inputs += [] if cache.base is None else [cache.base]
        logits_BV = self._run(INC, cache, [*inputs, *cache.tensors])
        cache.lengths = cache.lengths + 1
        return logits_BV

    def finite(self, logits_BV: np.ndarray) -> bool:
        return bool(np.isfinite(logits_BV).all())

    def sampler(self, samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]]) -> Sampler:
        return Sampler(samplings, prompts, self._spec.vocab)

    def _slots(self, row, place: np.ndarray) -> np.ndarray:
        block = self._tables[row, place // self.shapes.block_size]
        return (block * self.shapes.block_size + place % self.shapes.block_size).astype(np.int32)

    def _cache_ports(self):
        return [port for port in self.meta.graphs[FULL]["inputs"] if port.name.startswith(("key_", "value_"))]

    def _run(self, kind: str, cache: LiteCache, inputs: list[Any]) -> np.ndarray:
        graph = self._graphs[kind]
        logits, *cache.tensors = graph(inputs)
        return np.asarray(graph.read(logits), np.float32)[: cache.batch]
