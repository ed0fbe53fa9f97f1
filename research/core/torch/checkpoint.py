"""Checkpoints of torch tensors, and the state of every random generator of a rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from research.core.run.random_state import host_state, restore_host_state


class TorchTables:
    """:class:`research.core.run.checkpoint.Tables` of torch."""

    def write(self, table: dict[str, Tensor], path: Path) -> None:
        save_file(table, path)

    def read(self, path: Path) -> dict[str, Tensor]:
        return load_file(path)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of the generators of torch (CPU and ``device``), numpy and Python as tensors."""
    state = {"torch": torch.get_rng_state(), **{k: torch.from_numpy(v) for k, v in host_state().items()}}
    if device.type != "cpu":
        state["device"] = getattr(torch, device.type).get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put :func:`random_state` back; generators that the state does not hold (another backend's) stay as they are."""
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    restore_host_state(
        {name: np.asarray(value) for name, value in state.items() if name.startswith(("numpy", "python"))}
    )
    if device.type != "cpu" and "device" in state:
        getattr(torch, device.type).set_rng_state(state["device"], device)
