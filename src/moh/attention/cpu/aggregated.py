"""Shapes and gradients of the operator for aggregated attention (`csrc/aggregated.h`), in float32.

`moh.models.transnext.aggregated` calls it; `moh.models.transnext.scoring` says what its arguments mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_WINDOW = 7
_LENGTH = 8  # the argument that is given by the image's size alone: it gets no gradient


def register() -> None:
    """Tell PyTorch about the operators, once they are loaded."""
    torch.library.register_fake("moh::cpu_aggregated_attention", _shapes)
    torch.library.register_fake("moh::cpu_aggregated_attention_backward", _backward_shapes)
    torch.library.register_autograd("moh::cpu_aggregated_attention", _backward, setup_context=_save)
    torch.library.register_autograd("moh::cpu_aggregated_attention_backward", _second_derivative)


def _shapes(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape)


def _backward_shapes(grad: Tensor, *inputs: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for i, x in enumerate(inputs[:13]) if i != _LENGTH]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.height, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.moh.cpu_aggregated_attention_backward(grad, *ctx.saved_tensors, ctx.height, ctx.width)
    return (*grads[:_LENGTH], None, *grads[_LENGTH:], None, None)


def _second_derivative(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("the backend 'cpu' has no second derivative; use backend='reference' where you need one")
