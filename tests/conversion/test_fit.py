"""Promise: the conversion's closed forms are the least-squares solutions that their docstrings state."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moh import convert
from moh.conversion import passes
from moh.conversion.fit import (
    OUTPUT_RIDGE,
    PRESENT,
    ROUTER_RIDGE,
    error_left_by_refit,
    fit_contributions,
    fit_linear_map,
    fit_ranking,
    refit_output_projection,
    unique_part,
)
from moh.conversion.passes import ContributionSums, OutputSums, collect_contributions, head_contributions
from moh.conversion.transformers import DenseTextModel

FAMILIES = ["Llama", "Mistral", "Qwen2"]


def contributions_by_definition(z: Tensor, o_proj: Tensor) -> Tensor:
    """`||H_i W_O^i||` with z `[T, H, D]` and o_proj `[C, H*D]`, head by head."""
    width = z.shape[-1]
    columns = [(z[:, i] @ o_proj.double()[:, i * width : (i + 1) * width].T).norm(dim=-1) for i in range(z.shape[1])]
    return torch.stack(columns, -1)


def ridge(a: Tensor, b: Tensor, penalty: float, towards: Tensor | None = None, *, free: int = 0) -> Tensor:
    """min ||a w - b||^2 + penalty ||w - towards||^2 by `lstsq` on extra rows; the last `free` unknowns not penalised."""
    unknowns = a.shape[1]
    rows = penalty**0.5 * torch.eye(unknowns, dtype=torch.float64)[: unknowns - free]
    wanted = rows @ towards if towards is not None else torch.zeros(len(rows), b.shape[1], dtype=torch.float64)
    return torch.linalg.lstsq(torch.cat([a, rows]), torch.cat([b, wanted])).solution


def unique_by_definition(z: Tensor) -> Tensor:
    """Expected residual of each head of z `[T, H, D]` after ridge regression on the others, each present or absent."""
    penalty = OUTPUT_RIDGE * float(z.flatten(1).square().sum(0).mean())
    parts = []
    for head in range(z.shape[1]):
        others = torch.cat([z[:, :head], z[:, head + 1 :]], 1)  # [T, H - 1, D]
        present = list(itertools.product((0.0, 1.0), repeat=others.shape[1]))  # all 2^(H-1) equally likely
        rows = torch.cat([others * torch.tensor(b, dtype=z.dtype)[:, None] for b in present]).flatten(1)
        a = ridge(rows, z[:, head].repeat(len(present), 1), PRESENT * penalty * len(present))
        parts.append(z[:, head] - PRESENT * others.flatten(1) @ a)
    return torch.stack(parts, 1)


def test_head_contributions_are_the_norms_of_each_heads_part_of_the_output() -> None:
    z, o_proj = torch.randn(7, 3, 5), torch.randn(11, 15)
    expected = contributions_by_definition(z.double(), o_proj)
    got = head_contributions(z.flatten(1), o_proj, 3)
    assert got.shape == (7, 3)
    assert torch.allclose(got.double(), expected, rtol=1e-5)


@pytest.mark.parametrize(("heads", "width"), [(1, 3), (2, 1), (3, 4)])
def test_what_is_unique_to_a_head_is_what_the_others_do_not_tell(heads, width) -> None:
    mixed = torch.randn(50, heads * width, dtype=torch.float64) @ torch.randn(heads * width, heads * width).double()
    z = mixed.unflatten(1, (heads, width))
    got = mixed @ unique_part(mixed.T @ mixed, heads)
    expected = unique_by_definition(z) if heads > 1 else z  # no other head can predict an only head
    assert torch.allclose(got, expected.flatten(1), atol=1e-8)


def test_of_a_head_that_another_repeats_little_is_unique() -> None:
    z = torch.randn(200, 2, 4, dtype=torch.float64)
    z = torch.cat([z, 2 * z[:, :1]], 1)  # the third is the first, twice as large
    unique = (z.flatten(1) @ unique_part(z.flatten(1).T @ z.flatten(1), 3)).unflatten(1, (3, 4))
    left = unique.norm(dim=(0, 2)) / z.norm(dim=(0, 2))
    assert left[1] > 0.95 and left[0] < 0.7 and left[2] < 0.7  # half of the time the other one is absent


@pytest.mark.parametrize("silent", ["layer", "head"])
@torch.no_grad()
def test_heads_that_say_nothing_are_no_obstacle(make_dense, tokens, silent) -> None:
    dense = make_dense()
    rows = slice(None) if silent == "layer" else slice(0, 8)  # of a single key/value head
    dense.model.layers[0].self_attn.v_proj.weight[rows] = 0
    for options in (dict(refit_output=True), dict(shares=[0.5, 0.75])):
        model = convert(dense, shared_heads=1, active_heads=2, calibration=tokens, **options)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
        assert model(tokens[:2]).logits.isfinite().all()


@torch.no_grad()
def test_layers_that_do_not_fit_the_memory_together_are_calibrated_in_turn(make_dense, tokens, monkeypatch) -> None:
    dense = make_dense(num_hidden_layers=3)
    options = dict(shared_heads=1, active_heads=2, calibration=tokens)
    at_once = convert(dense, **options).state_dict()
    monkeypatch.setattr(passes, "SUMS_BYTES", 1)
    in_turn = convert(dense, **options).state_dict()
    assert all(torch.equal(at_once[name], in_turn[name]) for name in at_once)


@pytest.mark.parametrize("refit", [False, True], ids=["whole", "unique"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_contribution_router_is_the_least_squares_fit(make_dense, tokens, watch, family, refit) -> None:
    dense = make_dense(family)
    model = convert(dense, shared_heads=1, active_heads=1, calibration=tokens, batch_size=5, refit_output=refit)
    for layer, converted, seen in zip(dense.model.layers, model.model.layers, watch(dense, tokens), strict=True):
        c = contributions_by_definition(
            unique_by_definition(seen.z) if refit else seen.z, layer.self_attn.o_proj.weight
        )
        x = torch.cat([seen.x, torch.ones(len(seen.x), 1, dtype=torch.float64)], -1)
        w = ridge(x, c, ROUTER_RIDGE * float(seen.x.square().sum(0).mean()), free=1)  # [C + 1, H]
        router = converted.self_attn.router.contribution
        assert torch.allclose(router.weight.double(), w[:-1].T, atol=1e-4 * float(w.abs().max()))
        assert torch.allclose(router.bias.double(), w[-1], atol=1e-4 * float(w.abs().max()))


@torch.no_grad()
def test_the_fit_reports_means_and_explained_variance(make_dense, tokens, watch) -> None:
    dense = make_dense()
    sums = collect_contributions(DenseTextModel(dense, "linear", copied=True), iter(tokens.split(7)))
    for layer, layer_sums, seen in zip(
        [layer.self_attn for layer in dense.model.layers], sums, watch(dense, tokens), strict=True
    ):
        fit = fit_contributions(layer_sums)
        c = contributions_by_definition(seen.z, layer.o_proj.weight)
        left = (c - seen.x @ fit.weight.T - fit.bias).square().sum(0)
        r2 = 1 - left / (c - c.mean(0)).square().sum(0)
        assert layer_sums.tokens == tokens.numel()
        assert torch.allclose(fit.mean, c.mean(0), rtol=1e-5)
        assert torch.allclose(fit.r2, r2, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3])
@torch.no_grad()
def test_a_number_of_shared_heads_means_those_that_contribute_most(make_dense, tokens, watch, count) -> None:
    dense = make_dense()
    model = convert(dense, shared_heads=count, active_heads=1, calibration=tokens, refit_output=False)
    expected = [
        tuple(
            sorted(contributions_by_definition(s.z, layer.self_attn.o_proj.weight).mean(0).topk(count).indices.tolist())
        )
        for layer, s in zip(dense.model.layers, watch(dense, tokens), strict=True)
    ]
    assert [c.shared_indices for c in model.config.layer_configs()] == expected
    assert set(expected) != {tuple(range(count))}  # not just the first heads


def test_named_shared_heads_stay_the_named_ones(make_dense, tokens) -> None:
    model = convert(make_dense(), shared_heads=[3, 0], active_heads=1, calibration=tokens)
    assert [c.shared_indices for c in model.config.layer_configs()] == [(0, 3)] * 2


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_refitted_output_minimises_its_objective(make_dense, tokens, watch, family) -> None:
    dense = make_dense(family)
    refitted = convert(dense, shared_heads=1, active_heads=1, calibration=tokens, refit_output=True)
    for index, seen in enumerate(watch(dense, tokens)):
        gates = refitted.model.layers[index].self_attn.router(seen.x.float()[None]).gates[0].double()
        g, z = (seen.z * gates[..., None]).flatten(1), seen.z.flatten(1)  # [T, HD]
        w_o = dense.model.layers[index].self_attn.o_proj.weight.double().T
        penalty = OUTPUT_RIDGE * float(g.square().sum(0).mean())
        got = refitted.model.layers[index].self_attn.o_proj.weight.double().T
        expected = ridge(g, z @ w_o, penalty, towards=w_o)
        assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max()))
        assert (g @ got - z @ w_o).norm() < 0.95 * (g @ w_o - z @ w_o).norm()  # the purpose of the fit


def test_any_change_of_the_refitted_weight_raises_the_objective() -> None:
    gates = (torch.rand(200, 3, 1) < 0.6).double()
    z = torch.randn(200, 3, 4).double() + 0.5
    g, z = (z * gates).flatten(1), z.flatten(1)
    o_proj = torch.randn(5, 12).double()
    ridge_share = 0.3

    def objective(weight: Tensor) -> Tensor:
        penalty = ridge_share * g.square().sum(0).mean()
        return (g @ weight.T - z @ o_proj.T).square().sum() + penalty * (weight - o_proj).square().sum()

    best = refit_output_projection(OutputSums(g.T @ g, g.T @ z), o_proj, ridge=ridge_share)
    assert best.shape == o_proj.shape and objective(best) < objective(o_proj)
    for size in (1e-3, 1e-1):
        for _ in range(10):
            assert objective(best + size * torch.randn_like(best)) > objective(best)


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_what_a_refit_leaves_is_the_error_after_it_by_the_error_before(kept) -> None:
    gates = (torch.rand(200, 3, 1) < kept).double()
    z = torch.randn(200, 3, 4).double() + 0.5
    g, z = (z * gates).flatten(1), z.flatten(1)
    o_proj = torch.randn(5, 12).double()
    sums = OutputSums(g.T @ g, g.T @ z)
    refitted = refit_output_projection(sums, o_proj)
    after, before = ((z @ o_proj.T - g @ weight.T).square().sum() for weight in (refitted, o_proj))
    assert error_left_by_refit(sums, z.T @ z, o_proj) == pytest.approx(float(after / before))
    assert after < 0.97 * before


def test_a_refit_leaves_all_where_no_head_is_skipped() -> None:
    z = torch.randn(50, 12).double()
    sums = z.T @ z
    assert error_left_by_refit(OutputSums(sums, sums), sums, torch.randn(5, 12)) == 1


def test_the_refit_changes_nothing_when_every_head_is_kept(make_dense, tokens) -> None:
    dense = make_dense()
    model = convert(dense, shared_heads=1, active_heads=3, calibration=tokens, refit_output=True)
    for before, after in zip(dense.model.layers, model.model.layers, strict=True):
        assert torch.equal(before.self_attn.o_proj.weight, after.self_attn.o_proj.weight)


def test_of_inputs_or_heads_that_are_all_zero_nothing_is_learned() -> None:
    zero = torch.zeros(6, 6, dtype=torch.float64)
    xx = zero.clone()
    xx[-1, -1] = 10  # tokens, whose inputs are all zero but for the appended 1
    xc = zero[:, :3].clone()
    xc[-1] = torch.tensor([10.0, 20.0, 0.0])
    cc = torch.diag(torch.tensor([10.0, 40.0, 0.0], dtype=torch.float64))
    sums = ContributionSums(xx, xc, cc, tokens=10)
    fit = fit_contributions(sums)
    assert not fit.weight.any() and fit.bias.tolist() == [1, 2, 0] and not fit_ranking(sums, [0, 1]).any()
    assert fit_linear_map(xx, zero[:, :4], zero[:4, :4], torch.ones(5, 4)).left == 1
    assert not unique_part(zero[:4, :4], 2).isnan().any()
