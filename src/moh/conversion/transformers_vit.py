"""The conversion's adapter for transformers' ViT: `ViTModel`, `ViTForImageClassification` -> ours with the same weights.

timm's vision transformers are in `timm_vit.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, ViTForImageClassification, ViTModel

from moh.config import MoHConfig
from moh.conversion.dense import DenseAttention, DenseImageModel, make_undecided
from moh.models.heads import compact_heads
from moh.models.transformers_vit import MoHViTConfig, MoHViTForImageClassification, MoHViTModel
from moh.routing import Router

# What a MoH configuration says anew, or what described the file that the dense weights came from.
_NOT_CARRIED = frozenset({"model_type", "architectures", "transformers_version", "auto_map", "_name_or_path"})


class DenseTransformersViT(DenseImageModel):
    """A dense ViT of transformers.

    Raises:
        ValueError: it is of another class.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel) -> None:
        if isinstance(model, MoHViTModel | MoHViTForImageClassification):
            raise ValueError("model is a MoH model already: convert the dense model that it was made from")
        if type(model) not in (ViTModel, ViTForImageClassification):
            raise ValueError(
                f"model must be a ViTModel or a ViTForImageClassification, got {type(model).__name__}; "
                "its encoder alone can be converted if it is a ViTModel"
            )
        self.model = model
        self._backbone = model.vit if isinstance(model, ViTForImageClassification) else model
        self.num_heads = model.config.num_attention_heads
        self.attentions = [
            DenseAttention(layer.attention.q_proj, layer.attention.o_proj) for layer in self._backbone.layers
        ]

    def logits(self, images: Tensor) -> Tensor | None:
        output = self.model(pixel_values=images)
        return getattr(output, "logits", None) if self.model.config.num_labels else None

    def build(
        self,
        layers: Sequence[MoHConfig],
        routers: Sequence[Router],
        output_weights: Sequence[Tensor],
        *,
        router_aux_loss_coef: float,
    ) -> MoHViTModel | MoHViTForImageClassification:
        dense = self.model
        fields = {key: value for key, value in dense.config.to_dict().items() if key not in _NOT_CARRIED}
        config = MoHViTConfig(
            **fields, router=layers[0].router, **compact_heads(layers), router_aux_loss_coef=router_aux_loss_coef
        )
        config._attn_implementation = "sdpa"
        model: Any
        if isinstance(dense, ViTForImageClassification):
            model = MoHViTForImageClassification(config)
        else:
            embeddings = dense.embeddings
            model = MoHViTModel(config, dense.pooler is not None, use_mask_token=embeddings.mask_token is not None)
        model.to(dense.device, dense.dtype)
        backbone = model.vit if isinstance(model, MoHViTForImageClassification) else model
        for layer in backbone.layers:
            make_undecided(layer.attention.router)
        state = {name: tensor for name, tensor in model.state_dict().items() if ".router." in name}
        model.load_state_dict(state | dense.state_dict())  # copies
        for layer, router in zip(backbone.layers, routers, strict=bool(routers)):
            layer.attention.router.load_state_dict(router.state_dict())
        for layer, weight in zip(backbone.layers, output_weights, strict=bool(output_weights)):
            layer.attention.o_proj.weight.data.copy_(weight)
        return model.eval()  # type: ignore[no-any-return]
