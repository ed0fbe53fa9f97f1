"""LoRA adapters from PEFT's files to MindFormers' and back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from research.core.spec import DecoderSpec
from research.core.weights.blocks import compose
from research.core.weights.cast import Rounding
from research.core.weights.compare import check_copies
from research.core.weights.convert import ConvertOptions, Summary, check_options, common_dtype, how_made, sources_of
from research.core.weights.formats.safetensors import HF_METADATA, MINDSPORE_METADATA
from research.core.weights.layouts.adapter import CONFIG, PEFT, SAFE, open_adapter
from research.core.weights.opened import HUGGINGFACE, MINDFORMERS, NOTHING_SAID, OpenOptions
from research.core.weights.plan import CKPT, SAFETENSORS, Plan, Target, TargetFile
from research.core.weights.record import file_mark, make_record, record_name, to_bytes
from research.core.weights.runner import run_plan
from research.core.weights.staging import Written, check_apart


def convert_adapter(
    source: str | os.PathLike,
    target: str | os.PathLike,
    options: ConvertOptions,
    opening: OpenOptions = NOTHING_SAID,
    spec: DecoderSpec | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Convert an adapter; ``spec`` of its base model, where known, is checked against every tensor.

    The target of ``to=mindformers`` is a ``.ckpt`` or ``.safetensors`` file or a folder, with ``adapter_config.json`` (module
    names translated) beside it; of ``to=huggingface`` a PEFT folder. Raises :class:`WeightsError`.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    check_options(options)
    in_folder = source.is_file() and source.name == SAFE
    check_apart(source.parent if in_folder else source, target)
    adapter = open_adapter(source, opening, spec)
    opened = adapter.opened
    check_copies(opened, log)
    to = MINDFORMERS if options.to == MINDFORMERS else PEFT
    tensors, sources = adapter.layout(to), opened.sources()
    targets = []
    for stored in tensors:
        copies = compose(stored, sources)
        dtype = options.dtype or common_dtype(opened.entries, copies)
        targets.append(Target(stored, dtype, how_made(stored, copies, opened.entries, dtype)))
    file, single = _file(target, targets, options)
    config = (json.dumps(adapter.config_for(to), indent=2, ensure_ascii=False) + "\n").encode()
    plan = Plan([file], opened.entries, sources, {CONFIG: config})
    layout = {**opened.facts, "names": to, "files": file.format}
    name = record_name(target, single)

    def record(written: Sequence[Written], staged: Path) -> dict[str, bytes]:
        marks = {Path(file.path).name: file_mark(staged / file.path)}
        return {
            name: to_bytes(
                make_record(
                    source={"path": str(source), "layout": opened.facts},
                    target={"file": target.name if single else None, "layout": layout, "marks": marks},
                    options={"to": options.to, "dtype": options.dtype},
                    written=written,
                    made_from={item.target.name: sources_of(item.target, sources) for item in written},
                    unused=opened.unused,
                    missing=[],
                    tied=[],
                    config=adapter.config_for(to),
                )
            )
        }

    written = run_plan(
        plan,
        target,
        single_file=single,
        finish=record,
        allow_overflow=options.allow_overflow,
        overwrite=options.overwrite,
        log=log,
    )
    rounding = Rounding()
    for item in written:
        rounding.add(item.rounding)
    return Summary(
        target=target,
        record=(target.parent if single else target) / name,
        tensors=len(written),
        bytes=sum(item.target.bytes for item in written),
        source=opened.facts,
        layout=layout,
        dtypes={kind: sum(i.target.dtype == kind for i in written) for kind in {i.target.dtype for i in written}},
        rounding=rounding,
        unused=opened.unused,
    )


def _file(target: Path, targets: list[Target], options: ConvertOptions) -> tuple[TargetFile, bool]:
    if options.to == HUGGINGFACE:
        return TargetFile(SAFE, SAFETENSORS, tuple(targets), HF_METADATA), False
    kind = {".ckpt": CKPT, ".safetensors": SAFETENSORS}.get(target.suffix)
    path = target.name if kind else f"adapter_model.{options.files}"
    kind, single = kind or options.files, kind is not None
    return TargetFile(path, kind, tuple(targets), MINDSPORE_METADATA if kind == SAFETENSORS else {}), single
