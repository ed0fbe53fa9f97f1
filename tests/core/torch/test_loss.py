"""Chunked linear cross-entropy against F.cross_entropy on materialised logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from research.core.torch import loss
from research.core.torch.loss import linear_cross_entropy


def _case(dtype=torch.float32, B=3, T=17, H=24, V=101, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, H, generator=g).to(dtype)
    weight = (0.3 * torch.randn(V, H, generator=g)).to(dtype)
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[torch.rand(B, T, generator=g) < 0.4] = -100
    return hidden, weight, labels


def _reference(hidden, weight, labels):
    logits = (hidden.double() @ weight.double().t())[:, :-1]
    return F.cross_entropy(logits.reshape(-1, weight.shape[0]), labels[:, 1:].reshape(-1), reduction="sum")


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_fp32_loss_and_both_gradients_equal_full_cross_entropy(chunk):
    hidden, weight, labels = _case()
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    total, count = linear_cross_entropy(*ours, labels, chunk)
    expected = _reference(*theirs, labels)
    assert count == (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(total.double() / count, expected / count, rtol=0, atol=1e-6)
    (total / count).backward()
    (expected / count).backward()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_bf16_matmuls_stay_within_bf16_rounding_of_fp64():
    hidden, weight, labels = _case(torch.bfloat16, H=64, V=500)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    total, count = linear_cross_entropy(*ours, labels, 8)
    expected = _reference(*theirs, labels)
    # a logit is rounded to 8 bits: relative 2^-8 of values near 10, averaged over the targets
    assert abs(total.item() - expected.item()) / count < 0.02
    total.backward()
    expected.backward()
    for mine, other in zip(ours, theirs):
        error = (mine.grad.double() - other.grad.double()).norm() / other.grad.double().norm()
        assert error < 0.02


def test_position_predicts_next_label_and_never_crosses_rows():
    hidden, weight, _ = _case(B=2, T=4)
    labels = torch.full((2, 4), -100)
    labels[1, 0] = 5  # the first label of a row has no position before it
    total, count = linear_cross_entropy(hidden, weight, labels)
    assert count == 0 and total.item() == 0.0
    labels[0, 3] = 7
    total, count = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(total, F.cross_entropy(hidden[0, 2:3] @ weight.t(), torch.tensor([7])))
    assert count == 1


def test_no_supervised_target_gives_zero_gradients_instead_of_failing():
    hidden, weight, labels = _case()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    total, _ = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    total.backward()
    assert hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_frozen_head_gets_no_gradient_and_hidden_gradient_is_unchanged():
    hidden, weight, labels = _case()
    a, b = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    linear_cross_entropy(a, weight, labels, 5)[0].backward()
    linear_cross_entropy(b, weight.clone().requires_grad_(), labels, 5)[0].backward()
    assert weight.grad is None
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


def test_logits_of_all_rows_never_exist(monkeypatch):
    hidden, weight, labels = _case(T=64)
    seen = []
    original = loss._softmax_loss
    monkeypatch.setattr(loss, "_softmax_loss", lambda x, *a: (seen.append(x.shape[0]), original(x, *a))[1])
    _, count = linear_cross_entropy(hidden.requires_grad_(), weight, labels, 16)
    assert max(seen) == 16 and count <= sum(seen) < count + 16  # the last chunk is filled up
