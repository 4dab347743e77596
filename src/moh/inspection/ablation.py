"""What a head is worth: how much the loss rises when its gate is 0 for every token, or its output is frozen, on a few batches.

No other head takes its place: routers choose as before. MoH and dense models of any family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moh._modes import evaluating
from moh.inspection.groups import LayerHeads, stack_layers
from moh.inspection.inputs import GroupBatch, GroupedInputs
from moh.inspection.tables import Row, save_rows
from moh.inspection.trace import AttentionLayer, attention_layers


@dataclass(frozen=True)
class HeadAblation:
    """How much the loss rises without each head, or with its output frozen.

    Attributes:
        layers: heads and routing of each layer.
        increase: per layer `[H]` float64, mean over units (texts, images) of loss without the head minus loss; NaN for
            heads that were not requested.
        stderr: per layer `[H]` float64, the standard error of that mean, from the spread between units; NaN for one unit.
        loss: mean loss with all heads.
        units: number of units.
        groups: names of the G groups of inputs.
        of_groups: per layer `[G, H]` float64, `increase` in each group alone; NaN for a group without units.
        stderr_of_groups: per layer `[G, H]` float64.
    """

    layers: list[LayerHeads]
    increase: list[Tensor]
    stderr: list[Tensor]
    loss: float
    units: int
    groups: tuple[str, ...]
    of_groups: list[Tensor]
    stderr_of_groups: list[Tensor]

    def rows(self) -> list[Row]:
        """One row per removed head: layer, head, kind, increase, stderr."""
        return [
            {
                "layer": place,
                "head": head,
                "kind": layer.kind(head),
                "increase": float(self.increase[place][head]),
                "stderr": float(self.stderr[place][head]),
            }
            for place, layer in enumerate(self.layers)
            for head in range(layer.num_heads)
            if not self.increase[place][head].isnan()
        ]

    def group_rows(self) -> list[Row]:
        """One row per group with units and removed head: group, then as `rows`."""
        return [
            {
                "group": name,
                **row,
                "increase": float(self.of_groups[place][group, head]),
                "stderr": float(self.stderr_of_groups[place][group, head]),
            }
            for group, name in enumerate(self.groups)
            for row in self.rows()
            for place, head in [(int(row["layer"]), int(row["head"]))]
            if not self.of_groups[place][group, head].isnan()
        ]

    def save_csv(self, path: str | Path) -> None:
        """Write `rows()` as CSV, whole or not at all."""
        save_rows(path, self.rows())

    def map(self) -> Tensor:
        """`increase` as `[L, H]` float64; NaN for heads that don't exist or were not removed."""
        return stack_layers(self.increase)


@torch.no_grad()
def ablate_heads(
    model: nn.Module,
    inputs: GroupedInputs,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    freeze: bool = False,
    progress: bool = True,
) -> HeadAblation:
    """Remove one head at a time, or freeze it, and measure the loss.

    Each head takes one forward pass over all of `inputs`, which are kept in memory: use few.

    Args:
        model: MoH or dense; run in evaluation mode, its own mode is restored.
        inputs: made for this model, as in `inspect_groups`. Their losses are the next-token loss of a language model, the
            cross-entropy of a classifier and the training loss of a diffusion model.
        layers: numbers of the layers whose heads to remove; None means all.
        heads: `(layer, head)` to remove, instead of `layers`.
        freeze: put a head's mean output over the tokens of `inputs` that use it, gates included, in its place for those tokens,
            instead of 0: what is then lost is what the head says of single tokens, beyond what it says of all.
        progress: show a progress bar (only on a terminal).

    Raises:
        ValueError: the model has no known attention, a layer or head does not exist, or no input could be read.
    """
    from tqdm.auto import tqdm

    found = attention_layers(model)
    chosen = _chosen(found, layers, heads)
    with evaluating(model):
        batches = list(inputs.batches())
        if not batches:
            raise ValueError("no input could be read: there is nothing to measure")
        means: list[Tensor | None] = _mean_outputs(found, batches) if freeze else [None] * len(found)
        whole, group = _losses(batches)
        increase, stderr = (_missing(found) for _ in range(2))
        of_groups, stderr_of_groups = (_missing(found, len(inputs.names)) for _ in range(2))
        for place, head in tqdm(chosen, desc="ablation", unit="head", disable=None if progress else True, leave=False):
            with _without(found[place], head, means[place]):
                rise = _losses(batches)[0] - whole
            increase[place][head], stderr[place][head] = _mean_and_error(rise)
            for number in group.unique().tolist():
                mean, error = _mean_and_error(rise[group == number])
                of_groups[place][number, head], stderr_of_groups[place][number, head] = mean, error
    described = [LayerHeads(layer.name, layer.num_heads, layer.config) for layer in found]
    loss, units = float(whole.mean()), len(whole)
    return HeadAblation(described, increase, stderr, loss, units, inputs.names, of_groups, stderr_of_groups)


def _chosen(
    found: Sequence[AttentionLayer], layers: Sequence[int] | None, heads: Sequence[tuple[int, int]] | None
) -> list[tuple[int, int]]:
    """(layer, head) of each head to remove.

    Raises:
        ValueError: both are given, or a layer or head does not exist.
    """
    if layers is not None and heads is not None:
        raise ValueError("either layers or heads must be given, got both")
    for place in layers or ():
        if not 0 <= place < len(found):
            raise ValueError(f"layers must be between 0 and {len(found) - 1}, got {place}")
    for place, head in heads or ():
        if not 0 <= place < len(found):
            raise ValueError(f"heads must be of layers between 0 and {len(found) - 1}, got {(place, head)}")
        if not 0 <= head < found[place].num_heads:
            raise ValueError(f"heads of layer {place} must be between 0 and {found[place].num_heads - 1}, got {head}")
    if heads is not None:
        return list(heads)
    every = range(len(found)) if layers is None else layers
    return [(place, head) for place in every for head in range(found[place].num_heads)]


def _missing(found: Sequence[AttentionLayer], *groups: int) -> list[Tensor]:
    """NaN per layer, `[*groups, H]`."""
    return [torch.full((*groups, layer.num_heads), math.nan, dtype=torch.float64) for layer in found]


def _mean_and_error(rise: Tensor) -> tuple[Tensor, Tensor | float]:
    return rise.mean(), rise.std() / math.sqrt(len(rise)) if len(rise) > 1 else math.nan


def _mean_outputs(found: Sequence[AttentionLayer], batches: Sequence[GroupBatch]) -> list[Tensor | None]:
    """Per layer `[H, D]`: mean over the tokens that use a head of what W_O reads of it, weighted by the gate; None if not run."""
    sums: list[Tensor | None] = [None] * len(found)
    counts: list[Tensor | None] = [None] * len(found)
    now: list[GroupBatch] = []

    def take(place: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            heads = given[0].unflatten(-1, (found[place].num_heads, -1)).double()  # [B, N, H, D]
            used = _used(heads)
            if now[0].counted is not None:
                used = used & now[0].counted.to(used.device)[..., None]
            total = torch.where(used[..., None], heads, 0.0).flatten(0, 1).sum(0)  # padding may hold NaN
            count = used.flatten(0, 1).sum(0)[:, None]  # [H, 1]
            before, counted = sums[place], counts[place]
            sums[place] = total if before is None else before + total
            counts[place] = count if counted is None else counted + count

        return hook

    with ExitStack() as stack:
        for place, layer in enumerate(found):
            stack.callback(layer.projection.register_forward_pre_hook(take(place)).remove)
        for batch in batches:
            now[:] = [batch]
            batch.run()
    return [
        None if total is None or count is None else total / count.clamp(min=1)
        for total, count in zip(sums, counts, strict=True)
    ]


def _used(heads: Tensor) -> Tensor:
    """`[..., H]` bool of heads `[..., H, D]`: an inactive head's output is 0."""
    return (heads != 0).any(-1)


@contextmanager
def _without(layer: AttentionLayer, head: int, mean: Tensor | None) -> Iterator[None]:
    """Inside the block one head's gate is 0 for every token; with the heads' means `[H, D]`, its output is its mean."""
    width = layer.weight.shape[1] // layer.num_heads

    def remove(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = given[0].clone()  # [B, N, H * D]
        own = heads[..., head * width : (head + 1) * width]
        own[:] = 0 if mean is None else torch.where(_used(own)[..., None], mean[head].to(own), 0)
        return (heads, *given[1:])

    handle = layer.projection.register_forward_pre_hook(remove)
    try:
        yield
    finally:
        handle.remove()


def _losses(batches: Sequence[GroupBatch]) -> tuple[Tensor, Tensor]:
    """Loss of each unit, the mean over its inputs, float64; and the unit's group."""
    losses = torch.cat([batch.losses().double().cpu() for batch in batches])
    groups = torch.cat([batch.groups for batch in batches])
    _, place, count = torch.cat([batch.units for batch in batches]).unique(return_inverse=True, return_counts=True)
    sums = losses.new_zeros(len(count)).index_add_(0, place, losses)
    return sums / count, groups.new_zeros(len(count)).scatter_(0, place, groups)
