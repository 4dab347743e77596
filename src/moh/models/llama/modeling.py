"""MoH models of the Llama family on transformers' Llama: only attention differs; the loss can hold a balance term.

Tensor names are Llama's; a learned router adds `self_attn.router.*`. Method: docs/method.md.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    apply_rotary_pos_emb,
)
from transformers.utils.generic import can_return_tuple

from moh.attention import moh_attention, project_output
from moh.config import MoHConfig
from moh.layers.queries import route_and_project
from moh.models.balance import check_balance_gradient, share_of_batch
from moh.models.budget import HasActiveHeads
from moh.models.llama.configuration import MoHLlamaConfig
from moh.models.transformers.attention import parts
from moh.models.transformers.decoding import decode
from moh.models.transformers.families import FAMILIES
from moh.routing import build_router, record_routing


class MoHLlamaAttention(LlamaAttention):  # type: ignore[misc]
    """Llama's attention in which each token chooses its heads."""

    def __init__(self, config: MoHLlamaConfig, layer_idx: int, layer_config: MoHConfig) -> None:
        super().__init__(config, layer_idx)
        if config.attention_out_bias != config.attention_bias:
            width = config.num_attention_heads * self.head_dim
            self.o_proj = nn.Linear(width, config.hidden_size, bias=bool(config.attention_out_bias))
        self.router = build_router(layer_config, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        # `eager` is the definition
        backend = "reference" if self.config._attn_implementation == "eager" else self.config.moh_backend
        decoded = decode(self, hidden_states, position_embeddings, attention_mask, past_key_values, backend)
        if decoded is not None:
            return decoded, None
        B, N, _ = hidden_states.shape
        share = self.router.config.share
        # Routed before rotary embedding, which keeps the norms anyway
        routing, q = route_and_project(self.router, self.q_proj, hidden_states, backend)  # q: [B, N, H, D]
        k = self.k_proj(hidden_states).view(B, N, -1, self.head_dim).transpose(1, 2)  # [B, Hkv, N, D]
        v = self.v_proj(hidden_states).view(B, N, -1, self.head_dim).transpose(1, 2)

        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)

        # transformers leaves the mask out where it is plainly causal, or where a single token sees everything before it
        heads = moh_attention(
            q,
            k,
            v,
            routing.gates,
            is_causal=attention_mask is None and N > 1,
            attn_mask=attention_mask,
            scale=self.scaling,
            dropout_p=self.attention_dropout if self.training else 0.0,
            heads_per_group=self.router.config.heads_per_group,
            groups_per_token=self.router.config.groups_per_token,
            backend=backend,
        )  # [B, N, H, D]
        return project_output(self.o_proj, heads, routing.gates, share, backend), None


for _name, _part in parts(FAMILIES[0]).items():  # as `decode` finds them
    setattr(MoHLlamaAttention, _name, _part)


class MoHLlamaPreTrainedModel(HasActiveHeads, LlamaPreTrainedModel):  # type: ignore[misc]
    """What the MoH Llama models have in common."""

    config: MoHLlamaConfig
    config_class = MoHLlamaConfig
    # These compute all heads of all tokens; ours is chosen by config.moh_backend.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer}  # noqa: RUF012


class MoHLlamaModel(MoHLlamaPreTrainedModel, LlamaModel):  # type: ignore[misc]
    """Llama's decoder with MoH attention, without a head."""

    def __init__(self, config: MoHLlamaConfig) -> None:
        super().__init__(config)
        for index, (layer, layer_config) in enumerate(zip(self.layers, config.layer_configs(), strict=True)):
            layer.self_attn = MoHLlamaAttention(config, index, layer_config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if self.config.sliding_window is not None:
            if inputs_embeds is None and input_ids is not None:
                input_ids, inputs_embeds = None, self.embed_tokens(input_ids)
            # None where the window hides nothing: then Llama's own causal mask is the right one
            window = create_sliding_window_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            attention_mask = attention_mask if window is None else window
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class MoHLlamaForCausalLM(MoHLlamaPreTrainedModel, LlamaForCausalLM):  # type: ignore[misc]
    """Llama for language modelling with MoH attention.

    `forward` is Llama's. Where `config.router_aux_loss_coef` is above 0 and labels are given, `outputs.loss` holds the
    load-balance loss too, so that any trainer of transformers models trains it; `outputs.aux_loss` is the balance
    loss alone, without its weight.
    """

    def __init__(self, config: MoHLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # LlamaForCausalLM's would build a dense decoder first
        self.model = MoHLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        coefficient = self.config.router_aux_loss_coef
        with_balance = labels is not None and coefficient > 0
        with record_routing(self.model if with_balance else nn.Module()) as routing:
            outputs = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                return_dict=True,
                **kwargs,
            )
        if not with_balance:
            return outputs
        assert labels is not None
        balance = routing.balance_loss(_token_mask(attention_mask, labels))
        if self.training:
            check_balance_gradient(balance, (layer.self_attn for layer in self.model.layers))
        weight = coefficient * share_of_batch(labels[..., 1:], kwargs.get("num_items_in_batch"))
        return MoeCausalLMOutputWithPast(
            loss=outputs.loss + weight * balance.to(outputs.loss.device),
            aux_loss=balance,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _token_mask(attention_mask: Tensor | None, labels: Tensor) -> Tensor | None:
    """The padding mask `[B, N]` if there is one of the inputs' own length."""
    if attention_mask is not None and attention_mask.shape == labels.shape:
        return attention_mask
    return None
