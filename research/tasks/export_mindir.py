"""`make export BACKEND=mindspore`: prefill and decode step as MINDIR graphs, with what `make lite` needs beside them."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from pathlib import Path

from research.core.config.compose import from_yaml
from research.core.config.schema import Config
from research.core.errors import ConfigError, WeightsError
from research.core.mindspore.mindir import FULL, INC, META, TOKENIZER, GraphShapes, Meta
from research.core.spec import spec_to_hf
from research.core.weights.generation import read_generation_defaults
from research.tasks.answering import check_fingerprints, end_tokens
from research.tasks.exporting import note, tokenizer_files
from research.tasks.framework import half
from research.tasks.sources import (
    check_architecture,
    check_grid,
    opening,
    read_note,
    resolve_template,
    resolve_tokenizer,
    resolve_weights,
    say,
)

OUTPUT = "output"  # the documents' folder


def run(cfg: Config) -> int:
    """Export the weights of ``cfg`` on one rank. Raises UserErrors before anything is written."""
    if cfg.model.embedding:
        raise ConfigError("an embedding model has no graphs for generation", where=f"model={cfg.model.name}")
    if cfg.parallel.cards * cfg.parallel.nodes > 1:
        raise ConfigError(
            "graphs of several tensor-parallel ranks are not exported in this version",
            where=f"parallel.cards={cfg.parallel.cards}",
            hint="CARDS=1: weights in shards are joined",
        )
    root = Path(cfg.output or OUTPUT).expanduser()
    for name in (FULL, INC, META, TOKENIZER):
        if (root / name).exists():
            raise ConfigError("exists already", where=root / name, hint="OUTPUT=<another folder>, or move it away")
    shapes = graph_shapes(cfg)
    weights = resolve_weights(cfg)
    if weights is None:
        raise WeightsError("there are no weights to export", hint="WEIGHTS=<folder>")
    check_grid(cfg, weights)
    if (weights / "config.json").is_file():
        check_architecture(cfg, weights)
    beside = weights if weights.is_dir() else weights.parent
    tokenizer, template = resolve_tokenizer(cfg, beside), resolve_template(cfg, beside)
    check_fingerprints(beside, tokenizer, template, raw=cfg.generate.raw)
    defaults = read_generation_defaults(beside)

    load = half("mindspore", "load_runner").load_plain
    decoder, target = load(weights, cfg.generate, cfg.device, cfg.adapter, opening(cfg))
    check_architecture(cfg, weights, decoder.spec)
    if tokenizer.vocab_size > decoder.spec.vocab:
        raise WeightsError(
            f"the vocabulary has {tokenizer.vocab_size} tokens, the weights only {decoder.spec.vocab}",
            where=cfg.tokenizer or beside,
            hint="TOKENIZER=<the folder that belongs to these weights>",
        )
    shapes.check(decoder.spec)
    root.mkdir(parents=True, exist_ok=True)
    aside = root / f".export-{os.getpid()}"
    try:
        aside.mkdir()
        graphs = half("mindspore", "export").export_graphs(decoder, shapes, aside, log=say)
        (aside / TOKENIZER).mkdir()
        for name, content in tokenizer_files(tokenizer, template).items():
            (aside / TOKENIZER / name).write_bytes(content)
        system = read_note(beside).get("system")  # what the weights were trained with; None: the template's own
        dtype = str(decoder.dtype).lower()
        meta = Meta(
            model=cfg.model.name,
            family=cfg.model.family,
            config=spec_to_hf(decoder.spec, dtype),
            shapes=shapes,
            dtype=dtype,
            target=target,
            eos_ids=end_tokens(cfg, defaults, tokenizer),
            sampling={key: getattr(defaults, key) for key in ("temperature", "top_k", "top_p", "repetition_penalty")},
            tokenizer=tokenizer.fingerprint,
            template=template.fingerprint,
            template_name=note(cfg, tokenizer, template)["template_name"],
            system=system if cfg.generate.system is None else cfg.generate.system,
            graphs=graphs,
            mindspore=version("mindspore"),
            weights=str(weights),
        )
        (aside / META).write_text(meta.text(), encoding="utf-8")
        for name in (*graphs, TOKENIZER, META):  # what says that all is there comes last
            (aside / name).rename(root / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    say(f"exported {cfg.model.name} from {weights}, {_words(shapes)}: {root}")
    say("Export Over!")  # what the documents wait for
    return 0


def graph_shapes(cfg: Config) -> GraphShapes:
    """The shapes that ``mindir`` asks for; without a length those of the run that is exported."""
    mindir, length = cfg.mindir, cfg.mindir.seq_length
    if length is None:
        trained = Path(cfg.run).expanduser() / "config.yaml" if cfg.run else None
        length = (from_yaml(trained) if trained is not None and trained.is_file() else cfg).data.seq_length
    return GraphShapes(
        length, mindir.batch, mindir.past, mindir.dynamic, mindir.paged, mindir.block_size, mindir.num_blocks
    )


def _words(shapes: GraphShapes) -> str:
    text = f"{shapes.batch} x {shapes.seq_length} tokens"
    text = f"up to {text}" if shapes.dynamic else text
    return f"{text} in {shapes.num_blocks} blocks of {shapes.block_size}" if shapes.paged else text
