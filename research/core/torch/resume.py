"""What of a training goes into a checkpoint, and how a checkpoint becomes a training again."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from research.core.data.dataset import META, TOKENS
from research.core.errors import UserError
from research.core.torch.checkpoint import Checkpoint, load_checkpoint, random_state, restore_random_state
from research.core.torch.optimizer import whole

if TYPE_CHECKING:
    from research.core.torch.trainer import Trainer

# Parts of the identity whose change makes a checkpoint useless, and the setting that a user would look for.
_BREAKING = {
    "model": "model",
    "method": "task",
    "lora": "lora",
    "base": "weights",
    "data": "data",
    "seq_length": "data.seq_length",
    "shuffle": "data.seed / data.shuffle",
    "tokenizer": "tokenizer",
    "template": "model.template",
}
# Lora settings that do not change what the saved tensors mean.
_FREE_LORA = ("dropout", "adapter")


def capture(trainer: Trainer) -> Checkpoint | None:
    """A copy of the training's whole state on the CPU (None on ranks above 0; every rank has to call it)."""
    world = trainer.world
    model = {name: _copy(tensor, world.main) for name, tensor in trainer.optimizer.weights().items()}
    optimizer = {name: _copy(tensor, world.main) for name, tensor in trainer.optimizer.state().items()}
    states = world.gather(random_state(world.device))
    if not world.main:
        return None
    meta = {
        **asdict(trainer.at),
        "epoch": round(trainer.at.position / len(trainer.data), 4),
        "written": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "identity": trainer.identity,
    }
    random = {f"rank{rank}.{name}": value for rank, state in enumerate(states) for name, value in state.items()}
    return Checkpoint(meta, model, optimizer, random)


def _copy(tensor: Tensor, keep: bool) -> Tensor | None:
    tensor = whole(tensor.detach())
    return tensor.to("cpu", copy=True).contiguous() if keep else None


def restore(trainer: Trainer) -> dict[str, Any]:
    """Load the newest whole checkpoint into ``trainer`` and return the fields of its ``Progressed``.

    Without any checkpoint the training starts at its beginning, and says so. Raises :class:`UserError` naming every
    setting that the checkpoint contradicts.
    """
    world, run = trainer.world, trainer.run
    found = trainer.checkpoints.newest() if world.main else None
    step = world.tell(None if found is None else found.meta["step"])
    if step is None:
        run.say("no checkpoint in this run folder yet: the training starts at its beginning")
        return {}
    if found is None:
        found = load_checkpoint(trainer.checkpoints.folder / f"step-{step:08d}")
    check_identity(found.meta["identity"], trainer.identity, str(trainer.checkpoints.folder), run.say)
    trainer.optimizer.load(found.model, found.optimizer)
    mine = f"rank{world.rank}."
    state = {name.removeprefix(mine): value for name, value in found.random.items() if name.startswith(mine)}
    if state:
        restore_random_state(state, world.device)
    trainer.checkpoints.last_step = step
    run.say(f"resumed at step {step} (checkpoint of {found.meta['written']}, loss {found.meta['loss']:.4f})")
    return {field: found.meta[field] for field in asdict(trainer.at)}


def check_identity(saved: dict[str, Any], now: dict[str, Any], where: str, say) -> None:
    """Refuse what a checkpoint cannot go on with; announce other changes."""
    wrong = []
    for key in sorted(saved.keys() | now.keys()):
        before, after = saved.get(key), now.get(key)
        if key == "lora" and before and after:
            before, after = ({k: v for k, v in table.items() if k not in _FREE_LORA} for table in (before, after))
        before, after = _plain(before), _plain(after)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            names = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
            change = ", ".join(f"{key}.{k} was {before.get(k)}, is now {after.get(k)}" for k in sorted(names))
        else:
            change = f"{_BREAKING.get(key, key)} was {_short(before)}, is now {_short(after)}"
        if key in _BREAKING:
            wrong.append(change)
        else:
            say(f"note: {change}")
    if wrong:
        raise UserError(
            "the checkpoint cannot go on with these settings: " + "; ".join(wrong),
            where=where,
            hint="the settings of the first run (its config.yaml), or a new RUN",
        )


def _plain(value: Any) -> Any:
    """The value as JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if isinstance(value, str) and len(text) == 64 else text


def data_fingerprint(folder: str | Path) -> str:
    """sha256 over a prepared dataset's counts and the first and last megabyte of its training tokens."""
    meta = json.loads((Path(folder) / META).read_text("utf-8"))
    digest = hashlib.sha256(json.dumps([meta["splits"], meta["seq_length"]], sort_keys=True).encode())
    tokens = Path(folder) / "train" / TOKENS
    with open(tokens, "rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, tokens.stat().st_size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()


def frozen_fingerprint(decoder: torch.nn.Module) -> str:
    """sha256 over a sample of every frozen parameter: tells whether an adapter still sits on the base it was trained on."""
    digest = hashlib.sha256()
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()
