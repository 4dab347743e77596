"""Promise: by default a model shares 2 in 9 heads, or as in the paper, as far as the routing unit allows."""

from __future__ import annotations

import pytest

from moh import convert
from moh.routing import router_class


@pytest.mark.parametrize(
    ("num_heads", "step", "expected"),
    [(9, 1, 2), (12, 1, 3), (32, 1, 7), (4, 1, 1), (1, 1, 1), (9, 3, 0), (32, 4, 4), (32, 8, 0)],
)
def test_two_in_nine_heads_are_shared_as_far_as_what_a_token_chooses_allows(num_heads, step, expected) -> None:
    assert router_class("linear").default_shared_heads(num_heads, step=step) == expected


@pytest.mark.parametrize(("num_heads", "expected"), [(32, 16), (9, 4), (1, 1)])
def test_with_the_papers_router_half_of_them(num_heads, expected) -> None:
    assert router_class("query_norm").default_shared_heads(num_heads) == expected


@pytest.mark.parametrize("allocation", ["even", "sensitivity"])
def test_convert_shares_that_many(make_dense, tokens, allocation) -> None:
    model = convert(make_dense(), active_heads=2, calibration=tokens, allocation=allocation)
    assert [c.num_shared for c in model.config.layer_configs()] == [1, 1]
    assert model.config.share == 3 / 4


def test_convert_shares_the_first_half_with_the_papers_router(make_dense) -> None:
    model = convert(make_dense(), active_heads=1, router="query_norm")
    assert [c.shared_indices for c in model.config.layer_configs()] == [(0, 1)] * 2


@pytest.mark.parametrize(("unit", "expected"), [("group_balanced", 2), ("kv_group", 0)])
def test_the_default_is_a_multiple_of_what_a_token_chooses(make_dense, tokens, unit, expected) -> None:
    dense = make_dense(num_attention_heads=8, hidden_size=64)  # two groups of four
    model = convert(dense, active_heads=4, calibration=tokens, routing_unit=unit)
    assert [c.num_shared for c in model.config.layer_configs()] == [expected] * 2
