"""LoRA adapters: PEFT's names <-> MindFormers' (``..wq.lora_a``), and their ``adapter_config.json``.

A and B keep their shapes ([rank, in] and [out, rank]). Qwen v1's fused ``c_attn`` is apart in MindFormers: its one A stands
in wq, wk and wv, its B is cut by rows; the way back needs the three A's to be equal. The config is written beside the
target; the source's is never rewritten.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from research.core.errors import WeightsError
from research.core.spec import DecoderSpec
from research.core.weights.blocks import Block, Stored, hf_layout, whole_block
from research.core.weights.formats import safetensors, torch_bin
from research.core.weights.opened import MINDFORMERS, OpenOptions, OpenWeights, read_mindformers
from research.core.weights.tensors import Entry

CONFIG, SAFE, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
PEFT = "peft"

# --- tables: module in the Hugging Face model -> module(s) in MindFormers, below the layer --------------------------

QWEN1 = {
    "attn.c_attn": ("attention.wq", "attention.wk", "attention.wv"),
    "attn.c_proj": ("attention.wo",),
    "mlp.w1": ("feed_forward.w1",),
    "mlp.w2": ("feed_forward.w3",),
    "mlp.c_proj": ("feed_forward.w2",),
}
LLAMA = {
    "self_attn.q_proj": ("attention.wq",),
    "self_attn.k_proj": ("attention.wk",),
    "self_attn.v_proj": ("attention.wv",),
    "self_attn.o_proj": ("attention.wo",),
    "mlp.gate_proj": ("feed_forward.w1",),
    "mlp.down_proj": ("feed_forward.w2",),
    "mlp.up_proj": ("feed_forward.w3",),
    "mlp.shared_expert.gate_proj": ("feed_forward.shared_experts.w1",),
    "mlp.shared_expert.down_proj": ("feed_forward.shared_experts.w2",),
    "mlp.shared_expert.up_proj": ("feed_forward.shared_experts.w3",),
}
_HF_LAYER = re.compile(r"(?P<prefix>transformer\.h|model\.layers)\.(?P<n>\d+)\.(?P<module>.+)")
_MF_LAYER = re.compile(r"(?P<prefix>transformer\.layers|model\.layers)\.(?P<n>\d+)\.(?P<module>.+)")


@dataclass
class Adapter:
    """An opened adapter: its tensors by PEFT's names (``<module>.lora_A``), and its ``adapter_config.json``."""

    opened: OpenWeights
    config: dict
    v1: bool
    modules: list[str]

    def layout(self, to: str) -> list[Stored]:
        """The tensors of the target file."""
        shapes = self.shapes()
        if to != MINDFORMERS:
            return [plain_as(f"{PREFIX}{name}.weight", name, shape) for name, shape in shapes.items()]
        return [stored for module in self.modules for stored in _mindformers(module, shapes, self.v1)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        out: dict[str, tuple[int, ...]] = {}
        for _, stored in self.opened.tensors:
            for block in stored.blocks:
                shape = tuple(high for _, high in block.box)
                out[block.name] = tuple(map(max, shape, out.get(block.name, shape)))
        return out

    def config_for(self, to: str) -> dict:
        """``adapter_config.json`` with the target's module names."""
        config = dict(self.config)
        table = _name_table(self.v1, to == MINDFORMERS)
        targets = config.get("target_modules")
        if isinstance(targets, list):
            config["target_modules"] = list(dict.fromkeys(new for old in targets for new in _renamed(old, table)))
        elif isinstance(targets, str) and targets != "all-linear":
            config["target_modules"] = _in_pattern(targets, table)
        for key in ("rank_pattern", "alpha_pattern"):
            pattern = config.get(key) or {}
            config[key] = {new: value for old, value in pattern.items() for new in _renamed(old, table)}
        return config


def plain_as(name: str, logical: str, shape: Sequence[int]) -> Stored:
    """A stored tensor that is a whole logical one under another name."""
    return Stored(name, tuple(shape), (whole_block(logical, shape),))


def _mindformers(module: str, shapes: Mapping[str, tuple[int, ...]], v1: bool):
    layer = _HF_LAYER.fullmatch(module)
    targets = (QWEN1 if v1 else LLAMA)[layer["module"]]
    prefix = f"{'transformer' if v1 else 'model'}.layers.{layer['n']}."
    for part, target in enumerate(targets):
        name_a, name_b = f"{module}.lora_A", f"{module}.lora_B"
        yield plain_as(f"{prefix}{target}.lora_a", name_a, shapes[name_a])
        rows, rank = shapes[name_b]
        height = rows // len(targets)
        box = ((part * height, (part + 1) * height), (0, rank))
        yield Stored(f"{prefix}{target}.lora_b", (height, rank), (Block(name_b, box, (0, 0), (0, 1), (1, 1)),))


# --- reading ------------------------------------------------------------------------------------------------------------


def open_adapter(path: Path, options: OpenOptions, spec: DecoderSpec | None = None) -> Adapter:
    """Open a PEFT folder, or a MindFormers adapter file (or its folder) with ``adapter_config.json`` beside it.

    ``spec``: the base model, where it is known; every A and B is then checked against it. Raises :class:`WeightsError`.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise WeightsError("adapter not found", where=path)
    folder = path if path.is_dir() else path.parent
    entries, kind = _entries(path, folder, options)
    config = _config(folder)
    adapter = _from_peft(path, entries, config) if kind == PEFT else _from_mindformers(path, entries, config)
    _check_ranks(adapter)
    if spec is not None:
        _check_base(adapter, spec)
    return adapter


def _entries(path: Path, folder: Path, options: OpenOptions) -> tuple[dict[str, Entry], str]:
    if path.is_file() and path.suffix == ".ckpt":
        return read_mindformers([path])[0], MINDFORMERS
    safe = path if path.is_file() and path.suffix == ".safetensors" else folder / SAFE
    if safe.is_file():
        entries = safetensors.read_entries(safe)
        return entries, PEFT if any("lora_A" in name for name in entries) else MINDFORMERS
    checkpoints = sorted(folder.glob("*.ckpt")) or sorted(folder.glob("*.safetensors"))
    if checkpoints:
        return read_mindformers(checkpoints[-1:])[0], MINDFORMERS
    if (folder / PICKLE).is_file():
        if not options.allow_pickle:
            raise WeightsError(
                f"only a pickled adapter here ({PICKLE}); a pickle can run code when it is opened",
                where=folder,
                hint="convert.allow_pickle=true (--allow_pickle) if you trust its source",
            )
        return torch_bin.read_file(folder / PICKLE), PEFT
    raise WeightsError(f"no adapter here ({SAFE}, or a .ckpt of MindFormers)", where=folder)


def _config(folder: Path) -> dict:
    path = folder / CONFIG
    if not path.is_file():
        raise WeightsError(f"no {CONFIG} beside the adapter: its alpha is not in the tensors", where=folder)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as bad:
        raise WeightsError(f"not valid JSON: {bad}", where=path) from None
    if not isinstance(config, dict) or "r" not in config or "lora_alpha" not in config:
        raise WeightsError("r or lora_alpha is missing", where=path)
    for key in ("use_dora", "fan_in_fan_out", "modules_to_save"):
        if config.get(key):
            raise WeightsError(
                f"{key}={config[key]!r} has no place in MindFormers", where=path, hint="a plain LoRA adapter"
            )
    return config


def _from_peft(path: Path, entries: dict[str, Entry], config: dict) -> Adapter:
    tensors: list[tuple[Hashable, Stored]] = []
    modules: dict[str, set[str]] = {}
    for name, entry in entries.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise WeightsError(f"{name} is no tensor of a plain LoRA adapter", where=path)
        modules.setdefault(match[1], set()).add(match[2])
        tensors.append((name, plain_as(name, f"{match[1]}.lora_{match[2]}", entry.shape)))
    v1 = _generation(path, modules)
    table = QWEN1 if v1 else LLAMA
    for module in modules:
        layer = _HF_LAYER.fullmatch(module)
        if layer is None or layer["module"] not in table:
            raise WeightsError(f"MindFormers has no place for an adapter on {module}", where=path)
    return _adapter(path, entries, tensors, config, v1, modules, PEFT)


def _from_mindformers(path: Path, entries: dict[str, Entry], config: dict) -> Adapter:
    # A checkpoint of LoRA training holds its base and the optimiser's state too: those are left out and named.
    found: dict[str, dict[str, str]] = {}
    unused = []
    for name in entries:
        match = re.fullmatch(r"((?:transformer|model)\.layers\..+)\.lora_([ab])", name)
        if match is None:
            unused.append(name)
        else:
            found.setdefault(match[1], {})[match[2]] = name
    if not found:
        raise WeightsError(f"no LoRA tensors in it; its first tensors: {', '.join(unused[:3])}", where=path)
    v1 = any(module.startswith("transformer.") for module in found)
    tensors: list[tuple[Hashable, Stored]] = []
    modules: dict[str, set[str]] = {}
    copies: list[tuple[Hashable, Hashable]] = []
    for prefix, module, parts in _hf_modules(path, found, v1):
        rows = 0
        for number, part in enumerate(parts):
            names = found[prefix + part]
            if set(names) != {"a", "b"}:
                raise WeightsError(f"{prefix + part} has only one of lora_a and lora_b", where=path)
            a, b = entries[names["a"]], entries[names["b"]]
            tensors.append((names["a"], plain_as(names["a"], f"{module}.lora_A", a.shape)))
            box = ((rows, rows + b.shape[0]), (0, b.shape[1]))
            block = Block(f"{module}.lora_B", box, (0, 0), (0, 1), (1, 1))
            tensors.append((names["b"], Stored(names["b"], b.shape, (block,))))
            rows += b.shape[0]
            if number:
                copies.append((found[prefix + parts[0]]["a"], names["a"]))
        modules[module] = {"A", "B"}
    adapter = _adapter(path, entries, tensors, config, v1, modules, MINDFORMERS, copies)
    adapter.opened.unused = unused
    return adapter


def _hf_modules(path: Path, found: Mapping[str, object], v1: bool):
    """(MindFormers prefix of the layer, Hugging Face module, MindFormers modules that make it up)."""
    table = {parts: module for module, parts in (QWEN1 if v1 else LLAMA).items()}
    first = {part: parts for parts in table for part in parts}
    for name in found:
        layer = _MF_LAYER.fullmatch(name)
        parts = first.get(layer["module"]) if layer else None
        if parts is None:
            raise WeightsError(f"no Qwen model has a module {name}", where=path)
        prefix = name[: -len(layer["module"])]
        absent = [part for part in parts if prefix + part not in found]
        if absent:
            raise WeightsError(f"{prefix}{absent[0]} carries no adapter, but Qwen's c_attn is one module", where=path)
        if layer["module"] == parts[0]:
            yield prefix, f"{'transformer.h' if v1 else 'model.layers'}.{layer['n']}.{table[parts]}", parts


def _generation(path: Path, modules: Mapping[str, object]) -> bool:
    kinds = {module.startswith("transformer.h.") for module in modules}
    if len(kinds) != 1:
        raise WeightsError("no adapted modules, or of two families", where=path)
    return kinds.pop()


def _adapter(path, entries, tensors, config, v1, modules, kind, copies=()) -> Adapter:
    incomplete = [module for module, parts in modules.items() if parts != {"A", "B"}]
    if incomplete:
        raise WeightsError(f"{incomplete[0]} has only one of lora_A and lora_B", where=path)
    facts = {"names": kind, "model_type": "qwen adapter" if v1 else "qwen2 adapter", "files": _files(entries)}
    opened = OpenWeights(
        path=path, kind=kind, spec=None, config=config, entries=dict(entries), tensors=tensors, facts=facts,
        copies=list(copies),
    )  # fmt: skip
    return Adapter(opened, config, v1, list(modules))


def _files(entries: Mapping[str, Entry]) -> str:
    return next(iter(entries.values())).segments[0].path.suffix.removeprefix(".") if entries else "none"


# --- checks ---------------------------------------------------------------------------------------------------------------


def _check_ranks(adapter: Adapter) -> None:
    shapes = adapter.shapes()
    for module in adapter.modules:
        a, b = shapes[f"{module}.lora_A"], shapes[f"{module}.lora_B"]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise WeightsError(
                f"{module}: lora_A is {list(a)} and lora_B {list(b)}; their ranks differ", where=adapter.opened.path
            )


def _check_base(adapter: Adapter, spec: DecoderSpec) -> None:
    """Every A and B fits the base model's matrix."""
    if adapter.v1 != (spec.model_type == "qwen"):
        raise WeightsError(
            f"this adapter is for {'Qwen v1' if adapter.v1 else 'Qwen1.5 and later'}, the model is {spec.model_type}",
            where=adapter.opened.path,
            hint="the adapter's own base model",
        )
    base = {stored.name.removesuffix(".weight"): stored.shape for stored in hf_layout(spec)}
    shapes = adapter.shapes()
    for module in adapter.modules:
        if module not in base:
            raise WeightsError(f"the model has no {module}", where=adapter.opened.path, hint="its own base model")
        rows, width = base[module]
        found = shapes[f"{module}.lora_B"][0], shapes[f"{module}.lora_A"][1]
        if found != (rows, width):
            raise WeightsError(
                f"{module}: the adapter is for a matrix {list(found)}, this model has {[rows, width]}",
                where=adapter.opened.path,
                hint="the model that the adapter was trained on",
            )


# --- names in adapter_config.json ---------------------------------------------------------------------------------------


def _name_table(v1: bool, forward: bool) -> dict[str, tuple[str, ...]]:
    """Module names, whole (``mlp.up_proj``) and their last part (``up_proj``), to those of the other side."""
    table: dict[str, tuple[str, ...]] = {"transformer.h": ("transformer.layers",)} if v1 and forward else {}
    if v1 and not forward:
        table["transformer.layers"] = ("transformer.h",)
    for module, parts in (QWEN1 if v1 else LLAMA).items():
        short, leaves = _last(module), tuple(_last(part) for part in parts)
        if forward:
            table[module] = parts
            table[short] = tuple(dict.fromkeys((*table.get(short, ()), *leaves)))
            continue
        for part, leaf in zip(parts, leaves):
            table[part] = (module,)
            # The last part of Qwen v1's c_proj is that of two modules.
            table.setdefault(leaf, (module if short == "c_proj" else short,))
    return table


def _last(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _renamed(name: str, table: Mapping[str, tuple[str, ...]]) -> list[str]:
    for old in sorted(table, key=len, reverse=True):
        if name == old or name.endswith("." + old):
            head = name[: -len(old)]
            for layers in ("transformer.h", "transformer.layers"):
                if layers in table and head.startswith(layers + "."):
                    head = table[layers][0] + head[len(layers) :]
            return [head + new for new in table[old]]
    return [name]


def _in_pattern(expression: str, table: Mapping[str, tuple[str, ...]]) -> str:
    """The module names inside a regular expression, exchanged."""
    names = "|".join(sorted((re.escape(name) for name in table), key=len, reverse=True))

    def new(match: re.Match) -> str:
        found = table[match[0]]
        return found[0] if len(found) == 1 else f"(?:{'|'.join(found)})"

    return re.sub(rf"(?<![A-Za-z0-9_])(?:{names})(?![A-Za-z0-9_])", new, expression)
