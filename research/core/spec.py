"""DecoderSpec: the one description of an architecture, and its two spellings in Hugging Face's config.json.

Everything that builds, loads, counts or converts a model reads a :class:`DecoderSpec`; nothing else in the
repository reads ``config.json`` keys. Model types: ``qwen`` (the first generation, with ``c_attn`` and both FFN
halves in ``intermediate_size``), ``qwen2`` (Qwen1.5, Qwen2, Qwen2.5) and ``qwen2_moe``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace

from research.core.errors import WeightsError

MODEL_TYPES = ("qwen", "qwen2", "qwen2_moe")


@dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling as in ``rope_scaling``: ``linear`` (positions divided by ``factor``) or ``yarn`` (arXiv 2309.00071).

    ``original_positions`` is the length the model was trained at; ``attention_factor`` None means
    ``0.1 ln(factor) + 1``, which transformers multiplies into cos and sin.
    """

    kind: str
    factor: float
    original_positions: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class MoeSpec:
    """Sparse feed-forward: ``experts`` routed, ``top_k`` of them per token, and one shared expert with a sigmoid gate."""

    experts: int
    top_k: int
    expert_ffn: int
    shared_ffn: int
    norm_topk: bool = False
    sparse_step: int = 1
    dense_layers: tuple[int, ...] = ()
    aux_coefficient: float = 0.001


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes and switches of one decoder. All sizes count elements; ``ffn`` is one FFN half for every model type.

    ``train_length`` and ``logn_attention`` / ``dynamic_ntk`` are the first generation's: past ``train_length`` the
    query is scaled by log_{train_length}(position + 1) and the rotary base grows with the prompt's length.
    ``sliding_layers`` lists the layers that attend to the last ``sliding_window`` positions only.
    """

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    tied: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    moe: MoeSpec | None = None
    logn_attention: bool = False
    dynamic_ntk: bool = False
    train_length: int | None = None
    causal: bool = True
    init_range: float = 0.02

    def __post_init__(self):
        if self.model_type not in MODEL_TYPES:
            raise WeightsError(f"model_type {self.model_type!r} is not one of {', '.join(MODEL_TYPES)}")
        if self.heads % self.kv_heads:
            raise WeightsError(f"{self.heads} heads cannot share {self.kv_heads} kv heads evenly")
        if self.head_dim % 2:
            raise WeightsError(f"head_dim {self.head_dim} is odd: the rotary embedding needs pairs")

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer's feed-forward is a mixture of experts (as transformers' Qwen2MoeDecoderLayer decides)."""
        return self.moe is not None and layer not in self.moe.dense_layers and (layer + 1) % self.moe.sparse_step == 0

    def parameters(self) -> int:
        """Exact number of stored parameters (a tied head counts once)."""
        return self._count(self.moe.experts if self.moe else 0)

    def active_parameters(self) -> int:
        """Parameters that one token passes through: ``top_k`` of the experts instead of all."""
        return self._count(self.moe.top_k if self.moe else 0)

    def _count(self, experts: int) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (q + 2 * kv) + q * self.hidden + (q + 2 * kv if self.qkv_bias else 0)
        dense = 3 * self.hidden * self.ffn
        total = self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden
        for layer in range(self.layers):
            if self.is_sparse(layer):
                m = self.moe
                feed = (
                    self.hidden * m.experts
                    + experts * 3 * self.hidden * m.expert_ffn
                    + 3 * self.hidden * m.shared_ffn
                    + self.hidden
                )
            else:
                feed = dense
            total += attention + feed + 2 * self.hidden
        return total

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes of key/value cache that one token takes over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_element

    @property
    def usable_length(self) -> int:
        """Longest sequence the position scheme is made for, with a YaRN or linear factor counted in."""
        scaling = self.rope_scaling
        if scaling is None:
            return self.max_positions
        return max(self.max_positions, int(scaling.factor * (scaling.original_positions or self.max_positions)))


# --- Hugging Face's config.json -> DecoderSpec ------------------------------------------------------------------


def spec_from_hf(config: dict, where: str = "config.json") -> DecoderSpec:
    """Read a ``config.json`` dictionary, of transformers 4 or 5 spelling, into a :class:`DecoderSpec`.

    Raises :class:`WeightsError` naming ``where`` for a model type that is not a Qwen decoder or a key that is missing.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise WeightsError(
            f"model_type is {kind!r}; this repository runs {', '.join(MODEL_TYPES)}",
            where=where,
            hint="point WEIGHTS at the folder of a Qwen, Qwen1.5, Qwen2 or Qwen2.5 model",
        )
    try:
        return _from_qwen1(config) if kind == "qwen" else _from_qwen2(config)
    except KeyError as missing:
        raise WeightsError(f"required key {missing} is missing", where=where) from None
    except (TypeError, ValueError) as bad:
        raise WeightsError(f"a value has the wrong type: {bad}", where=where) from None


def _from_qwen1(config: dict) -> DecoderSpec:
    # The August 2023 files use GPT names; later ones use the usual ones.
    def first(*names):
        for name in names:
            if config.get(name) is not None:
                return config[name]
        raise KeyError(names[0])

    heads = int(first("num_attention_heads", "n_head"))
    hidden = int(first("hidden_size", "n_embd"))
    train_length = int(first("seq_length", "n_positions"))
    return DecoderSpec(
        model_type="qwen",
        layers=int(first("num_hidden_layers", "n_layer")),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=int(config.get("kv_channels") or hidden // heads),
        ffn=int(first("intermediate_size", "ffn_hidden_size")) // 2,
        vocab=int(first("padded_vocab_size", "vocab_size") if "padded_vocab_size" in config else first("vocab_size")),
        max_positions=int(first("max_position_embeddings", "n_positions")),
        rope_theta=float(first("rotary_emb_base")),
        norm_eps=float(first("layer_norm_epsilon")),
        tied=bool(config.get("tie_word_embeddings", False)),
        logn_attention=bool(config.get("use_logn_attn", True)),
        dynamic_ntk=bool(config.get("use_dynamic_ntk", True)),
        train_length=train_length,
        init_range=float(config.get("initializer_range", 0.02)),
    )


def _from_qwen2(config: dict) -> DecoderSpec:
    sparse = config["model_type"] == "qwen2_moe"
    layers = int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    positions = int(config.get("max_position_embeddings", 32768))
    rope = dict(config.get("rope_parameters") or {})  # transformers 5
    rope.update(config.get("rope_scaling") or {})  # transformers 4
    theta = config.get("rope_theta", rope.get("rope_theta", 10_000.0))  # transformers' default
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    return DecoderSpec(
        model_type=config["model_type"],
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        ffn=int(config["intermediate_size"]),
        vocab=int(config["vocab_size"]),
        max_positions=positions,
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(rope, positions),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        qkv_bias=bool(config.get("qkv_bias", True)) if sparse else True,
        tied=bool(config.get("tie_word_embeddings", False)),
        sliding_window=window,
        sliding_layers=_sliding_layers(config, layers, sparse) if window else (),
        moe=_moe(config) if sparse else None,
        causal=bool(config.get("is_causal", True)),
        init_range=float(config.get("initializer_range", 0.02)),
    )


def _rope_scaling(rope: dict, positions: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "yarn"):
        raise WeightsError(f"rope_scaling of type {kind!r} is not known", hint="yarn or linear")
    plain = {"mscale": None, "mscale_all_dim": None, "partial_rotary_factor": 1.0, "truncate": True}
    foreign = [key for key, usual in plain.items() if rope.get(key, usual) not in (usual, None)]
    if foreign:
        raise WeightsError(f"rope_scaling has {', '.join(foreign)}, which no Qwen model uses")
    return RopeScaling(
        kind=kind,
        factor=float(rope["factor"]),
        original_positions=int(rope.get("original_max_position_embeddings") or positions) if kind == "yarn" else None,
        attention_factor=rope.get("attention_factor"),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
    )


def _sliding_layers(config: dict, layers: int, sparse: bool) -> tuple[int, ...]:
    if config.get("layer_types"):
        return tuple(i for i, kind in enumerate(config["layer_types"]) if kind == "sliding_attention")
    border = config.get("max_window_layers", 28)
    if sparse:  # transformers' Qwen2MoeConfig alternates below the border, Qwen2Config slides above it
        return tuple(i for i in range(layers) if i % 2 == 0 and i < border)
    return tuple(range(min(border, layers), layers))


def _moe(config: dict) -> MoeSpec:
    return MoeSpec(
        experts=int(config["num_experts"]),
        top_k=int(config["num_experts_per_tok"]),
        expert_ffn=int(config["moe_intermediate_size"]),
        shared_ffn=int(config["shared_expert_intermediate_size"]),
        norm_topk=bool(config.get("norm_topk_prob", False)),
        sparse_step=int(config.get("decoder_sparse_step", 1)),
        dense_layers=tuple(config.get("mlp_only_layers") or ()),
        aux_coefficient=float(config.get("router_aux_loss_coef", 0.001)),
    )


# --- DecoderSpec -> Hugging Face's config.json ------------------------------------------------------------------


def spec_to_hf(
    spec: DecoderSpec, dtype: str = "float32", eos: int | list[int] | None = None, bos: int | None = None
) -> dict:
    """The ``config.json`` that transformers (4 and 5) and MindIE read for ``spec``. ``dtype`` is torch's name."""
    common = {
        "model_type": spec.model_type,
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.max_positions,
        "initializer_range": spec.init_range,
        "tie_word_embeddings": spec.tied,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if eos is not None:
        common["eos_token_id"] = eos
    if bos is not None:
        common["bos_token_id"] = bos
    return common | (_to_qwen1(spec) if spec.model_type == "qwen" else _to_qwen2(spec))


def _to_qwen1(spec: DecoderSpec) -> dict:
    return {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "intermediate_size": 2 * spec.ffn,
        "kv_channels": spec.head_dim,
        "layer_norm_epsilon": spec.norm_eps,
        "no_bias": True,
        "rotary_emb_base": spec.rope_theta,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": spec.train_length,
        "tokenizer_class": "QWenTokenizer",
        "use_dynamic_ntk": spec.dynamic_ntk,
        "use_flash_attn": "auto",
        "use_logn_attn": spec.logn_attention,
    }


def _to_qwen2(spec: DecoderSpec) -> dict:
    sliding = bool(spec.sliding_window)
    out = {
        "architectures": ["Qwen2ForCausalLM" if spec.moe is None else "Qwen2MoeForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "intermediate_size": spec.ffn,
        "num_key_value_heads": spec.kv_heads,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "sliding_window": spec.sliding_window if sliding else spec.max_positions,
        "use_sliding_window": sliding,
        "max_window_layers": min(spec.sliding_layers) if sliding and spec.sliding_layers else spec.layers,
    }
    if sliding:
        out["layer_types"] = [
            "sliding_attention" if i in spec.sliding_layers else "full_attention" for i in range(spec.layers)
        ]
    if spec.head_dim * spec.heads != spec.hidden:
        out["head_dim"] = spec.head_dim
    if not spec.causal:
        out["is_causal"] = False
    if spec.rope_scaling:
        scaling = {
            "rope_type": spec.rope_scaling.kind,
            "type": spec.rope_scaling.kind,
            "factor": spec.rope_scaling.factor,
        }
        if spec.rope_scaling.kind == "yarn":
            scaling["original_max_position_embeddings"] = spec.rope_scaling.original_positions
            scaling["beta_fast"], scaling["beta_slow"] = spec.rope_scaling.beta_fast, spec.rope_scaling.beta_slow
            if spec.rope_scaling.attention_factor is not None:
                scaling["attention_factor"] = spec.rope_scaling.attention_factor
        out["rope_scaling"] = scaling
    if spec.moe:
        out |= {
            "qkv_bias": spec.qkv_bias,
            "num_experts": spec.moe.experts,
            "num_experts_per_tok": spec.moe.top_k,
            "moe_intermediate_size": spec.moe.expert_ffn,
            "shared_expert_intermediate_size": spec.moe.shared_ffn,
            "norm_topk_prob": spec.moe.norm_topk,
            "decoder_sparse_step": spec.moe.sparse_step,
            "mlp_only_layers": list(spec.moe.dense_layers),
            "router_aux_loss_coef": spec.moe.aux_coefficient,
            "output_router_logits": False,
        }
    return out


# --- comparison -------------------------------------------------------------------------------------------------

# Differences that a checkpoint may have from its model's preset without being another model: longer contexts are
# released under the same name, and transformers writes the windows of unused sliding attention differently.
_FREE_FIELDS = {
    "max_positions",
    "rope_scaling",
    "init_range",
    "train_length",
    "sliding_window",
    "sliding_layers",
    "causal",
}


def spec_differences(preset: DecoderSpec, found: DecoderSpec) -> list[str]:
    """``key: expected X, found Y`` for every field that makes ``found`` another architecture than ``preset``."""
    rows = []
    for field in fields(DecoderSpec):
        if field.name in _FREE_FIELDS:
            continue
        a, b = getattr(preset, field.name), getattr(found, field.name)
        same = math.isclose(a, b, rel_tol=1e-9) if isinstance(a, float) and isinstance(b, float) else a == b
        if field.name == "norm_eps":  # base and Instruct releases of one size differ (1e-5, 1e-6)
            same = True
        if field.name == "moe" and a and b:
            a, b = replace(a, aux_coefficient=0.0), replace(b, aux_coefficient=0.0)
            same = a == b
        if not same:
            rows.append(f"{field.name}: expected {_show(a)}, found {_show(b)}")
    return rows


def _show(value) -> str:
    return str(asdict(value)) if hasattr(value, "__dataclass_fields__") else str(value)
