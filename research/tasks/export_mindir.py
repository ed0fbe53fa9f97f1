"""`make export BACKEND=mindspore`: prefill and decode step as MINDIR graphs, with what `make lite` needs beside them."""

from __future__ import annotations

import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path

from research.core.config.compose import from_yaml
from research.core.config.schema import Config
from research.core.errors import ConfigError, WeightsError
from research.core.launch.ranks import launch, needs_launch
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
    """Export the weights of ``cfg``: every rank the graphs of its part. Raises UserErrors before anything is written."""
    if needs_launch(cfg):
        return launch(cfg)
    if cfg.model.embedding:
        raise ConfigError("an embedding model has no graphs for generation", where=f"model={cfg.model.name}")
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
    decoder, world = load(weights, cfg.generate, cfg.device, cfg.adapter, opening(cfg))
    check_architecture(cfg, weights, decoder.spec)
    if tokenizer.vocab_size > decoder.spec.vocab:
        raise WeightsError(
            f"the vocabulary has {tokenizer.vocab_size} tokens, the weights only {decoder.spec.vocab}",
            where=cfg.tokenizer or beside,
            hint="TOKENIZER=<the folder that belongs to these weights>",
        )
    shapes.check(decoder.spec)
    world.folder = root
    aside = root / f".export-{world.tell(os.getpid())}"

    def finish() -> str:
        """The main rank's: wait for everybody's graphs, put the rest beside them, and give all of it its name."""
        for rank in range(world.size):
            while not done_file(aside, rank).is_file():  # a rank that fails ends this one
                time.sleep(0.2)
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
            target=world.target,
            eos_ids=end_tokens(cfg, defaults, tokenizer),
            sampling={key: getattr(defaults, key) for key in ("temperature", "top_k", "top_p", "repetition_penalty")},
            tokenizer=tokenizer.fingerprint,
            template=template.fingerprint,
            template_name=note(cfg, tokenizer, template)["template_name"],
            system=system if cfg.generate.system is None else cfg.generate.system,
            graphs=graphs,
            ranks=world.size,
            mindspore=version("mindspore"),
            weights=str(weights),
        )
        (aside / META).write_text(meta.text(), encoding="utf-8")
        for name in (*graphs, TOKENIZER, META):  # what says that all is there comes last
            (aside / name).rename(root / name)
        return str(root)

    try:
        aside.mkdir(parents=True, exist_ok=True)
        graphs = half("mindspore", "export").export_graphs(decoder, shapes, aside, world.rank, log=say)
        done_file(aside, world.rank).touch()
        world.after_main("export", finish)
    finally:
        if world.main:
            shutil.rmtree(aside, ignore_errors=True)
    ranks = f" on {world.size} ranks" if world.size > 1 else ""
    say(f"exported {cfg.model.name} from {weights}, {_words(shapes)}{ranks}: {root}")
    say("Export Over!")  # what the documents wait for
    return 0


def done_file(aside: Path, rank: int) -> Path:
    """Says that a rank's graphs are written."""
    return aside / f"rank_{rank}.done"


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
