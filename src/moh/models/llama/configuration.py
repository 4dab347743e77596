"""Configuration of a MoH model of the Llama family: Llama's, and which heads each layer shares and routes.

Plain data in `config.json`; each layer's part of it is a `moh.MoHConfig`.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from moh.models.heads import HasLayerHeads


@strict
class MoHLlamaConfig(HasLayerHeads, LlamaConfig):  # type: ignore[misc]
    """Llama's configuration (every argument of `transformers.LlamaConfig`) with the heads of each layer.

    Args:
        router: "two_stage", "single_stage", "query_norm" or "linear" (`moh.config.ROUTERS`).
        shared_heads: a number (every layer shares its first heads), or a list with one entry per layer: a number or
            the list of that layer's shared heads. None shares all heads that are not active routed ones.
        active_heads: routed heads active per token, a number or a list with one per layer.
        routing_unit: what a token chooses: "head", "group_balanced" (as many heads in every group that shares keys and
            values) or "kv_group" (whole such groups); see `moh.MoHConfig`.
        router_aux_loss_coef: beta, weight of the load-balance loss that is added to `outputs.loss` when labels are
            given (0.01 in the paper); 0 adds none.
        attention_out_bias: bias of the output projection; None means `attention_bias` (Qwen2: biases on q, k, v alone).
        sliding_window: width of the attention window of every layer (Mistral); None means unlimited.
        moh_backend: attention backend, None for the fastest that supports the call (`moh.attention.backends`).

    Raises:
        ValueError: the heads of a layer don't add up; the message names the layer, the field and what is allowed.
    """

    model_type = "moh_llama"

    router: str = "two_stage"
    shared_heads: int | list[int | list[int]] | None = None
    active_heads: int | list[int] = 0
    routing_unit: str = "head"
    router_aux_loss_coef: float = 0.0
    attention_out_bias: bool | None = None
    sliding_window: int | None = None
    moh_backend: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads = {self.num_key_value_heads}, "
                f"got {self.num_attention_heads}"
            )
        self.check_heads()


__all__ = ["MoHLlamaConfig"]
