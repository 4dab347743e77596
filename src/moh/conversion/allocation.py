"""How many heads each layer gets, and of which kind: routed, fixed, or none, by what each is estimated or measured to cost.

Estimates come from one backward pass (`passes.layer_costs`); they are far too low where few heads are left, so what an
allocation would leave with few is measured: the loss of the dense model with that layer alone changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moh._modes import evaluating
from moh.conversion.dense import DenseAttention
from moh.conversion.recording import replaced_forwards
from moh.conversion.transformers import DenseTextModel
from moh.models.dial import spend

FEW_HEADS = 4
"""Numbers of heads up to this one are few (or up to half of the heads, if the model has fewer): what they cost is measured."""

Change = Callable[[Tensor, Tensor], Tensor]
"""`(x [B, N, C], z [B, N, H*D]) -> [B, N, C]`: what a changed layer's attention adds, from its input and the dense heads."""


def few_heads(num_heads: int) -> int:
    """Numbers of heads up to this one are few."""
    return min(FEW_HEADS, num_heads // 2)


@dataclass
class Options:
    """What every layer may become, for one kind of layer.

    Attributes:
        costs: `[L, H + 1]` float64, estimated rise of the loss with n heads; inf where a layer can't have n.
        change: `(layer, n)` -> what the attention of that layer adds then.
    """

    costs: Tensor
    change: Callable[[int, int], Change]
    measured: dict[tuple[int, int], float] = field(default_factory=dict)

    def correct(self, layer: int, heads: int, rise: float) -> None:
        """Raise the estimates of a layer to what was measured with n heads, the more, the more heads are left out.

        They are never lowered: of many measured numbers the smallest ones are small by chance.
        """
        self.measured[layer, heads] = rise
        costs, h = self.costs[layer], self.costs.shape[1] - 1
        if (estimate := float(costs[heads])) <= 0:
            costs[heads] = max(0.0, rise)
        elif (factor := rise / estimate) > 1:
            shares = (h - torch.arange(h + 1, dtype=torch.float64)) / (h - heads)  # of what is left out then
            costs *= factor ** shares.clamp_max(1.0)


def allocate(options: Sequence[Options], total: int, meter: Meter | None) -> list[tuple[int, int]]:
    """Kind (an index of `options`) and number of heads of each layer, of the least summed cost.

    Args:
        options: the kinds of layers; of two that cost the same the first is taken.
        total: heads over all layers.
        meter: measures what few heads cost, until nothing is chosen on an estimate of it alone; None trusts the estimates.

    Returns:
        `(kind, heads)` per layer; the heads together are `total`, or as near to it as the kinds allow.
    """
    while True:
        costs = torch.stack([kind.costs for kind in options])  # [kinds, L, H + 1]
        least, kinds = costs.min(dim=0)
        tables = [{n: cost for n, cost in enumerate(row) if cost != float("inf")} for row in least.tolist()]
        heads = spend(tables, total)
        chosen = [(int(kinds[layer, n]), n) for layer, n in enumerate(heads)]
        few = few_heads(costs.shape[2] - 1)
        unknown = [
            (layer, kind, n)
            for layer, (kind, n) in enumerate(chosen)
            if n <= few and (layer, n) not in options[kind].measured
        ]
        if meter is None or not unknown:
            return chosen
        for layer, kind, n in unknown:
            options[kind].correct(layer, n, meter.rise(layer, options[kind].change(layer, n)))


class Meter:
    """Measures how much the loss of the dense model rises if the attention of one layer is changed.

    What comes before that layer is replayed, not computed.
    """

    def __init__(self, dense: DenseTextModel, batches: Iterator[Tensor]) -> None:
        self._dense = dense
        self._batches = list(batches)
        self._outputs: list[list[Any]] = []  # of every block, for each batch
        self._tokens = sum(batch.numel() for batch in self._batches)
        self._before = 0.0
        for batch in self._batches:
            outputs: list[Any] = []
            handles = [b.register_forward_hook(lambda _, __, out, to=outputs: to.append(out)) for b in dense.blocks]
            try:
                self._before += self._loss(batch)
            finally:
                for handle in handles:
                    handle.remove()
            self._outputs.append(outputs)

    def rise(self, layer: int, change: Change) -> float:
        """Rise of the loss, in nats per token, if the attention of this layer added what `change` gives."""
        after = 0.0
        for batch, outputs in zip(self._batches, self._outputs, strict=True):
            with self._replayed(layer, outputs), changed(self._dense.attentions[layer], change):
                after += self._loss(batch)
        return (after - self._before) / self._tokens

    def _loss(self, batch: Tensor) -> float:
        with torch.no_grad(), evaluating(self._dense.model):
            return float(self._dense.loss(batch))

    @contextmanager
    def _replayed(self, layer: int, outputs: Sequence[Any]) -> Iterator[None]:
        blocks = self._dense.blocks[: self._dense.block_of[layer]]
        with replaced_forwards(blocks, lambda _: lambda *_, **__: outputs[len(blocks) - 1]):
            yield


@contextmanager
def changed(attention: DenseAttention, change: Change) -> Iterator[None]:
    """A layer of the dense model whose attention adds what `change` gives, for the block; the bias of W_O stays."""
    inputs: list[Tensor] = []

    def see_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    def replace(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        added = change(inputs.pop(), args[0]).to(output.dtype)
        return added if module.bias is None else added + module.bias

    handles = [
        attention.entry.register_forward_pre_hook(see_input),
        attention.output.register_forward_hook(replace),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
