"""Promises of the dial: one number sets every layer, only inside the block; a dense model has no dial."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moh
from moh.explore.subjects import Dial


def layers(*heads: tuple[int, int, int], router: str = "query_norm") -> nn.ModuleList:
    """One layer per (heads, shared, active)."""
    return nn.ModuleList(
        moh.MoHAttention(h * 4, num_heads=h, shared_heads=s, active_heads=k, router=router) for h, s, k in heads
    )


def test_a_value_sets_every_layer_and_the_share_is_that_of_all_heads() -> None:
    dial = Dial(layers((6, 2, 1), (6, 2, 1)))
    assert dial.values == (0, 1, 2, 3, 4) and dial.own == 1
    with dial.at(3) as share:
        assert dial.counts() == [3, 3] and share == pytest.approx(5 / 6)
    with dial.at(None) as share:
        assert dial.counts() == [1, 1] and share == pytest.approx(0.5)


def test_the_share_of_before_comes_back_after_an_error() -> None:
    dial = Dial(layers((4, 1, 2), (4, 1, 1)))
    with pytest.raises(RuntimeError), dial.at(0):
        raise RuntimeError
    assert dial.counts() == [2, 1]


def test_layers_set_one_by_one_are_no_value_of_the_dial() -> None:
    assert Dial(layers((4, 1, 2), (4, 1, 1))).own is None


def test_a_layer_with_fewer_heads_follows_in_proportion() -> None:
    dial = Dial(layers((4, 2, 1), (8, 2, 3)))
    counts = {}
    for value in dial.values:
        with dial.at(value):
            counts[value] = dial.counts()
    assert counts[0] == [0, 0] and counts[3] == [1, 3] and counts[6] == [2, 6]
    assert dial.own == 3


@pytest.mark.parametrize("router, uses_all", [("query_norm", True), ("linear", True), ("two_stage", False)])
def test_only_gates_of_one_make_all_heads_the_dense_model(router: str, uses_all: bool) -> None:
    assert Dial(layers((4, 1, 1), router=router)).uses_all is uses_all


def test_a_model_without_a_choice_has_no_values() -> None:
    for model in (nn.Linear(2, 2), layers((4, 4, 0))):
        dial = Dial(model)
        assert dial.values == () and dial.own is None and not dial.uses_all
        with dial.at(None) as share:
            assert share == 1.0
        with pytest.raises(ValueError, match=r"active heads must be None for this model, got 1"), dial.at(1):
            pass


def test_a_value_that_no_layer_takes_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"active heads must be one of 0, 1, 2, 3, got 4"),
        Dial(layers((4, 1, 1))).at(4),
    ):
        pass


@torch.no_grad()
def test_the_model_computes_with_the_share() -> None:
    model = layers((4, 1, 1))
    x = torch.randn(1, 3, 16)
    with Dial(model).at(2), moh.record_routing(model) as routing:
        model[0](x)
    [(_, info)] = list(routing)
    assert info.active.sum(-1).eq(3).all()
