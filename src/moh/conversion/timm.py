"""The conversion's adapter for timm's `VisionTransformer` (ViT, DeiT and others of that class), extra `vision`.

The converted model is a copy of the same class with other attention layers (`moh.models.timm`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moh.config import FIXED, MoHConfig
from moh.conversion.dense import DenseAttention, DenseImageModel, OutputWeight, make_undecided
from moh.models.timm import dense_attentions, replace_attention
from moh.models.timm.vit import changes_heads
from moh.models.timm.vit_presets import described_as_moh
from moh.routing import Router, router_class
from moh.routing.attached import attach_to_layers


class DenseTimmViT(DenseImageModel):
    """A dense timm vision transformer.

    Args:
        model: the dense model.
        copied: False shares its tensors with the MoH model.

    Raises:
        ValueError: the model is of another class, or its attention can't be replaced.
    """

    def __init__(self, model: nn.Module, *, copied: bool = True) -> None:
        attentions = dense_attentions(model)
        scales = _layer_scales(model)
        self.model = model
        self._copied = copied
        self.num_heads = attentions[0].num_heads
        self.attentions = [DenseAttention(a.qkv, a.proj, scales.get(a)) for a in attentions]
        self._normalises_queries = not isinstance(attentions[0].q_norm, nn.Identity)
        self._changes_heads = any(map(changes_heads, attentions))

    def refusal(self, *, router: str, refit_output: bool, router_aux_loss_coef: float) -> str | None:
        if router_class(router).reads_queries and self._normalises_queries:
            return (
                f"router {router!r} can't work for a model that normalises its queries (qk_norm): all norms are about "
                "the same; use router='linear', which decides by the layer's input"
            )
        if router == FIXED:
            return (
                "router='fixed' cuts heads out of the projections, which only models of transformers can be without: load the "
                "model as a ViTForImageClassification of transformers, or use a router that chooses heads"
            )
        if refit_output and self._changes_heads:
            return (
                "refit_output must be False for a model that normalises or gates its heads before the output projection "
                "(scale_attn_norm, gated): what the projection reads is then not a sum over heads"
            )
        return None

    def logits(self, images: Tensor) -> Tensor | None:
        logits: Tensor = self.model(images)
        return logits if self.model.num_classes else None

    def build(
        self,
        layers: Sequence[MoHConfig],
        routers: Sequence[Router],
        output_weights: Sequence[OutputWeight],
        *,
        router_aux_loss_coef: float,
    ) -> nn.Module:
        tensors = () if self._copied else (*self.model.parameters(), *self.model.buffers())
        model: Any = copy.deepcopy(
            self.model, {id(tensor): tensor for tensor in tensors}
        )  # these are taken as they are
        attentions = replace_attention(model, layers)
        attach_to_layers([attention.router for attention in attentions], router_aux_loss_coef)
        for attention in attentions:
            make_undecided(attention.router)
        for attention, router in zip(attentions, routers, strict=bool(routers)):
            attention.router.load_state_dict(router.state_dict())
        with torch.no_grad():
            for attention, weight in zip(attentions, output_weights, strict=bool(output_weights)):
                assert weight.weight is not None
                attention.proj.weight.copy_(weight.weight)
        described: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        if described.get("architecture"):  # else timm did not make it and can't make it again
            model.pretrained_cfg = model.default_cfg = described_as_moh(described)
            recorded = {k: v for k, v in getattr(model, "_model_args", {}).items() if k != "pretrained_cfg"}
            model.moh_arguments = {**recorded, "base": described["architecture"]}
            if router_aux_loss_coef:
                model.moh_arguments["router_aux_loss_coef"] = router_aux_loss_coef
        return model.eval()  # type: ignore[no-any-return]


def _layer_scales(model: nn.Module) -> dict[nn.Module, Tensor]:
    """Attention layer -> the layer scale that follows it, in the blocks that have one."""
    scales = {}
    for block in model.modules():
        gamma = getattr(getattr(block, "ls1", None), "gamma", None)
        if gamma is not None:
            scales[block.attn] = gamma
    return scales  # type: ignore[return-value]
