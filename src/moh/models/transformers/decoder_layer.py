"""What a decoder computes for one new token besides attention, by one operator each: a layer's MLP, and the output layer.

`moh::cpu_decode_mlp` adds the attention's output to x, normalises the sum, and adds its MLP; `moh::cpu_decode_linear` gives
the logits. PyTorch's own products read the weights at a third of the speed that memory allows. As in `decoding`, whatever
needs more than the result (gradients, hooks, adapters, quantised weights, other activations) takes the family's own way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation, SiLUActivation

from moh.attention.projections import is_plain
from moh.models.transformers.attention import IMPLEMENTATIONS
from moh.models.transformers.decoding import is_decoded
from moh.models.transformers.families import Family, at
from moh.routing.routers import is_untouched

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.SiLU: "silu",
    SiLUActivation: "silu",
    GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh",
}


class DecodedLayer(nn.Module):
    """Mixed into a family's own layer, `y = x + attention(norm(x))` and then `y + mlp(norm(y))`.

    Attributes:
        family: where the parts of the MLP are.
        own_module: name of the Python module with the family's own classes.
    """

    family: ClassVar[Family]
    own_module: ClassVar[str]
    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = None if args else _parts(self, hidden_states)
        if parts is None:
            own: Tensor = super().forward(hidden_states, *args, **kwargs)
            return own
        normalised = torch.ops.moh.cpu_decode_norm(hidden_states, *parts.first_norm)
        attended, _ = self.self_attn(hidden_states=normalised, **kwargs)
        out: Tensor = torch.ops.moh.cpu_decode_mlp(
            hidden_states, attended, parts.scale, *parts.second_norm, *parts.projections, parts.activation
        )
        return out


class _Parts(NamedTuple):
    """What the operators need of a layer.

    Attributes:
        first_norm, second_norm: weight, bias, epsilon, what is added to the weight, whether the mean is subtracted.
        projections: weight and bias of gate, up and down.
        activation: its name for the operator.
        scale: of what is added to x.
    """

    first_norm: tuple[Any, ...]
    second_norm: tuple[Any, ...]
    projections: tuple[Tensor | None, ...]
    activation: str
    scale: float


def _parts(layer: DecodedLayer, x: Tensor) -> _Parts | None:
    """The layer's parts, if the operators can be used for x `[B, N, C]`."""
    family, mlp = layer.family, layer.mlp
    implementation = at(layer, family.attention_of_layer).config._attn_implementation
    if layer.training or implementation not in IMPLEMENTATIONS or not is_decoded(x, IMPLEMENTATIONS[implementation]):
        return None
    if type(mlp).__module__ != layer.own_module or not is_untouched(mlp):
        return None
    gate: Any = getattr(mlp, family.mlp_gate) if family.mlp_gate else None
    up: Any = getattr(mlp, family.mlp_up)
    down: Any = getattr(mlp, family.mlp_down)
    activation = getattr(mlp, family.mlp_activation)
    name = _ACTIVATIONS.get(type(activation))
    if name is None or not is_untouched(activation):
        return None
    if not all(is_plain(linear, x) for linear in (gate, up, down) if linear is not None):
        return None
    norms = [_norm(layer, norm, x) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    if norms[0] is None or norms[1] is None:
        return None
    projections: tuple[Tensor | None, ...]
    if gate is up:
        weights, biases = up.weight.chunk(2), (None, None) if up.bias is None else up.bias.chunk(2)
        projections = (weights[0], biases[0], weights[1], biases[1])
    else:
        of_gate = (None, None) if gate is None else (gate.weight, gate.bias)
        projections = (*of_gate, up.weight, up.bias)
    scale = at(layer, family.residual_scale) if family.residual_scale else 1.0
    return _Parts(norms[0], norms[1], (*projections, down.weight, down.bias), name, scale)


def _norm(layer: DecodedLayer, norm: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
    """Weight, bias, epsilon, what is added to the weight and whether the mean is subtracted; None for other norms."""
    weight: Any = norm.weight
    if not is_untouched(norm) or type(weight) not in (nn.Parameter, Tensor):
        return None
    if weight.dtype != x.dtype or weight.device != x.device:
        return None
    if type(norm) is nn.LayerNorm:
        return weight, norm.bias, norm.eps, layer.family.norm_offset, True
    if type(norm).__module__ != layer.own_module or not type(norm).__name__.endswith("RMSNorm"):
        return None
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return weight, None, eps, layer.family.norm_offset, False


def with_output_layer(dense_forward: Callable[..., Any]) -> Callable[..., Any]:
    """The `forward` of a causal model, whose output layer runs as one operator for one new token per sequence."""

    @functools.wraps(dense_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or type(getattr(self, "lm_head", None)) is not nn.Linear
        ):
            return dense_forward(self, *args, **kwargs)
        return dense_forward(_WithOutputLayer(self), *args, **kwargs)

    return forward


class _WithOutputLayer:
    """Stands in for a model in one call of its class's `forward`, as `attention._WithGates` does for an attention."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def lm_head(self, x: Tensor) -> Tensor:
        """The logits `[B, N, V]` of x `[B, N, C]`."""
        head = self._model.lm_head
        if is_plain(head, x) and is_decoded(x, IMPLEMENTATIONS.get(self._model.config._attn_implementation, "")):
            decoded: Tensor = torch.ops.moh.cpu_decode_linear(x, head.weight, head.bias)
            return decoded
        out: Tensor = head(x)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
