"""Logits of weights of any layout in MindSpore, the whole model at once, for ``verify``."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from research.core.config.schema import DeviceConfig
from research.core.errors import WeightsError
from research.core.mindspore import runtime
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.layout import Layout, rope_base
from research.core.mindspore.weights import fill_decoder
from research.core.weights.opened import OpenWeights


def logits(opened: OpenWeights, ids_BT: np.ndarray) -> np.ndarray:
    """float32 logits [B, T, V]; raises :class:`WeightsError` when they are not finite.

    Computed in float32 on the CPU with plain operators, so that nothing but MindSpore and the weights is under test.
    """
    runtime.start(DeviceConfig(kind="cpu"))
    decoder = Decoder(opened.spec, kernels="composite")
    fill_decoder(decoder, opened)
    base = rope_base(opened.spec, Layout.full(*ids_BT.shape).lengths)
    out = decoder(Tensor(ids_BT.astype(np.int32)), None, None, None if base is None else Tensor(base)).asnumpy()
    if not np.isfinite(out).all():
        raise WeightsError("the logits are not finite: the weights hold NaN or infinity", where=opened.path)
    return out
