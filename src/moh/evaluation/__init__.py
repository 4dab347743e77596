"""Evaluating language models: perplexity with its error, speed side by side, and what it was measured on.

Works for any transformers causal language model, MoH or dense. Not for training (`moh.training`).
"""

from moh.evaluation.machine import cpu_name, device_name
from moh.evaluation.perplexity import PerplexityResult, perplexity
from moh.evaluation.speed import ModelSpeed, Rate, SpeedReport, measure_speed

__all__ = [
    "ModelSpeed",
    "PerplexityResult",
    "Rate",
    "SpeedReport",
    "cpu_name",
    "device_name",
    "measure_speed",
    "perplexity",
]
