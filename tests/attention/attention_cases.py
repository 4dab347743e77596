"""Turns the conformance cases into tests: backends and instruction sets as parameters, skipped with their reason."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import Tensor

import moh.attention
from moh.attention import Backend, moh_attention
from moh.attention.cpu.build import supported_instruction_sets
from moh.attention.testing import SHAPES, assert_same, compare, gradients
from moh.attention.testing_inputs import ACTIVITIES, MASKS, SPECIAL_MASKS, Inputs, make_inputs

__all__ = [
    "ACTIVITIES",
    "BACKENDS",
    "EVERY_BACKEND",
    "FAST_BACKENDS",
    "ISAS",
    "MASKS",
    "SHAPES",
    "SPECIAL_MASKS",
    "Inputs",
    "assert_like_reference",
    "assert_same",
    "attend",
    "gradients",
    "make_inputs",
]

# Asked once and not by hundreds of tests; `cpu` is not asked, as it would be compiled for the answer.
_REASONS = {name: moh.attention.BACKENDS[name].why_not(make_inputs().call) for name in ("flex", "triton")}
_LEFT_OUT = {
    name: pytest.mark.skip(reason=f"{name}: {reason}") for name, reason in _REASONS.items() if reason is not None
}

EVERY_BACKEND = [pytest.param(b, id=name, marks=_LEFT_OUT.get(name, [])) for name, b in moh.attention.BACKENDS.items()]
"""Those that can't compute a plain call with gradients here are skipped with their reason."""

BACKENDS = [backend for backend in EVERY_BACKEND if backend.id not in _LEFT_OUT]
FAST_BACKENDS = [backend for backend in BACKENDS if backend.id != "reference"]

ISAS = [*supported_instruction_sets(), "portable"]
"""Instruction sets of this processor; those that the compiler does not know are skipped by the fixture `isa`."""


def attend(backend: Backend, inputs: Inputs, **options: Any) -> Tensor:
    """`moh_attention` by one backend; the test is skipped, with the backend's reason, if it can't handle the call.

    A backend without a gradient for masks gets the mask as a constant; the rest of the test applies to it.
    """

    if backend.name == "grouped":
        options = {"heads_per_group": most_heads_per_group(inputs), **options}

    def why_not() -> str | None:
        return backend.why_not(inputs.call._replace(**options))

    if inputs.attn_mask is not None and why_not() is not None:
        inputs.attn_mask = inputs.attn_mask.detach()
    reason = why_not()
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")
    options = {**inputs.options, **options}
    return moh_attention(inputs.q, inputs.k, inputs.v, inputs.gates, backend=backend.name, **options)


def most_heads_per_group(inputs: Inputs) -> int:
    """The most heads of one key/value head that a token uses, and at least 1."""
    B, Nq, H = inputs.gates.shape
    Hkv = inputs.k.shape[1]
    used = (inputs.gates != 0).view(B, Nq, Hkv, H // Hkv).sum(-1)
    return max(1, int(used.max())) if used.numel() else 1


def assert_like_reference(backend: Backend, inputs: Inputs) -> None:
    """Checks values and all gradients against the definition."""
    compare(functools.partial(attend, backend), inputs)
