"""One engine over the ranks of a tensor-parallel decoder: rank 0 schedules and samples, all compute every step.

Rank 0 sends each step's plan (integers) before it computes it; the others compute what they are sent, until it says that
the engine is closed. A rank that fails ends with its own error, and the launcher ends the others
(:mod:`research.core.launch`). The collectives inside the decoder run over the device's group (gloo, nccl, hccl); what is
said here goes over a gloo group of its own that waits for as long as nobody asks anything.
"""

from __future__ import annotations

import atexit
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from research.core.engine.batch import StepPlan
from research.core.engine.runner import ModelRunner, StepOutput
from research.core.errors import UserError, WeightsError
from research.core.torch.multi_lora import AdapterSlots

# Bytes of one message; a longer one is announced by it and sent apart.
_MESSAGE = 16 << 10
_IDLE = timedelta(days=365)


class Wire:
    """What rank 0 says to all others, in order; and what all think of a thing that may fail on any."""

    def __init__(self):
        self.group = dist.new_group(backend="gloo", timeout=_IDLE)
        self._message = torch.zeros(_MESSAGE, dtype=torch.uint8)

    def send(self, name: str, *arguments: Any) -> None:
        content = torch.frombuffer(bytearray(pickle.dumps((name, arguments), protocol=5)), dtype=torch.uint8)
        size = torch.tensor([len(content)], dtype=torch.int64).view(torch.uint8)
        self._message[:8] = size
        fits = len(content) <= _MESSAGE - 8
        if fits:
            self._message[8 : 8 + len(content)] = content
        dist.broadcast(self._message, 0, group=self.group)
        if not fits:
            dist.broadcast(content, 0, group=self.group)

    def receive(self) -> tuple[str, tuple]:
        dist.broadcast(self._message, 0, group=self.group)
        size = int(self._message[:8].view(torch.int64))
        content = self._message[8 : 8 + size]
        if size > _MESSAGE - 8:
            content = torch.empty(size, dtype=torch.uint8)
            dist.broadcast(content, 0, group=self.group)
        return pickle.loads(content.numpy().tobytes())

    def agree(self, work: Callable[[], None], undo: Callable[[], None]) -> None:
        """Do ``work`` on every rank. Where one of them cannot, all undo it and raise that rank's :class:`WeightsError`."""
        mine = None
        try:
            work()
        except UserError as error:
            mine = (error.what, error.where, error.hint)
        every: list = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(every, mine, group=self.group)
        failed = next((error for error in every if error is not None), None)
        if failed is not None:
            undo()
            raise WeightsError(failed[0], where=failed[1], hint=failed[2])

    def smallest(self, number: int) -> int:
        """The smallest of every rank's number."""
        box = torch.tensor([number])
        dist.all_reduce(box, dist.ReduceOp.MIN, group=self.group)
        return int(box)


# --- rank 0 ------------------------------------------------------------------------------------------------------------


class LeadingRunner:
    """Rank 0's :class:`ModelRunner`: tells the others of every plan. ``close`` ends them; so does the end of the process."""

    def __init__(self, runner: ModelRunner, wire: Wire):
        self.runner, self.wire = runner, wire
        self.num_blocks = runner.num_blocks
        self._open, self._in_step = True, True
        atexit.register(self.close)

    def execute(self, plan: StepPlan) -> StepOutput:
        if not self._in_step:
            raise RuntimeError("a step failed here and the other ranks may wait in the middle of it: start again")
        with _uninterrupted():
            self._in_step = False
            self.wire.send("execute", plan)
            output = self.runner.execute(plan)
            self._in_step = True
        return output

    def close(self) -> None:
        if self._open:
            self._open = False
            atexit.unregister(self.close)
            if self._in_step:  # else they end when this process does
                self.wire.send("close")


class LeadingSlots:
    """Rank 0's :class:`AdapterSlots`: every rank takes its part of an adapter, or none does."""

    def __init__(self, slots: AdapterSlots, wire: Wire):
        self.slots, self.wire = slots, wire

    def load(self, slot: int, folder: Path) -> None:
        with _uninterrupted():
            self.wire.send("load", slot, str(folder))
            _load(self.slots, self.wire, slot, str(folder))

    def clear(self, slot: int) -> None:
        with _uninterrupted():
            self.wire.send("clear", slot)
            self.slots.clear(slot)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: half a step on one rank would leave the others waiting for the rest."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    noted: list = []
    before = signal.signal(signal.SIGINT, lambda *what: noted.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if noted and callable(before):
        before(*noted[0])


# --- the others --------------------------------------------------------------------------------------------------------


def follow(runner: ModelRunner, slots: AdapterSlots, wire: Wire) -> None:
    """Compute what rank 0 sends, until it closes the engine. Ctrl-C is rank 0's to act on."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        name, arguments = wire.receive()
        if name == "execute":
            runner.execute(*arguments)
        elif name == "load":
            try:
                _load(slots, wire, *arguments)
            except WeightsError:
                pass  # rank 0 raises it where it was asked for
        elif name == "clear":
            slots.clear(*arguments)
        else:
            assert name == "close", name
            return


def _load(slots: AdapterSlots, wire: Wire, slot: int, folder: str) -> None:
    wire.agree(lambda: slots.load(slot, folder), lambda: slots.clear(slot))
