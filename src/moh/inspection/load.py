"""How many tokens use each head: counted over a text, layer by layer.

The load of a head is the share of tokens that activate it (f_i of the balance loss). Pictures are in `plots`; the load per
class of image is in `class_load`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moh.config import MoHConfig
from moh.inspection.counting import HeadCounter, stack_layers
from moh.inspection.tables import save_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class HeadLoad:
    """Loads of all heads of a model.

    Attributes:
        load: `[L, H]` float64, share of tokens that activate each head; 1 for shared heads. Where layers differ in their
            number of heads, H is the largest, and NaN stands where a layer has none.
        layers: heads and routing of each of the L layers.
        tokens: tokens counted.
    """

    load: Tensor
    layers: list[MoHConfig]
    tokens: int

    @property
    def share(self) -> list[float]:
        """Share of heads that a token uses in each layer, as counted."""
        return [float(row) for row in self.load.nanmean(1)]

    def rows(self) -> list[dict[str, int | float | str]]:
        """One row per layer and head: layer, head, kind ("shared" or "routed"), load."""
        return [
            {
                "layer": layer,
                "head": head,
                "kind": "shared" if head in config.shared_indices else "routed",
                "load": float(self.load[layer, head]),
            }
            for layer, config in enumerate(self.layers)
            for head in range(config.num_heads)
        ]

    def save_csv(self, path: str | Path) -> None:
        """Write `rows()` as CSV, whole or not at all."""
        save_rows(path, self.rows())


@torch.no_grad()
def head_load(model: PreTrainedModel, blocks: Tensor, *, batch_size: int = 4, progress: bool = True) -> HeadLoad:
    """Count which heads the tokens of `blocks` `[n, seq_len]` activate.

    Raises:
        ValueError: the model has no MoH layers, or there are no blocks.
    """
    from tqdm.auto import tqdm

    if blocks.dim() != 2 or blocks.numel() == 0:
        raise ValueError(f"blocks must be token ids [n, seq_len] with n >= 1, got shape {tuple(blocks.shape)}")
    counter = HeadCounter(model)
    training = model.training
    model.eval()
    try:
        batches = blocks.split(batch_size)
        for batch in tqdm(batches, desc="head load", unit="batch", disable=None if progress else True, leave=False):
            with counter.counting():
                model.get_decoder()(input_ids=batch.to(model.device), use_cache=False)
    finally:
        model.train(training)
    return HeadLoad(stack_layers([load[0] for load in counter.load]), counter.layers, blocks.numel())
