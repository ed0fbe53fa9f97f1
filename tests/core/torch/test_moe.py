"""Mixture of experts: both matmul paths, and the load-balancing loss against transformers'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from research.core.torch import moe
from research.core.torch.layout import Layout
from research.core.torch.moe import RouterCounts, SparseMLP, grouped_linear
from tests.core.torch.peers import make_pair, packed_ids, random_ids


def loop(x, weight, counts):
    parts = x.split(counts.tolist())
    return torch.cat([part @ weight[e].T for e, part in enumerate(parts)])


@pytest.mark.parametrize("path", ["grouped", "padded"])
@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 0, 10], [10, 0, 0, 0], [1, 1, 1, 1]])
def test_grouped_linear_equals_a_loop_over_experts_with_gradients(monkeypatch, path, counts):
    if path == "padded":
        monkeypatch.setattr(moe, "_grouped_operator", lambda x, w: None)
    else:
        assert moe._grouped_operator(torch.zeros(1, 8), torch.zeros(2, 8, 8)) is not None
    random = torch.Generator().manual_seed(0)
    counts = torch.tensor(counts)
    x = torch.randn(int(counts.sum()), 16, generator=random).requires_grad_()
    weight = torch.randn(4, 8, 16, generator=random).requires_grad_()
    probe = torch.randn(int(counts.sum()), 8, generator=random)
    results = []
    for function, argument in ((grouped_linear, counts.cumsum(0).int()), (loop, counts)):
        out = function(x, weight, argument)
        results.append((out, *torch.autograd.grad((out * probe).sum(), (x, weight))))
    for mine, reference in zip(*results):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=0)


def test_padded_path_gives_the_same_layer(monkeypatch):
    _, ours = make_pair("moe_norm_topk")
    ids = random_ids(2, 13)
    with torch.no_grad():
        expected = ours(ids)
        monkeypatch.setattr(moe, "_grouped_operator", lambda x, w: None)
        torch.testing.assert_close(ours(ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["moe", "moe_norm_topk", "moe_some_dense", "moe_every_second"])
def test_router_loss_and_its_gradients_equal_transformers(variant):
    theirs, ours = make_pair(variant)
    ids = random_ids(2, 21)
    expected = theirs(ids, output_router_logits=True)
    router = RouterCounts()
    ours.hidden(ids, router=router)
    loss = router.loss()
    torch.testing.assert_close(loss, expected.aux_loss, atol=1e-6, rtol=0)
    loss.backward()
    expected.aux_loss.backward()
    by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            reference = by_name[name].grad
            assert (parameter.grad - reference).norm() <= 1e-4 * reference.norm() + 1e-12, name
    gates = [parameter.grad for name, parameter in ours.named_parameters() if name.endswith("mlp.gate.weight")]
    assert gates and all(grad.norm() > 0 for grad in gates)


def test_router_loss_leaves_padding_out_like_transformers():
    theirs, ours = make_pair("moe")
    ids = random_ids(3, 16)
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[0, 9:] = 0
    mask[1, 12:] = 0  # right padding: real tokens see the same in both models
    expected = theirs(ids, attention_mask=mask, output_router_logits=True).aux_loss
    for layout in (Layout.padded(mask), Layout.packed(*packed_ids([[9], [12], [16]], 16))):
        router = RouterCounts()
        ours.hidden(ids, layout, router=router)
        torch.testing.assert_close(router.loss(), expected, atol=1e-6, rtol=0)


def test_training_loss_with_the_coefficient_equals_transformers():
    theirs, ours = make_pair("moe", router_aux_loss_coef=0.01)
    ids = random_ids(2, 21)
    expected = theirs(ids, labels=ids, output_router_logits=True).loss
    router = RouterCounts()
    logits = ours.logits(ours.hidden(ids, router=router))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss = loss + ours.spec.moe.aux_coefficient * router.loss()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)


def test_counts_are_transformers_formula_on_given_router_logits():
    """One layer alone, with all tokens sent to one expert: the loss is experts * 1 * its mean probability."""
    random = torch.Generator().manual_seed(0)
    _, ours = make_pair("moe")
    layer: SparseMLP = ours.model.layers[0].mlp
    x = torch.randn(1, 50, 96, generator=random)
    with torch.no_grad():
        router = RouterCounts()
        router.add(layer(x, None, True)[1], 50)
        logits = layer.gate(x[0])
        expected = load_balancing_loss_func((logits,), 6, 2)
    torch.testing.assert_close(router.loss(), expected, atol=1e-6, rtol=0)
