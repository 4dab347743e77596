"""How the tokens of each group of inputs use each head: one table for all families, in memory, CSV or parquet.

Counting is in `groups`; what follows from the numbers in `statistics` and `permutation`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moh.config import MoHConfig
from moh.inspection.tables import save_parquet, save_rows, to_pandas

if TYPE_CHECKING:
    from pandas import DataFrame

Row = dict[str, int | float | str]


@dataclass(frozen=True)
class LayerHeads:
    """One attention layer.

    Attributes:
        name: of the attention module in the model.
        num_heads: H.
        config: heads and routing; None for a dense layer, all of whose heads every token uses.
    """

    name: str
    num_heads: int
    config: MoHConfig | None

    @property
    def routed(self) -> list[int]:
        """The heads that tokens choose among; none where every token uses every head."""
        return list(self.config.routed_indices) if self.config is not None else []

    def kind(self, head: int) -> str:
        """ "dense" (the layer does not route), "shared" or "routed"."""
        if self.config is None:
            return "dense"
        return "shared" if head in self.config.shared_indices else "routed"


@dataclass(frozen=True)
class InputSample:
    """What some of the inputs did, each by itself: what tests of differences between groups need.

    Attributes:
        groups: `[m]` int64, the group of each.
        active: per layer `[m, H]` float32, how many of an input's tokens activate each head.
        tokens: `[m, L]` float32, tokens of each input in each layer.
    """

    groups: Tensor
    active: list[Tensor]
    tokens: Tensor


@dataclass(frozen=True)
class HeadUse:
    """What each head did for the tokens of each of G groups of inputs. Layers may differ in their number of heads.

    Attributes:
        groups: their names.
        layers: heads and routing of each of the L layers.
        load: per layer `[G, H]` float64, the share of a group's tokens that activate each head; 1 for shared heads and in
            dense layers. NaN for a group without inputs, as in the next two.
        gate: per layer `[G, H]` float64, the mean gate over all tokens, 0 where a head is inactive.
        contribution: per layer `[G, H]` float64, the mean over all tokens of `||g_i H_i W_O^i||_2`.
        tokens: `[G, L]` float64, tokens counted.
        inputs: `[G]` int64, sequences or images counted.
        sample: some inputs by themselves.
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
        """Share of the heads that a token uses in each layer, the mean over groups that have inputs."""
        return [float(load.nanmean()) for load in self.load]

    def mean_load(self) -> Tensor:
        """`[L, H]` float64: the mean over groups that have inputs; NaN beyond a layer's own heads where others have more."""
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
        """`rows()` as a data frame (extra `llm`)."""
        return to_pandas(self.rows())

    def save_csv(self, path: str | Path) -> None:
        """Write `rows()` as CSV, whole or not at all."""
        save_rows(path, self.rows())

    def save_parquet(self, path: str | Path) -> None:
        """Write `rows()` as parquet (extra `llm`), whole or not at all."""
        save_parquet(path, self.rows())

    def select(self, groups: Sequence[str]) -> HeadUse:
        """These groups alone, in this order.

        Raises:
            ValueError: one is unknown (the message names it), or there are none.
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
        """The groups, in their order, whose loads differ most from the mean of all (root mean square over heads)."""
        gaps = torch.cat([load - load.nanmean(0) for load in self.load], dim=1)  # [G, heads of all layers]
        distance = gaps.square().mean(1).nan_to_num(-1.0)  # a group without inputs comes last
        places = distance.topk(min(count, int((self.inputs > 0).sum()))).indices.sort().values
        return tuple(self.groups[place] for place in places.tolist())


def stack_layers(rows: Sequence[Tensor]) -> Tensor:
    """`[L, H]` float64 from one `[H_l]` per layer; NaN beyond a layer's own heads where others have more."""
    stacked = torch.full((len(rows), max(map(len, rows))), torch.nan, dtype=torch.float64)
    for place, row in zip(stacked, rows, strict=True):
        place[: len(row)] = row
    return stacked
