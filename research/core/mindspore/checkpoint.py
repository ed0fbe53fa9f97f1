"""Checkpoints of MindSpore's tensors, as numpy arrays in the format that both backends share."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from research.core.errors import UserError
from research.core.run.random_state import host_state, restore_host_state

_PREFIX = "mindspore"


class NumpyTables:
    """:class:`research.core.run.checkpoint.Tables` of numpy arrays."""

    def write(self, table: dict[str, np.ndarray], path: Path) -> None:
        save_file({name: np.ascontiguousarray(value) for name, value in table.items()}, path)

    def read(self, path: Path) -> dict[str, np.ndarray]:
        try:
            return load_file(path)
        except (SafetensorError, KeyError, TypeError, AttributeError) as bad:
            raise UserError(
                f"holds tensors that MindSpore's trainer cannot go on from ({bad})",
                where=path,
                hint="a checkpoint of a run with train.master=fp32",
            ) from None


def random_state() -> dict[str, np.ndarray]:
    """State of the generators of MindSpore, numpy and Python."""
    own = ms.get_rng_state().asnumpy()
    return {_PREFIX: own, **host_state()}


def restore_random_state(state: dict[str, np.ndarray]) -> None:
    """Put :func:`random_state` back; what the state does not hold (another backend wrote it) stays as it is."""
    if _PREFIX in state:
        ms.set_rng_state(ms.Tensor(state[_PREFIX]))
    restore_host_state(state)
