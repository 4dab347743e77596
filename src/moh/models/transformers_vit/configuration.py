"""Configuration of a MoH vision transformer of transformers: ViT's, and which heads each layer shares and routes.

Plain data in `config.json`; each layer's part of it is a `moh.MoHConfig`.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig

from moh.config import MoHConfig
from moh.models.layer_heads import layer_configs, mean_share


@strict
class MoHViTConfig(ViTConfig):  # type: ignore[misc]
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
        if self.router_aux_loss_coef < 0:
            raise ValueError(f"router_aux_loss_coef must be at least 0, got {self.router_aux_loss_coef}")
        self.layer_configs()  # validates

    def layer_configs(self) -> list[MoHConfig]:
        """The heads and routing of each layer.

        Raises:
            ValueError: as the class says.
        """
        return layer_configs(
            self.num_hidden_layers,
            self.num_attention_heads,
            shared_heads=self.shared_heads,
            active_heads=self.active_heads,
            router=self.router,
        )

    @property
    def share(self) -> float:
        """Mean share of the heads that a token uses, over the layers."""
        return mean_share(self.layer_configs())


__all__ = ["MoHViTConfig"]
