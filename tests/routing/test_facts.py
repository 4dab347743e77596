"""Promises of the router classes: every name has one, and its routers do what the class states."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moh import MoHAttention, MoHConfig
from moh.config import FIXED, ROUTERS
from moh.models.dial import allowed_counts
from moh.routing import ThresholdRouter, build_router, router_class

C, H, D = 12, 6, 4
each_router = pytest.mark.parametrize("name", ROUTERS)


def router_of(name: str, shared=(0, 3), active=2):
    router = build_router(MoHConfig(H, shared, active, name), C)
    if isinstance(router, ThresholdRouter):
        router.fit_thresholds(router.contribution(torch.randn(500, C)))
    return router


@each_router
def test_the_class_of_a_name_is_what_is_built(name) -> None:
    assert type(router_of(name)) is router_class(name)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router must be one of 'two_stage', .* got 'random'"):
        router_class("random")


@each_router
def test_a_router_reads_what_it_says(name) -> None:
    given = {"q": torch.randn(2, 5, H, D)} if router_class(name).reads_queries else {"x": torch.randn(2, 5, C)}
    assert router_of(name)(**given).gates.shape == (2, 5, H)


@each_router
def test_gates_of_a_hard_router_alone_are_1_and_0(name) -> None:
    gates = router_of(name)(torch.randn(2, 50, C), torch.randn(2, 50, H, D)).gates
    assert bool(((gates == 0) | (gates == 1)).all()) is router_class(name).is_hard


@each_router
@pytest.mark.parametrize("active", [0, 1, 4])
def test_a_router_works_with_every_number_of_active_heads_that_it_allows(name, active) -> None:
    router = router_of(name, active=active)
    for k in allowed_counts(router):
        router.config = dataclasses.replace(router.config, active_heads=k)
        info = router(torch.randn(2, 5, C), torch.randn(2, 5, H, D))
        assert info.active[..., [0, 3]].all()
        # by a threshold a token may use other numbers, but for none and all
        assert (name == "threshold" and 0 < k < 4) or (info.active.sum(-1) == 2 + k).all()


@pytest.mark.parametrize("shared", [(0, 3), (5,), (), (0, 1, 2, 3, 4, 5)])
def test_a_threshold_lets_the_tokens_it_was_fitted_to_use_k_routed_heads_on_average(shared) -> None:
    router, x = router_of("threshold", shared, min(2, H - len(shared))), torch.randn(4, 250, C)
    router.fit_thresholds(router.contribution(x).flatten(0, 1))
    for k in allowed_counts(router):
        router.config = dataclasses.replace(router.config, active_heads=k)
        active = router(x).active
        assert float(active.sum(-1).float().mean()) == pytest.approx(len(shared) + k, abs=1e-3)
        assert active[..., list(shared)].all() and (k in (0, H - len(shared)) or active.sum(-1).unique().numel() > 1)


def test_a_threshold_that_was_not_fitted_is_refused_in_use() -> None:
    router = build_router(MoHConfig(H, 2, 2, "threshold"), C)
    with pytest.raises(ValueError, match=r"thresholds must be fitted for router='threshold', as moh\.convert does"):
        router(torch.randn(1, 3, C))


def test_thresholds_are_not_rounded_with_the_model_and_not_in_checkpoints() -> None:
    router = router_of("threshold")
    before = router.threshold()
    assert router.bfloat16().threshold() == before
    assert sorted(router.state_dict()) == ["contribution.bias", "contribution.weight"]


def test_a_token_of_nan_uses_all_heads_of_a_threshold_and_is_seen_in_the_output() -> None:
    router, x = router_of("threshold"), torch.randn(1, 3, C)
    x[0, 1, 2] = torch.nan
    assert router(x).active[0, 1].all()


@each_router
@pytest.mark.parametrize("shared", [(0, 3), (5,), ()])
def test_a_reordered_router_gives_each_head_the_gate_that_it_had(name, shared) -> None:
    router, heads = router_of(name, shared), [4, 0, 5, 3, 1, 2]
    x, q = torch.randn(2, 5, C), torch.randn(2, 5, H, D)
    before = router(x, q).gates
    router.reorder(heads)
    places = [heads.index(head) for head in shared]
    assert router.config == dataclasses.replace(router.config, shared_heads=places)
    torch.testing.assert_close(router(x, q[:, :, heads]).gates, before[..., heads])


@each_router
def test_the_linear_layer_that_is_stated_ranks_the_routed_heads(name) -> None:
    router, x = router_of(name), torch.randn(2, 50, C)
    if (scores := router.linear_scores()) is not None:
        of_routed = scores(x)[..., routed := [1, 2, 4, 5]]
        if (threshold := router.threshold()) is not None:
            chosen = (of_routed > threshold).float()
        else:
            chosen = torch.zeros(2, 50, 4).scatter(-1, of_routed.topk(2).indices, 1.0)
        assert torch.equal(router(x).gates[..., routed], chosen)


@pytest.mark.parametrize("name", [name for name in ROUTERS if router_class(name).ranks_heads])
def test_a_ranking_router_orders_heads_as_layers_of_fewer_heads_use_them(name) -> None:
    router, x = router_of(name), torch.randn(2, 50, C)
    order = router.order(x)
    for n in range(2, H + 1):
        used = router.with_config(dataclasses.replace(router.config, active_heads=n - 2))(x).active
        first = torch.arange(H) < (used.sum(-1, keepdim=True) if name == "threshold" else n)
        assert torch.equal(torch.zeros_like(used).scatter(-1, order, first.expand_as(order)), used)
    other = router.with_config(MoHConfig(H, (5,), 2, name))
    if isinstance(other, ThresholdRouter):
        before = router(x).gates
        other.fit_thresholds(other.contribution(x).flatten(0, 1))
        assert torch.equal(router(x).gates, before)
    assert other(x).active[..., 5].all() and router.config.shared_indices == (0, 3)


@pytest.mark.parametrize("shared", [(0, 3), (5,), (), (0, 1, 2, 3, 4, 5)])
def test_fixed_heads_have_gates_of_1_whatever_the_input_is_and_nothing_is_routed(shared) -> None:
    router = router_of(FIXED, shared, 0)
    info = router(torch.randn(2, 5, C))
    assert torch.equal(info.gates, torch.tensor([float(h in shared) for h in range(H)]).expand(2, 5, H))
    assert info.probs is None and allowed_counts(router) == [0] and not list(router.parameters())


def test_a_layer_with_fixed_heads_is_that_of_the_others_weighted_by_0() -> None:
    torch.manual_seed(0)
    layer = MoHAttention(24, num_heads=H, shared_heads=(0, 3), active_heads=0, router=FIXED)
    whole = MoHAttention(24, num_heads=H, shared_heads=H, active_heads=0, router=FIXED)
    whole.load_state_dict(layer.state_dict())
    with torch.no_grad():
        whole.proj.weight.unflatten(1, (H, -1))[:, [1, 2, 4, 5]] = 0.0
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(layer(x), whole(x))
