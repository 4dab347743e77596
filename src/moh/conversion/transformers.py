"""The conversion's adapters for models of transformers: a dense model -> its family's class with MoH attention.

`moh.models.transformers.families` states what can be converted and how; refusals, with advice, are here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

import moh.models.transformers
from moh.config import FIXED, MoHConfig
from moh.conversion.dense import DenseAttention, DenseImageModel, DenseModel, OutputWeight, make_undecided
from moh.conversion.token_loss import summed_loss
from moh.data.text.blocks import IGNORED, are_texts, calibration_blocks, encoder_tokens, start_tokens
from moh.models.heads import compact_heads, compact_router, thresholds_of
from moh.models.output_changes import quantised
from moh.models.transformers.families import (
    FAMILIES,
    attentions,
    family_of,
    is_text_encoder,
    most_positions,
    supported_positions,
)
from moh.models.transformers.family import Family, at
from moh.models.transformers.fixed import cut_weights
from moh.models.transformers.loading import mend_generation_config
from moh.models.transformers.models import check_version, modeling, refusal
from moh.routing import Router, build_router, router_class

SEQ_LEN = 512
"""Tokens of a block of packed texts by default."""

LONG_SEQ_LEN = 4096
"""Tokens of the blocks that, by default, hold half of a large calibration of a model that generates: calibrated on short
blocks alone, it finds far less in long texts (docs/results/long_texts.md), and on long ones alone it is far worse at the
beginning of a text, of which it saw few."""

LONG_BLOCKS = 6
"""Fewer long blocks are not worth it: two of 2,048 tokens in 10,240 made a worse model (docs/results/tried.md)."""

ENCODER_SEQ_LEN = 128
"""The same for an encoder, which is mostly used on sentences and paragraphs."""

# Fields that describe the file of the dense weights, or that our configuration sets.
_NOT_CARRIED = frozenset(
    {"model_type", "architectures", "transformers_version", "quantization_config", "auto_map", "_name_or_path"}
)

_NEAREST = {
    "gemma3": "its text part alone can be converted: load it with Gemma3ForCausalLM",
    "gemma3n": "gemma, gemma2 without capped scores and gemma3_text can be converted",
    "mixtral": "the type without experts, mistral, can be converted",
    "qwen2_moe": "the type without experts, qwen2, can be converted",
    "qwen3_moe": "the type without experts, qwen3, can be converted",
    "olmoe": "the type without experts, olmo2, can be converted",
    "granitemoe": "the type without experts, granite, can be converted",
    "laguna": "mixtures of experts can't be converted; of models with a gate per head, lfm3 can",
    "step3p7": "mixtures of experts can't be converted; of models with a gate per head, lfm3 can",
    "phimoe": "the type without experts, phi3, can be converted",
    "distilbert": "encoders of type bert, roberta and modernbert can be converted",
    "mpnet": "encoders of type bert, roberta and modernbert can be converted",
    "deberta-v2": "encoders of type bert, roberta and modernbert can be converted",
    "dinov3_vit": "its predecessors, dinov2 and dinov2_with_registers, can be converted",
    "t5": "encoder-decoder models can't be converted, models of one stack can",
    "bart": "encoder-decoder models can't be converted, models of one stack can",
}
"""Model types that users may expect to work -> the nearest thing that does."""


class DenseTransformersModel(DenseModel):
    """A dense model of one of the families.

    Args:
        model: an instance of transformers' own class.
        router: of the conversion.
        copied: False shares the dense model's tensors with the MoH model.

    Raises:
        ValueError: the model is of another family or class, its attention is set up in a way that can't be computed for
            some heads alone, or `router` makes no sense for it; the message states what works.
    """

    model: PreTrainedModel
    block_of: list[int]
    """Index of the layer that each attention is a part of."""

    def __init__(self, model: PreTrainedModel, router: str, *, copied: bool) -> None:
        self._family = family = _checked_family(model.config)
        check_version(family)
        own = modeling(family)
        if type(model) not in [getattr(own, name) for name in family.dense_models]:
            base = type(model.base_model).__name__
            nearest = f"; its {base}, model.base_model, can be" if base in family.dense_models else ""
            raise ValueError(
                f"model must be one of {', '.join(family.dense_models)}, got {type(model).__name__}{nearest}"
            )
        reason = refusal(model.config)
        if reason is not None:
            raise ValueError(reason)
        layers = attentions(family, model.base_model)
        for index, attention in enumerate(layers):
            if type(attention) is not getattr(own, family.attention):
                raise ValueError(
                    f"layer {index}'s attention must be transformers' own {family.attention}, got a "
                    f"{type(attention).__name__}: convert the model before its attention is replaced"
                )
        _check_router(family, layers[0], router)
        self.model = model
        self.blocks = list(at(model.base_model, family.layers))
        first = family.attention_of_layer.split(".")[0]
        self.block_of = [index for index, block in enumerate(self.blocks) if hasattr(block, first)]
        self.num_heads = model.config.num_attention_heads
        self.kv_heads = getattr(model.config, "num_key_value_heads", None)
        self._copied = copied
        scales: list[Tensor | None] = [None] * len(layers)
        if family.scale_of_layer:
            scales = [at(block, family.scale_of_layer) for block in at(model.base_model, family.layers)]
        self.attentions = [
            DenseAttention(at(at(a, family.core), family.fused or family.queries), at(a, family.output), scale)
            for a, scale in zip(layers, scales, strict=True)
        ]
        _check_projections(model, self.attentions)

    def build(
        self,
        layers: Sequence[MoHConfig],
        routers: Sequence[Router],
        output_weights: Sequence[OutputWeight],
        *,
        router_aux_loss_coef: float,
    ) -> PreTrainedModel:
        dense = self.model
        fields = {key: value for key, value in dense.config.to_dict().items() if key not in _NOT_CARRIED}
        config = getattr(moh.models.transformers, self._family.moh_config)(
            **fields,
            router=compact_router(layers),
            without_heads="linear" if any(w.bias is not None for w in output_weights) else "nothing",
            routing_unit=layers[0].routing_unit,
            **compact_heads(layers),
            **thresholds_of(layers),
            router_aux_loss_coef=router_aux_loss_coef,
        )
        names = {module: name for name, module in dense.named_modules()}
        state = {name: tensor.clone() if self._copied else tensor for name, tensor in dense.state_dict().items()}
        for module, router in zip(attentions(self._family, dense.base_model), routers, strict=bool(routers)):
            prefix = names[module]
            for name, tensor in router.state_dict().items():
                state[f"{prefix}.router.{name}"] = tensor.to(dense.device, dense.dtype)
        for attention, heads in zip(attentions(self._family, dense.base_model), layers, strict=True):
            if heads.router == FIXED:
                kept = cut_weights(self._family, attention, heads, self.kv_heads)
                _replace_inputs(state, names[attention], self._family, kept)
        for dense_attention, output in zip(self.attentions, output_weights, strict=bool(output_weights)):
            _replace_output(state, names[dense_attention.output], dense_attention.output, output)
        made = getattr(moh.models.transformers, f"MoH{type(dense).__name__}")
        model = made.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dense.dtype,
            **self._construction(),
        )
        if dense.can_generate():
            model.generation_config = copy.deepcopy(dense.generation_config)
            mend_generation_config(model)
        result: PreTrainedModel = model.to(dense.device).eval()
        return result

    def refusal(self, *, router: str, refit_output: bool, router_aux_loss_coef: float) -> str | None:
        if router == FIXED and self._family.joint_norms:
            return (
                f"heads can't be cut out of a model of type {self._family.model_type!r}, which normalises the queries of all "
                "heads together: use layers='keep' and a router that chooses heads, such as router='linear'"
            )
        return super().refusal(router=router, refit_output=refit_output, router_aux_loss_coef=router_aux_loss_coef)

    def _construction(self) -> dict[str, Any]:
        """What the model was built with that its configuration does not hold."""
        return {"add_pooling_layer": False} if getattr(self.model, "pooler", True) is None else {}


class DenseTextModel(DenseTransformersModel):
    """A dense model that reads token ids."""

    def needs_calibration(self, router: str) -> bool:
        return router_class(router).is_fitted

    def samples(
        self,
        calibration: Any,
        *,
        max_tokens: int,
        tokenizer: PreTrainedTokenizerBase | None,
        seq_len: int | Sequence[int] | None,
    ) -> list[Tensor]:
        """Token ids `[n, N]` of each length; for an encoder each block of texts is put between its tokenizer's special tokens.

        Raises:
            ValueError: as in `calibration_blocks`, or a sequence is longer than the model's learned positions.
        """
        config, family = self.model.config, self._family
        most = most_positions(config)
        fewest_long = LONG_BLOCKS if seq_len is None else 0  # the texts may hold fewer tokens than were asked for
        if seq_len is None:
            seq_len = default_lengths(self.model, max_tokens)
        lengths = sorted({seq_len} if isinstance(seq_len, int) else set(seq_len))
        if not lengths:
            raise ValueError("seq_len must be a number of tokens, or several, got none")
        start, end = encoder_tokens(tokenizer) if family.encoder and are_texts(calibration) else ([], [])
        if tokenizer is not None and start == start_tokens(tokenizer):
            start = []  # which `calibration_blocks` adds
        # a length of 1 is refused below
        inside = [max(2, n - len(start) - len(end)) if n > 1 else n for n in lengths]
        room = -(-max_tokens * inside[0] // max(1, lengths[0]))  # rounded up: at least 1, if max_tokens is
        bos = getattr(config, "bos_token_id", None)
        groups = calibration_blocks(
            calibration, tokenizer, room, inside, config.vocab_size, bos_token_id=bos, fewest_long=fewest_long
        )
        groups = [
            torch.cat([_repeated(start, len(blocks)), blocks, _repeated(end, len(blocks))], dim=1) for blocks in groups
        ]
        if most is not None and groups[-1].shape[1] > most:
            raise ValueError(
                f"seq_len, or the length of calibration's sequences, must be at most the model's {most} positions, got "
                f"{groups[-1].shape[1]}"
            )
        return groups

    def tokens_per_sample(self, samples: Tensor) -> int:
        return samples.shape[1]

    def run(self, samples: Tensor) -> Tensor:
        states: Tensor = self.model.base_model(input_ids=samples, use_cache=False)[0]
        return states

    def samples_per_loss(self, batch_size: int) -> int:
        # Logits and the layers' graph of one sample are the most memory that a conversion takes. A loss with random
        # directions has to stay as it is: they are drawn for a batch.
        return 1 if self.model.can_generate() else super().samples_per_loss(batch_size)

    def loss(self, samples: Tensor) -> Tensor:
        """Next-token cross-entropy; for a model that predicts none, a random projection of each token's last state.

        The projection's squared gradients are, on average over its directions, the squared change of that state.
        """
        embedded = self.model.get_input_embeddings()(samples).requires_grad_()
        if self.model.can_generate():
            # The last token of a sample predicts nothing. Ignored, not cut off: a cut makes two copies of the logits.
            targets = nn.functional.pad(samples[:, 1:], (0, 1), value=IGNORED)
            logits = self.model(inputs_embeds=embedded, use_cache=False).logits  # [B, N, V]
            return summed_loss(logits.flatten(0, 1), targets.flatten())
        states = self.model.base_model(inputs_embeds=embedded).last_hidden_state  # [B, N, C]
        directions = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states.device)
        projected: Tensor = (states.float() * directions).sum() / states.shape[-1] ** 0.5
        return projected

    def loss_behind(self, samples: Tensor, places: Tensor) -> Tensor:
        embedded = self.model.get_input_embeddings()(samples).requires_grad_()
        logits = self.model(inputs_embeds=embedded, use_cache=False, logits_to_keep=places).logits  # [B, P, V]
        return summed_loss(logits.flatten(0, 1), samples[:, places + 1].flatten())


class DenseViT(DenseTransformersModel, DenseImageModel):
    """A dense model that reads images."""

    def logits(self, images: Tensor) -> Tensor | None:
        output = self.model(pixel_values=images)
        return getattr(output, "logits", None) if self.model.config.num_labels else None

    def build(
        self,
        layers: Sequence[MoHConfig],
        routers: Sequence[Router],
        output_weights: Sequence[OutputWeight],
        *,
        router_aux_loss_coef: float,
    ) -> PreTrainedModel:
        if not routers:
            routers = [build_router(layer, self.model.config.hidden_size) for layer in layers]
            for router in routers:
                make_undecided(router)
        return super().build(layers, routers, output_weights, router_aux_loss_coef=router_aux_loss_coef)

    def _construction(self) -> dict[str, Any]:
        takes = "use_mask_token" in inspect.signature(type(self.model).__init__).parameters
        masks = {"use_mask_token": True} if takes and self.model.embeddings.mask_token is not None else {}
        return super()._construction() | masks


def adapter(model: PreTrainedModel, router: str, *, copied: bool) -> DenseTransformersModel:
    """The adapter of a model of transformers; arguments and errors as for `DenseTransformersModel`."""
    kind = DenseViT if _checked_family(model.config).images else DenseTextModel
    return kind(model, router, copied=copied)


def default_lengths(model: PreTrainedModel, max_tokens: int) -> list[int]:
    """Lengths of calibration blocks, up to the model's positions; a long one too if it generates and tokens suffice."""
    config = model.config
    most = supported_positions(config) or SEQ_LEN
    short = min(ENCODER_SEQ_LEN if is_text_encoder(config) else SEQ_LEN, most)
    has_room = max_tokens // 2 >= LONG_BLOCKS * LONG_SEQ_LEN
    return [short, LONG_SEQ_LEN] if model.can_generate() and most >= LONG_SEQ_LEN and has_room else [short]


def _checked_family(config: PreTrainedConfig) -> Family:
    """The family of models of this type.

    Raises:
        ValueError: this type can't be converted, or the model is a MoH model; the message names those that can.
    """
    model_type = config.model_type
    if model_type.startswith("moh_"):
        raise ValueError("model is a MoH model already: convert the dense model that it was made from")
    family = family_of(model_type)
    if family is None:
        of_text = ", ".join(f.model_type for f in FAMILIES if not f.images)
        of_images = " or ".join(f.model_type for f in FAMILIES if f.images)
        nearest = f"; {_NEAREST[model_type]}" if model_type in _NEAREST else ""
        raise ValueError(
            f"model must be of a type among {of_text} (SmolLM is a llama, MiniLM a bert) or {of_images}, or one of "
            f"timm's vision transformers (DeiT), got {model_type!r}{nearest}"
        )
    return family


def _check_projections(model: PreTrainedModel, attentions: Sequence[DenseAttention]) -> None:
    """Check that the attention's projections are plain linear layers, defined by their weights alone.

    Raises:
        ValueError: the model is quantised, or holds adapters; the message states what to do.
    """
    parts = [part for attention in attentions for part in (attention.entry, attention.output)]
    if getattr(model, "is_quantized", False) or any(
        hasattr(part, "weight") and quantised(part.weight) for part in parts
    ):
        raise ValueError(
            "model is quantised, and its weights can't be calibrated: load it without quantization_config, convert it, and "
            "quantise the result"
        )
    names = {module: name for name, module in model.named_modules()}
    for part in parts:
        if type(part) not in (nn.Linear, Conv1D):
            raise ValueError(
                f"{names[part]} must be a plain linear layer, got {type(part).__name__}: merge an adapter first "
                "(model.merge_and_unload() of peft), or convert the model that it was put on"
            )


def _check_router(family: Family, attention: nn.Module, router: str) -> None:
    """Check that a router makes sense for the family's attention.

    Raises:
        ValueError: the router reads the norms of queries that are normalised.
    """
    normalised = family.query_norm and hasattr(at(attention, family.core), family.query_norm)
    if normalised and router_class(router).reads_queries:
        raise ValueError(
            f"router {router!r} can't work for a model of type {family.model_type!r}: it normalises its queries, so "
            "their norms don't show which heads matter; use router='linear', which decides by the layer's input"
        )


def _replace_inputs(state: dict[str, Tensor], prefix: str, family: Family, kept: dict[str, Tensor]) -> None:
    """Replace the input projections and norms of the attention at `prefix` by what is kept of them."""
    inputs = [family.fused] if family.fused else [family.queries, family.keys, family.values]
    for path in (*inputs, *filter(None, (family.gate, family.query_norm, family.key_norm))):
        for part in ("weight", "bias"):
            state.pop(".".join(filter(None, (prefix, family.core, path, part))), None)
    state |= {f"{prefix}.{name}": tensor for name, tensor in kept.items()}


def _replace_output(state: dict[str, Tensor], prefix: str, dense: nn.Module, output: OutputWeight) -> None:
    """Replace the output projection at `prefix`; its bias, if it has one, stays."""
    weight, bias = state.pop(f"{prefix}.weight"), state.get(f"{prefix}.bias")
    if output.weight is not None:
        state[f"{prefix}.weight"] = _as_kept_by(dense, output.weight.to(weight))
    if output.bias is not None:
        state[f"{prefix}.bias"] = output.bias if bias is None else bias + output.bias


def _repeated(ids: Sequence[int], rows: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.long).expand(rows, -1)


def _as_kept_by(linear: nn.Module, weight: Tensor) -> Tensor:
    return weight.T.contiguous() if isinstance(linear, Conv1D) else weight
