"""What the MindRecord files of each family hold: the documents' columns, and our note about how they were made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

IDS, ATTENTION = "input_ids", "attention_mask"
LABELS = ("labels", "target_ids")
_WRITER = "qwen-workbench"


def label_column(family: str) -> str:
    """Qwen v1 calls its labels ``labels``, the later families ``target_ids``."""
    return LABELS[0] if family == "qwen" else LABELS[1]


def columns_of(family: str, text: bool) -> tuple[str, ...]:
    """The columns of conversations, and of running text (``wiki``), as the documents' YAML files list them."""
    return (IDS,) if text else (IDS, label_column(family), ATTENTION)


@dataclass(frozen=True)
class Note:
    """What a file cannot say by its columns; kept as JSON in the description of its schema."""

    seq_length: int
    family: str
    tokenizer: str  # fingerprint
    supervise: str
    packed: bool  # rows of several documents

    def to_text(self) -> str:
        return json.dumps({"made_by": _WRITER, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: Any) -> Note | None:
        """The note of a file of ours, None for other descriptions."""
        try:
            fields = json.loads(text)
            return (
                cls(**{key: value for key, value in fields.items() if key != "made_by"}) if fields["made_by"] else None
            )
        except (TypeError, ValueError, KeyError, AttributeError):
            return None
