"""Promises of `MoHConfig`: the meaning of its numbers, and helpful errors for impossible ones."""

from __future__ import annotations

import dataclasses

import pytest

from moh import MoHConfig
from moh.config import FIXED, ROUTERS, ROUTING_UNITS


@pytest.mark.parametrize(
    "shared, active, shared_indices, routed_indices, share",
    [
        pytest.param(2, 3, (0, 1), (2, 3, 4, 5, 6, 7), 5 / 8, id="a-number-shares-the-first-heads"),
        pytest.param(0, 1, (), (0, 1, 2, 3, 4, 5, 6, 7), 1 / 8, id="no-shared-heads"),
        pytest.param([], 8, (), (0, 1, 2, 3, 4, 5, 6, 7), 1.0, id="no-shared-indices"),
        pytest.param(8, 0, (0, 1, 2, 3, 4, 5, 6, 7), (), 1.0, id="all-shared"),
        pytest.param(3, 0, (0, 1, 2), (3, 4, 5, 6, 7), 3 / 8, id="shared-alone"),
        pytest.param([6, 1], 2, (1, 6), (0, 2, 3, 4, 5, 7), 4 / 8, id="indices-in-any-order"),
        pytest.param((7,), 7, (7,), (0, 1, 2, 3, 4, 5, 6), 1.0, id="a-tuple-of-indices"),
    ],
)
def test_heads_are_counted_and_named(shared, active, shared_indices, routed_indices, share):
    config = MoHConfig(8, shared, active)
    assert config.shared_indices == shared_indices
    assert config.routed_indices == routed_indices
    assert config.num_shared == len(shared_indices)
    assert config.num_routed == len(routed_indices)
    assert config.share == pytest.approx(share)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_name_is_accepted(router):
    assert MoHConfig(4, 1, 1, router).router == router


@pytest.mark.parametrize(
    "router, thresholds, message",
    [
        ("linear", (0.0, 0.0), "thresholds must be None for router='linear'"),
        ("threshold", (0.0, 1.0), "thresholds must hold 4 numbers, one for each number of routed heads from 0 to 3"),
        ("threshold", (0.0, 1.0, float("nan"), 2.0), "thresholds must hold 4 numbers"),
        ("threshold", "four", "thresholds must hold 4 numbers"),
    ],
)
def test_thresholds_that_do_not_fit_the_layer_are_refused(router, thresholds, message):
    with pytest.raises(ValueError, match=message):
        MoHConfig(4, 1, 1, router, thresholds=thresholds)


def test_router_is_the_learned_one_by_default():
    config = MoHConfig(4, 1, 1)
    assert config.router == "two_stage"


def test_config_is_immutable_and_compares_by_value():
    config = MoHConfig(4, [2, 0], 1)
    assert config == MoHConfig(4, (0, 2), 1)
    assert hash(config) == hash(MoHConfig(4, (0, 2), 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.active_heads = 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param(
            (8, 5, 4), "active_heads must be between 0 and num_heads - shared_heads = 3, got 4", id="too-many"
        ),
        pytest.param((8, [1, 2], 7), "active_heads must be between 0 and .* = 6, got 7", id="too-many-with-indices"),
        pytest.param((8, 2, -1), "active_heads must be between 0 and .* = 6, got -1", id="negative-active"),
        pytest.param((8, 2, 1.0), "active_heads must be an integer, got 1.0", id="fractional-active"),
        pytest.param((8, 2, True), "active_heads must be an integer, got True", id="bool-active"),
        pytest.param((8, 0, 0), "active_heads must be at least 1 when shared_heads = 0", id="no-head-at-all"),
        pytest.param((8, [], 0), "active_heads must be at least 1 when shared_heads = 0", id="no-head-at-all-indices"),
        pytest.param((8, 9, 0), "shared_heads must be between 0 and num_heads = 8, got 9", id="too-many-shared"),
        pytest.param((8, -1, 1), "shared_heads must be between 0 and num_heads = 8, got -1", id="negative-shared"),
        pytest.param((8, [1, 8], 1), r"indices between 0 and num_heads - 1 = 7, got \[1, 8\]", id="index-too-large"),
        pytest.param((8, [-1], 1), r"indices between 0 and num_heads - 1 = 7, got \[-1\]", id="negative-index"),
        pytest.param((8, [3, 1, 3], 1), r"must not name a head twice, got \[3, 1, 3\]", id="index-twice"),
        pytest.param((8, [0.0], 1), r"a number of heads or a sequence of head indices, got \[0.0\]", id="float-index"),
        pytest.param((8, "01", 1), "a number of heads or a sequence of head indices, got '01'", id="a-string"),
        pytest.param((8, None, 1), "a number of heads or a sequence of head indices, got None", id="none"),
        pytest.param((8, 1.5, 1), "a number of heads or a sequence of head indices, got 1.5", id="fractional-shared"),
        pytest.param((0, 0, 1), "num_heads must be an integer of at least 1, got 0", id="no-heads"),
        pytest.param((2.0, 1, 1), "num_heads must be an integer of at least 1, got 2.0", id="fractional-heads"),
        pytest.param(
            (8, 2, 2, "top_p"),
            r"router must be one of 'two_stage', .*'query_norm_rounded', 'linear', 'threshold', 'fixed', got 'top_p'",
            id="router",
        ),
    ],
)
def test_impossible_heads_are_refused_by_name_value_and_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoHConfig(*arguments)


def balanced(shared, active, **options):
    return MoHConfig(9, shared, active, routing_unit="group_balanced", **{"kv_heads": 3} | options)


def by_group(shared, active, **options):
    return MoHConfig(9, shared, active, routing_unit="kv_group", **{"kv_heads": 3} | options)


def test_single_heads_are_chosen_by_default():
    config = MoHConfig(9, 4, 3)
    assert (config.routing_unit, config.step, config.heads_per_group) == ("head", 1, None)
    assert config == MoHConfig(9, 4, 3, routing_unit=ROUTING_UNITS[0])


@pytest.mark.parametrize(
    "config, shared, per_group",
    [
        pytest.param(balanced(3, 3), (0, 3, 6), 2, id="balanced-number"),
        pytest.param(balanced([8, 1, 5], 0), (1, 5, 8), 1, id="balanced-indices"),
        pytest.param(balanced(0, 9), (), 3, id="balanced-all"),
        pytest.param(by_group(3, 3), (0, 1, 2), None, id="kv-number"),
        pytest.param(by_group([6, 8, 7], 3), (6, 7, 8), None, id="kv-indices"),
        pytest.param(by_group(0, 3), (), None, id="kv-none-shared"),
    ],
)
def test_units_count_heads_in_groups(config, shared, per_group):
    assert config.step == 3
    assert config.shared_indices == shared
    assert config.heads_per_group == per_group


def test_groups_may_be_of_another_size_than_there_are_groups():
    config = MoHConfig(8, 2, 4, routing_unit="group_balanced", kv_heads=2)
    assert (config.step, config.heads_per_group, config.shared_indices) == (2, 3, (0, 4))
    config = MoHConfig(8, 4, 4, routing_unit="kv_group", kv_heads=2)
    assert (config.step, config.heads_per_group, config.shared_indices) == (4, None, (0, 1, 2, 3))


@pytest.mark.parametrize(
    "make, message",
    [
        pytest.param(lambda: balanced(3, 4), "active_heads must be a multiple of kv_heads = 3 .*got 4", id="active"),
        pytest.param(lambda: balanced(4, 3), "shared_heads must be a multiple of kv_heads = 3 .*got 4", id="shared"),
        pytest.param(
            lambda: balanced([0, 1, 3], 3), r"equally many heads of every group of 3 .*got \[0, 1, 3\]", id="unbalanced"
        ),
        pytest.param(
            lambda: MoHConfig(8, 2, 4, routing_unit="kv_group", kv_heads=2),
            "shared_heads must be a multiple of num_heads / kv_heads = 4 .*got 2",
            id="half-a-group",
        ),
        pytest.param(lambda: by_group([0, 1, 3], 3), r"whole groups of 3 heads .*got \[0, 1, 3\]", id="split-groups"),
        pytest.param(lambda: by_group(3, 3, kv_heads=None), "kv_heads must be given for .*'kv_group'", id="no-groups"),
        pytest.param(lambda: by_group(3, 3, kv_heads=2), "kv_heads must divide num_heads = 9, got 2", id="groups"),
        pytest.param(lambda: by_group(3, 3, kv_heads=0), "kv_heads must divide num_heads = 9, got 0", id="zero-groups"),
        pytest.param(lambda: MoHConfig(9, 3, 3, routing_unit="kv"), "routing_unit must be one of 'head', .*got 'kv'", id="unit"),
    ],
)  # fmt: skip
def test_heads_that_a_unit_does_not_allow_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_fixed_layer_is_its_shared_heads_and_may_have_none():
    some, none = MoHConfig(4, [1, 3], 0, FIXED), MoHConfig(4, (), 0, FIXED)
    assert (some.shared_indices, some.routed_indices, some.num_routed, some.share) == ((1, 3), (), 0, 0.5)
    assert (none.num_shared, none.num_routed, none.share) == (0, 0, 0.0)
    with pytest.raises(ValueError, match=r"active_heads must be 0 for router='fixed', whose layers .*, got 1"):
        MoHConfig(4, 1, 1, FIXED)
