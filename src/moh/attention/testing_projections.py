"""What the Triton projections of active heads promise, as named checks that need nothing but torch.

Values and gradients are those of the dense products of active pairs; inactive ones are 0 and spoil nothing. Not for when
they are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moh.attention import triton_kernels
from moh.attention.conformance.checks import Outcome, assert_same
from moh.attention.triton_kernels.projections import expand, sum_heads

_Product = Callable[..., Tensor]

SIZES: dict[str, dict[str, Any]] = {
    "T70-C40-H3-D24": dict(tokens=70, channels=40, heads=3, width=24),
    "T2500-C300-H4-D64": dict(tokens=2500, channels=300, heads=4, width=64),
    "T1000-C4096-H32-D128": dict(tokens=1000, channels=4096, heads=32, width=128),
    "T600-C512-H8-D72": dict(tokens=600, channels=512, heads=8, width=72),
    "T300-C200-H2-D256": dict(tokens=300, channels=200, heads=2, width=256),
    "one-token": dict(tokens=1, channels=4096, heads=32, width=128),
    "few-tokens": dict(tokens=13, channels=300, heads=3, width=33),
    "one-of-everything": dict(tokens=1, channels=1, heads=1, width=1),
    "strided": dict(tokens=90, channels=64, heads=2, width=64, strided=True),
    "all-active": dict(tokens=600, channels=256, heads=4, width=128, active=1.0),
    "nothing-active": dict(tokens=600, channels=256, heads=4, width=128, active=0.0),
    "no-tokens": dict(tokens=0, channels=8, heads=2, width=4),
}


def compare_projections(
    *,
    tokens: int,
    channels: int,
    heads: int,
    width: int,
    active: float = 0.6,
    columns: bool = False,
    strided: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Both projections and their gradients are the definition's, with NaN wherever nothing may be read.

    Args:
        tokens: T.
        channels: C.
        heads: H.
        width: D.
        active: share of active pairs.
        columns: whether the matrix is laid out as an output projection's, `[C, H * D]` transposed.
        strided: whether tokens have other numbers between them in memory.
        dtype: of everything.
        device: of everything.

    Raises:
        AssertionError: they are not.
    """
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).to(device)
        return torch.stack((x, x), 1)[:, 0] if strided else x

    x, inner = normal(tokens, channels), normal(tokens, heads, width)
    matrix = torch.randn(heads * width, channels, generator=random, dtype=torch.float64) / math.sqrt(max(channels, 1))
    matrix = matrix.to(dtype).to(device)
    matrix = matrix.t().contiguous().t() if columns else matrix
    gates = torch.rand(tokens, heads, generator=random) * (torch.rand(tokens, heads, generator=random) < active)
    if tokens and active < 1:
        gates[0] = 0  # a token without a head
    gates = gates.to(dtype).to(device)
    used = gates != 0

    def grown(heads_of: Tensor, matrix: Tensor) -> Tensor:
        return (heads_of @ matrix.t()).view(tokens, heads, width) * used[..., None]

    def summed(inner: Tensor, matrix: Tensor) -> Tensor:
        return (inner * used[..., None]).flatten(1) @ matrix

    unused_token, unused_pair = ~used.any(1, keepdim=True), ~used[..., None]
    spoilt_x, spoilt_inner = x.masked_fill(unused_token, math.nan), inner.masked_fill(unused_pair, math.nan)
    products: tuple[tuple[str, _Product, _Product, Tensor, Tensor, Tensor, Tensor], ...] = (
        ("expand", expand, grown, x, spoilt_x, inner, spoilt_inner),
        ("sum_heads", sum_heads, summed, inner, spoilt_inner, x, spoilt_x),
    )
    for what, ours, definition, clean, spoilt, cotangent, spoilt_cotangent in products:
        leaves = [t.detach().requires_grad_() for t in (spoilt, matrix)]
        out = ours(*leaves, gates)
        exact = [t.detach().double().requires_grad_() for t in (clean, matrix)]
        expected = definition(*exact)
        assert_same(out, expected.to(dtype), what)
        grads = torch.autograd.grad(out, leaves, spoilt_cotangent)
        for name, grad, wanted in zip(
            ("input", "matrix"), grads, torch.autograd.grad(expected, exact, cotangent.double()), strict=True
        ):
            assert_same(grad, wanted.to(dtype), f"{what}, gradient of its {name}")
        idle = out[~used] if what == "expand" else grads[0][~used]
        if not (idle == 0).all():
            raise AssertionError(f"{what}: inactive pairs are not 0")


def check_projections(device: torch.device | str = "cpu") -> Iterator[Outcome]:
    """Every check on a device, one after the other; a failure is an outcome, not an error."""
    kind_of_device = torch.device(device).type
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        reason: str | None = triton_kernels.unavailable(kind_of_device)
        reason = reason or triton_kernels.not_interpreted(kind_of_device, dtype)
        for size, kind in SIZES.items():
            for columns in (False, True):
                name = f"{size}, {str(dtype).removeprefix('torch.')}, {'columns' if columns else 'rows'}"
                if reason is not None:
                    yield Outcome(name, skipped=reason)
                    continue
                try:
                    compare_projections(**kind, columns=columns, dtype=dtype, device=device)
                except Exception as error:  # a kernel may fail in any way, and leave the device unusable: all is told
                    yield Outcome(name, failure=" ".join(f"{type(error).__name__}: {error}".split())[:300])
                else:
                    yield Outcome(name)
