"""Floating-point operations that a training step needs, for the share of the roofline it reaches (MFU)."""

from __future__ import annotations

import numpy as np

from research.core.spec import DecoderSpec


def step_flops(spec: DecoderSpec, *, tokens: int, targets: int, pairs: int, frozen: bool, adapter: int = 0) -> float:
    """Multiply-adds times two of one forward and backward, recomputation not counted.

    ``tokens`` real tokens, ``targets`` supervised ones (only they reach the head), ``pairs`` the sum over documents of
    length^2 (of which causal attention needs half). ``frozen``: the base needs no weight gradients (LoRA), and
    ``adapter`` is the number of adapter parameters. The counting of PaLM (arXiv 2204.02311, appendix B).
    """
    embedding = spec.vocab * spec.hidden
    matrices = spec.active_parameters() - embedding * (1 if spec.tied else 2)
    passes = 2 if frozen else 3  # forward, gradient of the input, gradient of the weight
    linear = 2.0 * passes * (matrices * tokens + embedding * targets)
    attention = spec.layers * spec.heads * spec.head_dim * 4.0 * 3 * pairs * (0.5 if spec.causal else 1.0)
    return linear + attention + 2.0 * 3 * adapter * tokens


def document_pairs(doc_ids_BT: np.ndarray) -> int:
    """Sum over documents of length^2; ``doc_ids`` number the documents of a row from 1, 0 is padding."""
    rows = np.arange(doc_ids_BT.shape[0])[:, None] * (int(doc_ids_BT.max(initial=0)) + 1)
    counts = np.bincount((doc_ids_BT + rows)[doc_ids_BT > 0])
    return int((counts.astype(np.int64) ** 2).sum())
