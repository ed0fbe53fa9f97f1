"""Random small models of every family as Hugging Face folders, and MindFormers' keys for them written out by hand.

Nothing here uses the tables under test: names and joins follow the published conversion scripts' description.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES = ("qwen", "qwen2", "qwen2_moe")


@dataclass(frozen=True)
class Case:
    """Sizes of a small model; ``kv`` kv heads of ``repeat`` query heads each."""

    family: str
    layers: int = 2
    kv: int = 2
    repeat: int = 2
    size: int = 4
    ffn: int = 6
    vocab: int = 11
    tied: bool = False
    experts: int = 3
    expert_ffn: int = 5
    shared_ffn: int = 7
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self):
        if self.family == "qwen":  # multi-head: every head is a kv head
            object.__setattr__(self, "kv", self.kv * self.repeat)
            object.__setattr__(self, "repeat", 1)

    @property
    def heads(self) -> int:
        return self.kv * self.repeat

    @property
    def hidden(self) -> int:
        return self.heads * self.size

    def sparse(self, layer: int) -> bool:
        return self.family == "qwen2_moe" and layer not in self.dense_layers

    def config(self) -> dict:
        if self.family == "qwen":
            return {
                "model_type": "qwen",
                "hidden_size": self.hidden,
                "num_attention_heads": self.heads,
                "num_hidden_layers": self.layers,
                "intermediate_size": 2 * self.ffn,
                "vocab_size": self.vocab,
                "max_position_embeddings": 64,
                "seq_length": 32,
                "rotary_emb_base": 10000,
                "layer_norm_epsilon": 1e-6,
                "kv_channels": self.size,
                "tie_word_embeddings": False,
            }
        out = {
            "architectures": ["Qwen2MoeForCausalLM" if self.family == "qwen2_moe" else "Qwen2ForCausalLM"],
            "model_type": self.family,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
        }
        if self.family == "qwen2_moe":
            out |= {
                "num_experts": self.experts,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": self.expert_ffn,
                "shared_expert_intermediate_size": self.shared_ffn,
                "mlp_only_layers": list(self.dense_layers),
                "decoder_sparse_step": 1,
                "norm_topk_prob": False,
            }
        return out

    def weights(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
        """Hugging Face's names -> random tensors, every value different in all likelihood."""
        random = torch.Generator().manual_seed(seed)
        shapes = self.qwen1_shapes() if self.family == "qwen" else self.qwen2_shapes()
        return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}

    def qwen1_shapes(self) -> dict[str, tuple[int, ...]]:
        h = self.hidden
        shapes = {"transformer.wte.weight": (self.vocab, h)}
        for n in range(self.layers):
            at = f"transformer.h.{n}."
            shapes |= {at + "ln_1.weight": (h,), at + "ln_2.weight": (h,)}
            shapes |= {at + "attn.c_attn.weight": (3 * h, h), at + "attn.c_attn.bias": (3 * h,)}
            shapes |= {at + "attn.c_proj.weight": (h, h), at + "mlp.c_proj.weight": (h, self.ffn)}
            shapes |= {at + "mlp.w1.weight": (self.ffn, h), at + "mlp.w2.weight": (self.ffn, h)}
        return shapes | {"transformer.ln_f.weight": (h,), "lm_head.weight": (self.vocab, h)}

    def qwen2_shapes(self) -> dict[str, tuple[int, ...]]:
        h, kv = self.hidden, self.kv * self.size
        shapes = {"model.embed_tokens.weight": (self.vocab, h)}
        for n in range(self.layers):
            at = f"model.layers.{n}."
            for name, rows in (("q_proj", h), ("k_proj", kv), ("v_proj", kv)):
                shapes |= {f"{at}self_attn.{name}.weight": (rows, h), f"{at}self_attn.{name}.bias": (rows,)}
            shapes[at + "self_attn.o_proj.weight"] = (h, h)
            blocks = {"mlp.": self.ffn}
            if self.sparse(n):
                blocks = {f"mlp.experts.{e}.": self.expert_ffn for e in range(self.experts)}
                blocks["mlp.shared_expert."] = self.shared_ffn
                shapes |= {at + "mlp.gate.weight": (self.experts, h), at + "mlp.shared_expert_gate.weight": (1, h)}
            for block, ffn in blocks.items():
                shapes |= {f"{at}{block}gate_proj.weight": (ffn, h), f"{at}{block}up_proj.weight": (ffn, h)}
                shapes[f"{at}{block}down_proj.weight"] = (h, ffn)
            shapes |= {at + "input_layernorm.weight": (h,), at + "post_attention_layernorm.weight": (h,)}
        shapes["model.norm.weight"] = (h,)
        return shapes if self.tied else shapes | {"lm_head.weight": (self.vocab, h)}

    def write(self, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, shards: int = 1) -> Path:
        """A Hugging Face folder; ``shards`` > 1: with an index."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config()))
        weights = self.weights(dtype, seed)
        if shards == 1:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        names, places = list(weights), {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            mine = names[shard::shards]
            save_file({name: weights[name] for name in mine}, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(mine, file)
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder


def mindformers_weights(
    case: Case, hf: dict[str, torch.Tensor], concat: str = "none", gmm: bool = False, head: bool = True
) -> dict[str, torch.Tensor]:
    """MindFormers' names and tensors for a model, by the rules of its conversion scripts."""
    out: dict[str, torch.Tensor] = {}
    if case.family == "qwen":
        return _qwen1(case, hf, concat)
    for name, value in hf.items():
        name = name.replace("model.embed_tokens.weight", "model.tok_embeddings.embedding_weight")
        name = name.replace("model.norm.weight", "model.norm_out.weight")
        for old, new in (
            (".self_attn.q_proj.", ".attention.wq."),
            (".self_attn.k_proj.", ".attention.wk."),
            (".self_attn.v_proj.", ".attention.wv."),
            (".self_attn.o_proj.", ".attention.wo."),
            (".mlp.gate_proj.", ".feed_forward.w1."),
            (".mlp.down_proj.", ".feed_forward.w2."),
            (".mlp.up_proj.", ".feed_forward.w3."),
            (".input_layernorm.", ".attention_norm."),
            (".post_attention_layernorm.", ".ffn_norm."),
            (".mlp.gate.", ".feed_forward.routed_experts.router.dense."),
            (".mlp.shared_expert.gate_proj.", ".feed_forward.shared_experts.w1."),
            (".mlp.shared_expert.down_proj.", ".feed_forward.shared_experts.w2."),
            (".mlp.shared_expert.up_proj.", ".feed_forward.shared_experts.w3."),
            (".mlp.shared_expert_gate.", ".feed_forward.shared_experts_gate."),
        ):
            name = name.replace(old, new)
        if ".mlp.experts." not in name:
            out[name] = value
    for n in range(case.layers):
        at = f"model.layers.{n}."
        if case.sparse(n):
            for new, old in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                stack = torch.stack([hf[f"{at}mlp.experts.{e}.{old}.weight"] for e in range(case.experts)])
                stack = stack.transpose(1, 2).contiguous() if gmm else stack
                out[f"{at}feed_forward.routed_experts.ffn.{new}.weight"] = stack
        join(case, out, at, concat, gate="w1", up="w3", ffn=case.family != "qwen2_moe")
    if case.tied and head:
        out["lm_head.weight"] = hf["model.embed_tokens.weight"]
    return out


def _qwen1(case: Case, hf: dict[str, torch.Tensor], concat: str) -> dict[str, torch.Tensor]:
    out = {
        "transformer.wte.embedding_weight": hf["transformer.wte.weight"],
        "transformer.ln_f.weight": hf["transformer.ln_f.weight"],
        "lm_head.weight": hf["lm_head.weight"],
    }
    for n in range(case.layers):
        old, new = f"transformer.h.{n}.", f"transformer.layers.{n}."
        for kind in ("weight", "bias"):
            for key, part in zip("qkv", hf[f"{old}attn.c_attn.{kind}"].chunk(3)):
                out[f"{new}attention.w{key}.{kind}"] = part.contiguous()
        out[new + "attention.wo.weight"] = hf[old + "attn.c_proj.weight"]
        out[new + "feed_forward.w1.weight"] = hf[old + "mlp.w1.weight"]
        out[new + "feed_forward.w3.weight"] = hf[old + "mlp.w2.weight"]
        out[new + "feed_forward.w2.weight"] = hf[old + "mlp.c_proj.weight"]
        out[new + "attention_norm.weight"] = hf[old + "ln_1.weight"]
        out[new + "ffn_norm.weight"] = hf[old + "ln_2.weight"]
        join(case, out, new, concat, gate="w3", up="w1", ffn=True)
    return out


def join(case: Case, out: dict[str, torch.Tensor], at: str, concat: str, gate: str, up: str, ffn: bool) -> None:
    """qkv_concat: stacked rows, or Megatron's order (per kv head its q heads, k, v; gate and up rows alternating)."""
    if concat == "none":
        return
    for kind in ("weight", "bias"):
        parts = [out.pop(f"{at}attention.w{key}.{kind}") for key in "qkv"]
        if concat == "grouped":
            groups = [part.reshape(case.kv, -1, *part.shape[1:]) for part in parts]
            parts = [torch.cat(groups, dim=1).flatten(0, 1)]
        out[f"{at}attention.w_qkv.{kind}"] = torch.cat(parts)
    if ffn:
        pair = [out.pop(f"{at}feed_forward.{key}.weight") for key in (gate, up)]
        both = torch.stack(pair, dim=1).flatten(0, 1) if concat == "grouped" else torch.cat(pair)
        out[f"{at}feed_forward.w_gate_hidden.weight"] = both


@st.composite
def cases(draw, families=FAMILIES) -> Case:
    family = draw(st.sampled_from(families))
    layers = draw(st.integers(1, 3))
    dense = draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1)) if family == "qwen2_moe" else set()
    return Case(
        family=family,
        layers=layers,
        kv=draw(st.integers(1, 3)),
        repeat=1 if family == "qwen" else draw(st.integers(1, 3)),
        size=2 * draw(st.integers(1, 3)),
        ffn=draw(st.integers(1, 9)),
        vocab=draw(st.integers(2, 13)),
        tied=family != "qwen" and draw(st.booleans()),
        experts=draw(st.integers(2, 4)),
        expert_ffn=draw(st.integers(1, 7)),
        shared_ffn=draw(st.integers(1, 7)),
        dense_layers=tuple(sorted(dense)),
    )


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, read by the safetensors library."""
    out: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        out |= load_file(path)
    return out


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(bits(a[k]), bits(b[k])) for k in a
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    # A flat copy: torch calls [n, 1] of any stride contiguous, and then refuses to view it as bytes.
    return tensor.reshape(-1).clone().view(torch.uint8)
