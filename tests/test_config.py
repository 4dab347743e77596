"""Promises of `MoHConfig`: what the numbers mean, and that impossible ones are refused with a message that helps."""

from __future__ import annotations

import dataclasses

import pytest

from moh import MoHConfig
from moh.config import ROUTERS


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


def test_router_is_the_learned_one_with_published_scaling_by_default():
    config = MoHConfig(4, 1, 1)
    assert config.router == "two_stage"
    assert config.scale_gates


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
        pytest.param((8, [1, 2], 7), "active_heads must be between 0 and .* = 6, got 7", id="too-many-beside-indices"),
        pytest.param((8, 2, -1), "active_heads must be between 0 and .* = 6, got -1", id="negative-active"),
        pytest.param((8, 2, 1.0), "active_heads must be between 0 and .* = 6, got 1.0", id="fractional-active"),
        pytest.param((8, 2, True), "active_heads must be between 0 and .* = 6, got True", id="bool-active"),
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
            "router must be one of 'two_stage', 'single_stage', 'query_norm', 'linear', got 'top_p'",
            id="router",
        ),
    ],
)
def test_impossible_heads_are_refused_by_name_value_and_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoHConfig(*arguments)
