"""Checks of numbers that recipes and settings share."""

from __future__ import annotations


def at_least(name: str, value: float, low: float) -> None:
    """Check a number of a recipe.

    Raises:
        ValueError: `value` is below `low`; names both.
    """
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
