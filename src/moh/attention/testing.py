"""What every backend and the projections of active heads promise, as named checks that need nothing but torch and moh.

`python -m moh.attention.testing --device cuda` runs them on the user's machine and prints what failed, and what was skipped
and why. Values and gradients of many kinds of calls are those of the definition; what is inactive costs nothing and spoils
nothing. The tests hold the same promises one by one, and more of them.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moh.attention.backends import BACKENDS, Backend, moh_attention
from moh.attention.gpu import backend as gpu
from moh.attention.gpu.projections import expand, sum_heads
from moh.attention.testing_inputs import ACTIVITIES, MASKS, SPECIAL_MASKS, Inputs, make_inputs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative to the largest expected number, or to 1 if that is larger: inputs are of size 1, and a sum may cancel."""

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
    """Check that `got` is NaN where `expected` is, finite elsewhere, and there equals it to within `TOLERANCE`.

    Raises:
        AssertionError: a number is not finite, or the two differ by more; the message states by how much.
    """
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: {tuple(got.shape)} instead of {tuple(expected.shape)}")
    if got.dtype != expected.dtype:
        raise AssertionError(f"{what}: {got.dtype} instead of {expected.dtype}")
    unknown = expected.isnan()
    if not torch.equal(got.isnan(), unknown):
        raise AssertionError(
            f"{what}: not finite, or NaN in other places: {int(got.isnan().sum())}, not {int(unknown.sum())}"
        )
    got, expected = got.masked_fill(unknown, 0.0), expected.masked_fill(unknown, 0.0)
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
    """Check that values and gradients of `attend` are those of the definition.

    Raises:
        AssertionError: one differs; the message names it.
    """
    got = attend(inputs)
    expected = moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, backend="reference", **inputs.options)
    assert_same(got, expected, "output")
    compare_gradients(got, expected, inputs, torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)))


def compare_gradients(got: Tensor, expected: Tensor, inputs: Inputs, weight: Tensor) -> dict[str, Tensor]:
    """Check that the gradients of two outputs of `inputs` are the same; returns those of `got`.

    Raises:
        AssertionError: one differs; the message names it.
    """
    found, expected_grads = gradients(got, inputs, weight), gradients(expected, inputs, weight)
    for name, grad in found.items():
        wanted = expected_grads[name]
        if name in ("k", "v", "attn_mask"):  # a NaN may spread to the other keys of its key/value head, and need not
            grad, wanted = (_spread(x, (-2, -1)) for x in (grad, wanted))
        assert_same(grad, wanted, f"gradient of {name}")
    return found


def _spread(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.masked_fill(x.isnan().any(dims, keepdim=True), math.nan)


@dataclass(frozen=True)
class Outcome:
    """One check of one backend.

    Attributes:
        name: of the check.
        failure: what went wrong, None if nothing did.
        skipped: why the backend can't handle the call, None if it can.
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
        for mask in SPECIAL_MASKS:
            yield f"mask {mask}, {how}", dict(common, mask=mask, Nk=6)
            yield f"mask {mask}, N 70, {how}", dict(common, mask=mask, Nq=70)
        yield f"token-major, {how}", dict(common, token_major=True, Nq=70)
        for dtype in (torch.float16, torch.float64):
            yield f"{str(dtype).removeprefix('torch.')}, {how}", dict(common, dtype=dtype, Nq=70)


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
    except Exception as error:  # a kernel may fail in any way, and leave the device unusable: report it
        return _failed(name, error)
    return Outcome(name, skipped=reason)


def _failed(name: str, error: Exception) -> Outcome:
    return Outcome(name, failure=" ".join(f"{type(error).__name__}: {error}".split())[:300])


def _why_not(backend: Backend, inputs: Inputs) -> str | None:
    """Why these inputs are skipped, or None. Detaches a mask whose gradient the backend lacks."""
    reason = backend.why_not(inputs.call)
    if reason is not None and inputs.attn_mask is not None:
        inputs.attn_mask = inputs.attn_mask.detach()
        reason = backend.why_not(inputs.call)
    return reason


def _idle_heads(attend: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    """Check that inactive heads are 0 in output and gradients, and that NaN in their queries reaches nothing."""
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


_Product = Callable[..., Tensor]

PROJECTION_SIZES: dict[str, dict[str, Any]] = {
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
    """Check that both projections and their gradients are the definition's, with NaN wherever nothing may be read.

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
        AssertionError: one differs, or a NaN got through; the message names it.
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
        reason: str | None = gpu.unavailable(kind_of_device)
        reason = reason or gpu.not_interpreted(kind_of_device, dtype)
        for size, kind in PROJECTION_SIZES.items():
            for columns in (False, True):
                name = f"{size}, {str(dtype).removeprefix('torch.')}, {'columns' if columns else 'rows'}"
                if reason is not None:
                    yield Outcome(name, skipped=reason)
                    continue
                try:
                    compare_projections(**kind, columns=columns, dtype=dtype, device=device)
                except Exception as error:  # a kernel may fail in any way, and leave the device unusable: report it
                    yield _failed(name, error)
                else:
                    yield Outcome(name)


PROJECTIONS = "projections"
"""Name of the Triton projections of active heads, next to those of the backends."""

MIN_WIDTH_ON_CUDA = 16
"""FlexAttention supports no narrower heads there."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the backends and the projections; returns 0, 1 if a check failed, 2 if the device is missing."""
    names = [name for name in BACKENDS if name != "reference"] + [PROJECTIONS]
    parser = argparse.ArgumentParser(prog="python -m moh.attention.testing", description=main.__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backend", nargs="+", choices=names, default=names)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("testing: --device cuda: PyTorch finds no CUDA device here", file=sys.stderr)
        return 2
    failed = 0
    for name in options.backend:
        outcomes = outcomes_of(name, options.device)
        print("\n".join(summary(name, outcomes)), flush=True)
        failed += sum(o.failure is not None for o in outcomes)
    return 1 if failed else 0


def outcomes_of(name: str, device: str) -> list[Outcome]:
    """All checks of the backend of this name, or of the projections."""
    if name == PROJECTIONS:
        return list(check_projections(device))
    return list(check(BACKENDS[name], device, min_width=MIN_WIDTH_ON_CUDA if device == "cuda" else 1))


def summary(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    """Lines with the number of checks that passed, each failure and each reason to skip."""
    failures = [o for o in outcomes if o.failure is not None]
    reasons = Counter(o.skipped for o in outcomes if o.skipped is not None)
    passed = len(outcomes) - len(failures) - reasons.total()
    lines = [f"{name}: {passed} of {len(outcomes)} checks passed, {len(failures)} failed, {reasons.total()} skipped"]
    lines += [f"  skipped {count}: {reason}" for reason, count in reasons.items()]
    return lines + [f"  FAILED {o.name}: {o.failure}" for o in failures]


if __name__ == "__main__":
    sys.exit(main())
