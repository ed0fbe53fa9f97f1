"""Folding an adapter into its base, with the proof that nothing but rounding changed."""

from __future__ import annotations

import torch

from research.core.errors import WeightsError
from research.core.torch.decoder import Decoder
from research.core.torch.lora import lora_layers, merge_lora

PROMPTS, LENGTH = 2, 32
TOLERANCE = 1e-3  # of the largest logit: fp32 sums in another order through all layers stay far below


@torch.inference_mode()
def merge_and_check(decoder: Decoder, seed: int = 0) -> float:
    """Fold the adapters of an fp32 ``decoder`` in, in place, and return the largest difference of a logit.

    Logits of random prompts are computed before and after. Raises :class:`WeightsError` when they differ by more than
    :data:`TOLERANCE` of the largest logit, or are not finite.
    """
    assert next(lora_layers(decoder), None) is not None, "no adapter on this decoder"
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, decoder.spec.vocab, (PROMPTS, LENGTH), generator=generator)
    ids = ids.to(decoder.model.embed_tokens.weight.device)
    decoder.eval()
    before = decoder(ids)
    after = merge_lora(decoder)(ids)
    difference, largest = float((after - before).abs().max()), float(before.abs().max())
    if not difference <= TOLERANCE * max(largest, 1.0):  # also when it is not a number
        raise WeightsError(
            f"the merged weights give other logits than base and adapter: they differ by {difference:.3g}, "
            f"the largest logit is {largest:.3g}",
            where="merge",
            hint="an adapter whose values are finite, for these base weights",
        )
    return difference
