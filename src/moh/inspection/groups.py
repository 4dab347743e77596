"""Run a model over groups of inputs and count what each head did for each group, in memory that does not grow with them.

One mechanism for texts, images and diffusion models, MoH and dense. Single tokens are the business of `trace`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moh.data.seeds import make_key
from moh.inspection.batches import GroupBatch, GroupedInputs
from moh.inspection.trace import LayerTrace, trace
from moh.inspection.use import HeadUse, InputSample, LayerHeads


@torch.no_grad()
def inspect_groups(
    model: nn.Module, inputs: GroupedInputs, *, keep: int = 64, seed: int = 0, progress: bool = True
) -> HeadUse:
    """Count, for each group, how its tokens use each head.

    Only sums are kept: for each group, layer and head three numbers, and for at most `keep` units of each group (texts,
    images) one number per layer and head, from which `permutation_test` works. Nothing grows with the number of inputs.

    Args:
        model: MoH or dense, of any family; used in evaluation mode and left in its own.
        inputs: made by `text_groups`, `token_groups`, `image_groups` or `diffusion_groups` for this model.
        keep: units of each group that are kept by themselves, drawn at random where there are more.
        seed: of that draw, which does not depend on order or batch size.
        progress: show a progress bar (only on a terminal).

    Raises:
        ValueError: the model has no attention that is known, `keep` is below 1, or no input could be read.
    """
    from tqdm.auto import tqdm

    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    sums: _Sums | None = None
    kept = _Kept(keep, seed)
    bar = tqdm(
        inputs.batches(),
        total=inputs.count,
        desc="heads",
        unit="batch",
        disable=None if progress else True,
        leave=False,
    )
    for batch in bar:
        layers = trace(model, batch.run)
        if sums is None:
            sums = _Sums(layers, len(inputs.names))
        active, tokens = sums.add(layers, batch)
        kept.add(batch, active, tokens)
    if sums is None:
        raise ValueError("no input could be read: there is nothing to inspect")
    return sums.use(inputs.names, kept)


class _Sums:
    """Sums over the tokens of each group, layer by layer."""

    def __init__(self, layers: list[LayerTrace], groups: int) -> None:
        self.layers = [LayerHeads(layer.name, layer.gates.shape[-1], layer.config) for layer in layers]
        self.totals = [torch.zeros(groups, 3, layer.num_heads, dtype=torch.float64) for layer in self.layers]
        self.tokens = torch.zeros(groups, len(layers), dtype=torch.float64)
        self.inputs = torch.zeros(groups, dtype=torch.int64)

    def add(self, layers: list[LayerTrace], batch: GroupBatch) -> tuple[list[Tensor], Tensor]:
        """Add a batch; returns the active tokens of each input, per layer `[B, H]`, and its tokens, `[B, L]`."""
        groups = batch.groups.cpu()
        active, tokens = [], []
        for place, layer in enumerate(layers):
            values = torch.stack([(layer.gates != 0).float(), layer.gates, layer.contributions], dim=2)  # [B, N, 3, H]
            counts = torch.full((len(groups),), values.shape[1], dtype=torch.float64)
            if batch.counted is not None:
                counted = batch.counted.to(values.device)
                values = torch.where(counted[..., None, None], values, 0.0)  # padding may hold NaN
                counts = counted.sum(1).double().cpu()
            of_input = values.double().sum(1).cpu()  # [B, 3, H]
            self.totals[place].index_add_(0, groups, of_input)
            self.tokens[:, place].index_add_(0, groups, counts)
            active.append(of_input[:, 0].float())
            tokens.append(counts.float())
        self.inputs += groups.bincount(minlength=len(self.inputs))
        return active, torch.stack(tokens, dim=1)

    def use(self, names: tuple[str, ...], kept: _Kept) -> HeadUse:
        means = [total / self.tokens[:, place, None, None] for place, total in enumerate(self.totals)]  # [G, 3, H]
        load, gate, contribution = ([mean[:, which] for mean in means] for which in range(3))
        sample = kept.sample([layer.num_heads for layer in self.layers])
        return HeadUse(names, self.layers, load, gate, contribution, self.tokens, self.inputs, sample)


@dataclass
class _Unit:
    """One unit's sums: active tokens of all layers' heads, one after the other, then tokens of each layer."""

    priority: int
    numbers: Tensor


class _Kept:
    """The units with the lowest random numbers, at most so many of each group.

    The number depends on the seed and the unit alone. A unit that is dropped or turned away has a higher one than all that
    are kept, then and later: what comes of it afterwards is turned away too, so that no sum is of a part.
    """

    def __init__(self, most: int, seed: int) -> None:
        self.most, self.seed = most, seed
        self.groups: dict[int, dict[int, _Unit]] = {}

    def add(self, batch: GroupBatch, active: list[Tensor], tokens: Tensor) -> None:
        rows = torch.cat([*active, tokens], dim=1)  # [B, all heads + L]
        for group, unit, row in zip(batch.groups.tolist(), batch.units.tolist(), rows, strict=True):
            units = self.groups.setdefault(group, {})
            if unit in units:
                units[unit].numbers += row
                continue
            priority = make_key(self.seed, unit)
            if len(units) == self.most:
                last = max(units, key=lambda number: units[number].priority)
                if units[last].priority < priority:
                    continue
                del units[last]
            units[unit] = _Unit(priority, row.clone())

    def sample(self, heads: list[int]) -> InputSample:
        units = [
            (group, unit, self.groups[group][unit]) for group in sorted(self.groups) for unit in self.groups[group]
        ]
        units.sort(key=lambda entry: entry[:2])
        rows = torch.stack([found.numbers for _, _, found in units])
        *active, tokens = rows.split([*heads, len(heads)], dim=1)
        return InputSample(torch.tensor([group for group, _, _ in units]), active, tokens)
