"""Promises of the query-norm router: the heads with the longest queries, gates of 1, gradients to the norms' softmax."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from moh import MoHConfig
from moh.routing import build_router

D = 6


def router_of(heads, shared, active):
    return build_router(MoHConfig(heads, shared, active, "query_norm"), 1)


def probabilities_of_one_token(q: Tensor) -> Tensor:
    """softmax of the norms of q `[h_r, D]`, divided by their unbiased standard deviation, number by number."""
    norms = [torch.sqrt((row * row).sum()) for row in q.double()]
    mean = sum(norms) / len(norms)
    spread = torch.sqrt(sum((n - mean) ** 2 for n in norms) / (len(norms) - 1))
    # the softmax of differences: norms much larger than their spread would overflow
    return torch.stack([1 / sum(torch.exp((other - n) / spread) for other in norms) for n in norms]).float()


@pytest.mark.parametrize(
    "shared, active",
    [
        pytest.param(3, 2, id="3-shared-2-of-5"),
        pytest.param(0, 2, id="none-shared"),
        pytest.param(5, 1, id="1-of-3"),
        pytest.param(3, 5, id="all-active"),
        pytest.param([1, 6, 7], 2, id="shared-1-6-7"),
    ],
)
def test_longest_queries_are_active_and_the_gradient_goes_to_the_probabilities(shared, active):
    router = router_of(8, shared, active)
    shared_heads, routed_heads = list(router.config.shared_indices), list(router.config.routed_indices)
    q = torch.randn(2, 4, 8, D, requires_grad=True)
    info = router(q=q)

    for b in range(2):
        for t in range(4):
            lengths = {i: math.sqrt(sum(v * v for v in q[b, t, i].tolist())) for i in routed_heads}
            longest = sorted(lengths, key=lengths.get)[-active:]
            expected = [1.0 if i in shared_heads or i in longest else 0.0 for i in range(8)]
            assert info.gates[b, t].tolist() == expected  # exactly 1, although a gradient passes through

    p = torch.stack([torch.stack([probabilities_of_one_token(t) for t in row]) for row in q[:, :, routed_heads]])
    torch.testing.assert_close(info.probs, p)

    weight = torch.randn(2, 4, 8)
    (through_gates,) = torch.autograd.grad((info.gates * weight).sum(), q, retain_graph=True)
    (through_p,) = torch.autograd.grad((p * weight[..., routed_heads]).sum(), q)
    assert through_p.abs().max() > 1e-3
    torch.testing.assert_close(through_gates, through_p, rtol=1e-4, atol=1e-6)


def published_choice(q: Tensor, shared: int, active: int) -> tuple[Tensor, Tensor]:
    """Mask `[T, H]` and p of queries `[T, H, D]`, step by step in their dtype, as MoH-LLaMA3-8B's inference code has it."""
    norms = torch.stack([torch.norm(q[:, head], p=2, dim=1) for head in range(shared, q.shape[1])], dim=1)
    p = torch.softmax(norms / norms.std(dim=1, keepdim=True), dim=1)
    chosen = torch.nn.functional.one_hot(p.topk(active, dim=1).indices, p.shape[1]).sum(1)
    return torch.cat([torch.ones(len(q), shared), chosen.float()], 1), p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_rounded_router_chooses_as_the_published_code(dtype):
    q = torch.randn(1, 3000, 32, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    config = MoHConfig(32, 16, 8, "query_norm_rounded")
    info = build_router(config, 1)(q=q)
    mask, p = published_choice(q[0], 16, 8)
    assert torch.equal(info.gates[0].float(), mask) and torch.equal(info.probs[0], p.float())
    exact = build_router(dataclasses.replace(config, router="query_norm"), 1)(q=q)
    differ = (exact.gates != info.gates).any(-1).float().mean()
    assert differ == 0 if dtype == torch.float32 else 0 < differ < 0.5  # as many as its ties


def test_the_rounded_routers_gradient_is_that_of_its_probabilities():
    q = torch.randn(1, 4, 8, D, dtype=torch.bfloat16, requires_grad=True)
    info = build_router(MoHConfig(8, 3, 2, "query_norm_rounded"), 1)(q=q)
    (got,) = torch.autograd.grad(info.gates[..., 3:].float().square().sum() / 2, q, retain_graph=True)
    (wanted,) = torch.autograd.grad((info.probs * info.gates[..., 3:].detach()).sum(), q)
    assert got.abs().max() > 0
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.02)


def test_a_single_routed_head_has_probability_1_and_finite_gradients():
    q = torch.randn(1, 3, 4, D, requires_grad=True)
    info = router_of(4, 3, 1)(q=q)
    assert (info.gates == 1).all()
    assert (info.probs == 1).all()
    info.gates.sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize(
    "q",
    [
        pytest.param(torch.ones(1, 3, 8, D), id="equal-queries"),
        pytest.param(torch.zeros(1, 3, 8, D), id="zero-queries"),
        pytest.param(torch.ones(1, 3, 8, D) * 1e-30, id="tiny-queries"),
        pytest.param(torch.ones(1, 3, 8, D) * 1e10, id="huge-queries"),
    ],
)
def test_ties_still_activate_exactly_k_heads_and_give_finite_gradients(q):
    q = q.clone().requires_grad_()
    info = router_of(8, 2, 3)(q=q)
    assert (info.active.sum(-1) == 5).all()
    torch.testing.assert_close(info.probs.sum(-1), torch.ones(1, 3))
    (info.gates * torch.randn_like(info.gates)).sum().backward()
    assert q.grad.isfinite().all()


def test_shared_heads_alone_route_nothing():
    info = router_of(8, 3, 0)(q=torch.randn(2, 4, 8, D))
    assert info.gates[0, 0].tolist() == [1.0] * 3 + [0.0] * 5
    assert info.probs is None


def test_router_has_no_parameters():
    assert not router_of(8, 3, 2).state_dict()


def test_bfloat16_gates_are_exactly_1_and_0():
    q = torch.randn(2, 4, 8, D, dtype=torch.bfloat16, requires_grad=True)
    info = router_of(8, 3, 2)(q=q)
    assert info.gates.dtype == torch.bfloat16
    assert info.probs.dtype == torch.float32
    assert set(info.gates.unique().tolist()) == {0.0, 1.0}
    assert (info.active.sum(-1) == 5).all()
    (info.gates * torch.randn_like(info.gates)).sum().backward()
    assert q.grad.dtype == torch.bfloat16
    assert q.grad.abs().sum() > 0


def test_gates_are_the_same_without_gradients():
    router, q = router_of(8, 3, 2), torch.randn(2, 4, 8, D)
    with torch.no_grad():
        gates = router(q=q).gates
    assert torch.equal(gates, router(q=q.requires_grad_()).gates)


@pytest.mark.parametrize("shape", [pytest.param((2, 4, 7, D), id="head-missing"), pytest.param((2, 4, 8), id="3d")])
def test_wrong_queries_are_refused(shape):
    with pytest.raises(ValueError, match=r"q must have shape \[B, N, num_heads = 8, D\], got \(2, 4, "):
        router_of(8, 3, 2)(q=torch.randn(shape))


def test_missing_queries_are_named():
    with pytest.raises(ValueError, match="q must be given: the 'query_norm' router decides by it"):
        router_of(8, 3, 2)(torch.randn(2, 4, 1))
