"""The decoder against transformers on random weights with non-zero biases."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from research.core.spec import DecoderSpec
from research.core.torch.cache import KVCache
from research.core.torch.decoder import Decoder
from research.core.torch.layout import Layout
from research.core.torch.native import ops
from research.registry import model_config, model_files, model_spec
from tests.core.torch.peers import VARIANTS, make_pair, packed_ids, random_ids

SMALL = DecoderSpec("qwen2", layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab=61, max_positions=64)


@pytest.fixture(params=["native", "plain"])
def kernels(request, monkeypatch):
    """With the CPU kernels compiled here, and with torch's own operators only."""
    if request.param == "plain":
        monkeypatch.setattr(ops, "library", lambda: None)
    elif ops.library() is None:
        pytest.skip("no C++ compiler: the CPU kernels cannot be built")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradients_equal_transformers(variant, kernels):
    theirs, ours = make_pair(variant)
    ids = random_ids(2, 40)
    labels = ids.clone()
    labels[:, :5] = -100
    expected = theirs(ids, labels=labels)
    logits = ours(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    # fp32 sums in another order: logits of size ~10 differ by a few 1e-6; the bounds are the requirement's.
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected.loss, atol=1e-6, rtol=1e-7)

    expected.loss.backward()
    loss.backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        reference = theirs_by_name[name].grad
        assert (parameter.grad - reference).norm() <= 1e-4 * reference.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_64_greedy_tokens_through_the_cache_equal_transformers(variant, kernels):
    theirs, ours = make_pair(variant, seed=3)
    ids = random_ids(2, 9)
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    with torch.inference_mode():
        cache = KVCache(ours.spec, 2, 9 + 64, torch.float32)
        tokens, part = [ids], ids
        for _ in range(64):
            part = ours(part, cache=cache)[:, -1:].argmax(-1)
            tokens.append(part)
    assert torch.equal(torch.cat(tokens, 1), expected)


@pytest.mark.parametrize("variant", ["gqa", "window", "yarn", "moe"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing_for_real_tokens(variant, side, kernels):
    theirs, ours = make_pair(variant)
    ids = random_ids(3, 24)
    mask = torch.ones(3, 24, dtype=torch.long)
    if side in ("left", "both"):
        mask[0, :11] = mask[2, :3] = 0
    if side in ("right", "both"):
        mask[0, 20:] = mask[1, 15:] = 0
    with torch.no_grad():
        padded = ours(ids, Layout.padded(mask))
        assert padded.isfinite().all()
        for row, real in enumerate(mask.bool()):
            alone = theirs(ids[row : row + 1, real]).logits[0]
            torch.testing.assert_close(padded[row, real], alone, atol=1e-4, rtol=0)
        if side != "both":
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            together = theirs(ids, attention_mask=mask, position_ids=positions).logits
            torch.testing.assert_close(padded[mask.bool()], together[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gqa", "mha", "window", "yarn", "moe"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_packed_documents_equal_separate_ones(variant, backend, kernels):
    theirs, ours = make_pair(variant)
    ours.use_attention(backend)
    rows = [[5, 9, 6], [20], [10, 7], [1, 1, 17]]
    ids = random_ids(len(rows), 20)
    positions, documents = packed_ids(rows, 20)
    packed = ours(ids, Layout.packed(positions, documents))
    (packed * (documents != 0)[..., None]).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}

    for row, number in [(r, n) for r, lengths in enumerate(rows) for n in range(1, len(lengths) + 1)]:
        members = documents[row] == number
        alone = theirs(ids[row : row + 1, members]).logits
        torch.testing.assert_close(packed[row, members], alone[0], atol=1e-4, rtol=0)
        alone.square().sum().backward()
    for name, parameter in theirs.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 1e-4 * parameter.grad.norm(), name


def test_gradient_of_padding_is_zero(kernels):
    _, ours = make_pair("gqa")
    positions, documents = packed_ids([[6, 3], [12]], 12)
    seen = {}
    ours.model.embed_tokens.register_forward_hook(lambda _, __, out: seen.setdefault("embedded", out).retain_grad())
    logits = ours(random_ids(2, 12), Layout.packed(positions, documents))
    (logits * (documents != 0)[..., None]).sum().backward()
    assert (seen["embedded"].grad[documents == 0] == 0).all()
    assert (seen["embedded"].grad[documents != 0] != 0).any(-1).all()


def test_batch_of_nothing_but_padding_is_finite_and_has_finite_gradients(kernels):
    _, ours = make_pair("moe")
    logits = ours(random_ids(2, 9), Layout.packed(*packed_ids([[], []], 9)))
    (logits * 0).sum().backward()
    assert logits.isfinite().all()
    assert all((p.grad == 0).all() for p in ours.parameters() if p.grad is not None)


@pytest.mark.parametrize("variant", ["gqa", "window", "moe"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_prompt_chunk_and_steps_through_the_cache_equal_one_forward(variant, backend):
    _, ours = make_pair(variant)
    ours.use_attention(backend)
    ids = random_ids(3, 20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[0, :12] = mask[1, 15:] = mask[2, :2] = False
    for real in (torch.ones_like(mask), mask):
        with torch.inference_mode():
            whole = ours(ids, Layout.padded(real))
            cache = KVCache(ours.spec, 3, 20, torch.float32)
            borders = [0, 9, 12, *range(13, 21)]
            parts = [
                ours(ids[:, a:b], Layout.cached(cache, b - a, real[:, a:b]), cache)
                for a, b in itertools.pairwise(borders)
            ]
        assert cache.lengths.tolist() == real.sum(1).tolist()
        torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=2e-5, rtol=0)


@pytest.mark.parametrize("variant", ["gqa", "yarn", "moe"])
def test_bf16_stays_as_near_to_fp32_as_transformers_bf16_does(variant, kernels):
    """bf16 rounds each of the ~10 operations per layer to 8 bits; transformers' own bf16 error against fp32 (3 to 6 %
    of the logits' norm on these three layers) is the yardstick. Ours has the same rounding points in other kernels and
    may exceed it by half; a mixture of experts by as much again, since a rounding that moves a token to another
    expert is a matter of luck."""
    exact, _ = make_pair(variant)
    theirs, ours = make_pair(variant, dtype=torch.bfloat16)
    ids = random_ids(4, 32)
    with torch.no_grad():
        target = exact(ids).logits
        yardstick = (theirs(ids).logits.float() - target).norm()
        error = (ours(ids).float() - target).norm()
    assert 0 < error <= (2 if variant == "moe" else 1.5) * yardstick
    assert error <= 0.06 * target.norm()


def test_embedding_is_the_last_real_token_normalised():
    theirs, ours = make_pair("gqa")
    ids = random_ids(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 7:] = 0
    mask[1, :4] = 0
    with torch.no_grad():
        vectors = ours.embed(ids, mask)
        for row, real in enumerate(mask.bool()):
            last = theirs.model(ids[row : row + 1, real]).last_hidden_state[0, -1]
            torch.testing.assert_close(vectors[row], F.normalize(last, dim=0), atol=1e-5, rtol=0)
        whole = ours.embed(ids, normalize=False)
        torch.testing.assert_close(whole, theirs.model(ids).last_hidden_state[:, -1], atol=1e-4, rtol=0)


def test_bidirectional_model_sees_the_whole_text(kernels):
    """Against transformers' attention with its causal mask replaced by one of zeros (padding excepted)."""
    theirs, ours = make_pair("gqa")
    ours.set_causal(False)
    ids = random_ids(3, 12)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    mask[1, 9:] = 0
    with torch.no_grad():
        vectors = ours.embed(ids, mask)
        for row, real in enumerate(mask.bool()):
            text = ids[row : row + 1, real]
            open_mask = torch.zeros(1, 1, text.shape[1], text.shape[1])
            last = theirs.model(text, attention_mask={"full_attention": open_mask}).last_hidden_state[0, -1]
            torch.testing.assert_close(vectors[row], F.normalize(last, dim=0), atol=1e-5, rtol=0)


def test_noncausal_spec_builds_a_bidirectional_decoder():
    from dataclasses import replace

    torch.manual_seed(0)
    decoder = Decoder(replace(SMALL, causal=False)).init_weights(1).eval()
    ids = random_ids(1, 8, vocab=61)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 61
    with torch.no_grad():
        assert not torch.allclose(decoder.hidden(ids)[0, 0], decoder.hidden(changed)[0, 0])


@pytest.mark.parametrize("name", sorted(model_files()))
def test_every_preset_builds_on_the_meta_device_with_its_exact_count(name):
    """The counts of the released sizes come from SOURCES.json (tests/core/test_spec.py ties spec.parameters to it)."""
    spec = model_spec(model_config(name), tokens=1000)
    with torch.device("meta"):
        decoder = Decoder(spec)
    assert sum(p.numel() for p in decoder.parameters()) == spec.parameters()
    assert all(p.is_meta for p in decoder.parameters())


def test_init_weights_is_deterministic_and_independent_of_order():
    first, again, other = (Decoder(SMALL).init_weights(seed) for seed in (7, 7, 8))
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(a, b)
        if name.endswith("bias"):
            assert (a == 0).all()
        elif "norm" in name:
            assert (a == 1).all()
        else:
            assert not torch.equal(a, c)
            assert a.std().item() == pytest.approx(SMALL.init_range, rel=0.1)
    layers = [layer.mlp.gate_proj.weight for layer in first.model.layers]
    assert not torch.equal(*layers)


@pytest.mark.slow
def test_compiled_layers_give_the_same_numbers_for_changing_documents():
    decoder = Decoder(SMALL).init_weights(1)
    ids = random_ids(2, 16, vocab=61)
    layouts = [Layout.packed(*packed_ids(rows, 16)) for rows in ([[5, 11], [16]], [[3, 3, 4], [9, 7]])]
    plain = [decoder(ids, layout) for layout in layouts]
    for layer in decoder.model.layers:
        layer.compile(backend="aot_eager")
    for layout, expected in zip(layouts, plain):
        torch.testing.assert_close(decoder(ids, layout), expected, atol=1e-6, rtol=0)
