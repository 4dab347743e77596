"""One converted model for a range of budgets: W_O refitted for every number of heads, kept as low-rank changes.

A refit of W_O depends on how many heads its layer uses and on nothing else of the budget, so that one change for each
number of heads serves every way to hand heads out. Where the changes live: `moh.models.output_changes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moh.conversion.allocation import allocate
from moh.conversion.calibrator import MIN_HEADS, with_heads
from moh.conversion.dense import DenseModel
from moh.conversion.fit import OUTPUT_RIDGE, penalty_of
from moh.conversion.passes import OutputSums, collect_several_outputs, layer_groups
from moh.models.dial import allowed_counts
from moh.models.output_changes import add_output_budgets, output_projection, routed_attentions, used_heads
from moh.routing import Router, router_class

RANK = 64
"""Rank of a change of W_O, at most (measured by experiments/budgets_in_one_model.py)."""

TOO_FEW = 1e3
"""Nats per token, times the square of how many heads there are fewer than `MIN_HEADS`: what is estimated there is far too
little, and a share that needs so few takes them from all layers."""


@dataclass(frozen=True)
class OutputChanges:
    """Changes of every layer's W_O.

    Attributes:
        heads: numbers of heads that have one, ascending.
        factors: per layer and number, `(left [C, r], right [r, H*D])`: W_O transposed, as a linear layer keeps it,
            changes by their product.
    """

    heads: tuple[int, ...]
    factors: list[list[tuple[Tensor, Tensor]]]

    @property
    def rank(self) -> int:
        """r."""
        return int(self.factors[0][0][1].shape[0])


def check_budgets(dense: DenseModel, budgets: Sequence[float], *, router: str, refit_output: bool) -> None:
    """Refuse budgets that can't be served.

    Raises:
        ValueError: says what is wrong with them, the model or another argument.
    """
    if not router_class(router).ranks_heads:
        raise ValueError(f"budgets needs router='linear', got router={router!r}")
    if refit_output:
        raise ValueError("refit_output must be False where budgets is given, which refits W_O for each of them")
    if (
        isinstance(budgets, str)
        or not len(budgets)
        or not all(isinstance(b, float | int) and 0 < b <= 1 for b in budgets)
    ):
        raise ValueError(f"budgets must be shares of heads above 0 and at most 1, got {budgets!r}")
    if not isinstance(dense.model, PreTrainedModel):
        raise ValueError(
            f"budgets must be None for a {type(dense.model).__name__}: only models of transformers can keep a W_O for each "
            "number of heads; the dial (moh.set_active_heads) works without them"
        )


def needed_heads(routers: Sequence[Router], costs: Tensor | None, budgets: Sequence[float]) -> tuple[int, ...]:
    """Numbers of heads, below all, that a layer uses at some budget or as the routers are set, and those between them.

    None at all where every budget is all heads.

    Args:
        routers: one per layer.
        costs: `[L, H + 1]`, by which heads are handed out; None for evenly.
        budgets: shares of heads.

    Raises:
        ValueError: a budget is below what the shared heads allow.
    """
    config = routers[0].config
    h, step, layers = config.num_heads, config.step, len(routers)
    possible = sorted({r.config.num_shared + k for r in routers for k in allowed_counts(r)})
    lowest = min(used_heads(r.config for r in routers))  # where the dial stands first has its own as well
    for share in budgets:
        total = round(share * h * layers / step) * step
        if total < sum(r.config.num_shared for r in routers):
            raise ValueError(
                f"budgets must be at least {sum(r.config.num_shared for r in routers) / (h * layers):.3f}, the share of "
                f"the shared heads, got {share}"
            )
        if costs is None:
            lowest = min(lowest, total // layers)
        else:
            at_least = max(step, min(MIN_HEADS, total // layers) // step * step)
            lowest = min(lowest, *allocate(costs, total, at_least=at_least, step=step))
    # A number between two of a layer's has its own: the largest possible one at or below the lowest begins
    first = max((n for n in possible if n <= lowest), default=possible[0])
    return tuple(n for n in possible if first <= n < h)


def fit_changes(
    dense: DenseModel,
    routers: Sequence[Router],
    heads: Sequence[int],
    batches: Callable[[], Iterator[Tensor]],
    *,
    rank: int = RANK,
) -> OutputChanges:
    """Refit W_O of every layer for each number of heads and keep the changes at low rank.

    Args:
        dense: the dense model.
        routers: one per layer; they tell which n heads a token uses.
        heads: numbers of heads.
        batches: gives the calibration data anew for each pass.
        rank: of the changes, at most.
    """
    factors: list[list[tuple[Tensor, Tensor]]] = []
    for group in layer_groups(dense, matrices=2 * len(heads)):
        chosen = {layer: [with_heads(routers[layer], n) for n in heads] for layer in group}
        for layer, sums in collect_several_outputs(dense, chosen, batches()).items():
            weight = dense.attentions[layer].output_weight
            factors.append([low_rank_change(s, weight, rank=rank) for s in sums])
    return OutputChanges(tuple(heads), factors)


def low_rank_change(
    sums: OutputSums, o_proj: Tensor, *, rank: int, ridge: float = OUTPUT_RIDGE
) -> tuple[Tensor, Tensor]:
    """The refit of W_O (`moh.conversion.fit.refit_output_projection`) as a change of at most this rank.

    The best one in the refit's own measure: of all changes of the rank it adds the least to what the refit minimises.

    Args:
        o_proj: weight of the original output projection, `[C, H*D]` (W_O transposed).

    Returns:
        `(left [C, r], right [r, H*D])`, float32: o_proj changes by their product.
    """
    measure = sums.gg + penalty_of(sums.gg, ridge) * torch.eye(sums.gg.shape[0], dtype=torch.float64)
    change = torch.linalg.solve(measure, (sums.gz - sums.gg) @ o_proj.detach().double().cpu().T)  # [H*D, C]
    root = torch.linalg.cholesky(measure)  # root root' = measure
    u, s, vh = torch.linalg.svd(root.T @ change, full_matrices=False)
    rank = min(rank, len(s))
    right = torch.linalg.solve_triangular(root.T, u[:, :rank] * s[:rank], upper=True)  # [H*D, r]
    return vh[:rank].T.float().contiguous(), right.T.float().contiguous()


def keep(model: PreTrainedModel, changes: OutputChanges | None, costs: Tensor | None) -> None:
    """Put what the dial needs into a converted model, whose W_O is still the original one.

    Args:
        model: the MoH model.
        changes: of every layer's W_O; None for none.
        costs: `[L, H + 1]`, what each layer loses with n heads; None if it was not measured.
    """
    if costs is not None:
        few = (MIN_HEADS - torch.arange(costs.shape[1])).clamp_min(0)
        model.config.head_costs = (costs + TOO_FEW * few.square()).tolist()
    if changes is None:
        return
    model.config.output_budgets = {
        "heads": list(changes.heads),
        "rank": changes.rank,
        "used_heads": used_heads(a.router.config for a in routed_attentions(model)),
    }
    add_output_budgets(model)
    for attention, factors in zip(routed_attentions(model), changes.factors, strict=True):
        projection, budgets, config = output_projection(attention), attention.output_budgets, attention.router.config
        for index, (left, right) in enumerate(factors):
            if isinstance(projection, Conv1D):  # which keeps W_O itself
                left, right = right.T, left.T
            budgets.left[index].copy_(left)
            budgets.right[index].copy_(right)
        used = config.num_shared + config.active_heads
        budgets.switch(projection.weight, None, budgets.index(used, config.num_heads))
