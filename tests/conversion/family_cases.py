"""A tiny dense model of every transformers family, whose attention matters and whose biases aren't zero."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from moh.models.transformers.families import known_families
from moh.models.transformers.family import Family

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT = dict(
    vocab_size=64,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
TINY = SIZES | TEXT
PIXELS = dict(image_size=16, patch_size=4, num_labels=5)
GROUPED = dict(num_key_value_heads=2)
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": GROUPED | dict(attention_bias=True, mlp_bias=True, head_dim=6, tie_word_embeddings=True),
    "mistral": GROUPED | dict(sliding_window=5),
    "qwen2": GROUPED | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": GROUPED | dict(head_dim=8),
    "gemma": GROUPED | dict(head_dim=12),
    "gemma2": GROUPED | dict(head_dim=8, query_pre_attn_scalar=24, attn_logit_softcapping=None, sliding_window=5),
    "gemma3_text": GROUPED
    | dict(head_dim=8, query_pre_attn_scalar=24, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "phi": GROUPED | dict(partial_rotary_factor=0.5),
    "phi3": GROUPED | dict(sliding_window=5),
    "olmo2": GROUPED,
    "granite": GROUPED
    | dict(attention_multiplier=0.4, residual_multiplier=0.7, embedding_multiplier=3.0, logits_scaling=2.0),
    "cohere": GROUPED | dict(use_qk_norm=True, logit_scale=0.5),
    "cohere2": GROUPED | dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "starcoder2": GROUPED | dict(sliding_window=5),
    "gpt_neox": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    "lfm3": GROUPED
    | dict(
        head_dim=8,
        sliding_window=5,
        num_hidden_layers=3,
        layer_types=["conv", "sliding_attention", "full_attention"],
        conv_bias=True,
    ),
    "gpt2": dict(n_inner=48, scale_attn_by_inverse_layer_idx=True),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "bert": dict(),
    "roberta": dict(max_position_embeddings=66, type_vocab_size=1),
    "xlm-roberta": dict(max_position_embeddings=66, type_vocab_size=1),
    "modernbert": dict(local_attention=6, cls_token_id=1, sep_token_id=2),
    "vit": PIXELS,
    "deit": PIXELS,
    "dinov2": PIXELS | dict(layerscale_value=0.7),
    "dinov2_with_registers": PIXELS | dict(layerscale_value=0.7, num_register_tokens=3),
}
BERT_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
NO_DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "opt": dict(dropout=0.0),
    "bert": BERT_DROPOUT,
    "roberta": BERT_DROPOUT,
    "xlm-roberta": BERT_DROPOUT,
}
INSTALLED = Version(transformers.__version__)
BY_TYPE = {f.model_type: f for f in known_families() if not f.since or Version(f.since) <= INSTALLED}
ALL = list(BY_TYPE)
IMAGES = [name for name, family in BY_TYPE.items() if family.images]
ENCODERS = [name for name, family in BY_TYPE.items() if family.encoder and not family.images]
DECODERS = [name for name, family in BY_TYPE.items() if not family.encoder]
TRAINED_HEAD = {
    **dict.fromkeys(DECODERS, "AutoModelForCausalLM"),
    **dict.fromkeys(ENCODERS, "AutoModelForMaskedLM"),
    **dict.fromkeys(IMAGES, "AutoModelForImageClassification"),
}


def dense_model(model_type: str, auto: str | None = None, **options: Any) -> Any:
    """The family's model for an Auto class, by default the one with the trained head, in evaluation mode."""
    auto = auto or TRAINED_HEAD[model_type]
    return _made(model_type, auto, options) if options else copy.deepcopy(_usual(model_type, auto))


@functools.lru_cache(maxsize=64)
def _usual(model_type: str, auto: str) -> Any:
    return _made(model_type, auto, {})


def _made(model_type: str, auto: str, options: dict[str, Any]) -> Any:
    family: Family = BY_TYPE[model_type]
    fields = SIZES | ({} if family.images else TEXT) | OPTIONS[model_type] | options
    if model_type in ("gpt2", "dinov2", "dinov2_with_registers"):
        del fields["intermediate_size"]
    config = getattr(transformers, family.config)(**fields)
    model = getattr(transformers, family.models[auto])(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() in (2, 4) or "bias" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def token_ids(count: int = 24, length: int = 16) -> Tensor:
    return torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(2))


def left_padded(ids: Tensor) -> dict[str, Tensor]:
    """The ids with padding before the first sequence."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return dict(input_ids=torch.where(mask.bool(), ids, 0), attention_mask=mask)


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def inputs_of(model_type: str, count: int = 3, length: int = 12, *, padded: bool = False) -> dict[str, Tensor]:
    """Inputs for the family's model: images or token ids."""
    if model_type in IMAGES:
        return dict(pixel_values=images(count))
    ids = token_ids(count, length)
    return left_padded(ids) if padded else dict(input_ids=ids)


def with_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with labels for the trained head; padding has none."""
    if "pixel_values" in inputs:
        return inputs | dict(labels=torch.arange(len(inputs["pixel_values"])) % 5)
    ids = inputs["input_ids"]
    return inputs | dict(labels=ids.masked_fill(inputs.get("attention_mask", torch.ones_like(ids)) == 0, -100))
