"""The promises that every backend keeps, to be checked on any machine: `python -m moh.attention.conformance --device cuda`."""

from moh.attention.conformance.checks import (
    LARGE,
    SHAPES,
    TOLERANCE,
    Outcome,
    assert_same,
    check,
    compare,
    gradients,
    kinds,
)
from moh.attention.conformance.inputs import ACTIVITIES, MASKS, Inputs, make_active, make_inputs, make_mask

__all__ = [
    "ACTIVITIES",
    "LARGE",
    "MASKS",
    "SHAPES",
    "TOLERANCE",
    "Inputs",
    "Outcome",
    "assert_same",
    "check",
    "compare",
    "gradients",
    "kinds",
    "make_active",
    "make_inputs",
    "make_mask",
]
