"""How alike heads are: their attention patterns and their outputs, pair by pair (the paper's table of similarities).

Two heads that attend alike and say alike are one head paid for twice. Needs a model of transformers, whose own attention
(`eager`) gives the patterns; any family, MoH or dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moh._modes import evaluating
from moh.inspection.groups import LayerHeads
from moh.inspection.inputs import GroupedInputs
from moh.inspection.tables import Row, save_rows
from moh.inspection.trace import AttentionLayer, attention_layers
from moh.routing import record_routing


@dataclass(frozen=True)
class HeadSimilarity:
    """Similarity of every two heads of a layer, a mean over the tokens that use both; NaN where none does.

    Attributes:
        layers: heads and routing of each of the L layers.
        patterns: per layer `[H, H]` float64, `1 - sum_k |A_ik - A_jk| / 2` of the attention A of a query over its keys k: 1
            if two heads attend alike, 0 if to different tokens.
        outputs: per layer `[H, H]` float64, the cosine of the heads' outputs before W_O.
        tokens: per layer `[H, H]` float64, the tokens that use both.
    """

    layers: list[LayerHeads]
    patterns: list[Tensor]
    outputs: list[Tensor]
    tokens: list[Tensor]

    def rows(self) -> list[Row]:
        """One row per layer and two heads that some token uses together: layer, head, other, patterns, outputs, tokens."""
        return [
            {
                "layer": place,
                "head": head,
                "other": other,
                "patterns": float(self.patterns[place][head, other]),
                "outputs": float(self.outputs[place][head, other]),
                "tokens": int(self.tokens[place][head, other]),
            }
            for place, layer in enumerate(self.layers)
            for head in range(layer.num_heads)
            for other in range(head + 1, layer.num_heads)
            if self.tokens[place][head, other] > 0
        ]

    def means(self) -> list[Row]:
        """One row per layer, then "all": layer, patterns, outputs; means over tokens and the pairs of heads that they use.

        A layer of which no token uses two heads has none. "all" is the mean of the layers.
        """
        rows: list[Row] = []
        for place, tokens in enumerate(self.tokens):
            weight = tokens.triu(1)
            if weight.sum() > 0:
                patterns, outputs = (
                    float((x[place].nan_to_num() * weight).sum() / weight.sum()) for x in (self.patterns, self.outputs)
                )
                rows.append({"layer": place, "patterns": patterns, "outputs": outputs})
        if rows:
            means = {name: sum(float(row[name]) for row in rows) / len(rows) for name in ("patterns", "outputs")}
            rows.append({"layer": "all", **means})
        return rows

    def save_csv(self, path: str | Path) -> None:
        """Write `rows()` as CSV, whole or not at all."""
        save_rows(path, self.rows())


@torch.no_grad()
def head_similarity(model: nn.Module, inputs: GroupedInputs) -> HeadSimilarity:
    """Compare every two heads of every layer, on the tokens that use both.

    Gates do not enter: they are positive factors of a head's output. In a causal model early tokens have few keys, and their
    patterns are alike for that reason alone; compare models on the same inputs.

    Args:
        model: of transformers, MoH or dense; run in evaluation mode and with `eager` attention, both are restored.
        inputs: made for this model, as in `inspect_groups`. Attention patterns of a batch are in memory: B x H x N x N.

    Raises:
        ValueError: the model is not of transformers, has no known attention, its attention gives no patterns, or no input
            could be read.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be of transformers, whose attention gives its patterns, got {type(model).__name__}: for a ViT of "
            "timm, compare the same architecture in transformers"
        )
    found = attention_layers(model)
    sums = [_Sums(layer) for layer in found]
    read = 0
    with _eager(model), ExitStack() as stack:
        for layer, own in zip(found, sums, strict=True):
            module = model.get_submodule(layer.name)
            for handle in (
                layer.projection.register_forward_pre_hook(own.take_heads),
                module.register_forward_hook(own.take_patterns),
            ):
                stack.callback(handle.remove)
        for batch in inputs.batches():
            with record_routing(model) as routing:
                batch.run()
            active = {name: info.active for name, info in routing}
            for layer, own in zip(found, sums, strict=True):
                own.add(active.get(f"{layer.name}.router".lstrip(".")), batch.counted)
            read += 1
    if not read:
        raise ValueError("no input could be read: there is nothing to compare")
    layers = [LayerHeads(layer.name, layer.num_heads, layer.config) for layer in found]
    patterns, outputs = ([getattr(own, name) / own.tokens for own in sums] for name in ("patterns", "outputs"))
    return HeadSimilarity(layers, patterns, outputs, [own.tokens for own in sums])


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """The family's own attention, which returns its patterns, in evaluation mode inside the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with evaluating(model):
            yield
    finally:
        model.set_attn_implementation(before)


class _Sums:
    """Sums of one layer over the tokens that use both of two heads."""

    def __init__(self, layer: AttentionLayer) -> None:
        self.layer = layer
        self.patterns, self.outputs, self.tokens = (
            torch.zeros(layer.num_heads, layer.num_heads, dtype=torch.float64) for _ in range(3)
        )
        self._heads: Tensor | None = None
        self._patterns: Tensor | None = None

    def take_heads(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._heads = given[0].unflatten(-1, (self.layer.num_heads, -1))  # [B, N, H, D]

    def take_patterns(self, module: nn.Module, given: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None or weights.shape[1] != self.layer.num_heads:
            raise ValueError(
                f"the attention of {self.layer.name or 'the model'} gives no pattern for each of its heads"
            )
        self._patterns = weights  # [B, H, N, N]

    def add(self, active: Tensor | None, counted: Tensor | None) -> None:
        """Add the batch that has just run.

        Args:
            active: `[B, N, H]` bool; None where every token uses every head.
            counted: `[B, N]` bool, the tokens that count; None counts all.
        """
        if self._heads is None or self._patterns is None:  # a layer that did not run
            return
        used = torch.ones(self._heads.shape[:-1], device=self._heads.device) if active is None else active.float()
        if counted is not None:
            used = used * counted.to(used.device)[..., None]
        outputs = F.normalize(
            torch.where(used[..., None] > 0, self._heads.float(), 0.0), dim=-1
        )  # padding may hold NaN
        self.outputs += torch.einsum("bnid,bnjd->ij", outputs, outputs).double().cpu()
        self.tokens += torch.einsum("bni,bnj->ij", used, used).double().cpu()
        weight = used.transpose(1, 2)  # [B, H, N]
        for head in range(self.layer.num_heads):  # one row of pairs at a time: all of them would be H times the memory
            distance = (self._patterns[:, head, None] - self._patterns).abs().float().sum(-1) / 2  # [B, H, N]
            both = weight * weight[:, head, None]
            self.patterns[head] += torch.where(both > 0, 1 - distance, 0.0).sum((0, 2)).double().cpu()
        self._heads = self._patterns = None
