"""MindFormers' checkpoint layouts as blocks: the keys of Qwen v1, of its llama (Qwen1.5, Qwen2, Qwen2.5) and of its MoE.

``qkv_concat`` has two incompatible layouts under one key name, with nothing in the file that tells them apart:

- ``stacked`` (MindFormers r1.3): ``w_qkv`` holds the rows of q, then of k, then of v; ``w_gate_hidden`` gate, then up.
- ``grouped`` (r1.5, as in Megatron): for each kv head the rows of its q heads, its k and its v; gate and up rows
  alternate. The mixture-of-experts models concatenate only q, k and v, the experts stay apart.

The traps of the tables: Qwen v1's gate (Hugging Face's ``w2``) is MindFormers' ``w3`` and its ``w1`` is ``w1``, while the
llama keys put the gate in ``w1``; either reading loads into the other without a complaint.
"""

from __future__ import annotations

from collections.abc import Iterable

from research.core.spec import DecoderSpec
from research.core.weights.blocks import Block, Stored, full_box, logical_shapes, whole_block

CONCAT = ("none", "stacked", "grouped")
ROUTED = "feed_forward.routed_experts.ffn."

# --- tables: MindFormers' name -> logical name (Hugging Face's Qwen2 names for every family) ----------------------

QWEN1_TOP = {
    "transformer.wte.embedding_weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
QWEN1_FEED_FORWARD = {"w1": "up_proj", "w2": "down_proj", "w3": "gate_proj"}

LLAMA_TOP = {
    "model.tok_embeddings.embedding_weight": "model.embed_tokens.weight",
    "model.norm_out.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
LLAMA_FEED_FORWARD = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
SPARSE = {
    "feed_forward.routed_experts.router.dense.weight": "mlp.gate.weight",
    "feed_forward.shared_experts_gate.weight": "mlp.shared_expert_gate.weight",
    "feed_forward.shared_experts.w1.weight": "mlp.shared_expert.gate_proj.weight",
    "feed_forward.shared_experts.w2.weight": "mlp.shared_expert.down_proj.weight",
    "feed_forward.shared_experts.w3.weight": "mlp.shared_expert.up_proj.weight",
}


def layer_prefix(spec: DecoderSpec) -> str:
    """``{n}`` stands for the layer."""
    return "transformer.layers.{n}." if spec.model_type == "qwen" else "model.layers.{n}."


def embedding_name(spec: DecoderSpec) -> str:
    return next(iter(QWEN1_TOP if spec.model_type == "qwen" else LLAMA_TOP))


def feed_forward_names(spec: DecoderSpec) -> dict[str, str]:
    return QWEN1_FEED_FORWARD if spec.model_type == "qwen" else LLAMA_FEED_FORWARD


def mindformers_layout(
    spec: DecoderSpec, qkv: str = "none", ffn: str = "none", head: bool = True, gmm: bool = False
) -> list[Stored]:
    """Every tensor of the MindFormers file of ``spec``, in module order.

    ``qkv``, ``ffn``: how q, k, v and gate, up are joined (``none | stacked | grouped``; ``ffn`` applies to dense models).
    ``head``: a tied head is written too, as a copy of the embedding. ``gmm``: the experts' two last axes are exchanged.
    """
    shapes = logical_shapes(spec)
    top = QWEN1_TOP if spec.model_type == "qwen" else LLAMA_TOP
    embedding, norm, output = top
    tensors = [_plain(embedding, top[embedding], shapes)]
    for n in range(spec.layers):
        tensors += _layer(spec, n, shapes, qkv, ffn if spec.moe is None else "none", gmm)
    tensors.append(_plain(norm, top[norm], shapes))
    if not spec.tied:
        tensors.append(_plain(output, top[output], shapes))
    elif head:
        tensors.append(Stored(output, shapes[top[embedding]], (whole_block(top[embedding], shapes[top[embedding]]),)))
    return tensors


def _layer(spec: DecoderSpec, n: int, shapes: dict, qkv: str, ffn: str, gmm: bool) -> Iterable[Stored]:
    here, there = layer_prefix(spec).format(n=n), f"model.layers.{n}."
    for kind in ("weight", "bias"):
        names = [f"{there}self_attn.{part}.{kind}" for part in ("q_proj", "k_proj", "v_proj")]
        if names[0] not in shapes:
            continue
        if qkv == "none":
            for key in ("wq", "wk", "wv"):
                yield _plain(f"{here}attention.{key}.{kind}", f"{there}self_attn.{ATTENTION[key]}.{kind}", shapes)
        else:
            join = _grouped_qkv(spec, names, shapes) if qkv == "grouped" else _stacked(names, shapes)
            yield _joined(f"{here}attention.w_qkv.{kind}", join, names, shapes)
    yield _plain(f"{here}attention.wo.weight", f"{there}self_attn.o_proj.weight", shapes)
    if spec.is_sparse(n):
        yield from _experts(spec, here, there, shapes, gmm)
    else:
        yield from _dense(spec, here, there, shapes, ffn)
    for key, name in NORMS.items():
        yield _plain(f"{here}{key}.weight", f"{there}{name}.weight", shapes)


def _dense(spec: DecoderSpec, here: str, there: str, shapes: dict, ffn: str) -> Iterable[Stored]:
    table = feed_forward_names(spec)
    gate, up = f"{there}mlp.gate_proj.weight", f"{there}mlp.up_proj.weight"
    if ffn != "none":
        join = _alternating([gate, up], shapes) if ffn == "grouped" else _stacked([gate, up], shapes)
        yield _joined(f"{here}feed_forward.w_gate_hidden.weight", join, [gate, up], shapes)
    for key, name in table.items():
        if ffn == "none" or key == "w2":
            yield _plain(f"{here}feed_forward.{key}.weight", f"{there}mlp.{name}.weight", shapes)


def _experts(spec: DecoderSpec, here: str, there: str, shapes: dict, gmm: bool) -> Iterable[Stored]:
    for key, name in LLAMA_FEED_FORWARD.items():
        experts = [f"{there}mlp.experts.{e}.{name}.weight" for e in range(spec.moe.experts)]
        rows, width = shapes[experts[0]]
        axes = (None, 1, 0) if gmm else (None, 0, 1)
        blocks = tuple(
            Block(expert, full_box((rows, width)), (e, 0, 0), axes, (1, 1, 1)) for e, expert in enumerate(experts)
        )
        shape = (len(experts), width, rows) if gmm else (len(experts), rows, width)
        yield Stored(f"{here}{ROUTED}{key}.weight", shape, blocks)
    for key, name in SPARSE.items():
        yield _plain(f"{here}{key}", f"{there}{name}", shapes)


def _plain(name: str, logical: str, shapes: dict) -> Stored:
    return Stored(name, shapes[logical], (whole_block(logical, shapes[logical]),))


def _joined(name: str, blocks: tuple[Block, ...], parts: list[str], shapes: dict) -> Stored:
    rows = sum(shapes[part][0] for part in parts)
    return Stored(name, (rows, *shapes[parts[0]][1:]), blocks)


def _rows(logical: str, shapes: dict, low: int, high: int, at: int, step: int = 1) -> Block:
    """Rows ``low .. high-1`` of a logical tensor at row ``at`` of the stored one, ``step`` rows apart."""
    shape = shapes[logical]
    rest = full_box(shape[1:])
    rank = len(shape)
    return Block(
        logical, ((low, high), *rest), (at, *(0 for _ in rest)), tuple(range(rank)), (step, *(1 for _ in rest))
    )


def _stacked(names: list[str], shapes: dict) -> tuple[Block, ...]:
    out, at = [], 0
    for name in names:
        out.append(_rows(name, shapes, 0, shapes[name][0], at))
        at += shapes[name][0]
    return tuple(out)


def _alternating(names: list[str], shapes: dict) -> tuple[Block, ...]:
    return tuple(_rows(name, shapes, 0, shapes[name][0], place, len(names)) for place, name in enumerate(names))


def _grouped_qkv(spec: DecoderSpec, names: list[str], shapes: dict) -> tuple[Block, ...]:
    repeat, size = spec.heads // spec.kv_heads, spec.head_dim
    out, at = [], 0
    for group in range(spec.kv_heads):
        for name, heads in zip(names, (repeat, 1, 1)):
            out.append(_rows(name, shapes, group * heads * size, (group + 1) * heads * size, at))
            at += heads * size
    return tuple(out)
