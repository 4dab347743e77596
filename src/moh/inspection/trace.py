"""What every head did with every token of one input: its gate and its contribution, layer by layer.

Reads any model whose attention ends in one output projection, MoH or dense; a dense layer's gates are 1. The model is
left unchanged. `moh.inspection.groups` is for whole data sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moh._modes import evaluating
from moh.config import MoHConfig
from moh.conversion.passes import head_contributions
from moh.models.transformers.families import FAMILIES
from moh.models.transformers.family import at
from moh.routing import Router, record_routing

_FAMILIES = {family.attention: family for family in FAMILIES}
"""Name of a family's attention class, the base of ours -> where its parts are."""
_USUAL_OUTPUTS = ("o_proj", "proj", "out_proj", "to_out.0")
"""Names of the output projection in any other attention module: transformers, timm and ours, diffusers."""


@dataclass(frozen=True)
class LayerTrace:
    """One attention layer and one batch.

    Attributes:
        name: of the attention module in the model.
        config: heads and routing; None for a dense layer.
        gates: `[B, N, H]` float32, weight of each head; 0 if unused, 1 in a dense layer.
        contributions: `[B, N, H]` float32, `||g_i H_i W_O^i||_2`, norm of the head's addition to the residual stream.
    """

    name: str
    config: MoHConfig | None
    gates: Tensor
    contributions: Tensor


class AttentionLayer:
    """An attention module whose output projection is observed.

    Attributes:
        name: of the module in the model.
        projection: W_O; its input is the heads, weighted and concatenated, `[B, N, H * D]`.
        weight: of the projection, `[C, H * D]`.
        num_heads: H.
        config: heads and routing; None for a dense layer.
    """

    def __init__(self, name: str, projection: nn.Module, num_heads: int, config: MoHConfig | None) -> None:
        self.name = name
        self.projection = projection
        self.num_heads = num_heads
        self.config = config
        self.contributions: list[Tensor] = []

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.projection.weight  # type: ignore[assignment]
        return (
            weight if isinstance(self.projection, nn.Linear) else weight.T
        )  # transformers' Conv1D stores the transpose

    def before_projection(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heads = inputs[0]  # [B, N, H * D], weighted by the gates
        found = head_contributions(heads.flatten(0, -2), self.weight, self.num_heads)
        self.contributions.append(found.view(*heads.shape[:-1], self.num_heads))

    def trace(self, gates: list[Tensor]) -> LayerTrace:
        contributions = torch.cat(self.contributions)  # [B, N, H]
        weights = torch.cat(gates).float().reshape(contributions.shape) if gates else torch.ones_like(contributions)
        return LayerTrace(self.name, self.config, weights, contributions)


@torch.no_grad()
def trace(model: nn.Module, forward: Callable[[], Any]) -> list[LayerTrace]:
    """Run `forward()`, which calls `model`, and report what each attention layer's heads did.

    Args:
        model: MoH or dense, of any family.
        forward: called once, without gradient; for example `lambda: model(input_ids)`.

    Returns:
        one entry per attention layer that ran, in the order of the model.

    Raises:
        ValueError: the model has no known attention layer.
    """
    layers = attention_layers(model)
    with evaluating(model), record_routing(model) as routing, ExitStack() as stack:
        for layer in layers:
            hook = layer.projection.register_forward_pre_hook(layer.before_projection)
            stack.callback(hook.remove)
        forward()
    gates: dict[str, list[Tensor]] = {}
    for name, info in routing:
        gates.setdefault(name, []).append(info.gates)
    return [layer.trace(gates.get(f"{layer.name}.router".lstrip("."), [])) for layer in layers if layer.contributions]


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The attention layers of a model of any family, MoH or dense, in its order.

    Raises:
        ValueError: the model has no known attention layer.
    """
    layers = list(_find(model))
    if not layers:
        raise ValueError("model has no attention layers with an output projection named " + ", ".join(_USUAL_OUTPUTS))
    return layers


def _find(model: nn.Module) -> Iterator[AttentionLayer]:
    for name, module in model.named_modules():
        core, projection = _parts(module)
        if projection is None:
            continue
        router = getattr(module, "router", None)
        if isinstance(router, Router):
            yield AttentionLayer(name, projection, router.config.num_heads, router.config)
        elif (num_heads := _dense_heads(core, projection)) is not None:
            yield AttentionLayer(name, projection, num_heads, None)


def _parts(module: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The holder of a module's number of heads, and its output projection; None if it is not an attention module."""
    for kind in type(module).__mro__:
        if (family := _FAMILIES.get(kind.__name__)) is not None:
            return at(module, family.core), at(module, family.output)
    for name in _USUAL_OUTPUTS:
        try:
            found = module.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(found, nn.Linear):
            return module, found
    return module, None


def _dense_heads(module: nn.Module, projection: nn.Module) -> int | None:
    """Number of heads of a dense attention module; None if it is not an attention module."""
    for name in ("num_heads", "heads", "num_attention_heads"):
        if isinstance(heads := getattr(module, name, None), int):
            return heads
    head_dim = getattr(module, "head_dim", getattr(module, "head_size", None))
    return int(projection.in_features) // head_dim if isinstance(head_dim, int) else None  # type: ignore[arg-type]
