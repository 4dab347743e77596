"""MoH-ViT: the TransNeXt backbone with Mixture-of-Head attention, as ordinary timm models (extra `vision`).

Importing `moh` is enough for `timm.create_model("moh_transnext_base_75")` to find them.
"""

from moh._extras import require

require("timm", extra="vision")

from moh.models.timm.transnext import presets
from moh.models.timm.transnext.architecture import Architecture
from moh.models.timm.transnext.attention import AggregatedAttention, PlainAttention
from moh.models.timm.transnext.model import MoHTransNeXt

__all__ = ["AggregatedAttention", "Architecture", "MoHTransNeXt", "PlainAttention", "presets"]
