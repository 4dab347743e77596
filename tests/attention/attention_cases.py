"""Inputs for routed attention of every kind that a backend has to serve, and what a backend makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moh.attention import Backend, backends, moh_attention

BACKENDS = [pytest.param(b, id=b.name) for b in backends()]
FAST_BACKENDS = [pytest.param(b, id=b.name) for b in backends() if b.name != "reference"]

ACTIVITIES = ("all", "none", "random", "half", "uneven", "idle_token", "idle_head", "one_pair")
MASKS = (
    "none",
    "padding",  # bool [B, 1, 1, Nk]
    "bool_2d",  # [Nq, Nk]
    "bool_full",  # [B, H, Nq, Nk]
    "blind_rows",  # bool [B, 1, Nq, Nk], some queries may see no key
    "bias_per_head",  # float [H, Nq, Nk]
    "bias_per_key",  # float [B, H, 1, Nk]
    "bias_per_query",  # float [B, 1, Nq, 1]: changes nothing but gradients, which are 0
    "bias_blind_rows",  # float [1, 1, Nq, Nk] with -inf, some rows throughout
)


@dataclass
class Inputs:
    """Arguments of one call of `moh_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        return dict(attn_mask=self.attn_mask, is_causal=self.is_causal, scale=self.scale)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that get a gradient."""
        found = {"q": self.q, "k": self.k, "v": self.v, "gates": self.gates}
        if self.attn_mask is not None and self.attn_mask.requires_grad:
            found["attn_mask"] = self.attn_mask
        return found


def make_inputs(
    *,
    B: int = 2,
    Hkv: int = 2,
    G: int = 2,
    Nq: int = 5,
    Nk: int | None = None,
    D: int = 8,
    Dv: int | None = None,
    activity: str = "random",
    mask: str = "none",
    is_causal: bool = False,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Random inputs that require gradients, additive masks too, with `G` query heads per key/value head."""
    random = torch.Generator().manual_seed(seed)
    H, Nk, Dv = Hkv * G, Nq if Nk is None else Nk, D if Dv is None else Dv

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    def coin(p: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=random) < p

    q, k, v = normal(B, H, Nq, D), normal(B, Hkv, Nk, D), normal(B, Hkv, Nk, Dv)
    gates = normal(B, Nq, H) * make_active(activity, coin, B, Nq, H)
    attn_mask = make_mask(mask, coin, normal, B, H, Nq, Nk)
    for tensor in (q, k, v, gates, attn_mask):
        if tensor is not None and tensor.is_floating_point():
            tensor.requires_grad_()
    return Inputs(q, k, v, gates, attn_mask, is_causal, scale)


def make_active(activity: str, coin, B: int, Nq: int, H: int) -> Tensor:
    active = torch.ones(B, Nq, H, dtype=torch.bool)
    if activity == "none":
        active[:] = False
    elif activity == "random":
        active = coin(0.6, B, Nq, H)
    elif activity == "half":
        active[..., ::2] = False
    elif activity == "uneven":  # some heads always, some never
        shares = torch.linspace(-0.3, 1.3, H).clamp(0, 1)
        active = torch.stack([coin(float(share), B, Nq) for share in shares], dim=-1)
    elif activity == "idle_token":
        active[:, Nq // 2 :][:, :1] = False
    elif activity == "idle_head":
        active[..., H // 2] = False
    elif activity == "one_pair":
        active[:] = False
        active[-1:, -1:, -1] = True
    else:
        assert activity == "all"
    return active


def make_mask(mask: str, coin, normal, B: int, H: int, Nq: int, Nk: int) -> Tensor | None:
    if mask == "none":
        return None
    if mask == "padding":
        return coin(0.7, B, 1, 1, Nk)
    if mask == "bool_2d":
        return coin(0.7, Nq, Nk)
    if mask == "bool_full":
        return coin(0.7, B, H, Nq, Nk)
    if mask == "blind_rows":
        return coin(0.8, B, 1, Nq, Nk) & coin(0.6, B, 1, Nq, 1)
    if mask == "bias_per_head":
        return normal(H, Nq, Nk)
    if mask == "bias_per_key":
        return normal(B, H, 1, Nk)
    if mask == "bias_per_query":
        return normal(B, 1, Nq, 1)
    assert mask == "bias_blind_rows"
    seen = coin(0.8, 1, 1, Nq, Nk) & coin(0.6, 1, 1, Nq, 1)
    return normal(1, 1, Nq, Nk).masked_fill(~seen, -torch.inf)


def attend(backend: Backend, inputs: Inputs, **options: Any) -> Tensor:
    """`moh_attention` by one backend; the test is skipped, with the backend's reason, if it can't serve the call.

    A backend that has no gradient for masks gets the mask as a constant, and the rest of the test holds for it.
    """

    def unsupported() -> str | None:
        dropout_p = options.get("dropout_p", 0.0)
        return backend.unsupported(inputs.q, inputs.k, inputs.v, inputs.gates, inputs.attn_mask, dropout_p)

    if inputs.attn_mask is not None and unsupported() is not None:
        inputs.attn_mask = inputs.attn_mask.detach()
    reason = unsupported()
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")
    options = {**inputs.options, **options}
    return moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, backend=backend.name, **options)


def gradients(out: Tensor, inputs: Inputs, weight: Tensor) -> dict[str, Tensor]:
    """Gradients of `(out * weight).sum()`."""
    tensors = inputs.tensors
    grads = torch.autograd.grad(out, list(tensors.values()), weight.to(out.dtype))
    return dict(zip(tensors, grads, strict=True))


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def assert_same(got: Tensor, expected: Tensor, what: str) -> None:
    """Finite, and equal to within the dtype's rounding in relation to the largest expected number."""
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} instead of {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"{what}: {got.dtype} instead of {expected.dtype}"
    assert got.isfinite().all(), f"{what}: not finite"
    if expected.numel():
        error = (got.double() - expected.double()).abs().max().item()
        largest = expected.abs().max().item()
        allowed = TOLERANCE[expected.dtype] * max(largest, 1.0)  # the inputs are of size 1; a sum may cancel
        assert error <= allowed, f"{what}: off by {error:.3g} where the largest is {largest:.3g}"


def assert_like_reference(backend: Backend, inputs: Inputs) -> None:
    """Same values and same gradients, of everything that has one, as the definition."""
    got = attend(backend, inputs)
    expected = moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, backend="reference", **inputs.options)
    assert_same(got, expected, "output")
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected_grads = gradients(expected, inputs, weight)
    for name, grad in gradients(got, inputs, weight).items():
        assert_same(grad, expected_grads[name], f"gradient of {name}")
