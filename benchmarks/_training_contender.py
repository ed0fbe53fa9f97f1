"""One contender of training_step.py, in its own process: load, say so, then one step for every line read.

The protocol is JSON lines on what was standard output; everything that libraries print goes to standard error.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

RANK, ALPHA, RATE = 8, 16, 1e-4


class Gate:
    """Waits for the signal before a step and reports after it."""

    def __init__(self):
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def loaded(self) -> None:
        self._say({"ready": True})

    def wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        reset_peak()
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def report(self, **numbers) -> None:
        seconds = time.perf_counter() - self._wall
        used = time.process_time() - self._cpu
        self._say({"seconds": seconds, "cpu_seconds": used, "memory": peak(), **numbers})

    def _say(self, numbers: dict) -> None:
        self._out.write(json.dumps(numbers) + "\n")
        self._out.flush()


def reset_peak() -> None:
    """Let the peak resident set start anew (Linux); where that is not allowed it stays that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    settings = json.loads(sys.argv[1])
    gate = Gate()
    (ours if settings["name"] == "ours" else peer)(settings, gate)


# --- ours -------------------------------------------------------------------------------------------------------


def ours(settings: dict, gate: Gate) -> None:
    import torch

    from research.core.config.schema import Config
    from research.core.data.dataset import PackedDataset
    from research.core.run.folder import RunFolder
    from research.core.torch.device import DTYPES
    from research.core.torch.lora import add_lora
    from research.core.torch.parallel import World
    from research.core.torch.trainer import Trainer
    from research.core.torch.weights import load_decoder

    work, lora = Path(settings["work"]), settings["method"] == "lora"
    cfg = Config()
    cfg.data.shuffle, cfg.data.seq_length = False, settings["seq_length"]
    cfg.lora.rank, cfg.lora.alpha = RANK, ALPHA
    train = cfg.train
    train.steps, train.micro_batch, train.lr, train.schedule = settings["rounds"], settings["rows"], RATE, "constant"
    train.warmup_steps, train.weight_decay, train.beta2, train.log_every = 0, 0.0, 0.999, 10**9
    world = World.join(cfg)
    decoder = load_decoder(work / "weights", dtype=DTYPES[settings["dtype"]], device=world.device)
    if lora:
        add_lora(decoder, cfg.lora, dtype=torch.float32)
    with RunFolder(work / "run", task=settings["method"], model="benchmark") as run:
        trainer = Trainer(cfg, decoder, PackedDataset(work / "data" / "train"), None, run, world)
        adapter = sum(p.numel() for p in decoder.parameters() if p.requires_grad) if lora else 0
        next_batch, update = trainer.next_batch, trainer.update

        def gated_batch():
            if trainer.at.step < settings["rounds"]:
                gate.wait()
            return next_batch()

        def reported_update(micro_batches, agreed):
            numbers = update(micro_batches, agreed)
            counts = {"tokens": agreed.tokens, "targets": agreed.targets, "pairs": agreed.pairs, "adapter": adapter}
            gate.report(loss=numbers["loss"], **counts)
            return numbers

        trainer.next_batch, trainer.update, trainer.save = gated_batch, reported_update, lambda: None
        gate.loaded()
        trainer.fit()
        sys.stdin.readline()


# --- transformers -----------------------------------------------------------------------------------------------


def peer(settings: dict, gate: Gate) -> None:
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    work, lora, half = Path(settings["work"]), settings["method"] == "lora", settings["dtype"] == "bf16"
    model = AutoModelForCausalLM.from_pretrained(work / "weights", dtype=torch.bfloat16 if half else torch.float32)
    adapter = 0
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batches = documents_of_steps(settings)
    counts = [count(documents) for documents in batches]
    width = settings["seq_length"] if settings["name"] == "padded" else None

    class Gated(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            done = state.global_step - 1
            gate.report(loss=trainer.last_loss, adapter=adapter, **counts[done])
            gate.wait()

    class Stepped(Trainer):
        last_loss = math.nan

        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.last_loss = float(loss)
            return loss

    arguments = TrainingArguments(
        output_dir=str(work / settings["name"]),
        use_cpu=True,
        bf16=half,
        max_steps=len(batches),
        per_device_train_batch_size=1,  # an item of the data set is all records of one step
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
    )
    trainer = Stepped(
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=lambda items: collate(items[0], width),
        callbacks=[Gated()],
    )
    gate.loaded()
    gate.wait()
    trainer.train()


def documents_of_steps(settings: dict) -> list[list[tuple]]:
    """For every step the (ids, labels) of the documents in its packed rows, in order."""
    from research.core.data.dataset import PackedDataset

    data = PackedDataset(Path(settings["work"]) / "data" / "train")
    steps = []
    for step in range(settings["rounds"]):
        batch = data.rows(range(step * settings["rows"], (step + 1) * settings["rows"]))
        documents = []
        for ids, labels, numbers in zip(batch.input_ids, batch.labels, batch.doc_ids):
            for number in range(1, int(numbers.max()) + 1):
                documents.append((ids[numbers == number], labels[numbers == number]))
        steps.append(documents)
    return steps


def count(documents: list[tuple]) -> dict:
    """What the rates are made of; ``pairs`` is the sum of the squared lengths."""
    return {
        "tokens": sum(len(ids) for ids, _ in documents),
        "targets": sum(int((labels[1:] != -100).sum()) for _, labels in documents),
        "pairs": sum(len(ids) ** 2 for ids, _ in documents),
    }


def collate(documents: list[tuple], width: int | None) -> dict:
    import torch

    width = width or max(len(ids) for ids, _ in documents)
    shape = (len(documents), width)
    batch = {"input_ids": torch.zeros(shape, dtype=torch.long), "labels": torch.full(shape, -100)}
    batch["attention_mask"] = torch.zeros(shape, dtype=torch.long)
    for row, (ids, labels) in enumerate(documents):
        batch["input_ids"][row, : len(ids)] = torch.from_numpy(ids)
        batch["labels"][row, : len(ids)] = torch.from_numpy(labels)
        batch["attention_mask"][row, : len(ids)] = 1
    return batch


if __name__ == "__main__":
    main()
