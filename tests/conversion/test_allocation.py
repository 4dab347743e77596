"""Promise: the uneven allocation has exactly the requested size and is the best for the estimated costs."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moh import MoHConfig, convert
from moh.conversion import calibrator as calibrator_module
from moh.conversion.calibrator import Calibrator, hand_out
from moh.conversion.fit import error_left_by_refit
from moh.conversion.passes import OutputSums, layer_costs
from moh.conversion.transformers import DenseTextModel
from moh.models.dial import spend
from moh.routing import LinearRouter


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    layers, most = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    at_least = draw(st.integers(0, most))
    total = draw(st.integers(layers * at_least, layers * most))
    rows = st.lists(st.integers(0, 50), min_size=most + 1, max_size=most + 1)
    costs = draw(st.lists(rows, min_size=layers, max_size=layers))
    return torch.tensor(costs, dtype=torch.float64), total, at_least


@given(problems())
def test_no_other_split_of_the_total_is_cheaper(problem) -> None:
    costs, total, at_least = problem
    most = costs.shape[1] - 1
    got = spend([{n: float(layer[n]) for n in range(at_least, most + 1)} for layer in costs], total)
    splits = itertools.product(range(at_least, most + 1), repeat=len(costs))
    cheapest = min(sum(float(costs[i, n]) for i, n in enumerate(split)) for split in splits if sum(split) == total)
    assert len(got) == len(costs) and sum(got) == total
    assert all(at_least <= n <= most for n in got)
    assert sum(float(costs[i, n]) for i, n in enumerate(got)) == cheapest


@pytest.mark.parametrize(("total", "step"), [(1, 1), (9, 1), (0, 1), (2, 2)])
def test_a_total_out_of_reach_is_refused(total, step) -> None:
    with pytest.raises(ValueError, match=f"total must be between {2 * step} and 8 heads, got {total}"):
        hand_out(torch.zeros(2, 5), total, step=step)


@pytest.mark.parametrize(
    ("total", "step", "expected"), [(10, 1, [6, 4]), (5, 1, [3, 2]), (12, 2, [8, 4]), (12, 3, [9, 3])]
)
def test_no_layer_has_fewer_than_four_heads_if_that_can_be(total, step, expected) -> None:
    costs = torch.arange(12, -1, -1).double() * torch.tensor([[2.0], [1.0]])  # the first layer needs each head more
    assert hand_out(costs, total, step=step) == expected


def routers_of(dense: nn.Module) -> list[LinearRouter]:
    return [LinearRouter(MoHConfig(4, 1, 1, "linear"), 32) for _ in dense.model.layers]


def costs_of(dense: nn.Module, routers: list[LinearRouter], tokens: Tensor) -> Tensor:
    return layer_costs(DenseTextModel(dense, "linear", copied=True), routers, iter(tokens.split(3)))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
def test_costs_are_half_the_mean_squared_effect_of_the_heads_left_out(make_dense, tokens, watch, family) -> None:
    dense, tokens = make_dense(family), tokens[:8]
    routers = routers_of(dense)
    costs = costs_of(dense, routers, tokens)
    seen = watch(dense, tokens)
    for index, layer in enumerate(dense.model.layers):
        # computed independently: the derivative of each token's loss by a factor on each head, at 1
        factors = torch.ones(*tokens.shape, 4, 1, requires_grad=True)
        handle = layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args, factors=factors: ((args[0].unflatten(-1, (4, -1)) * factors).flatten(-2),)
        )
        logits = dense(tokens).logits[:, :-1]
        handle.remove()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        (effect,) = torch.autograd.grad(loss, factors)
        effect = effect.flatten(0, 1).squeeze(-1).double()  # [T, H]
        predicted = routers[index].contribution(seen[index].x.float())
        predicted[:, 0] = torch.inf  # shared heads are removed last
        order = predicted.argsort(-1, descending=True)
        for kept in range(5):
            skipped = effect.gather(-1, order[:, kept:]).sum(-1)
            assert costs[index, kept] == pytest.approx(float(skipped.square().mean() / 2), rel=1e-3, abs=1e-12)


@torch.no_grad()
def test_costs_before_a_refit_are_what_it_leaves_of_them(make_dense, tokens, watch) -> None:
    dense = make_dense(num_attention_heads=8)
    calibrator = Calibrator(DenseTextModel(dense, "linear", copied=True), tokens, 8, progress=False)
    routers = calibrator.fit_routers([MoHConfig(8, 2, 4, "linear")] * 2)
    plain, refitted = calibrator.costs(routers), calibrator.costs(routers, refitted=True)
    for index, seen in enumerate(watch(dense, tokens)):
        o_proj = dense.model.layers[index].self_attn.o_proj.weight.double()
        order = routers[index].order(seen.x.float())
        for kept in range(3, 8):
            gates = torch.zeros(len(order), 8, 1).double().scatter_(1, order[:, :kept, None], 1.0)
            g, z = (seen.z * gates).flatten(1), seen.z.flatten(1)
            left = error_left_by_refit(OutputSums(g.T @ g, g.T @ z), z.T @ z, o_proj)
            assert float(refitted[index, kept] / plain[index, kept]) == pytest.approx(left, rel=1e-3)
        assert float(refitted[index, 2] / plain[index, 2]) == pytest.approx(float(refitted[index, 3] / plain[index, 3]))
    assert (refitted[:, :-1] < plain[:, :-1]).all() and refitted[:, -1].tolist() == [0, 0]


def test_costs_are_estimated_on_calibration_data_of_every_kind(make_dense, tokens, monkeypatch) -> None:
    monkeypatch.setattr(calibrator_module, "COST_TOKENS", 4 * 16)
    seen = []
    monkeypatch.setattr(calibrator_module, "layer_costs", lambda dense, routers, batches: seen.extend(batches))
    Calibrator(DenseTextModel(make_dense(), "linear", copied=True), tokens, 2, progress=False).costs([])
    assert torch.equal(torch.cat(seen), tokens[[0, 7, 15, 23]])


def test_costs_are_not_negative_and_all_heads_cost_nothing(make_dense, tokens) -> None:
    dense = make_dense()
    costs = costs_of(dense, routers_of(dense), tokens)
    assert costs.shape == (2, 5) and costs.dtype == torch.float64
    assert (costs >= 0).all() and (costs[:, :-1] > 0).all()
    assert costs[:, -1].tolist() == [0, 0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_estimating_costs_leaves_the_model_as_it_was(make_dense, tokens, training) -> None:
    dense = make_dense().train(training)
    parameters = dict(dense.named_parameters())
    frozen = {name for index, name in enumerate(parameters) if index % 3 == 0}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
        parameter.grad = torch.ones_like(parameter) if name not in frozen else None
    costs_of(dense, routers_of(dense), tokens)
    assert dense.training is training
    assert {name for name, p in parameters.items() if not p.requires_grad} == frozen
    for name, parameter in parameters.items():
        assert (parameter.grad is None) if name in frozen else bool((parameter.grad == 1).all())
    assert not any(m._forward_pre_hooks for m in dense.modules())


def test_an_error_while_estimating_leaves_the_model_as_it_was(make_dense) -> None:
    dense = make_dense().train()
    with pytest.raises(IndexError):
        costs_of(dense, routers_of(dense), torch.full((1, 4), 99))
    assert dense.training and all(p.requires_grad for p in dense.parameters())
    assert not any(m._forward_pre_hooks for m in dense.modules())


@pytest.fixture
def wide(make_dense):
    """Eight heads in three layers; the middle layer adds nothing."""
    dense = make_dense(num_attention_heads=8, num_hidden_layers=3)
    with torch.no_grad():
        dense.model.layers[1].self_attn.o_proj.weight.zero_()
    return dense


@pytest.mark.parametrize("active", [4, [5, 3, 4]], ids=["even", "per_layer"])
def test_sensitivity_keeps_the_total_of_heads_and_takes_them_from_a_layer_that_adds_nothing(
    wide, tokens, active
) -> None:
    model = convert(wide, shared_heads=2, active_heads=active, calibration=tokens, allocation="sensitivity")
    heads = [c.num_shared + c.active_heads for c in model.config.layer_configs()]
    assert sum(heads) == 3 * 6
    assert heads[1] == 3 and min(heads) >= 3  # a third
    assert all(c.num_shared == 2 for c in model.config.layer_configs())


def test_sensitivity_works_where_gradients_are_off(wide, tokens) -> None:
    options = dict(shared_heads=2, active_heads=4, calibration=tokens, allocation="sensitivity")
    expected = convert(wide, **options).config.active_heads
    with torch.no_grad():
        assert convert(wide, **options).config.active_heads == expected
        assert not torch.is_grad_enabled()
