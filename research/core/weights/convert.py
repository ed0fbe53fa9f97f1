"""From one layout to another: Hugging Face <-> MindFormers, or either to itself with another dtype or layout."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from research.core.errors import ConfigError, WeightsError
from research.core.weights.blocks import Copy, Stored, compose, hf_layout
from research.core.weights.cast import Rounding
from research.core.weights.compare import check_copies, show
from research.core.weights.formats.safetensors import HF_METADATA, MINDSPORE_METADATA
from research.core.weights.layouts.mindformers import CONCAT, mindformers_layout
from research.core.weights.opened import HUGGINGFACE, MINDFORMERS, NOTHING_SAID, OpenOptions, OpenWeights, open_weights
from research.core.weights.plan import CKPT, SAFETENSORS, Plan, Target, TargetFile, index_file, shard_files
from research.core.weights.record import file_mark, make_record, record_name, to_bytes
from research.core.weights.runner import run_plan
from research.core.weights.staging import Written, check_apart
from research.core.weights.tensors import TORCH_NAMES, Entry, tensor_bytes
from research.core.weights.write import SHARD_BYTES

# Files of a Hugging Face folder that go where the weights go.
SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "*.tiktoken",
    "special_tokens_map.json", "added_tokens.json", "chat_template.j*", "*.py", "workbench.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
_ORDER = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class ConvertOptions:
    """What to write. ``concat``, ``gmm``, ``tied_head`` and ``files`` are of the MindFormers side."""

    to: str = MINDFORMERS
    dtype: str | None = None  # F32 | BF16 | F16; None keeps each tensor's
    concat: str = "none"
    gmm: bool = False
    tied_head: str = "copy"  # copy | omit: a tied head as lm_head.weight too, or left out
    files: str = CKPT  # ckpt | safetensors, where the target's name does not say
    shard_bytes: int = SHARD_BYTES
    allow_overflow: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Summary:
    """What a conversion did, for the table at its end."""

    target: Path
    record: Path
    tensors: int
    bytes: int
    source: Mapping
    layout: Mapping
    dtypes: Mapping[str, int]
    rounding: Rounding
    unused: Sequence[str] = ()
    missing: Sequence[str] = ()
    tied: Sequence[str] = ()
    notes: Sequence[str] = field(default=())

    def lines(self) -> list[str]:
        """The table: tensors mapped, unused, missing, tied, and what rounding did."""
        rows = [
            ("mapped", str(self.tensors), f"{self.bytes / 1e9:.3f} GB, " + _counted(self.dtypes)),
            ("unused", str(len(self.unused)), _names(self.unused)),
            ("missing", str(len(self.missing)), _names(self.missing)),
            ("tied", str(len(self.tied)), _names(self.tied)),
        ]
        if self.rounding.rounded:
            lost = f"{self.rounding.overflowed} overflowed, {self.rounding.zeroed} became zero"
            rows.append(("rounded", f"{self.rounding.rounded}", f"of {self.rounding.values} values; {lost}"))
        table = [f"  {name:<8} {count:>6}  {text}".rstrip() for name, count, text in rows]
        return [f"{_layout(self.source)} -> {_layout(self.layout)}", *table, *self.notes, f"record: {self.record}"]


def _layout(facts: Mapping) -> str:
    extra = [f"{key}={facts[key]}" for key in ("qkv_concat", "use_gmm", "tied_head") if key in facts]
    return " ".join([f"{facts['names']} {facts['model_type']} ({facts['files']})", *extra])


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _names(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def convert(
    source: str | os.PathLike | OpenWeights,
    target: str | os.PathLike,
    options: ConvertOptions,
    opening: OpenOptions = NOTHING_SAID,
    *,
    threads: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Convert ``source`` to ``target``; raises :class:`WeightsError` and leaves nothing behind when something is wrong.

    The target is a Hugging Face folder, a ``.ckpt`` or ``.safetensors`` file of MindFormers, or (no suffix) a folder
    that gets ``rank_0/checkpoint_0.<files>``.
    """
    target = Path(target).expanduser()
    check_options(options)
    check_apart(source.path if isinstance(source, OpenWeights) else _root(Path(source).expanduser()), target)
    opened = source if isinstance(source, OpenWeights) else open_weights(source, opening)
    check_apart(opened.path, target)
    check_copies(opened, log)
    plan, single, layout, tied = make_plan(opened, target, options)
    made = _Making(opened, target, options, layout, tied, plan, single)
    results = run_plan(
        plan,
        target,
        single_file=single,
        finish=made.record,
        allow_overflow=options.allow_overflow,
        overwrite=options.overwrite,
        threads=threads,
        progress=progress,
        log=log,
    )
    return made.summary(results)


def _root(path: Path) -> Path:
    # Any file of a Hugging Face folder may stand for it; a MindFormers file is its own source.
    return (
        path.parent if path.is_file() and (path.parent / "config.json").is_file() and path.suffix != ".ckpt" else path
    )


def check_options(options: ConvertOptions) -> None:
    """Raise :class:`ConfigError` for a value that is no choice."""
    choices = {
        "to": (HUGGINGFACE, MINDFORMERS),
        "concat": CONCAT,
        "tied_head": ("copy", "omit"),
        "files": (CKPT, SAFETENSORS),
    }
    for name, allowed in choices.items():
        value = getattr(options, name)
        if value not in allowed:
            raise ConfigError(f"{value!r} is no choice", where=f"convert.{name}", hint=" | ".join(allowed))
    if options.to == HUGGINGFACE and options.concat != "none":
        raise ConfigError(
            "Hugging Face's layout has no joined q, k, v to write", where="convert.concat", hint="convert.concat=none"
        )


# --- the plan ---------------------------------------------------------------------------------------------------------


def make_plan(opened: OpenWeights, target: Path, options: ConvertOptions) -> tuple[Plan, bool, dict, list[str]]:
    """-> (plan, whether it is a single file, the target's layout in words, names that are tied)."""
    spec = opened.spec
    sources = opened.sources()
    head = any(name == "lm_head.weight" for name in sources)
    if options.to == HUGGINGFACE:
        stored = hf_layout(spec, head or spec.tied)
        layout = {"names": HUGGINGFACE, "model_type": spec.model_type, "files": SAFETENSORS}
    else:
        if not (head or spec.tied):
            raise WeightsError("an embedding model has no MindFormers layout (no lm_head.weight)", where=opened.path)
        ffn = "none" if spec.moe else options.concat
        stored = mindformers_layout(spec, options.concat, ffn, options.tied_head == "copy", options.gmm)
        layout = {"names": MINDFORMERS, "model_type": spec.model_type, "files": options.files}
        layout["qkv_concat"] = options.concat
        if spec.moe:
            layout["use_gmm"] = options.gmm
        if spec.tied:
            layout["tied_head"] = options.tied_head
    targets = []
    for tensor in stored:
        copies = compose(tensor, sources)
        dtype = options.dtype or common_dtype(opened.entries, copies)
        targets.append(Target(tensor, dtype, how_made(tensor, copies, opened.entries, dtype)))
    tied = ["lm_head.weight = " + stored[0].name] if spec.tied else []
    single = False
    if options.to == HUGGINGFACE:
        files = shard_files(targets, options.shard_bytes, HF_METADATA)
    else:
        files, single, layout["files"] = _mindformers_file(target, targets, options)
    entries = {handle: opened.entries[handle] for name in sources for handle, _ in sources[name]}
    extra = {} if single else _side_files(opened, target, options, files)
    return Plan(files, entries, sources, extra), single, layout, tied


def _mindformers_file(target: Path, targets: list[Target], options: ConvertOptions) -> tuple[list, bool, str]:
    kind = {".ckpt": CKPT, ".safetensors": SAFETENSORS}.get(target.suffix)
    single = kind is not None
    kind = kind or options.files
    path = target.name if single else f"rank_0/checkpoint_0.{kind}"
    if kind == SAFETENSORS:
        targets = sorted(targets, key=lambda item: item.name)  # as MindSpore writes them
    return [TargetFile(path, kind, tuple(targets), MINDSPORE_METADATA if kind == SAFETENSORS else {})], single, kind


def common_dtype(entries: Mapping, copies: Sequence[Copy]) -> str:
    """The dtype that holds the values of all sources."""
    """The widest dtype among the sources of ``copies``."""
    kinds = {entries[copy.source].dtype for copy in copies}
    if kinds == {"BF16", "F16"}:
        return "F32"  # neither holds the other's values
    return min(kinds, key=_ORDER.index)


def how_made(tensor: Stored, copies: Sequence[Copy], entries: Mapping, dtype: str) -> str:
    """The recipe in a few words."""
    handles = dict.fromkeys(copy.source for copy in copies)
    words = []
    if any(block.axes and None in block.axes for block in tensor.blocks):
        words.append("stack")
    elif any(step > 1 for block in tensor.blocks for step in block.steps):
        words.append("interleave")
    elif len(handles) > 1:
        words.append("join")
    elif len(copies) == 1 and _whole(copies[0], entries):
        words.append("copy")
    else:
        words.append("rows")
    if any(copy.order != tuple(sorted(copy.order)) for copy in copies):
        words.append("transpose")
    if any(entries[handle].dtype != dtype for handle in handles):
        words.append("cast")
    return " + ".join(words)


def sources_of(target: Target, sources: Mapping) -> list[str]:
    """Names of the source's tensors that a target is made from."""
    return [show(handle) for handle in dict.fromkeys(copy.source for copy in compose(target.stored, sources))]


def _whole(copy: Copy, entries: Mapping[object, Entry]) -> bool:
    return all(s.start == 0 and s.stop == n and s.step == 1 for s, n in zip(copy.of, entries[copy.source].shape))


def _side_files(
    opened: OpenWeights, target: Path, options: ConvertOptions, files: Sequence[TargetFile]
) -> dict[str, bytes | Path]:
    config = dict(opened.config)
    kinds = [t.dtype for file in files for t in file.tensors]
    name = TORCH_NAMES[max(set(kinds), key=kinds.count)]
    for key in ("torch_dtype", "dtype"):
        if key in config or key == "torch_dtype":
            config[key] = name
    out: dict[str, bytes | Path] = {"config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
    if options.to == HUGGINGFACE and len(files) > 1:
        out["model.safetensors.index.json"] = index_file(files)
    if opened.sides is not None and opened.sides.resolve() != target.resolve():
        for pattern in SIDE_FILES:
            for path in sorted(opened.sides.glob(pattern)):
                if path.is_file():
                    out[path.name] = path
    return {name: content for name, content in out.items() if options.overwrite or not (target / name).exists()}


# --- what is said about it ----------------------------------------------------------------------------------------------


class _Making:
    """Keeps what the record and the table need."""

    def __init__(self, opened, target: Path, options: ConvertOptions, layout, tied, plan: Plan, single: bool):
        self.opened, self.target, self.options, self.layout, self.tied = opened, target, options, layout, tied
        self.plan, self.single = plan, single
        self.name = record_name(target, single)

    def record(self, written: Sequence[Written], staged: Path) -> dict[str, bytes]:
        sources = self.plan.sources
        made_from = {item.target.name: sources_of(item.target, sources) for item in written}
        options = {key: value for key, value in asdict(self.options).items() if key not in ("overwrite", "shard_bytes")}
        record = make_record(
            source={"path": str(self.opened.path), "layout": self.opened.facts},
            target={
                "file": self.target.name if self.single else None,
                "layout": self.layout,
                "marks": {Path(file.path).name: file_mark(staged / file.path) for file in self.plan.files},
            },
            options=options,
            written=written,
            made_from=made_from,
            unused=self.opened.unused,
            missing=self.opened.missing,
            tied=self.tied,
            config=self.opened.config,
        )
        return {self.name: to_bytes(record)}

    def summary(self, written: Sequence[Written]) -> Summary:
        rounding, kinds = Rounding(), {}
        for item in written:
            rounding.add(item.rounding)
            kinds[item.target.dtype] = kinds.get(item.target.dtype, 0) + 1
        return Summary(
            target=self.target,
            record=(self.target.parent if self.single else self.target) / self.name,
            tensors=len(written),
            bytes=sum(tensor_bytes(item.target.dtype, item.target.shape) for item in written),
            source=self.opened.facts,
            layout=self.layout,
            dtypes=kinds,
            rounding=rounding,
            unused=self.opened.unused,
            missing=self.opened.missing,
            tied=self.tied,
        )
