"""The conversion's adapter for the families of transformers: a dense model -> the same class with MoH attention.

One adapter for all: what differs between them is in the table.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

import moh.models.transformers
from moh.config import MoHConfig
from moh.conversion.dense import DenseAttention
from moh.conversion.families import NOT_CARRIED, check_model_type, check_projections, check_router
from moh.conversion.language import SEQ_LEN, DenseTextModel
from moh.conversion.tokens import are_texts
from moh.models.layer_heads import compact_heads
from moh.models.transformers.families import at, family_of
from moh.models.transformers.models import modeling, refusal
from moh.routing import Router

ENCODER_SEQ_LEN = 128
"""Tokens of a block of packed texts for an encoder, which is mostly used on sentences and paragraphs."""


class DenseFamilyModel(DenseTextModel):
    """A dense model of one of the families.

    Args:
        model: an instance of transformers' own class.
        router: of the conversion.
        copied: False lets the MoH model have the dense model's own tensors.

    Raises:
        ValueError: the model is of another family or class, its attention is set up in a way that can't be computed for
            some heads alone, or `router` makes no sense for it; says what works.
    """

    def __init__(self, model: PreTrainedModel, router: str, *, copied: bool) -> None:
        check_model_type(model.config)
        family = family_of(model.config.model_type)
        assert family is not None
        own = modeling(family)
        if type(model) not in [getattr(own, name) for name in family.models.values()]:
            base = type(model.base_model).__name__
            nearest = f"; its {base}, model.base_model, can be" if base in family.models.values() else ""
            raise ValueError(
                f"model must be one of {', '.join(family.models.values())}, got {type(model).__name__}{nearest}"
            )
        reason = refusal(model.config)
        if reason is not None:
            raise ValueError(reason)
        layers = [at(layer, family.attention_of_layer) for layer in at(model.base_model, family.layers)]
        for index, attention in enumerate(layers):
            if type(attention) is not getattr(own, family.attention):
                raise ValueError(
                    f"layer {index}'s attention must be transformers' own {family.attention}, got a "
                    f"{type(attention).__name__}: convert the model before its attention is replaced"
                )
        check_router(family, layers[0], router)
        self.model = model
        self.num_heads = model.config.num_attention_heads
        self.kv_heads = getattr(model.config, "num_key_value_heads", None)
        self._family = family
        self._copied = copied
        self.attentions = [
            DenseAttention(at(at(a, family.core), family.fused or family.queries), at(a, family.output)) for a in layers
        ]
        check_projections(model, self.attentions)

    def samples(
        self, calibration: Any, *, max_tokens: int, tokenizer: PreTrainedTokenizerBase | None, seq_len: int | None
    ) -> Tensor:
        """Token ids `[n, N]`; for an encoder each block of texts stands between its tokenizer's special tokens.

        Raises:
            ValueError: as in `calibration_blocks`, or a sequence is longer than the model's learned positions.
        """
        most = getattr(self.model.config, self._family.max_positions) if self._family.max_positions else None
        if seq_len is None:
            seq_len = min(ENCODER_SEQ_LEN if self._family.encoder else SEQ_LEN, most or SEQ_LEN)
        start, end = _special_tokens(tokenizer) if self._family.encoder and are_texts(calibration) else ([], [])
        inside = max(2, seq_len - len(start) - len(end)) if seq_len > 1 else seq_len  # a length of 1 is refused below
        room = -(-max_tokens * inside // max(1, seq_len))  # rounded up: at least 1, if max_tokens is
        blocks = super().samples(calibration, max_tokens=room, tokenizer=tokenizer, seq_len=inside)
        ends = [torch.tensor(ids, dtype=torch.long).expand(len(blocks), -1) for ids in (start, end)]
        blocks = torch.cat([ends[0], blocks, ends[1]], dim=1)
        if most is not None and blocks.shape[1] > most:
            raise ValueError(
                f"seq_len, or the length of calibration's sequences, must be at most the model's {most} positions, got "
                f"{blocks.shape[1]}"
            )
        return blocks

    def loss(self, samples: Tensor) -> Tensor:
        """Next-token cross-entropy; of a model that predicts none, a random projection of each token's last state.

        The projection's squared gradients are, in the mean over its directions, the squared change of that state.
        """
        if self.model.can_generate():
            return super().loss(samples)
        embedded = self.model.get_input_embeddings()(samples).requires_grad_()
        states = self.model.base_model(inputs_embeds=embedded).last_hidden_state  # [B, N, C]
        directions = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states.device)
        projected: Tensor = (states.float() * directions).sum() / states.shape[-1] ** 0.5
        return projected

    def build(
        self,
        layers: Sequence[MoHConfig],
        routers: Sequence[Router],
        output_weights: Sequence[Tensor],
        *,
        router_aux_loss_coef: float,
    ) -> PreTrainedModel:
        dense = self.model
        fields = {key: value for key, value in dense.config.to_dict().items() if key not in NOT_CARRIED}
        config = getattr(moh.models.transformers, self._family.moh_config)(
            **fields,
            router=layers[0].router,
            routing_unit=layers[0].routing_unit,
            **compact_heads(layers),
            router_aux_loss_coef=router_aux_loss_coef,
        )
        names = {module: name for name, module in dense.named_modules()}
        state = {name: tensor.clone() if self._copied else tensor for name, tensor in dense.state_dict().items()}
        for layer, router in zip(at(dense.base_model, self._family.layers), routers, strict=bool(routers)):
            prefix = names[at(layer, self._family.attention_of_layer)]
            for name, tensor in router.state_dict().items():
                state[f"{prefix}.router.{name}"] = tensor.to(dense.device, dense.dtype)
        for attention, weight in zip(self.attentions, output_weights, strict=bool(output_weights)):
            state[f"{names[attention.output]}.weight"] = _as_kept_by(attention.output, weight)
        unusual = {"add_pooling_layer": False} if getattr(dense, "pooler", True) is None else {}
        made = getattr(moh.models.transformers, f"MoH{type(dense).__name__}")
        model = made.from_pretrained(
            None, config=config, state_dict=state, dtype=dense.dtype, attn_implementation="sdpa", **unusual
        )
        if dense.can_generate():
            model.generation_config = copy.deepcopy(dense.generation_config)
        result: PreTrainedModel = model.to(dense.device).eval()
        return result


def _as_kept_by(linear: nn.Module, weight: Tensor) -> Tensor:
    return weight.T.contiguous() if isinstance(linear, Conv1D) else weight


def _special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> tuple[list[int], list[int]]:
    """What an encoder's tokenizer puts before and after a text."""
    ids = (getattr(tokenizer, "cls_token_id", None), getattr(tokenizer, "sep_token_id", None))
    return tuple([] if i is None else [i] for i in ids)  # type: ignore[return-value]
