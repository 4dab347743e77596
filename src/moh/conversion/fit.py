"""Closed forms of the conversion: what is unique to a head, a router's regression, the refit of W_O, in full or low rank.

All are solved in float64 from the sums of `moh.conversion.passes`. No gradient step anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    penalty = torch.full((sums.xx.shape[0],), ridge * float(sums.xx.diagonal()[:-1].mean()), dtype=torch.float64)
    penalty[-1] = 0.0
    w = torch.linalg.solve(sums.xx + penalty.diag(), sums.xc)  # [C + 1, H]
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
    penalty = ridge * xx.diagonal().mean() * torch.eye(xx.shape[0], dtype=torch.float64)
    w = torch.linalg.solve(xx + penalty, xc)  # [C, heads]
    w = w - w.mean(1, keepdim=True)  # a softmax does not see what all heads have in common
    variance = (w * (xx @ w)).sum(0).mean() / sums.tokens  # over heads, whose mean is now 0 for every token
    logits_weight: Tensor = (
        w * RANKING_SCALE / variance.sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    ).T.contiguous()
    return logits_weight


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


def _change(sums: OutputSums, wanted: Tensor, ridge: float) -> Tensor:
    """Change of W_O `[H*D, C]`: the ridge regression of what is skipped on the kept heads."""
    change: Tensor = torch.linalg.solve(_measure(sums.gg, ridge), wanted)
    return change


def _measure(gram: Tensor, ridge: float) -> Tensor:
    """`gram` with its penalty on the diagonal."""
    return gram + _penalty_of(gram, ridge) * torch.eye(gram.shape[0], dtype=torch.float64)


def _penalty_of(gram: Tensor, ridge: float) -> Tensor:
    """lambda of a regression on the heads whose sum z z' is `gram`: a fraction of their mean square.

    If a layer's heads are all zero, any penalty above 0 makes it solvable.
    """
    mean = gram.diagonal().mean()
    return ridge * mean if mean > 0 else torch.ones_like(mean)
