"""The fast linear layer and the move of frozen weights to large pages, against F.linear and an untouched decoder."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from research.core.spec import DecoderSpec
from research.core.torch.decoder import Decoder
from research.core.torch.packed_linear import Linear, linear, pack_frozen_linears

SPEC = DecoderSpec(
    "qwen2", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=300, max_positions=64, tied=True
)
IDS = torch.arange(2 * 12).view(2, 12) * 7 % 300


def _decoder(dtype=torch.float32):
    return Decoder(SPEC).to(dtype).init_weights(3).requires_grad_(False).eval()


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_fp32_values_and_all_gradients_equal_f_linear(rows, bias):
    generator = torch.Generator().manual_seed(rows)
    shapes = [(2, rows, 48), (33, 48), *([(33,)] if bias else [])]
    inputs = [torch.randn(s, generator=generator) for s in shapes]
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    a, b = linear(*ours), F.linear(*theirs)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear(*inputs), b, rtol=1e-5, atol=1e-5)
    grad = torch.randn(a.shape, generator=generator)
    a.backward(grad)
    b.backward(grad)
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 8, 9, 64])
def test_bf16_values_and_input_gradient_equal_f_linear_within_rounding(rows):
    generator = torch.Generator().manual_seed(rows)
    x, w = (torch.randn(s, generator=generator).bfloat16() for s in ((rows, 256), (40, 256)))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = linear(ours, w), F.linear(theirs, w)
    # both accumulate in float32 and round once: at most one step of 2^-8 apart
    torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(linear(x, w), b, rtol=2**-7, atol=1e-2)
    a.sum().backward()
    b.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=2**-7, atol=1e-2)


def test_empty_and_one_dimensional_inputs():
    w, b = torch.randn(5, 8), torch.randn(5)
    assert linear(torch.empty(0, 8), w, b).shape == (0, 5)
    x = torch.randn(8)
    torch.testing.assert_close(linear(x, w, b), F.linear(x, w, b))


def test_a_transposed_weight_is_not_read_as_if_it_were_contiguous():
    w = torch.randn(8, 5).t()
    x = torch.randn(2, 8)
    torch.testing.assert_close(linear(x, w), F.linear(x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_keeps_weights_names_tie_and_logits(dtype):
    plain = _decoder(dtype)
    packed = copy.deepcopy(plain)
    moved = pack_frozen_linears(packed)
    distinct = {id(p): p.nbytes for p in packed.parameters() if p.ndim == 2}
    assert moved == sum(distinct.values())  # every shape here is a multiple of the alignment
    before, after = plain.state_dict(), packed.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(plain(IDS), packed(IDS))
    assert pack_frozen_linears(packed) == 0


def test_packed_matrices_share_one_region_and_give_the_old_storage_back():
    decoder = _decoder()
    weight = decoder.model.layers[0].self_attn.q_proj.weight
    old = weight.untyped_storage()._weak_ref()
    pack_frozen_linears(decoder)
    assert torch.UntypedStorage._expired(old)
    torch.UntypedStorage._free_weak_ref(old)
    places = sorted((p.data_ptr(), p.nbytes) for p in {id(p): p for p in decoder.parameters() if p.ndim == 2}.values())
    assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(places))
    assert places[0][0] % (2 << 20) == 0


def test_weights_that_train_stay_where_they_are():
    decoder = _decoder()
    head = decoder.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    place = head.data_ptr()
    pack_frozen_linears(decoder)
    assert head.data_ptr() == place


def test_a_packed_decoder_saves_and_trains_adapters():
    from research.core.config.schema import LoraConfig
    from research.core.torch.lora import add_lora, merge_lora

    decoder = _decoder()
    pack_frozen_linears(decoder)
    add_lora(decoder, LoraConfig(rank=4))
    decoder(IDS).square().mean().backward()
    assert all(p.grad is not None for p in decoder.parameters() if p.requires_grad)
    with torch.no_grad():
        expected = decoder(IDS)
        merge_lora(decoder)
        torch.testing.assert_close(decoder(IDS), expected, rtol=1e-4, atol=1e-5)


def test_compiled_and_meta_modules_use_torchs_operator():
    layer = Linear(8, 5, device="meta")
    assert layer(torch.empty(3, 8, device="meta")).shape == (3, 5)
