"""Put Mixture-of-Head attention into a timm `VisionTransformer`, which stays one: only its attention layers change.

All that timm does with the model (features, new classifiers, checkpointing, saving) still works.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers.attention import Attention
from timm.models import VisionTransformer
from torch import nn

from moh.config import MoHConfig
from moh.models.vit.attention import MoHViTAttention


def dense_attentions(model: nn.Module) -> list[Attention]:
    """The attention layers of a dense `VisionTransformer`, in the order of its blocks.

    Raises:
        ValueError: the model's attention can't be replaced; names the reason and the supported models.
    """
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"model must be a timm VisionTransformer (vit_*, deit_*, deit3_* and others of that class), "
            f"got {type(model).__name__}, whose attention is of another kind"
        )
    if moh_attentions(model):
        raise ValueError("model is a MoH model already: convert the dense model that it was made from")
    attentions: list[Attention] = []
    for index, block in enumerate(model.blocks):
        found = [module for module in block.modules() if type(module) is Attention]
        if not found:
            raise ValueError(
                f"model can't be converted: its block {index} ({type(block).__name__}) holds no timm.layers.Attention; "
                "models whose blocks are timm's Block can (vit_*_patch*, deit_*, deit3_*)"
            )
        attentions += found
    heads = {attention.num_heads for attention in attentions}
    if len(heads) != 1:
        raise ValueError(f"model must have the same number of heads in every layer, got {sorted(heads)}")
    for index, attention in enumerate(attentions):
        for name in ("qkv", "proj"):
            kind = type(getattr(attention, name))
            if kind is not nn.Linear:
                raise ValueError(
                    f"model must have plain nn.Linear projections, but {name} of attention layer {index} is a "
                    f"{kind.__name__}: merge adapters or undo the quantisation first"
                )
    return attentions


def moh_attentions(model: nn.Module) -> list[MoHViTAttention]:
    """The MoH attention layers of a model, in order; empty for a dense one."""
    return [module for module in model.modules() if isinstance(module, MoHViTAttention)]


def replace_attention(
    model: nn.Module, layers: Sequence[MoHConfig], *, backend: str | None = None
) -> list[MoHViTAttention]:
    """Replace the attention layers of a dense model, in place; weights stay, routers are new.

    Args:
        model: a timm `VisionTransformer` or a subclass (a distilled DeiT).
        layers: heads and routing of each attention layer.
        backend: attention backend, None for the fastest that supports the call.

    Returns:
        the new layers, in the order of the blocks.

    Raises:
        ValueError: as in `dense_attentions`, or `layers` has the wrong length; the model is unchanged.
    """
    dense = dense_attentions(model)
    if len(layers) != len(dense):
        raise ValueError(f"layers must have one entry per attention layer ({len(dense)}), got {len(layers)}")
    new = {
        old: MoHViTAttention.from_dense(old, layer, backend=backend) for old, layer in zip(dense, layers, strict=True)
    }
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child in new:
                setattr(module, name, new[child])
    return list(new.values())
