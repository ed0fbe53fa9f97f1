"""The YAML files that the documents name, as facts: which model, which recipe, and the settings that count.

``published.csv`` has one row per file of the MindFormers releases r1.0 to r1.5 (``release`` says which; ``document``: as the
document's text sets it). A command that names such a file works here without it.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("published.csv")
# What every one of these files says.
ADAM = {"train.beta1": 0.9, "train.beta2": 0.95}
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Published:
    """One file. Sizes count tokens and sequences; ``recompute``, ``lr`` ... None: not of its recipe."""

    file: str
    model: str
    recipe: str  # pretrain | finetune | lora | predict
    release: str
    seq: int
    batch: int
    epochs: int | None
    data: int
    tensor: int
    pipeline: int
    micro: int
    compute: str  # fp32 | bf16 | fp16
    params: str
    recompute: str | None
    lr: float | None
    lr_end: float | None
    warmup: float | None
    decay: float | None
    eps: float | None
    seed: int
    rank: int | None
    alpha: float | None
    dropout: float | None
    answer: int | None  # longest answer and prompt together
    sample: bool | None
    top_k: int | None
    top_p: float | None
    temperature: float | None
    penalty: float | None
    block_size: int | None
    num_blocks: int | None

    @property
    def run_mode(self) -> str:
        """The file's own ``run_mode``; one file of a Qwen v1 model serves all of them, and says predict."""
        if self.answer is not None:
            return "predict"
        return "train" if self.recipe == "pretrain" else "finetune"


@cache
def published() -> dict[str, Published]:
    """File name without ``.yaml``, lower case -> its row."""
    with open(TABLE, encoding="utf-8", newline="") as file:
        rows = [Published(**{key: _value(key, text) for key, text in row.items()}) for row in csv.DictReader(file)]
    return {row.file.lower(): row for row in rows}


def named(path: str) -> Published | None:
    """The row of the file that ``path`` names, in whatever folder; one document misspells finetune."""
    stem = re.sub(r"\.ya?ml$", "", path.replace("\\", "/").rsplit("/", 1)[-1].lower())
    return published().get(stem) or published().get(stem.replace("fintune", "finetune"))


_KINDS = {field.name: str(field.type) for field in fields(Published)}


def _value(key: str, text: str):
    kind = _KINDS[key]
    if text == "":
        return None
    if kind.startswith("int"):
        return int(text)
    if kind.startswith("float"):
        return float(text)
    return text == "true" if kind.startswith("bool") else text
