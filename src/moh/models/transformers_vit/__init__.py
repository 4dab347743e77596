"""transformers' ViT with Mixture-of-Head attention, as ordinary transformers models (extra `llm`).

Importing `moh` is enough for `AutoModelForImageClassification.from_pretrained(directory)` to find them. timm's vision
transformers are in `moh.models.vit`.
"""

from moh._extras import require

require("transformers", extra="llm")

from moh.models.transformers_vit.configuration import MoHViTConfig
from moh.models.transformers_vit.modeling import (
    MoHImageClassifierOutput,
    MoHViTForImageClassification,
    MoHViTModel,
    MoHViTPreTrainedModel,
)

__all__ = [
    "MoHImageClassifierOutput",
    "MoHViTConfig",
    "MoHViTForImageClassification",
    "MoHViTModel",
    "MoHViTPreTrainedModel",
]
