"""Conversion: a pretrained dense model -> the same model with MoH attention (extra `hf`; `vision` for timm's)."""

from moh._extras import require

require("transformers", extra="hf")

from moh.conversion.convert import convert

__all__ = ["convert"]
