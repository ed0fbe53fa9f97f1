"""AdamW (arXiv 1711.05101) over the trainable parameters, with fp32 master weights where the model computes in bf16.

A bf16 model stays bf16 all through: forward and backward read it as inference does, and nothing is cast per layer.
Each backward's gradients are added to fp32 gradients of the masters, and an update writes the rounded masters back.
``train.master=same`` leaves the masters out: gradients, moments and weights are all of the model's dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from research.core.config.schema import TrainConfig
from research.core.errors import UserError

_STATE = ("step", "exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW with weight decay on matrices only (not on biases and norms), clipping, and named, saveable state."""

    def __init__(self, parameters: dict[str, nn.Parameter], cfg: TrainConfig):
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.clip_norm = cfg.clip_norm
        wide = cfg.master == "fp32"
        self.masters = {
            name: nn.Parameter(p.detach().float()) if wide and p.dtype != torch.float32 else p
            for name, p in self.parameters.items()
        }
        self._narrow = [(p, self.masters[name]) for name, p in self.parameters.items() if self.masters[name] is not p]
        matrices = [p for p in self.masters.values() if p.ndim >= 2]
        vectors = [p for p in self.masters.values() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        settings = {"lr": cfg.lr, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps}
        groups = [group for group in groups if group["params"]]
        try:
            self._adamw = torch.optim.AdamW(groups, fused=True, **settings)
        except (RuntimeError, ValueError):  # devices without the fused kernel
            self._adamw = torch.optim.AdamW(groups, **settings)

    @torch.no_grad()
    def gather(self) -> None:
        """After each backward: add the bf16 gradients to the masters' fp32 ones and drop them."""
        for parameter, master in self._narrow:
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """Gradients of this step, of the masters where there are any."""
        return [p.grad for p in self.masters.values() if p.grad is not None]

    def norm(self) -> Tensor:
        """Euclidean norm of all gradients together, fp32 scalar (over all cards when they are sharded)."""
        norm = torch.nn.utils.get_total_norm(self.gradients())
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def step(self, lr: float, norm: Tensor) -> None:
        """Scale the gradients to at most ``clip_norm``, update, write the masters back, and clear the gradients."""
        if math.isfinite(self.clip_norm):
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), self.clip_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._write_back()

    @torch.no_grad()
    def _write_back(self) -> None:
        for parameter, master in self._narrow:
            parameter.copy_(master)

    # --- state ---

    def weights(self) -> dict[str, Tensor]:
        """The trained weights in their master precision, not copied."""
        return {name: p.detach() for name, p in self.masters.items()}

    def state(self) -> dict[str, Tensor]:
        """``<parameter>.step | exp_avg | exp_avg_sq``, not copied; empty before the first update."""
        return {
            f"{name}.{key}": self._adamw.state[p][key]
            for name, p in self.masters.items()
            if p in self._adamw.state
            for key in _STATE
        }

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Put saved weights and state back. Raises :class:`UserError` naming the first tensor that does not fit."""
        for name, master in self.masters.items():
            _check(name, weights.get(name), master)
        for name in weights:
            if name not in self.masters:
                raise UserError(f"the checkpoint trains {name}, this run does not", where="optimizer")
        for name, master in self.masters.items():
            _copy(master, weights[name])
            if f"{name}.exp_avg" not in state:
                continue
            moments = {}
            for key in _STATE[1:]:
                saved = state[f"{name}.{key}"]
                _check(f"{name}.{key}", saved, master)
                moments[key] = _copy(torch.zeros_like(master), saved)
            fused = self._adamw.param_groups[0]["fused"]
            step = state[f"{name}.step"].to(master.device if fused else "cpu", copy=True)
            self._adamw.state[master] = {"step": step, **moments}
        self._write_back()


def _check(name: str, saved: Tensor | None, target: Tensor) -> None:
    found = "missing" if saved is None else f"{tuple(saved.shape)} {saved.dtype}"
    expected = f"{tuple(target.shape)} {target.dtype}"
    if found != expected:
        raise UserError(
            f"{name} is {found} in the checkpoint, this run needs {expected}".replace("torch.", ""),
            where="train.resume=true",
            hint="the settings of the first run (train.master, train.dtype, lora.rank), or a new run",
        )


def _copy(target: Tensor, saved: Tensor) -> Tensor:
    """Copy a whole tensor into ``target``, which may be this card's shard of it."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        saved = distribute_tensor(saved.to(target.device), target.device_mesh, target.placements)
    target.copy_(saved)
    return target


def whole(tensor: Tensor) -> Tensor:
    """The tensor that cards hold in shards, put together (every card has to call this); others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
