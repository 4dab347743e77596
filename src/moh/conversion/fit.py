"""Closed forms of the conversion: what is unique to a head, a router's regression, the refit of W_O, in full or low rank.

All are solved in float64 from the sums of `moh.conversion.passes`. No gradient step anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moh.config import MoHConfig
from moh.conversion.passes import ContributionSums, OutputSums

ROUTER_RIDGE = 1e-2
"""Ridge of the router's fit, as a fraction of the inputs' mean square."""

RANKING_SCALE = 1e-2
"""Standard deviation of the logits of `fit_ranking`: enough to rank the heads, gates within a percent of 1."""

OUTPUT_RIDGE = 0.1
"""Ridge of the W_O refit, as a fraction of the gated heads' mean square; it pulls towards the original W_O."""

PRESENT = 0.5
"""Probability that a head is present to predict another (`unique_part`); 0.25 and 1 gave worse models."""


@dataclass(frozen=True)
class ContributionFit:
    """A layer's heads as predicted from its input, `c = W_r x + b`.

    Attributes:
        weight: W_r `[H, C]`, float64.
        bias: b `[H]`, float64.
        mean: mean contribution of each head, `[H]`, float64.
        r2: share of each head's variance that the prediction explains on the calibration tokens, `[H]`, float64.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    r2: Tensor


def unique_part(zz: Tensor, num_heads: int, *, present: float = PRESENT, ridge: float = OUTPUT_RIDGE) -> Tensor:
    """Map from a layer's heads to the part of each that the others don't predict, so that no refit of W_O can replace it.

    Each head is predicted by ridge regression on the others, each of them present at random with a probability; what
    remains of it, in expectation, is its unique part. With M = present * zz + (1 - present) * (the blocks of zz on
    its diagonal) + lambda and P its inverse, block i of the parts is `z P_i P_ii^-1` (docs/method.md, M18).

    Args:
        zz: sum z z' over tokens, z all heads, concatenated, `[H*D, H*D]`, float64.
        num_heads: H.
        present: the probability, above 0 and at most 1.
        ridge: lambda as a fraction of the heads' mean square.

    Returns:
        `[H*D, H*D]`, float64: `z @ map` holds the parts, concatenated as the heads are.
    """
    width = zz.shape[0] // num_heads
    of_heads = torch.block_diag(*torch.ones(num_heads, width, width, dtype=torch.float64))
    penalty = _penalty_of(zz, ridge)
    mixed = zz * (present + (1 - present) * of_heads) + penalty * torch.eye(zz.shape[0], dtype=torch.float64)
    blocks = torch.linalg.inv(mixed).split(width, dim=1)  # P_i: [H*D, D]
    own = (block[i * width : (i + 1) * width] for i, block in enumerate(blocks))  # P_ii: [D, D]
    return torch.cat(
        [torch.linalg.solve(p_ii, block, left=False) for block, p_ii in zip(blocks, own, strict=True)], dim=1
    )


def fit_contributions(sums: ContributionSums, *, ridge: float = ROUTER_RIDGE) -> ContributionFit:
    """Least-squares `c = W_r x + b` for all heads of a layer, the bias not penalised."""
    w = _with_bias(sums.xx, sums.xc, ridge)  # [C + 1, H]
    mean = sums.xc[-1] / sums.tokens
    squares = sums.cc.diagonal()
    # sum (c - w' x)^2, expanded
    residual = squares - 2 * (w * sums.xc).sum(0) + (w * (sums.xx @ w)).sum(0)
    total = squares - sums.tokens * mean**2  # sum (c - mean)^2
    r2 = 1 - residual / total.clamp_min(torch.finfo(torch.float64).tiny)
    return ContributionFit(w[:-1].T.contiguous(), w[-1].contiguous(), mean, r2)


def fit_ranking(sums: ContributionSums, heads: Sequence[int], *, ridge: float = ROUTER_RIDGE) -> Tensor:
    """Weight `[heads, C]` of logits, without a bias, that rank some heads by contribution with almost equal weights.

    Their standard deviation within a token is `RANKING_SCALE`, so that a softmax over them gives gates near 1.
    """
    xx, xc = sums.xx[:-1, :-1], sums.xc[:-1, list(heads)]
    w = torch.linalg.solve(_measure(xx, ridge), xc)  # [C, heads]
    w = w - w.mean(1, keepdim=True)  # a softmax does not see what all heads have in common
    variance = (w * (xx @ w)).sum(0).mean() / sums.tokens  # over heads, whose mean is now 0 for every token
    logits_weight: Tensor = (
        w * RANKING_SCALE / variance.sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    ).T.contiguous()
    return logits_weight


def order_of_removal(
    zz: Tensor, o_proj: Tensor, layer: MoHConfig, *, ridge: float = OUTPUT_RIDGE
) -> tuple[list[int], Tensor]:
    """Which heads a refit of W_O can do without: they are left out one after the other, always the one that costs least then.

    The cost of leaving out heads c is the least `||Z_s U - Z_c W_c||^2 + lambda ||U||^2` over changes U of the other
    heads' W_O. With `P = (Z'Z + lambda)^-1` it is `tr W_c' P_cc^-1 W_c - lambda ||W_c||^2`, and leaving out one more head is
    a step of block elimination on P and W (docs/method.md, M19).

    Args:
        zz: sum z z' over tokens, z all heads, concatenated, `[H*D, H*D]`, float64.
        o_proj: weight of the original output projection as it reaches the residual stream, `[C, H*D]`.
        layer: its routing unit states which heads are left out together.
        ridge: lambda as a fraction of the heads' mean square.

    Returns:
        the heads, the last ones to be left out first; and `[H + 1]`, what the refit leaves of the squared error with the first
        n of them alone, as a fraction (1 for 0 heads; between the numbers that the unit allows, the next lower one's).
    """
    h = layer.num_heads
    width, penalty = zz.shape[0] // h, _penalty_of(zz, ridge)
    original = o_proj.detach().double().cpu().T  # [H*D, C]
    w = original.clone()
    inverse = torch.linalg.inv(_measure(zz, ridge))
    size = layer.step if layer.routing_unit == "kv_group" else 1
    present = [list(range(first, first + size)) for first in range(0, h, size)]
    removed: list[int] = []
    left, error = torch.ones(h + 1, dtype=torch.float64), 0.0

    def rows(heads: Sequence[int]) -> Tensor:
        return torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads])

    def cost(heads: list[int]) -> float:
        index = rows(heads)
        added = (w[index] * torch.linalg.solve(inverse[index][:, index], w[index])).sum()
        return float(added - penalty * original[index].square().sum())

    while present:
        heads = min(_removable(present, layer), key=cost)
        error += cost(heads)
        index = rows(heads)
        step = torch.linalg.solve(inverse[index][:, index], torch.cat([w[index], inverse[index]], dim=1))
        w -= inverse[:, index] @ step[:, : w.shape[1]]
        inverse = inverse - inverse[:, index] @ step[:, w.shape[1] :]
        present.remove(heads)
        removed += heads[::-1]
        gone = rows(removed)
        without = float((original[gone] * (zz[gone][:, gone] @ original[gone])).sum())
        fraction = min(1.0, max(0.0, error) / without) if without > 0 else 1.0
        left[h - len(removed) : h - len(removed) + size] = fraction
    left[h] = 1.0
    return removed[::-1], left


def _removable(present: list[list[int]], layer: MoHConfig) -> list[list[int]]:
    """The heads that may be left out next: in balanced groups only those of a group that has most."""
    if layer.routing_unit != "group_balanced" or layer.kv_heads is None:
        return present
    size = layer.num_heads // layer.kv_heads
    counts = [sum(heads[0] // size == group for heads in present) for group in range(layer.kv_heads)]
    return [heads for heads in present if counts[heads[0] // size] == max(counts)]


def refit_fixed(
    zz: Tensor, o_proj: Tensor, heads: Sequence[int], num_heads: int, *, ridge: float = OUTPUT_RIDGE
) -> Tensor:
    """W_O of some heads alone, refitted to make up for the others: `[C, len(heads)*D]`, in o_proj's dtype and on its device.

    Args:
        zz: as in `order_of_removal`.
        o_proj: weight of the original output projection, `[C, H*D]`.
        heads: those that are kept, at least one.
        num_heads: H.
    """
    width = zz.shape[0] // num_heads
    kept = torch.zeros(num_heads, width, dtype=torch.bool)
    kept[list(heads)] = True
    kept = kept.flatten()
    w_o = o_proj.detach().double().cpu().T
    change = torch.linalg.solve(_measure(zz, ridge)[kept][:, kept], zz[kept][:, ~kept] @ w_o[~kept])
    refitted: Tensor = (w_o[kept] + change).T.to(o_proj).contiguous()
    return refitted


@dataclass(frozen=True)
class LinearMap:
    """The linear map of a layer's input that is nearest to what its attention adds: `weight x + bias`.

    Attributes:
        weight: `[C, C_in]`, float64.
        bias: `[C]`, float64.
        left: what it leaves of the squared error of adding nothing, as a fraction.
    """

    weight: Tensor
    bias: Tensor
    left: float


def fit_linear_map(xx: Tensor, xz: Tensor, zz: Tensor, o_proj: Tensor, *, ridge: float = ROUTER_RIDGE) -> LinearMap:
    """Least squares of the attention's output, without the bias of W_O, on the layer's input; its bias is not penalised.

    Args:
        xx: sum x x' with a 1 appended to x, `[C + 1, C + 1]`, float64.
        xz: sum x z', `[C + 1, H*D]`, float64.
        zz: sum z z', `[H*D, H*D]`, float64.
        o_proj: weight of the original output projection, `[C, H*D]`.
        ridge: as a fraction of the inputs' mean square.
    """
    w_o = o_proj.detach().double().cpu().T
    wanted = xz @ w_o  # sum x a'
    w = _with_bias(xx, wanted, ridge)  # [C + 1, C]
    without = float((w_o * (zz @ w_o)).sum())
    after = without - 2 * float((w * wanted).sum()) + float((w * (xx @ w)).sum())
    left = min(1.0, max(0.0, after) / without) if without > 0 else 1.0
    return LinearMap(w[:-1].T.contiguous(), w[-1].contiguous(), left)


def refit_output_projection(sums: OutputSums, o_proj: Tensor, *, ridge: float = OUTPUT_RIDGE) -> Tensor:
    """W_O that lets the kept heads make up for the skipped ones.

    Minimises `sum ||g W - z W_O||^2 + lambda ||W - W_O||^2` over W, with lambda = ridge x mean diagonal of sum g g'.

    Args:
        o_proj: weight of the original output projection, `[C, H*D]` (W_O transposed).

    Returns:
        the new weight, `[C, H*D]`, in o_proj's dtype and on its device.
    """
    w_o = o_proj.detach().double().cpu().T  # [H*D, C]
    # Solve for the change: exactly nothing changes when every head is kept.
    change = _change(sums, (sums.gz - sums.gg) @ w_o, ridge)
    refitted: Tensor = (w_o + change).T.to(o_proj).contiguous()
    return refitted


def error_left_by_refit(sums: OutputSums, whole: Tensor, o_proj: Tensor, *, ridge: float = OUTPUT_RIDGE) -> float:
    """Fraction of the squared error of skipping heads that remains after the refit of W_O.

    Args:
        whole: sum z z', `[H*D, H*D]`, over the same tokens as `sums`.
        o_proj: weight of the original output projection as it reaches the residual stream, `[C, H*D]`.

    Returns:
        between 0 and 1; 1 where nothing is skipped.
    """
    w_o = o_proj.detach().double().cpu().T  # [H*D, C]
    skipped = whole - sums.gz - sums.gz.T + sums.gg  # sum (z - g)(z - g)'
    before = float((w_o * (skipped @ w_o)).sum())
    wanted = (sums.gz - sums.gg) @ w_o  # sum g r', of what is skipped r = (z - g) W_O
    change = _change(sums, wanted, ridge)
    # sum ||r - g change||^2, expanded
    after = before - 2 * float((change * wanted).sum()) + float((change * (sums.gg @ change)).sum())
    return min(1.0, max(0.0, after) / before) if before > 0 else 1.0


def low_rank_change(
    sums: OutputSums, o_proj: Tensor, *, rank: int, ridge: float = OUTPUT_RIDGE
) -> tuple[Tensor, Tensor]:
    """The refit of W_O (`refit_output_projection`) as a change of at most this rank.

    The best one in the refit's own measure: of all changes of this rank it adds least to what the refit minimises.

    Args:
        o_proj: weight of the original output projection, `[C, H*D]` (W_O transposed).

    Returns:
        `(left [C, r], right [r, H*D])`, float32: o_proj changes by their product.
    """
    change = _change(sums, (sums.gz - sums.gg) @ o_proj.detach().double().cpu().T, ridge)  # [H*D, C]
    measure = _measure(sums.gg, ridge)
    # What is minimised rises by ||root' (low - change)||^2, so the truncated SVD of root' change is the best of its rank.
    root = torch.linalg.cholesky(measure)  # root root' = measure
    u, s, vh = torch.linalg.svd(root.T @ change, full_matrices=False)
    rank = min(rank, len(s))
    right = torch.linalg.solve_triangular(root.T, u[:, :rank] * s[:rank], upper=True)  # [H*D, r]
    return vh[:rank].T.float().contiguous(), right.T.float().contiguous()


def _with_bias(xx: Tensor, xy: Tensor, ridge: float) -> Tensor:
    """Ridge regression on inputs with a 1 appended, whose coefficient, the bias, is not penalised."""
    penalty = torch.full((xx.shape[0],), float(_penalty_of(xx[:-1, :-1], ridge)), dtype=torch.float64)
    penalty[-1] = 0.0
    weight: Tensor = torch.linalg.solve(xx + penalty.diag(), xy)
    return weight


def _change(sums: OutputSums, wanted: Tensor, ridge: float) -> Tensor:
    """Change of W_O `[H*D, C]`: the ridge regression of what is skipped on the kept heads."""
    change: Tensor = torch.linalg.solve(_measure(sums.gg, ridge), wanted)
    return change


def _measure(gram: Tensor, ridge: float) -> Tensor:
    """`gram` with its penalty on the diagonal."""
    return gram + _penalty_of(gram, ridge) * torch.eye(gram.shape[0], dtype=torch.float64)


def _penalty_of(gram: Tensor, ridge: float) -> Tensor:
    """lambda of a regression on what has the sum of squares and products `gram`: a fraction of its mean square.

    If it is all zero, any penalty above 0 makes the regression solvable.
    """
    mean = gram.diagonal().mean()
    return ridge * mean if mean > 0 else torch.ones_like(mean)
