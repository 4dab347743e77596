"""Configuration of a MoH vision transformer of transformers: ViT's, and which heads each layer shares and routes.

Plain data in `config.json`; each layer's part of it is a `moh.MoHConfig`.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig

from moh.models.heads import HasLayerHeads


@strict
class MoHViTConfig(HasLayerHeads, ViTConfig):  # type: ignore[misc]
    """ViT's configuration (every argument of `transformers.ViTConfig`) with the heads of each layer.

    Args:
        router: "two_stage", "single_stage", "query_norm" or "linear" (`moh.config.ROUTERS`).
        shared_heads: a number (every layer shares its first heads), or a list with one entry per layer: a number or
            the list of that layer's shared heads. None shares all heads that are not active routed ones.
        active_heads: routed heads active per token, a number or a list with one per layer.
        router_aux_loss_coef: beta, weight of the load-balance loss that is added to `outputs.loss` when labels are
            given (0.01 in the paper); 0 adds none.
        moh_backend: attention backend, None for the fastest that supports the call (`moh.attention.backends`).

    Raises:
        ValueError: the heads of a layer don't add up; the message names the layer, the field and what is allowed.
    """

    model_type = "moh_vit"

    router: str = "two_stage"
    shared_heads: int | list[int | list[int]] | None = None
    active_heads: int | list[int] = 0
    router_aux_loss_coef: float = 0.0
    moh_backend: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check_heads()


__all__ = ["MoHViTConfig"]
