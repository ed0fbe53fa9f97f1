"""`make lite`: answer prompts with exported graphs. Their meta.json knows every shape, so that none has to be repeated."""

from __future__ import annotations

import os
from pathlib import Path

from research.core.config.schema import Config, MindirConfig
from research.core.errors import ConfigError, UserError, require_file
from research.core.generation.sampling import Sampling
from research.core.launch.environment import place
from research.core.launch.ranks import launch, needs_launch
from research.core.mindspore import lite
from research.core.mindspore.mindir import INC, TOKENIZER, Meta, read_meta
from research.core.run.folder import write_text
from research.core.text.tokenizer import load_tokenizer
from research.core.weights.generation import GenerationDefaults
from research.tasks import predict
from research.tasks.answering import Model, choose_sampling
from research.tasks.export_mindir import OUTPUT
from research.tasks.sources import resolve_template, say

LITE_INI = "lite.ini"


def run(cfg: Config) -> int:
    """Answer with the graphs in ``weights=`` (the OUTPUT of the export; default ``output``)."""
    if needs_launch(cfg):
        return launch(cfg)
    root = Path(cfg.weights or OUTPUT).expanduser()
    meta = read_meta(root)
    check_shapes(asked(cfg.mindir), meta)
    return answer(cfg, load_graphs(cfg, meta, root))


def answer(cfg: Config, model: Model) -> int:
    """What ``make predict`` does with a model, as many prompts at a time as the graphs have rows."""
    cfg.generate.batch = model.runner.shapes.batch
    return predict.answer(cfg, model)


def load_graphs(cfg: Config, meta: Meta, root: Path, ge_configs: list[Path] | None = None) -> Model:
    """Graphs, vocabulary, template and sampling of an export. ``ge_configs``: the user's own files for MindSpore Lite."""
    rank = this_rank(meta)
    tokenizer = load_tokenizer(cfg.tokenizer or root / TOKENIZER, meta.family)
    if tokenizer.fingerprint != meta.tokenizer:
        raise ConfigError(
            f"the graphs were exported with the vocabulary {meta.tokenizer[:12]}, this one is {tokenizer.fingerprint[:12]}",
            where=cfg.tokenizer or root / TOKENIZER,
            hint="leave TOKENIZER (--vocab_file) out: the export kept its own",
        )
    cfg.model.family = meta.family
    cfg.model.template = cfg.model.template or meta.template_name
    template = resolve_template(cfg, root / TOKENIZER)
    if not cfg.generate.raw and template.fingerprint != meta.template:
        raise ConfigError(
            f"the weights were trained with the template {meta.template[:12]}, {template.name} is {template.fingerprint[:12]}",
            where=root,
            hint='ARGS="model.template=<the run\'s>", or generate.raw=true',
        )
    if cfg.generate.system is None:
        cfg.generate.system = meta.system
    sampling: Sampling = choose_sampling(cfg, GenerationDefaults(eos_ids=meta.eos_ids, **meta.sampling))

    if lite.has_lite():
        configs = ge_configs if ge_configs is not None else [write_lite_ini(meta, root)] if meta.target != "CPU" else []
        device = cfg.device.index if cfg.device.index is not None else int(os.environ.get("DEVICE_ID") or 0)
        runtime = lite.LiteRuntime(meta.target, device, configs)
    else:
        if ge_configs:
            say(
                f"note: {' '.join(map(str, ge_configs))} has no effect: it configures MindSpore Lite, which is not installed"
            )
        runtime = lite.GraphCellRuntime(cfg.device)
    runner = lite.LiteRunner(meta, root, runtime, rank)
    if INC not in meta.graphs:
        say("note: exported with mindir.past=false: every new token computes the whole sequence again")
    say(f"{meta.model} from {root}, {meta.dtype} ({runtime.name})")
    return Model(runner, tokenizer, template, sampling, meta.eos_ids)


def this_rank(meta: Meta) -> int:
    """This process's rank, when as many were started as the export has. Raises :class:`ConfigError`."""
    here = place()
    size, rank = (1, 0) if here is None else (here.size, here.rank)
    if size != meta.ranks:
        raise ConfigError(
            f"exported for {meta.ranks} ranks, {size} started",
            where="the graphs",
            hint=f"CARDS={meta.ranks}, or scripts/msrun_launcher.sh with as many workers",
        )
    return rank


def asked(mindir: MindirConfig) -> dict[str, object]:
    """The shapes that somebody set."""
    plain = MindirConfig()
    return {key: value for key, value in vars(mindir).items() if value != getattr(plain, key)}


def check_shapes(wanted: dict[str, object], meta: Meta, flags: dict[str, str] | None = None) -> None:
    """Raise :class:`ConfigError` with the value to use for a shape that is not the graphs'. ``flags``: what each is called
    on a script's command line."""
    for key, value in wanted.items():
        exported = getattr(meta.shapes, key)
        if value != exported:
            name = f"--{flags[key]} " if flags else f"mindir.{key}="
            raise ConfigError(
                f"the graphs were exported with {name}{exported}",
                where=f"{name}{value}",
                hint=f"{name}{exported}, or leave it out; another shape needs another `make export BACKEND=mindspore`",
            )


def write_lite_ini(meta: Meta, root: Path) -> Path:
    """``lite.ini`` beside the graphs, for Ascend; one that is there stays as it is."""
    path = root / LITE_INI
    if not path.exists():
        table = os.environ.get("RANK_TABLE_FILE") if meta.ranks > 1 else None
        write_text(path, lite.lite_ini(meta, table))
        say(f"wrote {path}")
    return path


def ge_config_files(names: str) -> list[Path]:
    """The files of ``--ge_config_path``: one for both graphs, or full,inc."""
    files = [require_file(name, "configuration of MindSpore Lite") for name in names.split(",")]
    if len(files) > 2:
        raise UserError(f"{len(files)} files, two graphs", where=f"--ge_config_path {names}", hint="full.ini,inc.ini")
    return files
