"""Names on both sides: architecture keys, dtypes, modules of adapters, and the keys of a YAML that change nothing here."""

from __future__ import annotations

import re
from collections.abc import Iterable

from research.core.errors import ConfigError

# MindFormers' dtype names -> ours, and back.
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
DTYPE_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}

# model_config key -> (DecoderSpec field, other spelling). Those of a mixture of experts are in read.py.
SPEC_KEYS = {
    "hidden_size": ("hidden", None),
    "num_layers": ("layers", "num_hidden_layers"),
    "num_heads": ("heads", "num_attention_heads"),
    "n_kv_heads": ("kv_heads", "num_key_value_heads"),
    "vocab_size": ("vocab", None),
    "intermediate_size": ("ffn", None),
    "rms_norm_eps": ("norm_eps", None),
    "qkv_has_bias": ("qkv_bias", None),
    "tie_word_embeddings": ("tied", None),
    "kv_channels": ("head_dim", "head_dim"),
    "max_position_embedding": ("max_positions", "max_position_embeddings"),
    "init_method_std": ("init_range", "initializer_range"),
    "theta": ("rope_theta", None),
}

# --- adapters ---------------------------------------------------------------------------------------------------

# MindFormers' linear names -> Hugging Face's. In Qwen v1 the gate is w3, in all others w1.
_ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
_FEED_FORWARD = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_FEED_FORWARD_V1 = {"w1": "up_proj", "w3": "gate_proj", "w2": "down_proj"}


def linear_names(v1: bool) -> dict[str, str]:
    """MindFormers' names of the linear layers of a block -> Hugging Face's."""
    return _ATTENTION | (_FEED_FORWARD_V1 if v1 else _FEED_FORWARD)


def targets_from_mindformers(pattern: str | list, layers: int, v1: bool) -> str | list[str]:
    """``pet_config.target_modules`` (an expression over MindFormers' names) as ``lora.target_modules``.

    Raises :class:`ConfigError` for an expression that matches nothing, or only some layers.
    """
    where = "model.model_config.pet_config.target_modules"
    names = linear_names(v1)
    prefix = "transformer.layers" if v1 else "model.layers"
    pattern = "|".join(pattern) if isinstance(pattern, list) else str(pattern)
    try:
        wanted = re.compile(pattern)
    except re.error as bad:
        raise ConfigError(f"{pattern!r} is not a regular expression: {bad}", where=where) from None
    chosen = []
    for name, ours in names.items():
        part = "attention" if name in _ATTENTION else "feed_forward"
        hits = sum(bool(wanted.fullmatch(f"{prefix}.{layer}.{part}.{name}")) for layer in range(layers))
        if hits == layers:
            chosen.append(ours)
        elif hits:
            raise ConfigError(
                f"{pattern!r} matches {name} of {hits} of {layers} layers",
                where=where,
                hint=rf"lora.target_modules='model\.layers\.(0|1)\..*{ours}' instead",
            )
    if not chosen:
        raise ConfigError(
            f"{pattern!r} matches none of {', '.join(names)}",
            where=where,
            hint=f"'{targets_to_mindformers('all-linear', v1)}'",
        )
    return "all-linear" if len(chosen) == len(names) else chosen


def targets_to_mindformers(targets: str | list[str], v1: bool) -> str:
    """``lora.target_modules`` as an expression over MindFormers' names. Raises :class:`ConfigError` for an expression."""
    theirs = {ours: name for name, ours in linear_names(v1).items()}
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = list(theirs)
    if isinstance(targets, str) or set(targets) - theirs.keys():
        raise ConfigError(
            "MindFormers' files name modules by their own names",
            where=f"lora.target_modules={targets}",
            hint=f"a list of {', '.join(theirs)}, or all-linear",
        )
    return "|".join(f".*{theirs[name]}" for name in theirs if name in targets)


# --- keys without effect ----------------------------------------------------------------------------------------

# Reason -> expressions over dotted keys. What is listed here is read, and said to change nothing.
WITHOUT_EFFECT = {
    "MindFormers' graphs, memory and scheduling; this repository plans its own": (
        r"context\.(?!device_target$|device_id$|mode$).*",
        r"parallel\.(?!enable_parallel_optimizer$|parallel_mode$).*",
        r"parallel_config\.(gradient_aggregation_group|vocab_emb_dp|use_seq_parallel|mp_comm.*|seq_split_num|optimizer_shard|mem_coeff)",
        r"micro_batch_interleave_num",
        r"recompute_config\.(?!recompute$|select_recompute$).*",
        r"runner_config\.sink_(mode|size)",
        r"model\.model_config\.(use_flash_attention|fine_grain_interleave|compute_in_2d|use_attn_mask_compression|offset"
        r"|use_past_shard|use_kvcache_op|use_ring_attention|use_rope_slice|residual_dtype|embedding_init_type|parallel_optimizer"
        r"|pp_interleave_num|use_kbk_infer|fused_rms_norm|input_sliced_sig|rmsnorm_compute_2d|chunk_prefill|llm_backend|pipeline_stage)",
        r"swap_config\..*|memory_optimize_level",
    ),
    "norms, softmax and rotary angles are always computed in fp32": (
        r"model\.model_config\.(layernorm_compute_type|softmax_compute_type|rotary_dtype)",
    ),
    "weights are converted between layouts when they are loaded": (r"model\.model_config\.qkv_concat", r"qkv_concat"),
    "the input files are mapped into memory, and read by this repository's sampler": (
        r"(train|eval)_dataset(_task\.dataset_config)?\.(?!data_loader\.(dataset_dir|shuffle|num_samples)$).*",
        r"(train|eval)_dataset_task\..*",
    ),
    "results are in the run folder (RUN=), with their names": (
        r"output_dir|remote_save_url|callbacks\..*|eval_callbacks\..*|only_save_strategy|transform_process_num|metric\..*"
        r"|strategy_load_checkpoint|load_ckpt_format|remove_redundancy|load_ckpt_async",
    ),
    "vocabulary, control tokens and template come with the tokenizer's files": (
        r"processor\.(?!tokenizer\.(vocab_file|merges_file)$).*",
        r"model\.model_config\.(eos_token_id|pad_token_id|bos_token_id|ignore_token_id|auto_map.*)",
    ),
    "no token is dropped by an expert, and experts are split as all other weights": (
        r"moe_config\.(capacity_factor|routing_policy|enable_sdrop|router_dense_type|use_fused_ops_topkrouter|expert_group_size"
        r"|group_wise_a2a|comp_comm_parallel.*|.*loss_types.*|hot_expert_num|cold_token_percent|moe_module_name|use_gmm|dispatch.*"
        r"|use_shared_expert_gating|routed_scaling_factor|callback_moe_droprate|save_token_distribution.*|enable_.*)",
    ),
    "profiling, automatic tuning and cloud storage are MindFormers'": (
        r"profile.*|init_start_profile|auto_tune|filepath_prefix|autotune_per_step|layer_scale|layer_decay|lr_scale_factor"
        r"|infer\..*|ms_enable.*",
    ),
    "keys of other releases' models that say nothing about a Qwen": (
        r"model\.model_config\.(type|emb_dropout_prob|rotary_pct|rotary_emb_base|kv_channels|multiple_of|ffn_dim_multiplier|attn_proj_has_bias|quant_config"
        r"|checkpoint_name_or_path|is_dynamic|use_paged_attention|block_size|num_blocks|use_past|auto_register|return_hidden_states"
        r"|calculate_per_token_loss|use_eod_attn_mask_compression)",
        r"model\.arch\..*|trainer\..*|eval_(step|epoch)_interval|runner_config\.(initial_.*|eval_.*)|runner_wrapper\.(type|local_norm)",
    ),
}
_COMPILED = {reason: [re.compile(text) for text in texts] for reason, texts in WITHOUT_EFFECT.items()}


def sort_out(keys: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Keys that were not translated: by the reason why they change nothing here, and those that nobody knows."""
    known: dict[str, list[str]] = {}
    unknown = []
    for key in keys:
        reason = next((reason for reason, texts in _COMPILED.items() if any(t.fullmatch(key) for t in texts)), None)
        if reason is None:
            unknown.append(key)
        else:
            known.setdefault(reason, []).append(key)
    return known, unknown


def brief(keys: list[str]) -> str:
    """Dotted keys for one line: those under one parent together."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        parent, _, name = key.rpartition(".")
        groups.setdefault(parent, []).append(name)
    shown = []
    for parent, names in groups.items():
        if not parent:
            shown += names
        else:
            shown.append(f"{parent}.{names[0]}" if len(names) == 1 else f"{parent}.{{{','.join(names)}}}")
    return " ".join(shown)
