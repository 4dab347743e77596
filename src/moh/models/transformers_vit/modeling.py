"""MoH vision transformers on transformers' ViT: only attention differs; the loss can hold a balance term.

Tensor names are ViT's; a learned router adds `attention.router.*`. Method: docs/method.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTForImageClassification,
    ViTLayer,
    ViTModel,
    ViTPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

from moh.attention import moh_attention, project_output, route_and_project
from moh.config import MoHConfig
from moh.models.balance import check_balance_gradient, share_of_batch
from moh.models.dial import HasActiveHeads
from moh.models.transformers_vit.configuration import MoHViTConfig
from moh.routing import build_router, record_routing


@dataclass
class MoHImageClassifierOutput(ImageClassifierOutput):  # type: ignore[misc]
    """transformers' output of an image classifier, with the load-balance loss (without its weight) in `aux_loss`."""

    aux_loss: Tensor | None = None


class MoHViTAttention(ViTAttention):  # type: ignore[misc]
    """ViT's attention in which each token chooses its heads."""

    def __init__(self, config: MoHViTConfig, layer_config: MoHConfig) -> None:
        super().__init__(config)
        self.router = build_router(layer_config, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        B, N, _ = hidden_states.shape
        share = self.router.config.share
        # `eager` is the definition
        backend = "reference" if self.config._attn_implementation == "eager" else self.config.moh_backend
        routing, q = route_and_project(self.router, self.q_proj, hidden_states, backend)  # q: [B, N, H, D]
        k = self.k_proj(hidden_states).view(B, N, -1, self.head_dim).transpose(1, 2)  # [B, H, N, D]
        v = self.v_proj(hidden_states).view(B, N, -1, self.head_dim).transpose(1, 2)
        heads = moh_attention(
            q.transpose(1, 2),
            k,
            v,
            routing.gates,
            attn_mask=attention_mask,
            scale=self.scaling,
            dropout_p=self.attention_dropout if self.training else 0.0,
            backend=backend,
        )  # [B, N, H, D]
        return project_output(self.o_proj, heads, routing.gates, share, backend), None


class MoHViTPreTrainedModel(HasActiveHeads, ViTPreTrainedModel):  # type: ignore[misc]
    """What the MoH ViT models have in common."""

    config: MoHViTConfig
    config_class = MoHViTConfig
    # These compute all heads of all tokens; ours is chosen by config.moh_backend.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_record_outputs = {"hidden_states": ViTLayer}  # noqa: RUF012


class MoHViTModel(MoHViTPreTrainedModel, ViTModel):  # type: ignore[misc]
    """ViT with MoH attention, without a classifier."""

    def __init__(self, config: MoHViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer, use_mask_token=use_mask_token)
        for layer, layer_config in zip(self.layers, config.layer_configs(), strict=True):
            layer.attention = MoHViTAttention(config, layer_config)
        self.post_init()


class MoHViTForImageClassification(MoHViTPreTrainedModel, ViTForImageClassification):  # type: ignore[misc]
    """ViT for image classification with MoH attention.

    `forward` is ViT's. Where `config.router_aux_loss_coef` is above 0 and labels are given, `outputs.loss` holds the
    load-balance loss too, so that any trainer of transformers models trains it; `outputs.aux_loss` is the balance
    loss alone, without its weight.
    """

    def __init__(self, config: MoHViTConfig) -> None:
        ViTPreTrainedModel.__init__(self, config)  # ViTForImageClassification's would build a dense model first
        self.num_labels = config.num_labels
        self.vit = MoHViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        coefficient = self.config.router_aux_loss_coef
        with_balance = labels is not None and coefficient > 0
        with record_routing(self.vit if with_balance else nn.Module()) as routing:
            outputs = super().forward(
                pixel_values,
                labels=labels,
                interpolate_pos_encoding=interpolate_pos_encoding,
                attention_mask=attention_mask,
                return_dict=True,
                **kwargs,
            )
        if not with_balance:
            return outputs
        assert labels is not None
        balance = routing.balance_loss()
        if self.training:
            check_balance_gradient(balance, (layer.attention for layer in self.vit.layers))
        weight = coefficient * share_of_batch(labels, kwargs.get("num_items_in_batch"))
        return MoHImageClassifierOutput(
            loss=outputs.loss + weight * balance.to(outputs.loss.device),
            aux_loss=balance,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["MoHImageClassifierOutput", "MoHViTForImageClassification", "MoHViTModel", "MoHViTPreTrainedModel"]
