"""Promises of the routing units: which heads a token may choose together, with the scores of every router."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moh import MoHConfig
from moh.routing import build_router, record_routing
from moh.routing.units import choose, order, strongest

C, D = 12, 4
ROUTERS = ["two_stage", "single_stage", "query_norm", "query_norm_rounded", "linear"]


def config_of(unit: str, shared=3, active=3, router="linear", heads=9, kv_heads=3) -> MoHConfig:
    return MoHConfig(heads, shared, active, router, routing_unit=unit, kv_heads=kv_heads)


def route(config: MoHConfig, B=2, N=40):
    router = build_router(config, C)
    return router(x=torch.randn(B, N, C), q=torch.randn(B, N, config.num_heads, D))


def in_groups(active: Tensor, config: MoHConfig) -> Tensor:
    """How many heads of each key/value group each token uses, `[B, N, Hkv]`."""
    return active.unflatten(-1, (config.kv_heads, -1)).sum(-1)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    "shared, active",
    [
        pytest.param(3, 3, id="1-shared-1-of-2"),
        pytest.param(0, 6, id="2-of-3"),
        pytest.param([2, 3, 7], 3, id="other-shared"),
        pytest.param(6, 3, id="all"),
        pytest.param(3, 0, id="shared-alone"),
    ],
)
def test_group_balanced_routing_uses_as_many_heads_of_every_group(router, shared, active):
    config = config_of("group_balanced", shared, active, router)
    info = route(config)
    assert (in_groups(info.active, config) == config.heads_per_group).all()
    assert info.active[..., list(config.shared_indices)].all()
    assert config.heads_per_group == (config.num_shared + active) // 3


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    "shared, active",
    [
        pytest.param(3, 3, id="1-shared-1-of-2"),
        pytest.param(0, 6, id="2-of-3"),
        pytest.param([6, 7, 8], 3, id="last-shared"),
        pytest.param(6, 3, id="all"),
        pytest.param(3, 0, id="shared-alone"),
    ],
)
def test_kv_group_routing_uses_whole_groups(router, shared, active):
    config = config_of("kv_group", shared, active, router)
    info = route(config)
    used = in_groups(info.active, config)
    assert set(used.unique().tolist()) <= {0, 3}
    assert ((used == 3).sum(-1) == (config.num_shared + active) // 3).all()
    assert info.active[..., list(config.shared_indices)].all()


@pytest.mark.parametrize("unit", ["head", "group_balanced", "kv_group"])
def test_the_choice_is_the_best_of_all_that_the_unit_allows(unit):
    from itertools import combinations

    config = MoHConfig(6, 0, 4, "linear", routing_unit=unit, kv_heads=2 if unit == "group_balanced" else 3)
    scores = torch.randn(20, 6)
    groups = 6 // config.kv_heads

    def allowed(heads: tuple[int, ...]) -> bool:
        counts = [sum(h // groups == g for h in heads) for g in range(config.kv_heads)]
        return {"head": True, "group_balanced": len(set(counts)) == 1, "kv_group": set(counts) <= {0, groups}}[unit]

    sets = [heads for heads in combinations(range(6), 4) if allowed(heads)]
    for row, chosen in zip(scores, choose(scores, config), strict=True):
        best = max(sets, key=lambda heads: float(row[list(heads)].sum()))
        assert tuple(chosen.nonzero().flatten().tolist()) == best


def test_group_balanced_routing_leaves_out_the_weakest_of_its_group_and_not_of_all():
    scores = torch.tensor([9.0, 8.0, 7.0, 3.0, 2.0, 1.0])
    config = MoHConfig(6, 0, 4, "linear", routing_unit="group_balanced", kv_heads=2)
    assert choose(scores, config).tolist() == [True, True, False, True, True, False]


@pytest.mark.parametrize("unit", ["group_balanced", "kv_group"])
def test_a_learned_router_without_an_opinion_weighs_every_active_head_1(unit):
    router = build_router(config_of(unit, router="two_stage"), C)
    for parameter in router.parameters():
        torch.nn.init.zeros_(parameter)
    gates = router(x=torch.randn(2, 5, C)).gates
    torch.testing.assert_close(gates[gates != 0], torch.ones(2 * 5 * 6))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("unit", ["group_balanced", "kv_group"])
def test_the_balance_loss_is_k_at_perfect_balance_and_trains_the_router(unit, router):
    config = config_of(unit, 0, 6, router)
    module = build_router(config, C)
    q = torch.randn(2, 50, 9, D, requires_grad=True)
    with record_routing(module) as routing:
        info = module(x=torch.randn(2, 50, C), q=q)
    loss = routing.balance_loss()
    assert 5 < float(loss.detach()) < 9
    loss.backward()
    learned = [p.grad for p in module.parameters() if p.grad is not None] or [q.grad]
    assert all(grad.isfinite().all() for grad in learned) and any((grad != 0).any() for grad in learned)
    if info.probs is not None:
        torch.testing.assert_close(info.probs.sum(-1), torch.ones(2, 50))


@pytest.mark.parametrize("unit", ["head", "group_balanced", "kv_group"])
def test_the_first_heads_of_the_order_are_those_that_a_layer_with_so_many_would_use(unit):
    config = config_of(unit, [0, 1, 2] if unit == "kv_group" else [0, 4, 6], 3)
    router = build_router(config, C)
    x = torch.randn(2, 7, C)
    ordered = router.order(x)
    assert torch.equal(ordered.sort(-1).values, torch.arange(9).expand(2, 7, 9))
    for n in range(3, 10, config.step):
        smaller = build_router(config_of(unit, config.shared_indices, n - 3), C)
        smaller.load_state_dict(router.state_dict())
        used = torch.zeros(2, 7, 9, dtype=torch.bool).scatter(-1, ordered[..., :n], True)
        assert torch.equal(used, smaller(x).active)


@pytest.mark.parametrize(
    "unit, expected",
    [("head", (0, 1, 8)), ("group_balanced", (0, 3, 8)), ("kv_group", (0, 1, 2))],
    ids=lambda v: str(v),
)
def test_the_strongest_heads_that_may_be_shared_depend_on_the_unit(unit, expected):
    mean = torch.tensor([9.0, 8.0, 1.0, 5.0, 4.0, 3.0, 0.0, 2.0, 7.5])
    assert strongest(mean, 3, config_of(unit)) == expected


def test_equal_scores_still_choose_as_many_heads():
    for unit in ("head", "group_balanced", "kv_group"):
        config = config_of(unit)
        assert (choose(torch.zeros(5, 6), config).sum(-1) == 3).all()
        assert torch.equal(order(torch.zeros(9), config).sort().values, torch.arange(9))


@pytest.mark.parametrize("unit", ["group_balanced", "kv_group"])
def test_repr_tells_the_unit(unit):
    assert f"unit={unit}" in repr(build_router(config_of(unit), C))
