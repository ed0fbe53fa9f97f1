"""The switch between kernels, and the arguments of Ascend's operators against stand-ins that compute their description.

The operators themselves are not run: this machine has no NPU. The decoder runs eagerly here, since stand-ins in numpy
cannot be compiled.
"""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from research.core.errors import ConfigError
from research.core.mindspore import fused, native, runtime
from research.core.mindspore.generate import Runner
from research.core.mindspore.layout import Layout
from tests.core.mindspore.ascend_stand_ins import install
from tests.core.mindspore.peers import as_tensor, layout_inputs, twin
from tests.core.mindspore.test_decode import Paged
from tests.core.torch.peers import make_pair, packed_ids, random_ids

CLOSE = {"atol": 1e-4, "rtol": 0}
ROWS = [[5, 9, 6], [20], [10, 7], [1, 1, 17]]


@pytest.fixture
def eager():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture
def called(eager, monkeypatch):
    return install(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gqa", "window", "moe"])
def test_ascend_operators_get_arguments_that_give_the_decoders_logits(variant, called):
    """Whole rows (prefill), packed rows by mask and by cumulative lengths, rows in blocks, and training mode."""
    _, ours = make_pair(variant, num_hidden_layers=2)
    ids = as_tensor(random_ids(4, 20))
    positions, documents = packed_ids(ROWS, 20)
    layout = Layout.packed(positions.numpy(), documents.numpy())
    packed, real = layout_inputs(layout), layout.documents != 0
    plain = twin(ours, kernels="composite")
    whole, expected = plain(ids).asnumpy(), plain(ids, *packed).asnumpy()
    assert not called
    ascend = twin(ours, kernels="ascend")
    np.testing.assert_allclose(ascend(ids).asnumpy(), whole, **CLOSE)
    assert {"rms_norm", "swiglu", "rotary_position_embedding", "prompt_flash_attention"} <= set(called)
    assert ("grouped_matmul" in called) == (variant == "moe") and "flash_attention_score" not in called
    ascend.set_train()
    np.testing.assert_allclose(ascend(ids).asnumpy(), whole, **CLOSE)
    np.testing.assert_allclose(ascend(ids, *packed).asnumpy()[real], expected[real], **CLOSE)
    ends = Tensor(layout.ends(20))
    np.testing.assert_allclose(ascend(ids, *packed, None, ends).asnumpy()[real], expected[real], **CLOSE)
    assert "flash_attention_score" in called


@pytest.mark.slow
def test_ascend_operators_attend_in_blocks_and_both_ways(called):
    _, ours = make_pair("gqa", num_hidden_layers=1)
    ids = as_tensor(random_ids(2, 48))
    packed = layout_inputs(Layout.packed(*(x.numpy() for x in packed_ids([[16, 9, 16], [3, 14]], 48))))
    expected = twin(ours, kernels="composite")(ids, *packed).asnumpy()
    np.testing.assert_allclose(twin(ours, kernels="ascend", block=16)(ids, *packed).asnumpy(), expected, **CLOSE)
    ours.spec = replace(ours.spec, causal=False)
    both, ends = twin(ours, kernels="composite")(ids, *packed).asnumpy(), Tensor(np.array([16, 25, 41, 48, 51, 65, 96]))
    for more in ((), (None, ends)):
        found = twin(ours, kernels="ascend")(ids, *packed, *more).asnumpy()
        real = packed[1].asnumpy() != 0
        np.testing.assert_allclose(found[real], both[real], **CLOSE)
    whole = twin(ours, kernels="composite")(ids).asnumpy()
    np.testing.assert_allclose(twin(ours, kernels="ascend")(ids).asnumpy(), whole, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gqa", "window"])
def test_ascend_steps_against_dense_and_paged_caches(variant, called):
    _, ours = make_pair(variant, num_hidden_layers=2)
    ids, lengths = random_ids(3, 14).numpy(), [5, 9, 7]
    runners = [Runner(twin(ours, kernels=kernels)) for kernels in ("composite", "ascend")]
    cache, other = (runner.new_cache(3, 24) for runner in runners)
    prompts = [row[:n] for row, n in zip(ids, lengths)]
    expected, found = runners[0].prefill(cache, prompts), runners[1].prefill(other, prompts)
    paged = Paged(twin(ours, kernels="ascend"), rows=3, blocks=12, size=8, per_row=3)
    same = paged.prefill(ids, lengths, width=16)
    for _ in range(4):
        np.testing.assert_allclose(found, expected, **CLOSE)
        np.testing.assert_allclose(same, expected, **CLOSE)
        tokens, positions = [int(row[n]) for row, n in zip(ids, cache.lengths)], cache.lengths
        expected, found = runners[0].step(cache, tokens), runners[1].step(other, tokens)
        same = paged.step(tokens, positions)
    assert {"incre_flash_attention", "reshape_and_cache"} <= set(called)


def test_the_switch_follows_the_device_and_can_be_forced(monkeypatch):
    assert fused.choose_kernels("composite") == "composite" and fused.choose_kernels("ascend") == "ascend"
    assert fused.choose_kernels() == ("native" if native.available() else "composite")
    monkeypatch.setattr(native, "available", lambda: False)
    assert fused.choose_kernels() == "composite"
    with pytest.raises(ConfigError, match="need float32 and a C"):
        fused.choose_kernels("native")
    with pytest.raises(ConfigError, match="not one of"):
        fused.choose_kernels("cuda")
    monkeypatch.setattr(runtime, "on_ascend", lambda: True)
    assert fused.choose_kernels("auto", ms.bfloat16) == "ascend"
    assert fused.choose_kernels("auto", ms.float32) == "composite"  # flash attention takes 16-bit floats only


def test_more_documents_than_room_is_an_error():
    layout = Layout.packed(*(x.numpy() for x in packed_ids([[1, 2, 3], [4]], 8)))
    assert layout.ends(8).tolist() == [1, 3, 6, 8, 12, 16, 16, 16]
    with pytest.raises(ConfigError, match="6 documents in one micro batch"):
        layout.ends(5)


def test_start_where_mindspore_has_computed_already_takes_its_device(monkeypatch):
    assert (Tensor([1.0]) + 1).asnumpy() == 2
    monkeypatch.setattr(runtime, "_started", None)
    assert runtime.start().on_cpu
