"""Run a model over groups of inputs and count what each head did for each group, in memory that does not grow with them.

One mechanism for texts, images and diffusion models, MoH and dense, with one result, `HeadUse`. `trace` is for single
tokens, `statistics` for conclusions from the numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moh.config import MoHConfig
from moh.data.seeds import make_key
from moh.inspection.inputs import GroupBatch, GroupedInputs
from moh.inspection.tables import Row, save_parquet, save_rows, to_pandas
from moh.inspection.trace import LayerTrace, trace
from moh.routing import router_class

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class LayerHeads:
    """One attention layer.

    Attributes:
        name: of the attention module in the model.
        num_heads: H.
        config: heads and routing; None for a dense layer, where every token uses all heads.
    """

    name: str
    num_heads: int
    config: MoHConfig | None

    @property
    def routed(self) -> list[int]:
        """The heads that tokens choose among; none if every token uses every head."""
        return list(self.config.routed_indices) if self.config is not None else []

    @property
    def has_scores(self) -> bool:
        """Whether its gates are weights, and not only 1 and 0."""
        return self.config is not None and not router_class(self.config.router).is_hard

    def kind(self, head: int) -> str:
        """ "dense" (the layer does not route), "shared" or "routed"."""
        if self.config is None:
            return "dense"
        return "shared" if head in self.config.shared_indices else "routed"


@dataclass(frozen=True)
class InputSample:
    """Counts of single inputs, for tests of differences between groups.

    Attributes:
        groups: `[m]` int64, the group of each.
        active: per layer `[m, H]` float32, number of an input's tokens that activate each head.
        tokens: `[m, L]` float32, tokens of each input in each layer.
    """

    groups: Tensor
    active: list[Tensor]
    tokens: Tensor


@dataclass(frozen=True)
class HeadUse:
    """What each head did for the tokens of each of G groups of inputs. Layers may differ in their number of heads.

    Attributes:
        groups: names of the groups.
        layers: heads and routing of each of the L layers.
        load: per layer `[G, H]` float64, the share of a group's tokens that activate each head; 1 for shared heads and in
            dense layers. NaN for a group without inputs, as in the next two.
        gate: per layer `[G, H]` float64, the mean gate over all tokens, 0 where a head is inactive.
        contribution: per layer `[G, H]` float64, the mean over all tokens of `||g_i H_i W_O^i||_2`.
        tokens: `[G, L]` float64, tokens counted.
        inputs: `[G]` int64, sequences or images counted.
        sample: counts of some single inputs.
    """

    groups: tuple[str, ...]
    layers: list[LayerHeads]
    load: list[Tensor]
    gate: list[Tensor]
    contribution: list[Tensor]
    tokens: Tensor
    inputs: Tensor
    sample: InputSample

    @property
    def configs(self) -> list[MoHConfig | None]:
        """Heads and routing of each layer; None for dense ones."""
        return [layer.config for layer in self.layers]

    def share(self) -> list[float]:
        """Share of the heads that a token uses in each layer, mean over groups with inputs."""
        return [float(load.nanmean()) for load in self.load]

    def mean_load(self) -> Tensor:
        """`[L, H]` float64: mean over groups with inputs; NaN beyond the heads of a layer that has fewer than others."""
        return stack_layers([load.nanmean(0) for load in self.load])

    def rows(self) -> list[Row]:
        """One row per group with inputs, layer and head: group, layer, head, kind, load, gate, contribution."""
        return [
            {
                "group": name,
                "layer": place,
                "head": head,
                "kind": layer.kind(head),
                "load": float(self.load[place][group, head]),
                "gate": float(self.gate[place][group, head]),
                "contribution": float(self.contribution[place][group, head]),
            }
            for group, name in enumerate(self.groups)
            if self.inputs[group]
            for place, layer in enumerate(self.layers)
            for head in range(layer.num_heads)
        ]

    def to_pandas(self) -> DataFrame:
        """`rows()` as a data frame (extra `plot`)."""
        return to_pandas(self.rows())

    def save_csv(self, path: str | Path) -> None:
        """Write `rows()` as CSV, whole or not at all."""
        save_rows(path, self.rows())

    def save_parquet(self, path: str | Path) -> None:
        """Write `rows()` as parquet (extra `plot`), whole or not at all."""
        save_parquet(path, self.rows())

    def select(self, groups: Sequence[str]) -> HeadUse:
        """Only these groups, in this order.

        Raises:
            ValueError: `groups` is empty or a group is unknown; names it.
        """
        if not groups:
            raise ValueError("groups must name at least one group, got none")
        for name in groups:
            if name not in self.groups:
                some = ", ".join(self.groups[:10]) + (", ..." if len(self.groups) > 10 else "")
                raise ValueError(f"groups must be among {some}, got {name!r}")
        places = torch.tensor([self.groups.index(name) for name in groups])
        order = torch.full((len(self.groups),), -1)
        order[places] = torch.arange(len(places))
        new = order[self.sample.groups]  # -1: not selected
        changed: dict[str, Any] = {
            name: [layer[places] for layer in getattr(self, name)] for name in ("load", "gate", "contribution")
        }
        sample = InputSample(new[new >= 0], [a[new >= 0] for a in self.sample.active], self.sample.tokens[new >= 0])
        return dataclasses.replace(
            self, groups=tuple(groups), tokens=self.tokens[places], inputs=self.inputs[places], sample=sample, **changed
        )

    def distinctive(self, count: int) -> tuple[str, ...]:
        """The `count` groups, in their order, whose loads differ most from the mean (root mean square over heads)."""
        gaps = torch.cat([load - load.nanmean(0) for load in self.load], dim=1)  # [G, heads of all layers]
        distance = gaps.square().mean(1).nan_to_num(-1.0)  # a group without inputs comes last
        places = distance.topk(min(count, int((self.inputs > 0).sum()))).indices.sort().values
        return tuple(self.groups[place] for place in places.tolist())


def stack_layers(rows: Sequence[Tensor]) -> Tensor:
    """`[L, H]` float64 from one `[H_l]` per layer; NaN beyond the heads of a layer that has fewer than others."""
    stacked = torch.full((len(rows), max(map(len, rows))), torch.nan, dtype=torch.float64)
    for place, row in zip(stacked, rows, strict=True):
        place[: len(row)] = row
    return stacked


@torch.no_grad()
def inspect_groups(
    model: nn.Module, inputs: GroupedInputs, *, keep: int = 64, seed: int = 0, progress: bool = True
) -> HeadUse:
    """Count, for each group, how its tokens use each head.

    Only sums are kept: three numbers per group, layer and head, and for up to `keep` units (texts, images) of each group
    one number per layer and head, for `permutation_test`. Memory does not grow with the number of inputs.

    Args:
        model: MoH or dense, of any family; run in evaluation mode, its own mode is restored.
        inputs: made by `text_groups`, `token_groups`, `image_groups` or `diffusion_groups` for this model.
        keep: most units of each group to keep singly, drawn at random if there are more.
        seed: seed of that draw, which does not depend on order or batch size.
        progress: show a progress bar (only on a terminal).

    Raises:
        ValueError: the model has no known attention, `keep` is below 1, or no input could be read.
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
        """Add a batch; returns each input's active tokens, per layer `[B, H]`, and its tokens, `[B, L]`."""
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
    """One unit's sums: active tokens of each head, layer after layer, then tokens of each layer."""

    priority: int
    numbers: Tensor


class _Kept:
    """The units with the lowest random numbers, up to `most` of each group.

    The number depends only on the seed and the unit. A rejected unit has a higher number than all kept units, then and
    later: its later inputs are rejected too, so that no sum covers only part of a unit.
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
