"""Promises of `RoutingInfo`: which heads are active, their loads, and how unbalanced those are."""

from __future__ import annotations

import math

import pytest
import torch

from moh import MoHConfig, RoutingInfo
from moh.routing import build_router

CONFIG = MoHConfig(6, [0, 3], 2)  # routed: 1, 2, 4, 5


def random_routing(config: MoHConfig = CONFIG, batch: int = 3, tokens: int = 5) -> RoutingInfo:
    return build_router(config, 7)(2 * torch.randn(batch, tokens, 7))


def balance_loss_of_counts(info: RoutingInfo, kept: list[tuple[int, int]]) -> float:
    """h_r * sum of f_i P_i, counted token by token."""
    total = 0.0
    for column, head in enumerate(info.config.routed_indices):
        f = sum(info.gates[b, t, head].item() != 0 for b, t in kept) / len(kept)
        p = sum(info.probs[b, t, column].item() for b, t in kept) / len(kept)
        total += f * p
    return info.config.num_routed * total


@pytest.mark.parametrize("masked", [pytest.param(False, id="all-tokens"), pytest.param(True, id="token-mask")])
def test_balance_loss_is_that_of_a_direct_count(masked):
    info = random_routing()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]) if masked else None
    kept = [(b, t) for b in range(3) for t in range(5) if mask is None or mask[b, t]]
    assert info.balance_loss(mask).item() == pytest.approx(balance_loss_of_counts(info, kept), rel=1e-5)


@pytest.mark.parametrize("active", [1, 2, 3, 4])
def test_balance_loss_is_k_at_perfect_balance(active):
    tokens = 4
    gates = torch.zeros(1, tokens, 6)
    gates[..., [0, 3]] = 1
    for t in range(tokens):
        for j in range(active):
            gates[0, t, CONFIG.routed_indices[(t + j) % 4]] = 1  # each routed head `active` times
    config = MoHConfig(6, [0, 3], active)
    info = RoutingInfo(config=config, gates=gates, probs=torch.full((1, tokens, 4), 0.25))
    assert info.balance_loss().item() == pytest.approx(active)


def test_balance_loss_is_larger_where_all_tokens_choose_the_same_heads():
    gates = torch.zeros(1, 4, 6)
    gates[..., [1, 2]] = 1
    probs = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 4, 4)
    assert RoutingInfo(config=MoHConfig(6, [0, 3], 2), gates=gates, probs=probs).balance_loss().item() == pytest.approx(
        4
    )


def test_balance_loss_sends_its_gradient_to_the_probabilities_alone():
    probs = torch.full((1, 2, 4), 0.25, requires_grad=True)
    gates = torch.tensor([[[1.0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0]]], requires_grad=True)
    RoutingInfo(config=CONFIG, gates=gates, probs=probs).balance_loss().backward()
    assert gates.grad is None
    # d/dp = h_r * f_i / tokens, with f = 1, 1/2, 1/2, 0
    torch.testing.assert_close(probs.grad, torch.tensor([2.0, 1.0, 1.0, 0.0]).expand(1, 2, 4))


def test_padding_tokens_do_not_count_even_if_they_hold_nan():
    info = random_routing()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, :2] = False
    gates, probs = info.gates.clone(), info.probs.clone()
    gates[0, :2], probs[0, :2] = math.nan, math.nan
    spoilt = RoutingInfo(config=info.config, gates=gates, probs=probs)
    torch.testing.assert_close(spoilt.balance_loss(mask), info.balance_loss(mask))
    torch.testing.assert_close(spoilt.load(mask), info.load(mask))


def test_balance_loss_of_nothing_but_padding_is_0():
    assert random_routing().balance_loss(torch.zeros(3, 5)).item() == 0


@pytest.mark.parametrize("router", ["two_stage", "query_norm", "linear"])
def test_balance_loss_of_a_layer_that_routes_nothing_is_0(router):
    info = build_router(MoHConfig(6, 6, 0, router), 7)(torch.randn(2, 3, 7), torch.randn(2, 3, 6, 4))
    assert info.balance_loss().item() == 0
    assert info.load().tolist() == [1.0] * 6


def test_balance_loss_is_float32_for_low_precision_gates():
    info = build_router(CONFIG, 7, dtype=torch.bfloat16)(torch.randn(2, 3, 7, dtype=torch.bfloat16))
    assert info.balance_loss().dtype == torch.float32


def test_load_is_the_share_of_tokens_that_use_each_head():
    gates = torch.zeros(2, 2, 6)
    gates[..., [0, 3]] = 0.7
    gates[0, :, 1] = -0.2  # the sign does not matter
    gates[0, 0, 5] = 1e-20
    info = RoutingInfo(config=CONFIG, gates=gates, probs=None)
    assert info.load().tolist() == [1.0, 0.5, 0.0, 1.0, 0.0, 0.25]
    assert info.load(torch.tensor([[1, 0], [0, 0]])).tolist() == [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert torch.equal(info.active, gates != 0)


@pytest.mark.parametrize("method", ["load", "balance_loss"])
def test_token_mask_of_another_shape_is_refused(method):
    with pytest.raises(ValueError, match=r"token_mask must have shape \(3, 5\), got \(3, 4\)"):
        getattr(random_routing(), method)(torch.ones(3, 4))


def test_a_batch_of_none_loses_nothing() -> None:
    config = MoHConfig(4, 1, 1)
    info = RoutingInfo(config, torch.zeros(0, 5, 4), torch.zeros(0, 5, 3, requires_grad=True))
    assert float(info.balance_loss().detach()) == 0 and torch.equal(info.load(), torch.zeros(4))
