"""What every head did with every token of one input: its gate and its contribution, layer by layer.

Reads any model whose attention ends in one output projection, MoH or dense; a dense layer's gates are 1. Nothing is
kept in the model. Not for whole data sets: see `moh.inspection.load`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moh.config import MoHConfig
from moh.routing import Router, RoutingInfo

_PROJECTIONS = ("o_proj", "proj", "out_proj", "to_out.0")
"""Where the output projection of an attention module is found: transformers, timm and ours, diffusers."""


@dataclass(frozen=True)
class LayerTrace:
    """One attention layer and one batch.

    Attributes:
        name: of the attention module in the model.
        config: heads and routing; None for a dense layer.
        gates: `[B, N, H]` float32, weight of each head; 0 where it was not used, 1 in a dense layer.
        contributions: `[B, N, H]` float32, `||g_i H_i W_O^i||_2`, what the head added to the residual stream.
    """

    name: str
    config: MoHConfig | None
    gates: Tensor
    contributions: Tensor


class _Layer:
    """An attention module that is listened to."""

    def __init__(self, name: str, projection: nn.Linear, router: Router | None, num_heads: int) -> None:
        self.name = name
        self.projection = projection
        self.router = router
        self.num_heads = num_heads
        self.gates: list[Tensor] = []
        self.contributions: list[Tensor] = []

    def record(self, router: Router, info: RoutingInfo) -> None:
        self.gates.append(info.gates.detach().float())

    def before_projection(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heads = inputs[0].detach()  # [..., H * D], weighted by the gates
        self.contributions.append(contributions(heads, self.projection.weight, self.num_heads))

    def trace(self) -> LayerTrace:
        contribution = torch.cat(self.contributions)
        gates = torch.cat(self.gates).reshape(contribution.shape) if self.gates else torch.ones_like(contribution)
        return LayerTrace(self.name, self.router.config if self.router is not None else None, gates, contribution)


def contributions(heads: Tensor, output_weight: Tensor, num_heads: int) -> Tensor:
    """`||H_i W_O^i||_2` of weighted heads `[B, N, H * D]` and an output projection `[C, H * D]` -> `[B, N, H]` float32."""
    split = heads.float().unflatten(-1, (num_heads, -1))  # [B, N, H, D]
    parts = output_weight.detach().float().unflatten(-1, (num_heads, -1))  # [C, H, D]
    gram = torch.einsum("chd,che->hde", parts, parts)  # [H, D, D]: ||h W||^2 = h (W W') h'
    return torch.einsum("bnhd,hde,bnhe->bnh", split, gram, split).clamp_min(0).sqrt()


@torch.no_grad()
def trace(model: nn.Module, forward: Callable[[], Any]) -> list[LayerTrace]:
    """Run `forward()`, which calls `model`, and tell what each attention layer's heads did.

    Args:
        model: MoH or dense, of any family.
        forward: called once, without gradient; for example `lambda: model(input_ids)`.

    Returns:
        one entry per attention layer that ran, in the order of the model.

    Raises:
        ValueError: the model has no attention layer that is known.
    """
    layers = list(_attention_layers(model))
    if not layers:
        raise ValueError("model has no attention layers with an output projection named " + ", ".join(_PROJECTIONS))
    training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(_listening(layer))
            forward()
    finally:
        model.train(training)
    return [layer.trace() for layer in layers if layer.contributions]


@contextmanager
def _listening(layer: _Layer) -> Iterator[None]:
    """Listen to the router's decisions and to what goes into the output projection."""
    hook = layer.projection.register_forward_pre_hook(layer.before_projection)
    if layer.router is not None:
        layer.router._recorders = (*layer.router._recorders, layer)
    try:
        yield
    finally:
        hook.remove()
        if layer.router is not None:
            layer.router._recorders = tuple(r for r in layer.router._recorders if r is not layer)


def _attention_layers(model: nn.Module) -> Iterator[_Layer]:
    for name, module in model.named_modules():
        projection = _projection(module)
        if projection is None:
            continue
        router = getattr(module, "router", None)
        if isinstance(router, Router):
            yield _Layer(name, projection, router, router.config.num_heads)
        elif (num_heads := _dense_heads(module, projection)) is not None:
            yield _Layer(name, projection, None, num_heads)


def _projection(module: nn.Module) -> nn.Linear | None:
    for name in _PROJECTIONS:
        try:
            found = module.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(found, nn.Linear):
            return found
    return None


def _dense_heads(module: nn.Module, projection: nn.Linear) -> int | None:
    """How many heads a dense attention module has; None if it is no attention module."""
    for owner, attribute in ((module, "num_heads"), (module, "heads"), (module, "num_attention_heads")):
        if isinstance(heads := getattr(owner, attribute, None), int):
            return heads
    head_dim = getattr(module, "head_dim", None)
    return projection.in_features // head_dim if isinstance(head_dim, int) else None
