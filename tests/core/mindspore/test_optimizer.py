"""The AdamW kernel against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mindspore import Tensor

from research.core.mindspore import native


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_adamw_kernel_takes_torchs_steps():
    generator = np.random.default_rng(0)
    weight = torch.nn.Parameter(torch.from_numpy(generator.standard_normal(40_000, np.float32)))
    theirs = torch.optim.AdamW([weight], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    ours = [Tensor(weight.detach().numpy().copy()), *(Tensor(np.zeros(40_000, np.float32)) for _ in range(2))]
    settings = Tensor(np.array([0.8, 0.95, 1e-6, 0.1], np.float32))
    for step in range(1, 4):
        gradient = generator.standard_normal(40_000, np.float32)
        weight.grad = torch.from_numpy(gradient * np.float32(0.5))
        theirs.step()
        numbers = Tensor(np.array([0.5, 0.01, 1 - 0.8**step, (1 - 0.95**step) ** 0.5], np.float32))
        ours = native.adamw()(ours[0], Tensor(gradient), *ours[1:], numbers, settings)
        state = theirs.state[weight]
        for mine, other in zip(ours, (weight.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=True):
            # float32 rounding of some operations in another order, on values of size 1
            np.testing.assert_allclose(mine.asnumpy(), other.numpy(), atol=2e-6, rtol=1e-5)
