"""A decoder's prefill and decode step as MINDIR graphs of fixed shape, keys and values as inputs and outputs.

Shape letters: B rows, S sequence length, K kv heads, D head_dim, P blocks, Z tokens of a block, M blocks of a row.
The cells are those of :mod:`research.core.mindspore.decode`, made of operators that every MINDIR runtime has (on Ascend:
the fused ones), never of this repository's CPU kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from research.core.mindspore.decode import DecodeStep, PagedPrefill, PagedStep, Prefill
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.mindir import FULL, INC, GraphShapes, Port, graph_file, variables_folder

OPEN = -1
_MINDSPORE = {"int32": ms.int32, "float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}


def export_graphs(
    decoder: Decoder, shapes: GraphShapes, root: Path, rank: int = 0, log=lambda line: None
) -> dict[str, dict[str, list[Port]]]:
    """Write this rank's graphs under ``root``; -> each graph's inputs and outputs, for meta.json.

    ``decoder`` must not have CPU kernels (``kernels="native"``). Raises :class:`ConfigError` for impossible shapes.
    """
    assert decoder.kernels != "native", "a MINDIR may not name a library of this machine"
    shapes.check(decoder.spec)
    decoder.set_train(False)
    ports = graph_ports(decoder, shapes)
    cells: dict[str, nn.Cell] = {FULL: PagedPrefill(decoder) if shapes.paged else Prefill(decoder, shapes.seq_length)}
    if shapes.past:
        cells[INC] = PagedStep(decoder) if shapes.paged else DecodeStep(decoder)
    for kind, cell in cells.items():
        write_graph(cell, ports[kind]["inputs"], root, kind, rank)
        log(f"{graph_file(root, kind, rank).relative_to(root)}")
    return ports


def graph_ports(decoder: Decoder, shapes: GraphShapes) -> dict[str, dict[str, list[Port]]]:
    """Inputs and outputs of the graphs of one rank, in order."""
    spec, dtype = decoder.spec, str(decoder.dtype).lower()
    kv_heads = decoder.model.layers[0].self_attn.kv_heads  # this rank's
    batch = OPEN if shapes.dynamic else shapes.batch
    width = OPEN if shapes.dynamic else shapes.seq_length
    if shapes.paged:
        cache = (shapes.num_blocks, shapes.block_size, kv_heads, spec.head_dim)
    else:
        cache = (batch, kv_heads, shapes.seq_length, spec.head_dim)
    caches = [Port(f"{kind}_{layer}", cache, dtype) for layer in range(spec.layers) for kind in ("key", "value")]
    base = [Port("rope_base", (batch, 1), "float32")] if spec.dynamic_ntk else []
    logits = Port("logits", (batch, spec.vocab), "float32")
    full = [Port("input_ids", (batch, width), "int32"), Port("lengths", (batch,), "int32")]
    inc = [Port("tokens", (batch,), "int32"), Port("positions", (batch,), "int32")]
    if shapes.paged:
        full += [Port("slot_mapping", (batch * width,), "int32"), *base, *caches]
        inc += [Port("block_tables", (batch, shapes.blocks_per_row), "int32"), Port("slot_mapping", (batch,), "int32")]
    else:
        full += base
    ports = {FULL: {"inputs": full, "outputs": [logits, *caches]}}
    if shapes.past:
        ports[INC] = {"inputs": [*inc, *base, *caches], "outputs": [logits, *caches]}
    return ports


def write_graph(cell: nn.Cell, inputs: Sequence[Port], root: Path, kind: str, rank: int) -> None:
    """Export one Cell as ``rank_N_graph.mindir``; MindSpore itself puts the weights of large ones beside it."""
    (root / kind).mkdir(parents=True, exist_ok=True)
    target = graph_file(root, kind, rank)
    ms.export(
        cell, *[example(port) for port in inputs], file_name=str(root / kind / f"rank_{rank}"), file_format="MINDIR"
    )
    whole = root / kind / f"rank_{rank}.mindir"
    if whole.is_file():
        whole.rename(target)
    target.chmod(0o644)
    variables = variables_folder(root, kind, rank)
    if variables.is_dir():
        variables.chmod(0o755)
        for file in variables.iterdir():
            file.chmod(0o644)


def example(port: Port) -> Tensor:
    """What a graph is traced with."""
    if OPEN in port.shape:
        return Tensor(shape=[None if size == OPEN else size for size in port.shape], dtype=_MINDSPORE[port.dtype])
    if port.dtype == "int32":
        # lengths of at least one token, slots and blocks that exist
        return Tensor(np.ones(port.shape, np.int32) if port.name == "lengths" else np.zeros(port.shape, np.int32))
    return Tensor(np.ones(port.shape, np.float32), _MINDSPORE[port.dtype])
