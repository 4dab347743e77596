"""What every backend promises, as named checks that need nothing but torch.

Values and gradients of many kinds of calls are those of the definition; what is inactive costs nothing and spoils nothing.
The tests hold the same promises one by one, and more of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moh.attention.conformance.inputs import ACTIVITIES, MASKS, Inputs, make_inputs
from moh.attention.dispatch import Backend, moh_attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Of the largest expected number, or of 1 if that is more: inputs are of size 1, and a sum may cancel."""

SHAPES: dict[str, dict[str, Any]] = {
    "B2-H4-kv2-N5-D8": {},
    "H4-kv4": dict(Hkv=4, G=1),
    "H4-kv1": dict(Hkv=1, G=4),
    "H9-kv3-D5": dict(Hkv=3, G=3, D=5),
    "one-of-everything": dict(B=1, Hkv=1, G=1, Nq=1, D=1),
    "more-queries-than-keys": dict(Nq=7, Nk=3),
    "more-keys-than-queries": dict(Nq=3, Nk=7),
    "one-query": dict(Nq=1, Nk=6),
    "one-key": dict(Nq=6, Nk=1),
    "long": dict(B=1, Nq=300, G=3, D=4, Hkv=1),
    "own-scale": dict(scale=0.5),
    "scale-0": dict(scale=0.0),
}
LARGE: dict[str, dict[str, Any]] = {
    "N700-D64": dict(B=1, Hkv=2, G=2, Nq=700, D=64),
    "N333-D128": dict(B=1, Hkv=2, G=1, Nq=333, D=128),
    "N130-Nk257-D72-Dv40": dict(Hkv=1, G=3, Nq=130, Nk=257, D=72, Dv=40),
    "N70-D256": dict(B=1, Hkv=1, Nq=70, D=256),
    "decode-G8-Nk3000": dict(B=3, Hkv=2, G=8, Nq=1, Nk=3000, D=128),
}
"""Sizes of real models; only for checks on the user's machine."""


def assert_same(got: Tensor, expected: Tensor, what: str) -> None:
    """Finite, and equal to within the dtype's rounding in relation to the largest expected number.

    Raises:
        AssertionError: it is not.
    """
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: {tuple(got.shape)} instead of {tuple(expected.shape)}")
    if got.dtype != expected.dtype:
        raise AssertionError(f"{what}: {got.dtype} instead of {expected.dtype}")
    if not got.isfinite().all():
        raise AssertionError(f"{what}: not finite")
    if expected.numel():
        error = (got.double() - expected.double()).abs().max().item()
        largest = expected.abs().max().item()
        if error > TOLERANCE[expected.dtype] * max(largest, 1.0):
            raise AssertionError(f"{what}: off by {error:.3g} where the largest is {largest:.3g}")


def gradients(out: Tensor, inputs: Inputs, weight: Tensor) -> dict[str, Tensor]:
    """Gradients of `(out * weight).sum()`."""
    tensors = inputs.tensors
    grads = torch.autograd.grad(out, list(tensors.values()), weight.to(out))
    return dict(zip(tensors, grads, strict=True))


def compare(attend: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    """Values and gradients of `attend` are those of the definition.

    Raises:
        AssertionError: they are not.
    """
    got = attend(inputs)
    expected = moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, backend="reference", **inputs.options)
    assert_same(got, expected, "output")
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected_grads = gradients(expected, inputs, weight)
    for name, grad in gradients(got, inputs, weight).items():
        assert_same(grad, expected_grads[name], f"gradient of {name}")


@dataclass(frozen=True)
class Outcome:
    """One check of one backend.

    Attributes:
        name: of the check.
        failure: what went wrong, None if nothing did.
        skipped: why the backend can't serve the call, None if it can.
    """

    name: str
    failure: str | None = None
    skipped: str | None = None


def kinds(*, min_width: int = 1, large: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, arguments of `make_inputs`) of every comparison; narrower heads than `min_width` get that width."""
    for is_causal in (False, True):
        how = "causal" if is_causal else "full"
        for name, shape in {**SHAPES, **(LARGE if large else {})}.items():
            width = max(shape.get("D", 8), min_width)
            for dtype in (torch.float32, torch.bfloat16) if name in LARGE else (torch.float32,):
                words = f"{name}, {str(dtype).removeprefix('torch.')}, {how}"
                yield words, {**shape, "D": width, "dtype": dtype, "is_causal": is_causal}
        common = dict(D=max(8, min_width), is_causal=is_causal)
        for activity in ACTIVITIES:
            yield f"activity {activity}, {how}", dict(common, activity=activity)
        for mask in MASKS:
            yield f"mask {mask}, {how}", dict(common, mask=mask, Nk=6)
            yield f"mask {mask}, N 260, {how}", dict(common, mask=mask, Nq=260, activity="uneven")
        yield f"token-major, {how}", dict(common, token_major=True, Nq=70)
        for dtype in (torch.float16, torch.float64):
            yield f"{str(dtype).removeprefix('torch.')}, {how}", dict(common, dtype=dtype, Nq=70)
    for window in (1, 40):
        for mask in ("none", "bool_2d"):
            words = f"window {window}, mask {mask}, causal"
            yield words, dict(D=max(8, min_width), mask=mask, Nq=150, is_causal=True, sliding_window=window)


def check(
    backend: Backend, device: torch.device | str = "cpu", *, min_width: int = 1, large: bool = True
) -> Iterator[Outcome]:
    """Every check of a backend on a device, one after the other; a failure is an outcome, not an error."""

    def attend(inputs: Inputs) -> Tensor:
        return moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, backend=backend.name, **inputs.options)

    for name, kind in kinds(min_width=min_width, large=large):
        make = functools.partial(make_inputs, device=device, **kind)
        yield _run(name, backend, make, lambda inputs: compare(attend, inputs))
    for is_causal in (False, True):
        how = "causal" if is_causal else "full"
        for size in (5, 70):
            kind = dict(is_causal=is_causal, Nq=size, activity="uneven", D=max(8, min_width))
            make = functools.partial(make_inputs, device=device, **kind)
            yield _run(f"idle heads, N {size}, {how}", backend, make, lambda x: _idle_heads(attend, x))


def _run(name: str, backend: Backend, make: Callable[[], Inputs], body: Callable[[Inputs], None]) -> Outcome:
    try:
        inputs = make()
        reason = _why_not(backend, inputs)
        if reason is None:
            body(inputs)
    except Exception as error:  # a kernel may fail in any way, and leave the device unusable: all is told
        return Outcome(name, failure=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    return Outcome(name, skipped=reason)


def _why_not(backend: Backend, inputs: Inputs) -> str | None:
    """Why the backend is not checked with these inputs; takes from a mask the gradient that the backend does not have."""
    arguments = (inputs.q, inputs.k, inputs.v, inputs.gates)
    reason = backend.unsupported(*arguments, inputs.attn_mask, 0.0)
    if reason is not None and inputs.attn_mask is not None:
        inputs.attn_mask = inputs.attn_mask.detach()
        reason = backend.unsupported(*arguments, inputs.attn_mask, 0.0)
    if reason is None and backend.needs_limits:
        reason = "it needs a promise that no check of single calls makes"
    return reason


def _idle_heads(attend: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    """What is inactive is 0 in output and gradients, and NaN in its queries reaches nothing."""
    idle = inputs.gates == 0
    weight = torch.randn(inputs.gates.shape + inputs.v.shape[-1:], generator=torch.Generator().manual_seed(1))
    clean = attend(inputs)
    expected = gradients(clean, inputs, weight)
    for what, tensor in (
        ("output", clean), ("gradient of gates", expected["gates"]), ("gradient of q", expected["q"].transpose(1, 2)),
    ):  # fmt: skip
        if not (tensor[idle] == 0).all():
            raise AssertionError(f"{what} of inactive heads is not 0")
    spoilt = inputs.q.detach().masked_fill(idle.transpose(1, 2)[..., None], math.nan).requires_grad_()
    inputs.q = spoilt
    out = attend(inputs)
    assert_same(out, clean, "output with NaN in inactive queries")
    for name, grad in gradients(out, inputs, weight).items():
        assert_same(grad, expected[name], f"gradient of {name} with NaN in inactive queries")
