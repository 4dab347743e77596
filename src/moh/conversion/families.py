"""Which transformers models can be converted, and how their configuration becomes that of a MoH Llama.

Llama, Mistral and Qwen2 share one architecture up to biases and the attention window. Weights are not touched here.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

# What a MoH configuration says anew, or what described the file that the dense weights came from.
_NOT_CARRIED = frozenset(
    {"model_type", "architectures", "transformers_version", "quantization_config", "auto_map", "layer_types",
     "use_sliding_window", "max_window_layers", "sliding_window", "_name_or_path"}
)  # fmt: skip

# Model types that normalise queries: every query then has (almost) the same norm, so that it tells nothing.
_QUERY_NORMALISING = frozenset({"qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2", "cohere2"})

SUPPORTED = ("llama", "mistral", "qwen2")
"""Model types (`config.model_type`) that `moh.convert` takes; SmolLM and SmolLM2 are of type llama."""


def moh_config_fields(config: PreTrainedConfig, router: str) -> dict[str, Any]:
    """The fields of a `MoHLlamaConfig` that describe the same dense model as `config`.

    Raises:
        ValueError: the model's attention can't be converted, or `router` makes no sense for it; says why and what does.
    """
    model_type = config.model_type
    if model_type == "moh_llama":
        raise ValueError("model is a MoH model already: convert the dense model that it was made from")
    if model_type in _QUERY_NORMALISING and router == "query_norm":
        raise ValueError(
            f"router 'query_norm' can't serve a model of type {model_type!r}: it normalises its queries, so that their "
            "norms say nothing about which heads matter; the contribution router (router='linear') does not need them, "
            f"but conversion of this type is not supported yet: only of {', '.join(SUPPORTED)}"
        )
    if model_type not in SUPPORTED:
        raise ValueError(
            f"model must be of a type among {', '.join(SUPPORTED)} (SmolLM is a llama) or vit, or one of timm's vision "
            f"transformers (DeiT), got {model_type!r}"
        )
    fields = {key: value for key, value in config.to_dict().items() if key not in _NOT_CARRIED}
    fields["sliding_window"] = _uniform_window(config)
    if model_type == "qwen2":  # biases of queries, keys and values, none of the output
        fields |= {"attention_bias": True, "attention_out_bias": False}
    return fields


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
