"""Promises of the choice between routed, fixed and dropped layers: closed forms, measured costs, and what is made of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from moh import MoHConfig, convert, record_routing
from moh.config import FIXED
from moh.conversion.allocation import Meter, Options, allocate, few_heads
from moh.conversion.calibrator import Calibrator
from moh.conversion.fit import OUTPUT_RIDGE, ROUTER_RIDGE, fit_linear_map, order_of_removal, refit_fixed
from moh.conversion.layer_kinds import LayerKinds
from moh.conversion.transformers import DenseTextModel

H, D, C, T = 4, 3, 7, 60


@pytest.fixture
def layer() -> tuple[Tensor, Tensor]:
    """Heads z `[T, H*D]` that depend on each other, and W_O `[C, H*D]`."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(H * D, H * D, generator=generator, dtype=torch.float64)
    return torch.randn(T, H * D, generator=generator, dtype=torch.float64) @ mix, torch.randn(
        C, H * D, generator=generator, dtype=torch.float64
    )


def left_by_definition(z: Tensor, w: Tensor, kept: list[int]) -> tuple[float, Tensor]:
    """The least `||Z_s U - Z_c W_c||^2 + lambda ||U||^2` by `lstsq` on extra rows, and the refitted W_O `[C, len(kept)*D]`."""
    is_kept = torch.zeros(H, D, dtype=torch.bool)
    is_kept[kept] = True
    is_kept = is_kept.flatten()
    penalty = OUTPUT_RIDGE * float(z.square().sum(0).mean())
    rows = torch.cat([z[:, is_kept], penalty**0.5 * torch.eye(int(is_kept.sum()), dtype=torch.float64)])
    skipped = z[:, ~is_kept] @ w.T[~is_kept]
    wanted = torch.cat([skipped, torch.zeros(int(is_kept.sum()), C, dtype=torch.float64)])
    change = torch.linalg.lstsq(rows, wanted).solution
    return float((rows @ change - wanted).square().sum()), (w.T[is_kept] + change).T


@pytest.mark.parametrize("unit", ["head", "group_balanced", "kv_group"])
def test_heads_are_left_out_in_the_order_in_which_the_refit_can_do_without_them(layer, unit) -> None:
    z, w = layer
    config = MoHConfig(H, H, 0, FIXED, routing_unit=unit, kv_heads=None if unit == "head" else 2)
    order, left = order_of_removal(z.T @ z, w, config)
    kept = list(range(H))
    while kept:
        whole = [group for group in ([0, 1], [2, 3]) if set(group) <= set(kept)]
        units = whole if unit == "kv_group" else [[head] for head in kept]
        if unit == "group_balanced":  # equally many are left in each group, or one more
            of_group = [sum(head // 2 == group for head in kept) for group in (0, 1)]
            units = [[head] for head in kept if of_group[head // 2] == max(of_group)]
        best = min(units, key=lambda heads: left_by_definition(z, w, [h for h in kept if h not in heads])[0])
        kept = [head for head in kept if head not in best]
        assert sorted(order[: len(kept)]) == kept
        error = left_by_definition(z, w, kept)[0] if kept else float((z @ w.T).square().sum())
        gone = [i for head in range(H) if head not in kept for i in range(head * D, head * D + D)]
        without = float((z[:, gone] @ w.T[gone]).square().sum())
        assert float(left[len(kept)]) == pytest.approx(min(1.0, error / without))
    assert sorted(order) == list(range(H)) and float(left[H]) == 1


def test_the_refit_of_fixed_heads_is_the_ridge_regression(layer) -> None:
    z, w = layer
    for count in (1, 2, 3):
        for kept in map(list, itertools.combinations(range(H), count)):
            torch.testing.assert_close(refit_fixed(z.T @ z, w, kept, H), left_by_definition(z, w, kept)[1])


def test_the_linear_map_is_the_ridge_regression_of_the_attentions_output_on_its_input(layer) -> None:
    z, w = layer
    x = torch.cat([z[:, :5] + torch.randn(T, 5, dtype=torch.float64), torch.ones(T, 1, dtype=torch.float64)], 1)
    found = fit_linear_map(x.T @ x, x.T @ z, z.T @ z, w)
    penalty = ROUTER_RIDGE * float(x[:, :-1].square().sum(0).mean())
    rows = torch.cat([x, penalty**0.5 * torch.eye(6, dtype=torch.float64)[:5]])
    wanted = z @ w.T
    expected = torch.linalg.lstsq(rows, torch.cat([wanted, torch.zeros(5, C, dtype=torch.float64)])).solution
    torch.testing.assert_close(torch.cat([found.weight, found.bias[:, None]], 1).T, expected)
    error = (x @ expected - wanted).square().sum() / wanted.square().sum()
    assert found.left == pytest.approx(float(error))


class CountingMeter:
    """Knows the true costs, and counts what it is asked."""

    def __init__(self, true: Tensor) -> None:
        self.true, self.asked = true, []

    def rise(self, layer: int, change: tuple[int, int]) -> float:
        self.asked.append(change)
        return float(self.true[change])


def options_of(costs: list[list[float]]) -> Options:
    return Options(torch.tensor(costs, dtype=torch.float64), lambda layer, n: (layer, n))


def test_what_few_heads_cost_is_measured_until_nothing_rests_on_an_estimate() -> None:
    estimated = [[1.0, 0.25, 0.2, 0.1, 0.0], [2.0, 1.0, 0.4, 0.2, 0.0]]
    options = options_of(estimated)
    assert allocate([options], 4, None) == [(0, 1), (0, 3)]
    meter = CountingMeter(torch.tensor([[9.0, 5.0, 0.2, 0.1, 0.0], [2.0, 1.0, 0.4, 0.2, 0.0]]))
    assert allocate([options], 4, meter) == [(0, 3), (0, 1)]
    assert meter.asked == [(0, 1), (1, 1)]
    assert few_heads(4) == 2 and few_heads(9) == 4 and few_heads(32) == 4


def test_a_measured_cost_raises_all_estimates_of_its_layer_and_never_lowers_them() -> None:
    options = options_of([[4.0, 2.0, 1.0, 0.5, 0.0]])
    options.correct(0, 1, 0.1)
    assert options.costs.tolist() == [[4.0, 2.0, 1.0, 0.5, 0.0]]
    options.correct(0, 1, 16.0)
    assert options.costs[0].tolist() == pytest.approx([32.0, 16.0, 4.0, 1.0, 0.0])  # a factor of 8, 8^(2/3), 8^(1/3)


def test_of_two_kinds_that_cost_the_same_the_first_is_taken() -> None:
    first, second = options_of([[3.0, 1.0, 0.0]] * 2), options_of([[torch.inf, 1.0, 0.0]] * 2)
    assert allocate([first, second], 2, None) == [(0, 1), (0, 1)]
    second.costs[:, 1] = 0.5
    assert allocate([first, second], 2, None) == [(1, 1), (1, 1)]


def test_the_meter_gives_the_rise_of_the_loss_with_one_layer_changed(make_dense, tokens) -> None:
    dense = make_dense("Qwen2", num_hidden_layers=3)
    adapter = DenseTextModel(dense, "linear", copied=True)
    meter = Meter(adapter, iter(tokens[:6].split(4)))

    def loss() -> float:
        logits = dense(tokens[:6]).logits[:, :-1]
        return float(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:6, 1:].flatten(), reduction="sum"))

    with torch.no_grad():
        before = loss()
        for layer in (2, 0, 1):
            attention = dense.model.layers[layer].self_attn
            handle = attention.register_forward_hook(lambda _, args, out: (0.5 * out[0] + 1.0, out[1]))
            expected = (loss() - before) / tokens[:6].numel()
            handle.remove()
            weight = attention.o_proj.weight
            got = meter.rise(layer, lambda x, z, weight=weight: 0.5 * z @ weight.T + 1.0)
            assert got == pytest.approx(expected, abs=1e-6) and abs(got) > 1e-3
        assert loss() == before
    assert not any("forward" in vars(block) for block in adapter.blocks)


@pytest.fixture
def wide(make_dense):
    """Eight heads in four layers; the second layer adds nothing."""
    dense = make_dense(num_attention_heads=8, num_hidden_layers=4)
    with torch.no_grad():
        dense.model.layers[1].self_attn.o_proj.weight.zero_()
    return dense


@pytest.mark.parametrize("refit", [True, False], ids=["linear", "nothing"])
def test_dropped_layers_are_those_that_cost_least_and_the_others_are_whole(wide, tokens, refit) -> None:
    model = convert(wide, layers="drop", active_heads=4, calibration=tokens, refit_output=refit, progress=False)
    layers = model.config.layer_configs()
    assert sorted(layer.num_shared for layer in layers) == [0, 0, 8, 8]
    assert layers[1].num_shared == 0 and all(layer.router == FIXED for layer in layers)
    assert model.config.without_heads == ("linear" if refit else "nothing")
    for block, layer in zip(model.model.layers, layers, strict=True):
        assert (block.self_attn.q_proj is None) is (layer.num_shared == 0)


def test_a_layer_that_adds_nothing_loses_all_of_its_heads_first(wide, tokens) -> None:
    for options in (dict(router="fixed", active_heads=6), dict(layers="mix", shared_heads=1, active_heads=5)):
        model = convert(wide, calibration=tokens, progress=False, **options)
        used = [layer.num_shared + layer.active_heads for layer in model.config.layer_configs()]
        assert used == [8, 0, 8, 8], options


@torch.no_grad()
def test_routed_fixed_and_dropped_layers_live_in_one_model(make_dense, tokens, tmp_path) -> None:
    dense = make_dense(num_attention_heads=8, num_hidden_layers=3)
    adapter = DenseTextModel(dense, "linear", copied=True)
    calibrator = Calibrator(adapter, tokens, 8, progress=False)
    kinds = LayerKinds(calibrator, [MoHConfig(8, 1, 4, "linear")] * 3, refitted=True)
    made, outputs = kinds.assemble([(0, 0), (0, 5), (1, 5)])
    model = adapter.build([r.config for r in made], made, outputs, router_aux_loss_coef=0.0)
    assert model.config.router == ["fixed", "fixed", "linear"] and model.config.share == 10 / 24
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    ids = tokens[:2]
    expected = model(ids).logits
    assert torch.equal(loaded(ids).logits, expected)
    model.set_attn_implementation("eager")
    assert (model(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    with record_routing(model) as routing:
        model(ids)
    assert routing.share() == pytest.approx(10 / 24)
    assert model.set_active_heads(2) == pytest.approx(8 / 24)  # the routed layer alone
    with pytest.raises(ValueError, match="active_heads as a share of the heads must be between"):
        model.set_active_heads(1.0)
    assert model.set_active_heads(13 / 24) == pytest.approx(13 / 24)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert model.generate(ids, **options).tolist() == model.generate(ids, use_cache=False, **options).tolist()
