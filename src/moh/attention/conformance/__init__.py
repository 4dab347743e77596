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
from moh.attention.conformance.projections import check_projections, compare_projections

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
    "check_projections",
    "compare",
    "compare_projections",
    "gradients",
    "kinds",
    "make_active",
    "make_inputs",
    "make_mask",
]
