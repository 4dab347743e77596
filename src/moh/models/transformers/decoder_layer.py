"""What a decoder computes for one new token besides attention, by one operator each: a layer's MLP, and the output layer.

`moh::cpu_decode_mlp` adds the attention's output to x, and the MLP, with the norms around them; `moh::cpu_decode_linear` gives
the logits. PyTorch's own products read the weights at a third of the speed that memory allows. As in `decoding`, whatever
needs more than the result (gradients, hooks, adapters, quantised weights that `matrix_of` does not know, other activations)
takes the family's own way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

from moh.attention.projections import matrix_of
from moh.models.transformers.attention import IMPLEMENTATIONS
from moh.models.transformers.decoding import is_decoded
from moh.models.transformers.family import Family, at
from moh.models.transformers.remembered import remembered
from moh.routing.router import is_untouched

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.SiLU: "silu",
    SiLUActivation: "silu",
    GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh",
    GELUActivation: "gelu",
}


class DecodedLayer(nn.Module):
    """Mixed into a family's own layer, which is as `Family.layer` says.

    Attributes:
        family: where the parts of the layer are.
        own_module: name of the Python module with the family's own classes.
    """

    family: ClassVar[Family]
    own_module: ClassVar[str]
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = None if args else self._parts(hidden_states)
        if parts is None:
            own: Tensor = super().forward(hidden_states, *args, **kwargs)
            return own
        first, second = (norm and norm.run(hidden_states) for norm in (parts.first_norm, parts.norm_beside))
        attention = at(self, self.family.attention_of_layer)
        attended, _ = attention(hidden_states if first is None else first, **kwargs)
        beside = first if parts.is_norm_shared else second
        out: Tensor = torch.ops.moh.cpu_decode_mlp.default(
            hidden_states, attended, parts.scale, *parts.second_norm, *parts.weights, parts.activation, *parts.scales, beside,
            parts.added_norm, parts.result_norm,
        )  # fmt: skip
        return out

    def _parts(self, x: Tensor) -> _Parts | None:
        """The layer's parts, if the operators can be used for x `[B, N, C]`."""
        if self.training:
            return None
        attention: Any = at(self, self.family.attention_of_layer)
        implementation = attention.config._attn_implementation
        if implementation not in IMPLEMENTATIONS or not is_decoded(x, IMPLEMENTATIONS[implementation]):
            return None
        return remembered(self, x, _parts, lambda layer: _besides(layer, attention))


class _Norm(NamedTuple):
    """A norm as the operators take it; `centred` says whether the mean is subtracted."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    offset: float
    centred: bool

    def run(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.moh.cpu_decode_norm.default(x, *self)
        return out


class _Parts(NamedTuple):
    """What the operators need of a layer.

    Attributes:
        first_norm: of the attention's input, None for none.
        second_norm: of the MLP's input; without a weight where the MLP reads the layer's input or something not normalised.
        norm_beside: of the layer's input for an MLP that reads this; None if none does.
        is_norm_shared: whether such an MLP reads what the attention reads.
        added_norm, result_norm: weights of the norms of what attention and MLP return, None for none.
        weights: weight and bias of gate, up and down.
        scales: those of their integer weights.
        activation: its name for the operator.
        scale: of what is added to x.
    """

    first_norm: _Norm | None
    second_norm: _Norm
    norm_beside: _Norm | None
    is_norm_shared: bool
    added_norm: Tensor | None
    result_norm: Tensor | None
    weights: tuple[Tensor | None, ...]
    scales: tuple[Tensor | None, ...]
    activation: str
    scale: float


def _besides(layer: DecodedLayer, attention: nn.Module) -> list[nn.Module]:
    """The layer and what is in it besides the attention, which looks at its own modules."""
    own = set(attention.modules())
    return [module for module in layer.modules() if module not in own]


def _parts(layer: DecodedLayer, x: Tensor) -> _Parts | None:
    family, mlp = layer.family, layer.mlp
    if type(mlp).__module__ != layer.own_module or not is_untouched(mlp):
        return None
    gate: Any = getattr(mlp, family.mlp_gate) if family.mlp_gate else None
    up: Any = getattr(mlp, family.mlp_up)
    down: Any = getattr(mlp, family.mlp_down)
    activation = getattr(mlp, family.mlp_activation)
    name = _ACTIVATIONS.get(type(activation))
    if name is None or not is_untouched(activation):
        return None
    matrices = [None if linear is None else matrix_of(linear, x) for linear in (gate, up, down)]
    if matrices[1] is None or matrices[2] is None or (gate is not None and matrices[0] is None):
        return None
    if gate is up:
        matrices[:2] = matrices[1].halves()
    names = (family.first_norm, family.second_norm, family.added_norm, family.result_norm)
    norms = [_norm(layer, getattr(layer, name), x) if name else None for name in names]
    if any(name and norm is None for name, norm in zip(names, norms, strict=True)):
        return None
    first, second, added, result = norms
    kinds = {norm[2:] for norm in (second, added, result) if norm is not None}  # one operator computes all three
    if len(kinds) != 1 or any(norm.bias is not None for norm in (added, result) if norm is not None):
        return None
    parallel = family.parallel
    beside = at(layer, parallel) if isinstance(parallel, str) and parallel else bool(parallel)
    shared = beside and family.first_norm == family.second_norm
    weights = tuple(tensor for matrix in matrices for tensor in (matrix[:2] if matrix else (None, None)))
    scales = tuple(matrix.scale if matrix else None for matrix in matrices)
    scale = at(layer, family.residual_scale) if family.residual_scale else 1.0
    return _Parts(
        first,
        _Norm(None, None, *kinds.pop()) if beside or second is None else second,
        second if beside and not shared else None,
        shared,
        added and added.weight,
        result and result.weight,
        weights,
        scales,
        name,
        scale,
    )


def _norm(layer: DecodedLayer, norm: nn.Module, x: Tensor) -> _Norm | None:
    """The norm, if it is of a kind that the operators know."""
    weight: Any = norm.weight
    if not is_untouched(norm) or type(weight) not in (nn.Parameter, Tensor):
        return None
    if weight.dtype != x.dtype or weight.device != x.device:
        return None
    if type(norm) is nn.LayerNorm:
        return _Norm(weight, norm.bias, norm.eps, layer.family.norm_offset, True)
    kind = type(norm)
    if kind.__module__ != layer.own_module or not kind.__name__.endswith(("RMSNorm", "LayerNorm")):
        return None
    eps: Any = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return _Norm(weight, None, eps, layer.family.norm_offset, kind.__name__.endswith("LayerNorm"))


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
        if is_decoded(x, IMPLEMENTATIONS.get(self._model.config._attn_implementation, "")):
            matrix = matrix_of(head, x)
            if matrix is not None:
                decoded: Tensor = torch.ops.moh.cpu_decode_linear(x, *matrix)
                return decoded
        out: Tensor = head(x)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
