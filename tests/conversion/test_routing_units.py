"""Promises of the conversion for groups of heads: shared heads, shares and W_O match what a token may choose."""

from __future__ import annotations

import pytest
import torch

import moh
from moh import convert
from moh.conversion.calibrator import hand_out

GROUPS = dict(num_attention_heads=6, num_key_value_heads=3, hidden_size=48, head_dim=8)
UNITS = ["group_balanced", "kv_group"]
every_unit = pytest.mark.parametrize("unit", UNITS)


@pytest.fixture
def dense(make_dense):
    return make_dense(**GROUPS, num_hidden_layers=3)


def heads_of(unit: str) -> dict[str, int]:
    return dict(shared_heads=0, active_heads=3) if unit == "group_balanced" else dict(shared_heads=2, active_heads=2)


@every_unit
@pytest.mark.parametrize("router", ["linear", "query_norm", "two_stage"])
@torch.no_grad()
def test_every_router_converts_and_uses_the_heads_of_its_unit(dense, tokens, unit, router):
    model = convert(dense, **heads_of(unit), router=router, routing_unit=unit, calibration=tokens, allocation="even")
    assert model.config.routing_unit == unit
    with moh.record_routing(model) as routing:
        model(tokens[:2])
    for _, info in routing:
        used = info.active.unflatten(-1, (3, 2)).sum(-1)  # [B, N, Hkv]
        if unit == "group_balanced":
            assert (used == 1).all()
        else:
            assert ((used == 2).sum(-1) == 2).all() and ((used == 0).sum(-1) == 1).all()


@every_unit
@torch.no_grad()
def test_with_all_heads_active_the_outputs_are_the_originals(dense, tokens, unit):
    step = 3 if unit == "group_balanced" else 2
    model = convert(dense, shared_heads=step, active_heads=6 - step, routing_unit=unit, calibration=tokens)
    torch.testing.assert_close(model(tokens[:2]).logits, dense(tokens[:2]).logits, rtol=1e-5, atol=1e-5)


@every_unit
@torch.no_grad()
def test_shared_heads_are_the_strongest_that_the_unit_allows(dense, tokens, watch, unit):
    step = 3 if unit == "group_balanced" else 2
    model = convert(dense, shared_heads=step, active_heads=0, routing_unit=unit, calibration=tokens)
    for layer, seen, config in zip(dense.model.layers, watch(dense, tokens), model.config.layer_configs(), strict=True):
        o_proj = layer.self_attn.o_proj.weight.double().unflatten(-1, (6, 8))  # [C, H, D]
        mean = torch.einsum("thd,chd->thc", seen.z, o_proj).norm(dim=-1).mean(0).view(3, 2)
        if unit == "group_balanced":
            expected = [2 * group + int(mean[group].argmax()) for group in range(3)]
        else:
            first = 2 * int(mean.sum(-1).argmax())
            expected = [first, first + 1]
        assert list(config.shared_indices) == expected


@every_unit
def test_an_uneven_share_is_spent_in_steps_of_the_unit(make_dense, tokens, unit):
    dense = make_dense(**GROUPS, num_hidden_layers=4)
    with torch.no_grad():
        dense.model.layers[1].self_attn.o_proj.weight.zero_()
    step, active = (3, [3, 3, 6, 6]) if unit == "group_balanced" else (2, [4, 4, 6, 6])
    model = convert(
        dense, shared_heads=0, active_heads=active, routing_unit=unit, calibration=tokens, allocation="sensitivity"
    )
    used = [c.num_shared + c.active_heads for c in model.config.layer_configs()]
    assert sum(used) == sum(active) and all(n % step == 0 for n in used)
    assert used[1] == min(used) <= active[0]


@every_unit
@torch.no_grad()
def test_the_refit_of_the_output_is_made_for_the_heads_that_the_unit_keeps(dense, tokens, unit):
    """On the calibration text the refitted layers are closer to the dense ones than the others are."""
    plain, refitted = (
        convert(dense, **heads_of(unit), routing_unit=unit, calibration=tokens, allocation="even", refit_output=refit)
        for refit in (False, True)
    )
    outputs = []
    for model in (dense, plain, refitted):  # the first layer: its input is the same in all models
        attention = model.model.layers[0].self_attn
        handle = attention.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
        model(tokens)
        handle.remove()
    wanted, before, after = outputs
    assert (after - wanted).norm() < 0.98 * (before - wanted).norm()


def test_totals_that_are_no_multiple_of_the_step_are_refused():
    with pytest.raises(ValueError, match="total must be a multiple of 3 heads, which tokens choose together, got 10"):
        hand_out(torch.zeros(3, 7), 10, step=3)


@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param(("kv_group", 1, 2), "shared_heads must be a multiple of num_heads / kv_heads = 2", id="shared"),
        pytest.param(("group_balanced", 3, 2), "active_heads must be a multiple of kv_heads = 3", id="active"),
        pytest.param(("groups", 3, 3), "routing_unit must be one of .*got 'groups'", id="unit"),
    ],
)
def test_heads_that_the_unit_does_not_allow_are_refused_before_anything_runs(dense, options, message):
    unit, shared, active = options
    with pytest.raises(ValueError, match=message):
        convert(dense, shared_heads=shared, active_heads=active, routing_unit=unit, calibration=None)
