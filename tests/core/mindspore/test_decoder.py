"""The MindSpore decoder against transformers and the torch decoder on random weights with non-zero biases, in float32."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mindspore import Tensor

from research.core.mindspore.decoder import Decoder, Embedder
from research.core.mindspore.layout import Layout, choose_block
from research.core.mindspore.loss import Objective, shifted_targets
from research.core.torch.layout import Layout as TorchLayout
from research.core.torch.loss import Objective as TorchObjective
from tests.core.mindspore.peers import Gradients, as_tensor, layout_inputs, twin
from tests.core.torch.peers import make_pair, packed_ids, random_ids

# fp32 sums in another order: logits of size ~10 differ by up to 3e-5; the bounds are the requirement's.
CLOSE = {"atol": 1e-4, "rtol": 0}
# A graph costs seconds. Every setting of the torch tests' VARIANTS is in one of these, several where they act in
# different parts of a layer; two layers where layers differ. yarn_factor does what yarn does, and more.
ONE = {"num_hidden_layers": 1}
ALL_SLIDE = ONE | {"max_window_layers": 0}
CASES = {
    "gqa": ("gqa", {"num_hidden_layers": 2}),
    "tied, as many key heads, linear positions": (
        "linear",
        ONE | {"num_key_value_heads": 6, "tie_word_embeddings": True},
    ),
    "window in the second layer": ("window", {"num_hidden_layers": 2}),
    "yarn_factor": ("yarn_factor", ONE),
    "moe": ("moe", ONE),
    "moe_norm_topk": ("moe_norm_topk", ONE),
    "moe_some_dense": ("moe_some_dense", {"num_hidden_layers": 2}),
    "moe in every second layer, no bias, window in the first": (
        "moe_window",
        {"num_hidden_layers": 2, "decoder_sparse_step": 2, "qkv_bias": False},
    ),
}
EVERY = [pytest.param(case, marks=[] if case == "gqa" else pytest.mark.slow) for case in CASES]
ROWS = [[5, 9, 6, 12, 15], [16, 13], [10, 7], [1, 1, 14]]


def packed_case():
    """-> ids and labels [4, 48] (torch), torch's layout, ours."""
    positions, documents = packed_ids(ROWS, 48)
    ids = random_ids(4, 48)
    labels = torch.where(documents == 0, -100, ids)
    labels[:, :3] = -100
    return ids, labels, TorchLayout.packed(positions, documents), Layout.packed(positions.numpy(), documents.numpy())


class Summed(ms.nn.Cell):
    """The objective with a weight on the router's loss large enough to be seen in every gradient."""

    def __init__(self, objective):
        super().__init__(auto_prefix=False)
        self.objective = objective

    def construct(self, *inputs):
        total, router = self.objective(*inputs)
        return total + 30.0 * router, total, router


def small_pair(variant: str):
    """One layer, a sliding one where the variant has any."""
    return make_pair(variant, **(ALL_SLIDE if variant == "window" else ONE))


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY)
def test_logits_loss_and_gradients_equal_transformers(case):
    """The logits from plain operators (as a MINDIR has them), loss and gradients from the kernels that training uses."""
    variant, changes = CASES[case]
    theirs, ours = make_pair(variant, **changes)
    ids = random_ids(2, 40)
    labels = ids.clone()
    labels[:, :5] = -100
    expected = theirs(ids, labels=labels)
    if variant in ("gqa", "window", "yarn_factor", "moe"):
        plain = twin(ours, kernels="composite")
        np.testing.assert_allclose(plain(as_tensor(ids)).asnumpy(), expected.logits.detach().numpy(), **CLOSE)

    where, targets = shifted_targets(labels.numpy(), 80)
    inputs = (as_tensor(ids), *layout_inputs(Layout.full(2, 40)), Tensor(where), Tensor(targets))
    count = int((targets != -100).sum())
    (expected.loss * count).backward()
    theirs_by_name = dict(theirs.named_parameters())
    for kernels in ("auto", "composite") if variant == "gqa" else ("auto",):
        step = Gradients(Objective(twin(ours, kernels=kernels), head_chunk=32))
        (total, _), gradients = step(*inputs)
        assert float(total) / count == pytest.approx(float(expected.loss.detach()), abs=1e-5)
        for parameter, gradient in zip(step.weights, gradients):
            reference = theirs_by_name[parameter.name].grad.numpy()
            assert np.linalg.norm(gradient.asnumpy() - reference) <= 1e-4 * np.linalg.norm(reference), parameter.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "block", "kernels"),
    [("gqa", None, "auto"), ("gqa", None, "composite"), ("window", 16, "auto")]
    + [("moe", None, "auto"), ("moe", 16, "composite")],
)
def test_packed_batch_has_the_loss_and_gradients_of_torch_in_rows_and_in_blocks(variant, block, kernels):
    _, ours = small_pair(variant)
    ids, labels, theirs_layout, layout = packed_case()
    sparse = variant == "moe"
    total, router = TorchObjective(ours, 32, sparse)(ids, labels, theirs_layout)
    (total + (30.0 * router if sparse else 0.0)).backward()
    expected = {name: p.grad.numpy() for name, p in ours.named_parameters()}
    assert choose_block(layout.longest, 48) == 16
    where, targets = shifted_targets(labels.numpy(), 160)
    step = Gradients(Summed(Objective(twin(ours, block=block, kernels=kernels), head_chunk=64, router=sparse)))
    (_, found, balance), gradients = step(as_tensor(ids), *layout_inputs(layout), Tensor(where), Tensor(targets))
    assert float(found) == pytest.approx(float(total.detach()), rel=1e-5)
    if sparse:
        assert float(balance) == pytest.approx(float(router.detach()), rel=1e-5)
    for parameter, gradient in zip(step.weights, gradients):
        reference = expected[parameter.name]
        assert np.linalg.norm(gradient.asnumpy() - reference) <= 1e-4 * np.linalg.norm(reference), parameter.name


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gqa", "window"])
def test_packed_and_padded_documents_equal_separate_ones(variant):
    theirs, ours = small_pair(variant)
    decoder, blocked = twin(ours), twin(ours, block=16, kernels="composite")
    positions, documents = packed_ids(ROWS, 48)
    ids = random_ids(4, 48)
    inputs = (as_tensor(ids), *layout_inputs(Layout.packed(positions.numpy(), documents.numpy())))
    packed, in_blocks = decoder(*inputs).asnumpy(), blocked(*inputs).asnumpy()
    assert np.isfinite(packed).all() and np.isfinite(in_blocks).all()
    mask = torch.ones(4, 48, dtype=torch.long)
    mask[0, :11] = mask[2, :3] = mask[1, 40:] = mask[2, 31:] = 0
    padded = decoder(as_tensor(ids), *layout_inputs(Layout.padded(mask.numpy()))).asnumpy()
    with torch.no_grad():
        for row, lengths in enumerate(ROWS):
            for number in range(1, len(lengths) + 1):
                members = documents[row] == number
                alone = theirs(ids[row : row + 1, members]).logits[0].numpy()
                np.testing.assert_allclose(packed[row, members], alone, **CLOSE)
                np.testing.assert_allclose(in_blocks[row, members], alone, **CLOSE)
        for row, real in enumerate(mask.bool()):
            alone = theirs(ids[row : row + 1, real]).logits[0].numpy()
            np.testing.assert_allclose(padded[row, real], alone, **CLOSE)


@pytest.mark.slow
def test_a_block_smaller_than_a_document_would_change_the_result():
    """That the hint acts at all: with blocks of 8 a document of 48 tokens loses its far keys."""
    _, ours = small_pair("gqa")
    ids = as_tensor(random_ids(1, 48))
    whole = layout_inputs(Layout.full(1, 48))
    near, far = (twin(ours, block=block, kernels="composite")(ids, *whole).asnumpy()[0] for block in (8, None))
    np.testing.assert_allclose(near[:8], far[:8], **CLOSE)
    assert np.abs(near[20:] - far[20:]).max() > 0.01


def test_choose_block_is_the_smallest_power_of_two_that_saves_work():
    assert choose_block(60, 256) == 64 and choose_block(65, 256) is None and choose_block(64, 256) == 64
    assert choose_block(3, 256) == 16 and choose_block(20, 250) is None and choose_block(16, 32) is None


@pytest.mark.slow
def test_embedding_is_the_last_real_token_and_bidirectional_models_see_the_whole_text():
    theirs, ours = small_pair("gqa")
    ids = random_ids(3, 12)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = mask[1, 9:] = 0
    layout = Layout.padded(mask.numpy())
    inputs = (as_tensor(ids), *layout_inputs(layout), Tensor(layout.last()))
    for causal in (True, False):
        ours.spec = replace(ours.spec, causal=causal)
        vectors = Embedder(twin(ours, head=True))(*inputs).asnumpy()
        with torch.no_grad():
            for row, real in enumerate(mask.bool()):
                text = ids[row : row + 1, real]
                seen = None if causal else {"full_attention": torch.zeros(1, 1, text.shape[1], text.shape[1])}
                last = theirs.model(text, attention_mask=seen).last_hidden_state[0, -1]
                np.testing.assert_allclose(vectors[row], F.normalize(last, dim=0).numpy(), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_batch_of_nothing_but_filling_is_finite():
    _, ours = small_pair("moe")
    layout = Layout.packed(np.zeros((2, 16)), np.zeros((2, 16)))
    step = Gradients(Summed(Objective(twin(ours), router=False)))
    where, targets = shifted_targets(np.full((2, 16), -100), 8)
    (_, total, _), gradients = step(
        as_tensor(random_ids(2, 16)), *layout_inputs(layout), Tensor(where), Tensor(targets)
    )
    assert float(total) == 0.0
    assert all(float(np.abs(gradient.asnumpy()).max()) == 0.0 for gradient in gradients)


def test_parameter_names_stay_when_a_decoder_is_wrapped():
    decoder = Decoder(replace(make_pair("gqa")[1].spec, layers=1))
    names = [p.name for p in decoder.get_parameters()]
    assert names[0] == "model.embed_tokens.weight" and "model.layers.0.self_attn.q_proj.bias" in names
    assert [p.name for p in Gradients(Objective(decoder)).weights] == names
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_importing_the_package_loads_no_torch(repo):
    code = (
        "import sys, research.core.mindspore.runtime\n"
        "assert 'mindspore' not in sys.modules\n"
        "from research.core.mindspore import cache, decode, layout, lora, loss, probe, weights\n"
        "assert 'mindspore' in sys.modules and 'torch' not in sys.modules\n"
        "assert not any(name.startswith('research.core.torch') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
