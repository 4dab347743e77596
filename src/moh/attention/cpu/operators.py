"""The C++ operators for PyTorch: their shapes for `torch.compile`, and gradients where C++ registers none.

Attention (`csrc/operators/attention.cpp`) registers its own; those for one token (`decode_*.cpp`), routing (`routing.cpp`) and
whole layers (`layer.cpp`) have none.

Projections of active (token, head) pairs alone (`projection.h`), with M `[H * D, C]`: `cpu_expand(x, M, gates)` is
`heads[t, h] = M[h] x[t]`, `cpu_sum_heads(heads, M, gates)` is `x[t] = sum_h M[h]' heads[t, h]`, both over the pairs whose
gate is not 0. Each is the other's gradient, and `cpu_outer(heads, x, gates)` is M's. Gates only mark the active
pairs; they get no gradient here.

Aggregated attention (`aggregated.h`) is float32 alone; `moh.models.timm.transnext.aggregated` explains its arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_WINDOW = 7
_LENGTH = 8  # aggregated attention's argument that depends on the image's size alone: no gradient


def register() -> None:
    """Register shapes and gradients of the operators, once they are loaded."""
    for name, shapes in (
        ("attention", _attention_shapes),
        ("attention_backward", _attention_backward_shapes),
        ("route", _route_shapes),
        ("layer", _layer_shape),
        ("project", _project_shapes),
        ("attend", _attend_shape),
        ("decode_layer", _decode_layer_shape),
        ("decode_norm", _shape_of_x),
        ("decode_mlp", _shape_of_x),
        ("decode_linear", _decode_linear_shape),
        ("expand", _expand_shape),
        ("sum_heads", _sum_heads_shape),
        ("outer", _outer_shape),
        ("aggregated_attention", _aggregated_shapes),
        ("aggregated_attention_backward", _aggregated_backward_shapes),
    ):
        torch.library.register_fake(f"moh::cpu_{name}", shapes)
    torch.library.register_autograd("moh::cpu_expand", _expand_backward, setup_context=_save)
    torch.library.register_autograd("moh::cpu_sum_heads", _sum_heads_backward, setup_context=_save)
    torch.library.register_autograd("moh::cpu_outer", _outer_backward, setup_context=_save)
    torch.library.register_autograd(
        "moh::cpu_aggregated_attention", _aggregated_backward, setup_context=_save_aggregated
    )
    torch.library.register_autograd("moh::cpu_aggregated_attention_backward", _no_second_derivative)


def _attention_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    keep_softmax: bool = True,
) -> tuple[Tensor, Tensor]:
    B, H, Nq = q.shape[:3]
    return q.new_empty(B, Nq, H, v.shape[-1]), q.new_empty(2, B if keep_softmax else 0, H, Nq, dtype=torch.float32)


def _attention_backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *saved: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), gates.new_empty(gates.shape)


def _route_shapes(
    x: Tensor,
    shared_weight: Tensor | None,
    routed_weight: Tensor | None,
    stage_weight: Tensor | None,
    bias: Tensor | None,
    shared: list[int],
    heads: int,
    hard: bool,
    active: int,
    parts: int,
    together: int,
    threshold: float | None,
) -> tuple[Tensor, Tensor]:
    B, N = x.shape[:2]
    has_probs = routed_weight is not None and (not hard or active > 0)
    probs = x.new_empty(B if has_probs else 0, N, heads - len(shared), dtype=torch.float32)
    return x.new_empty(B, N, heads), probs


def _layer_shape(x: Tensor, *others: Any) -> Tensor:
    o_weight: Tensor = others[3]
    return x.new_empty(*x.shape[:2], o_weight.shape[0])


def _project_shapes(x: Tensor, gates: Tensor, weights: list[Tensor], *others: object) -> tuple[Tensor, Tensor, Tensor]:
    B, N, H = gates.shape
    D = weights[0].shape[0] // H
    q, k, v = (x.new_empty(B, N, weight.shape[0] // D, D).transpose(1, 2) for weight in weights)
    return q, k, v


def _attend_shape(q: Tensor, *others: Any) -> Tensor:
    o_weight: Tensor = others[4]
    return q.new_empty(q.shape[0], q.shape[2], o_weight.shape[0])


def _decode_layer_shape(x: Tensor, *others: Any) -> Tensor:
    o_weight: Tensor = others[11]
    return x.new_empty(*x.shape[:2], o_weight.shape[0])


def _shape_of_x(x: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape)


def _decode_linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


def _expand_shape(x: Tensor, matrix: Tensor, gates: Tensor) -> Tensor:
    heads = gates.shape[1]
    return x.new_empty(x.shape[0], heads, matrix.shape[0] // heads)


def _sum_heads_shape(heads: Tensor, matrix: Tensor, gates: Tensor) -> Tensor:
    return heads.new_empty(heads.shape[0], matrix.shape[1])


def _outer_shape(heads: Tensor, x: Tensor, gates: Tensor) -> Tensor:
    return x.new_empty(heads.shape[1] * heads.shape[2], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _expand_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, matrix, gates = ctx.saved_tensors
    needs_x, needs_matrix, _ = ctx.needs_input_grad
    grad_x = torch.ops.moh.cpu_sum_heads(grad, matrix, gates) if needs_x else None
    grad_matrix = torch.ops.moh.cpu_outer(grad, x, gates) if needs_matrix else None
    return grad_x, grad_matrix, None


def _sum_heads_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    heads, matrix, gates = ctx.saved_tensors
    needs_heads, needs_matrix, _ = ctx.needs_input_grad
    grad_heads = torch.ops.moh.cpu_expand(grad, matrix, gates) if needs_heads else None
    grad_matrix = torch.ops.moh.cpu_outer(heads, grad, gates) if needs_matrix else None
    return grad_heads, grad_matrix, None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    heads, x, gates = ctx.saved_tensors
    needs_heads, needs_x, _ = ctx.needs_input_grad
    grad_heads = torch.ops.moh.cpu_expand(x, grad, gates) if needs_heads else None
    grad_x = torch.ops.moh.cpu_sum_heads(heads, grad, gates) if needs_x else None
    return grad_heads, grad_x, None


def _aggregated_shapes(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape)


def _aggregated_backward_shapes(grad: Tensor, *inputs: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for i, x in enumerate(inputs[:13]) if i != _LENGTH]


def _save_aggregated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.height, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _aggregated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.moh.cpu_aggregated_attention_backward(grad, *ctx.saved_tensors, ctx.height, ctx.width)
    return (*grads[:_LENGTH], None, *grads[_LENGTH:], None, None)


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("the backend 'cpu' has no second derivative; use backend='reference' where you need one")
