"""Shapes and gradients of the operators that project active (token, head) pairs alone (`csrc/projection.h`).

With M `[H * D, C]`: `cpu_expand(x, M, gates)` is `heads[t, h] = M[h] x[t]`, `cpu_sum_heads(heads, M, gates)` is
`x[t] = sum_h M[h]' heads[t, h]`, both over the pairs whose gate is not 0. Each is the other's gradient, and
`cpu_outer(heads, x, gates)` is M's. Gates only say which pairs are active; they get no gradient here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def register() -> None:
    """Tell PyTorch about the operators, once they are loaded."""
    torch.library.register_fake("moh::cpu_expand", _expand_shape)
    torch.library.register_fake("moh::cpu_sum_heads", _sum_heads_shape)
    torch.library.register_fake("moh::cpu_outer", _outer_shape)
    torch.library.register_autograd("moh::cpu_expand", _expand_backward, setup_context=_save)
    torch.library.register_autograd("moh::cpu_sum_heads", _sum_heads_backward, setup_context=_save)
    torch.library.register_autograd("moh::cpu_outer", _outer_backward, setup_context=_save)


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
