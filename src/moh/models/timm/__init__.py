"""Vision transformers of timm (ViT, DeiT) with Mixture-of-Head attention, as ordinary timm models (extra `vision`).

Importing `moh` is enough for `timm.create_model("moh_vit_base_patch16_224_50")` to find them.
"""

from moh._extras import require

require("timm", extra="vision")

from moh.models.timm import vit_presets
from moh.models.timm.saving import from_pretrained, push_to_hub, save_pretrained
from moh.models.timm.vit import MoHViTAttention, dense_attentions, replace_attention

__all__ = [
    "MoHViTAttention",
    "dense_attentions",
    "from_pretrained",
    "push_to_hub",
    "replace_attention",
    "save_pretrained",
    "vit_presets",
]
