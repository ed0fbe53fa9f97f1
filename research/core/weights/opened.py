"""Weights of any layout, opened: which logical tensor lies where, checked by name and shape before anything is read."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from research.core.errors import WeightsError
from research.core.spec import DecoderSpec, spec_from_hf
from research.core.weights.blocks import Block, Stored, hf_layout, index_sources
from research.core.weights.cast import FLOATS
from research.core.weights.config_source import ConfigSource, find_config
from research.core.weights.folder import WeightFolder, plan_reading, read_config
from research.core.weights.formats import mindspore, safetensors, torch_bin
from research.core.weights.layouts.mindformers import (
    CONCAT,
    ROUTED,
    embedding_name,
    mindformers_layout,
)
from research.core.weights.record import RecordedLayout, recorded_layout
from research.core.weights.tensors import Entry

HUGGINGFACE, MINDFORMERS = "huggingface", "mindformers"

# What MindSpore's training checkpoints hold beside the weights: optimiser state, counters, loss scaling.
TRAINING_STATE = re.compile(
    r"(adam_[mv]|moments?|accu_grads|fast_gamma)\..*|.*\.(moment1|moment2|accum)"
    r"|epoch_num|step_num|global_steps?|loss_scale|scale_sense|learning_rate|lr|beta[12]_power"
    r"|(current|last_overflow)_iterator_step|.*_current_overflow_.*"
)


@dataclass
class OpenWeights:
    """Weights that can be read, whatever their layout.

    ``tensors``: each stored tensor's handle in ``entries`` and its blocks. ``copies``: pairs of handles that must hold
    the same bytes (a tied head stored beside its embedding). ``facts``: the layout in words, for conversion.json.
    ``sides``: folder whose further files (vocabulary, generation settings) belong to the weights.
    """

    path: Path
    kind: str
    spec: DecoderSpec | None  # None: an adapter
    config: dict
    entries: dict[Hashable, Entry]
    tensors: list[tuple[Hashable, Stored]]
    facts: dict
    copies: list[tuple[Hashable, Hashable]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    sides: Path | None = None

    def sources(self) -> Mapping[str, list[tuple[Hashable, Block]]]:
        """For :class:`research.core.weights.plan.Plan`."""
        return index_sources(self.tensors)

    def used(self) -> dict[Hashable, Entry]:
        return {handle: self.entries[handle] for handle, _ in self.tensors}


@dataclass(frozen=True)
class OpenOptions:
    """What a person says about weights that the files do not say themselves; None: not said."""

    concat: str | None = None  # none | stacked | grouped
    gmm: bool | None = None  # experts' two last axes exchanged
    config: str | None = None  # config.json or a folder with one, for MindFormers files
    strategy: str | None = None  # MindSpore strategy file or folder of rank folders, when it is not beside them
    allow_pickle: bool = False
    presets: Mapping | ConfigSource | None = None  # of the output folder or the named MODEL, the last resort
    head: bool = True  # False: an output matrix may be absent and is not read (embedding models)


NOTHING_SAID = OpenOptions()


def open_weights(path: str | os.PathLike, options: OpenOptions = NOTHING_SAID) -> OpenWeights:
    """Open a Hugging Face folder, a MindFormers file or folder with ``rank_0/``, or shards of either.

    Raises :class:`WeightsError` for everything that is wrong with it.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise WeightsError("not found", where=path, hint="check the path")
    from research.core.weights import sharded  # it opens shards as whole models, with the functions below

    if sharded.kind_of(path) is not None:
        return sharded.open_sharded(path, options)
    files = mindformers_files(path)
    if files is not None:
        entries, others = read_mindformers(files)
        if entries and all("lora_" in name for name in entries):
            raise _adapter(path)
        if _is_mindformers(entries):
            return open_mindformers(path, files, entries, others, options)
        if not _is_huggingface(entries):
            raise _unknown(path, entries)
    folder = path if path.is_dir() else path.parent
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise _adapter(folder)
    return open_huggingface(folder, options)


def _is_mindformers(names) -> bool:
    return any(
        re.search(r"(tok_embeddings|wte)\.embedding_weight$|\.attention\.(wq|wo|w_qkv)\.", name) for name in names
    )


def _is_huggingface(names) -> bool:
    return any(re.search(r"(embed_tokens|wte)\.weight$|\.self_attn\.|\.attn\.c_attn\.", name) for name in names)


def _unknown(path: Path, names) -> WeightsError:
    return WeightsError(
        "neither Hugging Face's nor MindFormers' names are in it",
        where=path,
        hint=f"its first tensors: {', '.join(list(names)[:3])}",
    )


def _adapter(path: Path) -> WeightsError:
    return WeightsError("this is a LoRA adapter, not a model", where=path, hint="convert.lora=true (--is_lora)")


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def open_huggingface(folder: Path, options: OpenOptions = NOTHING_SAID) -> OpenWeights:
    """A folder with config.json and safetensors, or (with the flag) ``.bin`` files."""
    config = read_config(folder)
    spec = spec_from_hf(config, where=str(folder / "config.json"))
    pickled = options.allow_pickle and not any(folder.glob("*.safetensors*"))
    if pickled:
        entries = torch_bin.read_entries(folder)
    else:
        found = WeightFolder(folder).entries
        entries = {name: safetensors.from_folder_entry(name, entry) for name, entry in found.items()}
    bare = str((config.get("architectures") or [""])[0]).endswith("Model")
    head = options.head and not (bare and "lm_head.weight" not in entries)
    plan = plan_reading(_Names(folder, entries), spec, head)
    stacked = any(tensor.name.endswith("mlp.experts.gate_up_proj") for tensor in plan.tensors)
    tensors = [(plan.names[stored.name], stored) for stored in hf_layout(spec, head, stacked)]
    copies = []
    if plan.tied_head is not None:
        copies.append((plan.names[_embedding(spec)], plan.tied_head))
    used = {handle for handle, _ in tensors} | {handle for pair in copies for handle in pair}
    opened = OpenWeights(
        path=folder,
        kind=HUGGINGFACE,
        spec=spec,
        config=config,
        entries=dict(entries),
        tensors=tensors,
        facts={
            "names": HUGGINGFACE,
            "model_type": spec.model_type,
            "files": "torch .bin" if pickled else "safetensors",
        },
        copies=copies,
        unused=[name for name in entries if name not in used],
        sides=folder,
    )
    _check_dtypes(opened)
    return opened


def _embedding(spec: DecoderSpec) -> str:
    return "transformer.wte.weight" if spec.model_type == "qwen" else "model.embed_tokens.weight"


@dataclass(frozen=True)
class _Names:
    """What :func:`plan_reading` asks of a folder."""

    folder: Path
    entries: Mapping[str, Entry]

    def names(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape


def _check_dtypes(opened: OpenWeights) -> None:
    for handle, _ in opened.tensors:
        if opened.entries[handle].dtype not in FLOATS:
            raise WeightsError(
                f"tensor {handle} is {opened.entries[handle].dtype}; quantised weights are not converted",
                where=opened.path,
                hint="the floating-point weights that they were made from",
            )


# --- MindFormers ------------------------------------------------------------------------------------------------------


def mindformers_files(path: Path) -> list[Path] | None:
    """The files of a MindFormers checkpoint at ``path``: the file itself, or ``rank_0/``'s last ``.ckpt`` by name, or its
    safetensors. None for a folder without any."""
    if path.is_file():
        return [path] if path.suffix in (".ckpt", ".safetensors") else None
    ranks = sorted(p for p in path.glob("rank_*") if p.is_dir())
    folder = ranks[0] if ranks else path
    checkpoints = sorted(folder.glob("*.ckpt"))
    if checkpoints:
        return checkpoints[-1:]  # as MindFormers chooses
    if ranks or not (path / "config.json").is_file():
        return sorted(folder.glob("*.safetensors")) or None
    return None


def read_mindformers(files: list[Path]) -> tuple[dict[str, Entry], list[str]]:
    """-> (name -> entry over all files, names of values that are no tensors)."""
    entries: dict[str, Entry] = {}
    others: list[str] = []
    for path in files:
        if path.suffix == ".ckpt":
            found, text = mindspore.read_entries(path)
            others += text
        else:
            found = safetensors.read_entries(path)
        for name in found.keys() & entries.keys():
            raise WeightsError(f"tensor {name} is in {entries[name].segments[0].path.name} too", where=path)
        entries |= found
    return entries, others


def open_mindformers(
    path: Path, files: list[Path], entries: dict[str, Entry], others: list[str], options: OpenOptions
) -> OpenWeights:
    """Match ``entries`` (read from ``files``, whole tensors) with the layout that they are of, by name and shape."""
    record = recorded_layout(files[0])
    source = find_config(path, options.config, record, options.presets)
    spec = spec_from_hf(source.config, where=source.where)
    if embedding_name(spec) not in entries:
        raise WeightsError(
            f"these are not the tensors of a {spec.model_type} model: {embedding_name(spec)} is not in it",
            where=path,
            hint=f"is {source.where} of the same model?",
        )
    concat = _concat(path, entries, spec, record, options)
    gmm = _gmm(path, entries, spec, record, options)
    head = "lm_head.weight" in entries
    has_gate_hidden = any(name.endswith("feed_forward.w_gate_hidden.weight") for name in entries)
    layout = mindformers_layout(spec, concat, concat if has_gate_hidden else "none", head, gmm)
    tensors = [(stored.name, stored) for stored in layout]
    unused = _check_names(path, entries, dict(tensors), source)
    copies = [(embedding_name(spec), "lm_head.weight")] if spec.tied and head else []
    opened = OpenWeights(
        path=path,
        kind=MINDFORMERS,
        spec=spec,
        config=source.config,
        entries=dict(entries),
        tensors=tensors,
        facts={
            "names": MINDFORMERS,
            "model_type": spec.model_type,
            "files": files[0].suffix.removeprefix("."),
            "qkv_concat": concat,
            **({"use_gmm": gmm} if spec.moe else {}),
            **({"tied_head": "copy" if head else "left out"} if spec.tied else {}),
        },
        copies=copies,
        unused=[*unused, *others],
        sides=source.folder,
    )
    _check_dtypes(opened)
    return opened


def _concat(path: Path, entries, spec: DecoderSpec, record: RecordedLayout | None, options: OpenOptions) -> str:
    joined = any(".attention.w_qkv." in name for name in entries)
    said = options.concat
    if said is not None and said not in CONCAT:
        raise WeightsError(f"{said!r} is no layout", where="qkv_concat", hint=" | ".join(CONCAT))
    if not joined:
        if said not in (None, "none"):
            raise WeightsError(
                f"q, k and v are apart in this file, not {said}", where=path, hint="qkv_concat=none, or leave it out"
            )
        return "none"
    if said == "none":
        raise WeightsError(
            "q, k and v are joined in this file (w_qkv)", where=path, hint="qkv_concat=stacked (r1.3) or grouped (r1.5)"
        )
    known = record.concat if record is not None else None
    if said is not None and known is not None and said != known:
        raise WeightsError(
            f"this file was written as {known}, not {said}",
            where=record.where,
            hint=f"qkv_concat={known}; or remove that record if the file is another one",
        )
    if said is None and known is None:
        raise UnknownConcat(
            "w_qkv has two layouts (stacked: MindFormers r1.3; grouped: r1.5 and MoE) that nothing in the file tells apart",
            where=path,
            hint="qkv_concat=stacked or grouped, or qkv_concat=probe to try both on a forward pass",
        )
    return said or known


class UnknownConcat(WeightsError):
    """The file's joined tensors can be read in two ways and nobody said which."""


def _gmm(path: Path, entries, spec: DecoderSpec, record: RecordedLayout | None, options: OpenOptions) -> bool:
    if spec.moe is None:
        return False
    shapes = {name: entry.shape for name, entry in entries.items() if ROUTED in name and name.endswith("w1.weight")}
    found = None
    if shapes and spec.moe.expert_ffn != spec.hidden:
        shape = next(iter(shapes.values()))
        found = shape[1:] == (spec.hidden, spec.moe.expert_ffn)
    if found is None:  # square experts: the shape does not say
        found = record.gmm if record is not None else None
    if options.gmm is not None and found is not None and options.gmm != found:
        raise WeightsError(
            f"the experts' matrices are {'not ' if options.gmm else ''}exchanged in this file",
            where=path,
            hint=f"use_gmm={str(found).lower()}",
        )
    if found is None and options.gmm is None:
        raise WeightsError(
            "the experts' matrices are square: whether their axes are exchanged cannot be seen",
            where=path,
            hint="use_gmm=true (written for grouped matmul) or false",
        )
    return bool(options.gmm if found is None else found)


def _check_names(path: Path, entries, expected: Mapping[str, Stored], source: ConfigSource) -> list[str]:
    """Names, then shapes; -> the names of training state that is passed over."""
    missing = [name for name in expected if name not in entries]
    more = [name for name in entries if name not in expected]
    unused = [name for name in more if TRAINING_STATE.fullmatch(name)]
    strange = [name for name in more if name not in set(unused)]
    hint = f"is {source.where} the config.json of this model?"
    if missing:
        also = f"; not expected: {some(strange)}" if strange else ""
        raise WeightsError(f"{len(missing)} tensors are missing: {some(missing)}{also}", where=path, hint=hint)
    if strange:
        raise WeightsError(
            f"{len(strange)} tensors do not belong to this model: {some(strange)}", where=path, hint=hint
        )
    for name, stored in expected.items():
        if entries[name].shape != stored.shape:
            raise WeightsError(
                f"tensor {name} has the wrong shape: expected {list(stored.shape)}, found {list(entries[name].shape)}",
                where=path,
                hint=hint,
            )
    return unused


def some(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
