"""What a head is worth: how much the loss rises when its gate is 0 for every token, on a few batches.

No other head takes its place: routers choose as before. MoH and dense models of any family.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moh.inspection.groups import LayerHeads, stack_layers
from moh.inspection.inputs import GroupBatch, GroupedInputs
from moh.inspection.tables import Row, save_rows
from moh.inspection.trace import AttentionLayer, attention_layers


@dataclass(frozen=True)
class HeadAblation:
    """How much the loss rises without each head.

    Attributes:
        layers: heads and routing of each layer.
        increase: per layer `[H]` float64, mean over units (texts, images) of loss without the head minus loss; NaN for
            heads that were not requested.
        stderr: per layer `[H]` float64, the standard error of that mean, from the spread between units; NaN for one unit.
        loss: mean loss with all heads.
        units: number of units.
    """

    layers: list[LayerHeads]
    increase: list[Tensor]
    stderr: list[Tensor]
    loss: float
    units: int

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

    def save_csv(self, path: str | Path) -> None:
        """Write `rows()` as CSV, whole or not at all."""
        save_rows(path, self.rows())

    def map(self) -> Tensor:
        """`increase` as `[L, H]` float64; NaN for heads that don't exist or were not removed."""
        return stack_layers(self.increase)


@torch.no_grad()
def ablate_heads(
    model: nn.Module, inputs: GroupedInputs, *, layers: Sequence[int] | None = None, progress: bool = True
) -> HeadAblation:
    """Remove one head at a time and measure the loss.

    Each head takes one forward pass over all of `inputs`, which are kept in memory: use few.

    Args:
        model: MoH or dense; run in evaluation mode, its own mode is restored.
        inputs: made for this model, as in `inspect_groups`. Their losses are the next-token loss of a language model, the
            cross-entropy of a classifier and the training loss of a diffusion model.
        layers: numbers of the layers whose heads to remove; None means all.
        progress: show a progress bar (only on a terminal).

    Raises:
        ValueError: the model has no known attention, a layer does not exist, or no input could be read.
    """
    from tqdm.auto import tqdm

    found = attention_layers(model)
    chosen = list(range(len(found))) if layers is None else list(layers)
    for place in chosen:
        if not 0 <= place < len(found):
            raise ValueError(f"layers must be between 0 and {len(found) - 1}, got {place}")
    training = model.training
    model.eval()
    try:
        batches = list(inputs.batches())
        if not batches:
            raise ValueError("no input could be read: there is nothing to measure")
        whole = _losses(batches)
        increase = [torch.full((layer.num_heads,), math.nan, dtype=torch.float64) for layer in found]
        stderr = [row.clone() for row in increase]
        heads = [(place, head) for place in chosen for head in range(found[place].num_heads)]
        for place, head in tqdm(heads, desc="ablation", unit="head", disable=None if progress else True, leave=False):
            with _without(found[place], head):
                rise = _losses(batches) - whole
            increase[place][head] = rise.mean()
            stderr[place][head] = rise.std() / math.sqrt(len(rise)) if len(rise) > 1 else math.nan
    finally:
        model.train(training)
    described = [LayerHeads(layer.name, layer.num_heads, layer.config) for layer in found]
    return HeadAblation(described, increase, stderr, float(whole.mean()), len(whole))


@contextmanager
def _without(layer: AttentionLayer, head: int) -> Iterator[None]:
    """Remove one head inside the block, as if its gate were 0 for every token."""
    width = layer.weight.shape[1] // layer.num_heads

    def remove(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = given[0].clone()  # [B, N, H * D]
        heads[..., head * width : (head + 1) * width] = 0
        return (heads, *given[1:])

    handle = layer.projection.register_forward_pre_hook(remove)
    try:
        yield
    finally:
        handle.remove()


def _losses(batches: Sequence[GroupBatch]) -> Tensor:
    """Loss of each unit, the mean over its inputs, float64."""
    losses = torch.cat([batch.losses().double().cpu() for batch in batches])
    _, place, count = torch.cat([batch.units for batch in batches]).unique(return_inverse=True, return_counts=True)
    sums = losses.new_zeros(len(count)).index_add_(0, place, losses)
    mean: Tensor = sums / count
    return mean
