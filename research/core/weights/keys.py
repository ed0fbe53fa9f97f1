"""Key tables: how a checkpoint's tensor names and blocks map to the decoder's parameters, as data used both ways.

In memory every family has Hugging Face's Qwen2 names, with the experts of a mixture stacked. A stored tensor is one
in-memory parameter, rows of several (Qwen v1's fused ``c_attn`` holds q, k, v), or one expert's half of a stacked one.
All three are the same relation, a :class:`Piece`: a block of rows here equals a block of rows there.

Qwen v1's trap: it computes ``w1(x) * silu(w2(x))``, so its gate is ``w2`` and its ``w1`` is our ``up_proj``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from research.core.spec import DecoderSpec

# Stored beside the weights by some writers, recomputed here, and therefore passed over.
IGNORED = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(masked_bias|bias))$")

# --- tables: stored name -> in-memory name(s); {n} is the layer, {e} the expert ----------------------------------

QWEN1_TOP = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
QWEN1_LAYER = {
    "transformer.h.{n}.ln_1.weight": "model.layers.{n}.input_layernorm.weight",
    "transformer.h.{n}.ln_2.weight": "model.layers.{n}.post_attention_layernorm.weight",
    # Fused: the rows of q, then of k, then of v.
    "transformer.h.{n}.attn.c_attn.weight": (
        "model.layers.{n}.self_attn.q_proj.weight",
        "model.layers.{n}.self_attn.k_proj.weight",
        "model.layers.{n}.self_attn.v_proj.weight",
    ),
    "transformer.h.{n}.attn.c_attn.bias": (
        "model.layers.{n}.self_attn.q_proj.bias",
        "model.layers.{n}.self_attn.k_proj.bias",
        "model.layers.{n}.self_attn.v_proj.bias",
    ),
    "transformer.h.{n}.attn.c_proj.weight": "model.layers.{n}.self_attn.o_proj.weight",
    "transformer.h.{n}.mlp.w1.weight": "model.layers.{n}.mlp.up_proj.weight",
    "transformer.h.{n}.mlp.w2.weight": "model.layers.{n}.mlp.gate_proj.weight",
    "transformer.h.{n}.mlp.c_proj.weight": "model.layers.{n}.mlp.down_proj.weight",
}
# One expert's matrices in the stacked parameters: (parameter, which part of its rows).
MOE_EXPERT = {
    "model.layers.{n}.mlp.experts.{e}.gate_proj.weight": ("model.layers.{n}.mlp.experts.gate_up_proj", 0),
    "model.layers.{n}.mlp.experts.{e}.up_proj.weight": ("model.layers.{n}.mlp.experts.gate_up_proj", 1),
    "model.layers.{n}.mlp.experts.{e}.down_proj.weight": ("model.layers.{n}.mlp.experts.down_proj", 0),
}


# --- shapes of the in-memory parameters ---------------------------------------------------------------------------


def parameter_shapes(spec: DecoderSpec, head: bool = True) -> dict[str, tuple[int, ...]]:
    """Shape of every in-memory parameter, in module order; a tied head (one tensor with the embedding) is left out."""
    hidden, q, kv = spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab, hidden)}
    for n in range(spec.layers):
        layer = f"model.layers.{n}."
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            shapes[f"{layer}self_attn.{name}.weight"] = (rows, hidden)
            if spec.qkv_bias:
                shapes[f"{layer}self_attn.{name}.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, q)
        if spec.is_sparse(n):
            moe = spec.moe
            shapes[f"{layer}mlp.gate.weight"] = (moe.experts, hidden)
            shapes[f"{layer}mlp.experts.gate_up_proj"] = (moe.experts, 2 * moe.expert_ffn, hidden)
            shapes[f"{layer}mlp.experts.down_proj"] = (moe.experts, hidden, moe.expert_ffn)
            shapes |= _feed_forward(f"{layer}mlp.shared_expert.", hidden, moe.shared_ffn)
            shapes[f"{layer}mlp.shared_expert_gate.weight"] = (1, hidden)
        else:
            shapes |= _feed_forward(f"{layer}mlp.", hidden, spec.ffn)
        shapes[f"{layer}input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if head and not spec.tied:
        shapes["lm_head.weight"] = (spec.vocab, hidden)
    return shapes


def _feed_forward(prefix: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (ffn, hidden),
        f"{prefix}up_proj.weight": (ffn, hidden),
        f"{prefix}down_proj.weight": (hidden, ffn),
    }


# --- the relation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """``stored[rows_stored] == parameter[expert][rows_parameter]``; row ranges are (start, stop)."""

    stored: str
    rows_stored: tuple[int, int]
    parameter: str
    rows_parameter: tuple[int, int]
    expert: int | None = None


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint folder: its name, its shape, and the pieces of parameters that make it up."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def stored_tensors(spec: DecoderSpec, head: bool = True, stacked_experts: bool = False) -> list[StoredTensor]:
    """Every tensor of the Hugging Face folder of ``spec``, in module order.

    ``stacked_experts``: the folder keeps the experts stacked as in memory instead of one tensor each.
    """
    shapes = parameter_shapes(spec, head)
    if spec.model_type == "qwen":
        return _from_table(shapes, spec, head)
    out = []
    for name, shape in shapes.items():
        if ".mlp.experts." in name and not stacked_experts:
            out.extend(_expert_tensors(name, shape))
        else:
            out.append(StoredTensor(name, shape, (Piece(name, (0, shape[0]), name, (0, shape[0])),)))
    return out


def _from_table(shapes: dict[str, tuple[int, ...]], spec: DecoderSpec, head: bool) -> list[StoredTensor]:
    rows = [(name, target) for name, target in QWEN1_TOP.items() if head or name != "lm_head.weight"]
    for n in range(spec.layers):
        for name, target in QWEN1_LAYER.items():
            targets = (target,) if isinstance(target, str) else target
            rows.append((name.format(n=n), tuple(t.format(n=n) for t in targets)))
    out = []
    for name, target in rows:
        targets = (target,) if isinstance(target, str) else target
        if targets[0] not in shapes:  # a tied head, or biases of a model without them
            continue
        pieces, begin = [], 0
        for parameter in targets:
            height = shapes[parameter][0]
            pieces.append(Piece(name, (begin, begin + height), parameter, (0, height)))
            begin += height
        out.append(StoredTensor(name, (begin, *shapes[targets[0]][1:]), tuple(pieces)))
    return out


def _expert_tensors(parameter: str, shape: tuple[int, ...]) -> list[StoredTensor]:
    experts, rows, width = shape
    layer = re.match(r"model\.layers\.(\d+)\.", parameter).group(1)
    parts = [(stored, part) for stored, (name, part) in MOE_EXPERT.items() if name.format(n=layer) == parameter]
    height = rows // len(parts)
    out = []
    for expert in range(experts):
        for stored, part in parts:
            name = stored.format(n=layer, e=expert)
            piece = Piece(name, (0, height), parameter, (part * height, (part + 1) * height), expert)
            out.append(StoredTensor(name, (height, width), (piece,)))
    return out
