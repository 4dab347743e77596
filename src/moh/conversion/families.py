"""Which transformers models can be converted, what is refused with which advice, and a MoH Llama's configuration.

Llama, Mistral and Qwen2 share one architecture up to biases and the attention window; the other families are in
`moh.models.transformers.families`. Weights are not touched here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moh.conversion.dense import DenseAttention
from moh.models.transformers.families import FAMILIES, Family, at

# What described the file that the dense weights came from, or is said anew.
NOT_CARRIED = frozenset(
    {"model_type", "architectures", "transformers_version", "quantization_config", "auto_map", "_name_or_path"}
)
_NOT_LLAMAS = frozenset({"layer_types", "use_sliding_window", "max_window_layers", "sliding_window"})

LLAMAS = ("llama", "mistral", "qwen2")
"""Model types (`config.model_type`) of the Llama family; SmolLM and SmolLM2 are of type llama."""

SUPPORTED = tuple(family.model_type for family in FAMILIES)
"""Model types of models of text that `moh.convert` takes."""

_NEAREST = {
    "gemma3": "its text part alone can be converted: load it with Gemma3ForCausalLM",
    "gemma3n": "of Gemma, gemma, gemma2 without capped scores and gemma3_text can be converted",
    "mixtral": "the type without experts, mistral, can be converted",
    "qwen2_moe": "the type without experts, qwen2, can be converted",
    "qwen3_moe": "the type without experts, qwen3, can be converted",
    "phimoe": "the type without experts, phi3, can be converted",
    "roberta": "of encoders, those of type bert can be converted",
    "xlm-roberta": "of encoders, those of type bert can be converted",
    "distilbert": "of encoders, those of type bert can be converted",
    "mpnet": "of encoders, those of type bert can be converted",
    "t5": "encoder-decoder models can't be converted, models of one stack can",
    "bart": "encoder-decoder models can't be converted, models of one stack can",
}
"""Model types that users may expect to work -> the nearest thing that does."""


def moh_config_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a `MoHLlamaConfig` that describe the same dense model as `config`.

    Raises:
        ValueError: the model is of another family, or its layers differ; says what works.
    """
    check_model_type(config)
    fields = {key: value for key, value in config.to_dict().items() if key not in NOT_CARRIED | _NOT_LLAMAS}
    fields["sliding_window"] = _uniform_window(config)
    if config.model_type == "qwen2":  # biases of queries, keys and values, none of the output
        fields |= {"attention_bias": True, "attention_out_bias": False}
    return fields


def check_model_type(config: PreTrainedConfig) -> None:
    """Check that models of this type are converted.

    Raises:
        ValueError: they are not, or the model is a MoH model; names the types that are, and the nearest one.
    """
    model_type = config.model_type
    if model_type.startswith("moh_"):
        raise ValueError("model is a MoH model already: convert the dense model that it was made from")
    if model_type not in SUPPORTED:
        nearest = f"; {_NEAREST[model_type]}" if model_type in _NEAREST else ""
        raise ValueError(
            f"model must be of a type among {', '.join(SUPPORTED)} (SmolLM is a llama, MiniLM a bert) or vit, or one of "
            f"timm's vision transformers (DeiT), got {model_type!r}{nearest}"
        )


def check_projections(model: PreTrainedModel, attentions: Sequence[DenseAttention]) -> None:
    """Check that the attention's projections are plain linear layers, whose weights say all that they do.

    Raises:
        ValueError: the model is quantised, or holds adapters; says what to do.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "model is quantised, and its weights can't be calibrated: load it without quantization_config, convert it, and "
            "quantise the result"
        )
    names = {module: name for name, module in model.named_modules()}
    for attention in attentions:
        for module in (attention.entry, attention.output):
            if type(module) not in (nn.Linear, Conv1D):
                raise ValueError(
                    f"{names[module]} must be a plain linear layer, got {type(module).__name__}: merge an adapter first "
                    "(model.merge_and_unload() of peft), or convert the model that it was put on"
                )


def check_router(family: Family, attention: nn.Module, router: str) -> None:
    """Check that a router makes sense for the family's attention.

    Raises:
        ValueError: queries are normalised, so that their norms tell nothing.
    """
    if router == "query_norm" and family.query_norm and hasattr(at(attention, family.core), family.query_norm):
        raise ValueError(
            f"router 'query_norm' can't serve a model of type {family.model_type!r}: it normalises its queries, so that "
            "their norms say nothing about which heads matter; use router='linear', which decides by the layer's input"
        )


def _uniform_window(config: PreTrainedConfig) -> int | None:
    """The attention window that all layers have, or None."""
    window: int | None = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if window is None or layer_types is None:
        return window
    sliding = [kind == "sliding_attention" for kind in layer_types]
    if not any(sliding):
        return None
    if not all(sliding):
        raise ValueError(
            f"model mixes layers with and without an attention window ({sum(sliding)} of {len(sliding)} have one); "
            "only models whose layers are all alike can be converted"
        )
    return window
