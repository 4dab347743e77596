"""Vision transformers of timm (ViT, DeiT) with Mixture-of-Head attention, as ordinary timm models (extra `vision`).

Importing `moh` is enough for `timm.create_model("moh_vit_base_patch16_224_50")` to find them.
"""

from moh._extras import require

require("timm", extra="vision")

from moh.models.vit import presets
from moh.models.vit.attention import MoHViTAttention
from moh.models.vit.replacing import dense_attentions, replace_attention
from moh.models.vit.saving import from_pretrained, save_pretrained

__all__ = [
    "MoHViTAttention",
    "dense_attentions",
    "from_pretrained",
    "presets",
    "replace_attention",
    "save_pretrained",
]
