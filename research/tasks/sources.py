"""Where weights, vocabulary and template of a run come from."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from research.core.config.compose import REPO, from_yaml
from research.core.config.schema import Config, ModelConfig
from research.core.errors import ConfigError, UserError, WeightsError
from research.core.spec import DecoderSpec, spec_from_hf
from research.core.weights.opened import OpenOptions
from research.registry import family, model_config, model_files, model_spec

NOTE_FILE = "workbench.json"  # beside exported weights: model name, template, fingerprints


def say(text: str) -> None:
    """A line for the person at the terminal; stdout stays free for answers."""
    print(text, file=sys.stderr, flush=True)


# --- weights ----------------------------------------------------------------------------------------------------


def resolve_weights(cfg: Config) -> Path | None:
    """The folder in Hugging Face format to start from, or None when the model is built from scratch.

    With ``backend=mindspore`` any other layout is returned as it is, a MindFormers file too. ``weights=`` may be such a
    folder, a run folder (its ``weights/``, or base weights and ``adapter/`` of a LoRA run,
    which then sets ``cfg.adapter``), or a hub name. Without it: released models come from ``weights/<model>`` or the hub;
    the tiny ones from scratch when they are trained, else from their newest run. Raises :class:`WeightsError`.
    """
    if cfg.weights:
        return _given(cfg, cfg.weights)
    if cfg.task.name in ("predict", "chat", "serve", "export", "merge") and cfg.run:
        return _given(cfg, cfg.run)
    scratch = cfg.train.from_scratch
    if cfg.task.name in ("pretrain", "finetune") and (
        scratch or (scratch is None and (cfg.task.name == "pretrain" or cfg.model.hub_id is None))
    ):
        return None
    if cfg.model.hub_id is not None:
        fetched = REPO / "weights" / cfg.model.name  # by `make weights`
        return fetched if (fetched / "config.json").is_file() else from_hub(cfg.model.hub_id)
    newest = newest_run(cfg.model.name)
    if newest is None:
        raise WeightsError(
            f"{cfg.model.name} has no published weights and no run here yet",
            where=f"task={cfg.task.name}",
            hint=f"make finetune MODEL={cfg.model.name}, or WEIGHTS=<folder>",
        )
    say(f"weights: {newest} (the newest run of {cfg.model.name})")
    return _given(cfg, str(newest))


def _given(cfg: Config, name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.exists():
        if name.count("/") == 1 and not name.startswith((".", "/", "~")):
            return from_hub(name)
        raise WeightsError("weight folder not found", where=folder, hint="WEIGHTS=<folder with config.json>")
    if not folder.is_dir():
        if cfg.backend == "mindspore":
            return folder  # a MindFormers file, which is opened as it is
        raise WeightsError(
            "torch reads weights from a folder, this is a file",
            where=folder,
            hint=f"WEIGHTS={folder.parent}, `make convert` for a MindFormers file, or BACKEND=mindspore",
        )
    if (folder / "config.json").is_file():
        return folder
    if (folder / "weights" / "config.json").is_file():
        return folder / "weights"
    if (folder / "adapter" / "adapter_config.json").is_file():
        return _lora_run(cfg, folder)
    if (folder / "adapter_config.json").is_file():
        raise WeightsError(
            "this is an adapter, not a model", where=folder, hint=f"ADAPTER={folder} beside WEIGHTS=<base>"
        )
    if cfg.backend == "mindspore" or (folder / "0" / "config.json").is_file():
        return folder  # parts, ranks or a MindFormers file, which say themselves what is wrong with them
    raise WeightsError("no config.json here", where=folder, hint="WEIGHTS=<folder with config.json and safetensors>")


def _lora_run(cfg: Config, folder: Path) -> Path:
    if cfg.adapter is None:
        cfg.adapter = str(folder / "adapter")
    base = from_yaml(folder / "config.yaml")
    if base.weights is None and base.model.hub_id is None:
        raise WeightsError(
            "the run does not say which weights its adapter belongs to", where=folder, hint="WEIGHTS=<base>"
        )
    return _given(cfg, base.weights) if base.weights else from_hub(base.model.hub_id)


def from_hub(
    name: str, patterns: tuple[str, ...] = ("*.json", "*.safetensors", "*.txt", "*.tiktoken", "*.jinja")
) -> Path:
    """Download ``Org/Name`` (resumed, checksummed; ``HF_ENDPOINT`` names a mirror, ``HF_HUB_OFFLINE=1`` uses the cache only)."""
    from huggingface_hub import snapshot_download

    say(f"weights: {name} from the hub")
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the library raises many kinds: no network, no such name, no right
        raise WeightsError(
            f"cannot be had from the hub: {_first_line(error)}",
            where=name,
            hint="WEIGHTS=<local folder>, or HF_ENDPOINT=<mirror>",
        ) from None


def resolve_data(cfg: Config) -> str:
    """``data.source``, with ``hub:Org/Name:pattern`` replaced by a glob of the downloaded files."""
    source = cfg.data.source
    if not source.startswith("hub:"):
        return source
    from huggingface_hub import snapshot_download

    _, name, pattern = source.split(":", 2)
    say(f"data: {name} from the hub")
    try:
        return str(Path(snapshot_download(name, repo_type="dataset", allow_patterns=[pattern])) / pattern)
    except Exception as error:
        raise UserError(
            f"cannot be had from the hub: {_first_line(error)}",
            where=f"data set {name}",
            hint="DATA=<local file or folder>, or HF_ENDPOINT=<mirror>",
        ) from None


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def newest_run(model: str, root: Path | None = None) -> Path | None:
    """The newest run folder of ``model`` that holds exported weights, or None."""
    root = REPO / "runs" if root is None else root
    runs = [path.parent.parent for path in root.glob(f"*/{model}/*/weights/config.json")]
    return max(runs, key=lambda run: run.name, default=None)


def opening(cfg: Config) -> OpenOptions:
    """What ``cfg`` says about weights of a layout that does not say it itself."""
    known = cfg.model.hf.get("vocab_size") is not None
    return OpenOptions(
        concat=cfg.convert.qkv_concat,
        gmm=cfg.convert.use_gmm,
        config=cfg.convert.config,
        strategy=cfg.reshard.strategy,
        allow_pickle=cfg.allow_pickle,
        presets=dict(cfg.model.hf) if known else None,
    )


def check_grid(cfg: Config, weights: Path) -> None:
    """Raise :class:`ConfigError` for shards of another number of ranks than run here, when ``auto_transform`` is off
    (mindspore)."""
    from research.core.launch.environment import place
    from research.core.weights import rank_folders, sharded

    kind = sharded.kind_of(weights)
    if cfg.backend != "mindspore" or cfg.auto_transform or kind not in (sharded.PARTS, sharded.RANKS):
        return
    ranks = sharded.part_folders(weights) if kind == sharded.PARTS else rank_folders.rank_folders(weights)
    here = place()
    size = 1 if here is None else here.size
    if len(ranks) != size:
        raise ConfigError(
            f"these weights are cut for {len(ranks)} ranks, and {size} {'runs' if size == 1 else 'run'} here",
            where=f"auto_transform=false (--auto_trans_ckpt False) with {weights}",
            hint=f"auto_transform=true (--auto_trans_ckpt True), or {len(ranks)} ranks",
        )


def check_architecture(cfg: Config, folder: Path, found: DecoderSpec | None = None) -> None:
    """Raise :class:`WeightsError` listing every key in which ``config.json`` of ``folder``, or ``found`` in weights of
    another layout, contradicts the chosen MODEL."""
    from research.core.spec import spec_differences

    config = folder / "config.json"
    if found is None:
        found = spec_from_hf(read_json(config), where=str(config))
    differing = spec_differences(model_spec(cfg.model, tokens=found.vocab), found)
    if cfg.model.hf.get("vocab_size") is None:
        differing = [row for row in differing if not row.startswith("vocab:")]
    if differing:
        raise WeightsError(
            f"these weights are not {cfg.model.name}:\n    " + "\n    ".join(differing),
            where=config if config.is_file() else folder,
            hint="another MODEL, another WEIGHTS, or leave MODEL out to take the folder's own architecture",
        )


def spec_of_weights(cfg: Config, weights: Path) -> DecoderSpec:
    """The architecture that ``config.json`` beside the weights says, or (MindFormers files, ranks, parts) they themselves."""
    config = weights / "config.json"
    if config.is_file():
        return spec_from_hf(read_json(config), where=str(config))
    from research.core.weights.opened import open_weights

    return open_weights(weights, opening(cfg)).spec


def model_of_folder(folder: Path) -> ModelConfig:
    """The model that a weight folder says it is: its own ``config.json``, under the name in its note if there is one."""
    note, hf = read_note(folder), read_json(folder / "config.json")
    spec_from_hf(hf, where=str(folder / "config.json"))
    if note.get("model") in model_files():  # the sizes are the folder's: model.hf.* may have changed the preset's
        return replace(model_config(note["model"]), hf=hf)
    guess = note.get("family") or ("qwen" if hf["model_type"] == "qwen" else "qwen2_5")
    return ModelConfig(name=folder.resolve().name, family=guess, hf=hf)


def read_note(folder: Path) -> dict:
    """``workbench.json`` beside the weights: model, family, template and fingerprints; empty when it is not there."""
    path = folder / NOTE_FILE
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict:
    """Read a JSON object; raises :class:`WeightsError` naming file and line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError("file not found", where=path) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as bad:
        line = getattr(bad, "lineno", 1)
        raise WeightsError(f"not valid JSON: {bad}", where=f"{path}:{line}") from None
    if not isinstance(value, dict):
        raise WeightsError("not a JSON object", where=path)
    return value


# --- vocabulary and template ------------------------------------------------------------------------------------


def resolve_tokenizer(cfg: Config, weights: Path | None):
    """The tokenizer: ``tokenizer=`` folder, else the files beside the weights, else the built-in one of the tiny models."""
    from research.core.text.tokenizer import has_tokenizer, load_tokenizer

    if cfg.tokenizer:
        return load_tokenizer(cfg.tokenizer, cfg.model.family)
    if weights is not None and has_tokenizer(weights):
        return load_tokenizer(weights, cfg.model.family)
    if cfg.model.tokenizer == "builtin":
        from research.core.text.builtin import builtin_tokenizer

        return builtin_tokenizer()
    files = " or ".join(family(cfg.model.family).tokenizer_files)
    raise ConfigError(
        f"no vocabulary ({files}) beside the weights" if weights else "a vocabulary is needed",
        where=weights or f"model={cfg.model.name}",
        hint="TOKENIZER=<folder with the vocabulary>",
    )


def resolve_template(cfg: Config, weights: Path | None):
    """The chat template: ``model.template``, else the one beside the weights, else the family's."""
    from research.core.text.template import get_template, template_from_jinja

    if cfg.model.template:
        return get_template(cfg.model.template)
    if weights is not None:
        note = read_note(weights)
        if note.get("template_name"):
            return get_template(note["template_name"])
        text = published_template(weights)
        if text:
            return template_from_jinja(text)
    return get_template(family(cfg.model.family).template)


def published_template(folder: Path) -> str | None:
    """The Jinja text of ``chat_template.jinja`` or of ``tokenizer_config.json``'s ``chat_template`` in a weight folder."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "tokenizer_config.json").is_file():
        text = read_json(folder / "tokenizer_config.json").get("chat_template")
        return text if isinstance(text, str) else None
    return None
