"""Evaluating models: perplexity and speed of language models, accuracy of image classifiers (extra `vision`).

Works for MoH and dense models alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moh._lazy import lazy
from moh.evaluation.perplexity import PerplexityResult, perplexity, perplexity_rise
from moh.evaluation.speed import ModelSpeed, Rate, SpeedReport, cpu_name, device_name, measure_speed

if TYPE_CHECKING:
    from moh.evaluation.images import ImageEvaluation, evaluate_images

__all__ = [
    "ImageEvaluation",
    "ModelSpeed",
    "PerplexityResult",
    "Rate",
    "SpeedReport",
    "cpu_name",
    "device_name",
    "evaluate_images",
    "measure_speed",
    "perplexity",
    "perplexity_rise",
]

__getattr__, __dir__ = lazy(
    __name__,
    {"ImageEvaluation": "moh.evaluation.images", "evaluate_images": "moh.evaluation.images"},
    extras={"moh.evaluation.images": ("timm", "vision")},
)
