"""The families of transformers models that share one MoH attention: one entry each, and what is asked of the table.

Only data: neither torch nor transformers is imported here. A new family is one more entry.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from moh.models.transformers.family import (
    Family,
    at,
    with_output_dropout,
    with_residual_dropout,
    with_residual_norm,
    with_residual_rate,
)

PACKAGE = "moh.models.transformers"
"""Where the classes that are made for the families are found."""

_SEQUENCES, _TOKENS, _ANSWERS = "SequenceClassification", "TokenClassification", "QuestionAnswering"


def _decoder(stem: str, *heads: str) -> dict[str, str]:
    """Names of a decoder's classes, which begin with `stem`, for the Auto classes `AutoModelFor{head}`."""
    return {"AutoModel": f"{stem}Model"} | {f"AutoModelFor{head}": f"{stem}For{head}" for head in ("CausalLM", *heads)}


_ENCODER_HEADS = ("MaskedLM", _SEQUENCES, _TOKENS, _ANSWERS, "MultipleChoice")


def _encoder(name: str) -> dict[str, str]:
    return {"AutoModel": f"{name}Model"} | {f"AutoModelFor{head}": f"{name}For{head}" for head in _ENCODER_HEADS}


def _like_bert(model_type: str, package: str, name: str, *, positions_after_padding: bool = False) -> Family:
    return Family(
        model_type,
        package,
        f"{name}Config",
        f"{name}Attention",
        _encoder(name),
        layers="encoder.layer",
        attention_of_layer="attention",
        core="self",
        queries="query",
        keys="key",
        values="value",
        output="output.dense",
        rotary="",
        dropout="dropout.p",
        finish=with_residual_norm,
        encoder=True,
        max_positions="max_position_embeddings",
        positions_after_padding=positions_after_padding,
    )


def _like_vit(model_type: str, name: str, *, more: str = "", **differs: Any) -> Family:
    classifier = "AutoModelForImageClassification"
    return Family(
        model_type,
        model_type,
        f"{name}Config",
        f"{name}Attention",
        {"AutoModel": f"{name}Model", classifier: f"{name}ForImageClassification"},
        {classifier: more} if more else {},
        attention_of_layer="attention",
        rotary="",
        encoder=True,
        images=True,
        **differs,
    )


_NORMS_AROUND: dict[str, Any] = dict(added_norm="post_attention_layernorm", result_norm="post_feedforward_layernorm")
_GEMMA: dict[str, Any] = dict(norm_offset=1.0, second_norm="pre_feedforward_layernorm", **_NORMS_AROUND)
_PARALLEL: dict[str, Any] = dict(parallel=True, second_norm="input_layernorm")
_DINO: dict[str, Any] = dict(layers="encoder.layer", scale_of_layer="layer_scale1.lambda1", since="5.18")


FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        "llama",
        "LlamaConfig",
        "LlamaAttention",
        _decoder("Llama", _SEQUENCES, _TOKENS, _ANSWERS),
        layer="LlamaDecoderLayer",
    ),
    Family(
        "mistral",
        "mistral",
        "MistralConfig",
        "MistralAttention",
        _decoder("Mistral", _SEQUENCES, _TOKENS, _ANSWERS),
        layer="MistralDecoderLayer",
    ),
    Family(
        "qwen2",
        "qwen2",
        "Qwen2Config",
        "Qwen2Attention",
        _decoder("Qwen2", _SEQUENCES, _TOKENS, _ANSWERS),
        layer="Qwen2DecoderLayer",
    ),
    Family(
        "qwen3",
        "qwen3",
        "Qwen3Config",
        "Qwen3Attention",
        _decoder("Qwen3", _SEQUENCES, _TOKENS, _ANSWERS),
        query_norm="q_norm",
        key_norm="k_norm",
        layer="Qwen3DecoderLayer",
    ),
    Family(
        "gemma",
        "gemma",
        "GemmaConfig",
        "GemmaAttention",
        _decoder("Gemma", _SEQUENCES, _TOKENS),
        layer="GemmaDecoderLayer",
        norm_offset=1.0,
    ),
    Family(
        "gemma2",
        "gemma2",
        "Gemma2Config",
        "Gemma2Attention",
        _decoder("Gemma2", _SEQUENCES, _TOKENS),
        defaults={"attn_logit_softcapping": None},
        layer="Gemma2DecoderLayer",
        **_GEMMA,
    ),
    Family(
        "gemma3_text",
        "gemma3",
        "Gemma3TextConfig",
        "Gemma3Attention",
        _decoder("Gemma3Text", _SEQUENCES) | {"AutoModelForCausalLM": "Gemma3ForCausalLM"},
        query_norm="q_norm",
        key_norm="k_norm",
        layer="Gemma3DecoderLayer",
        **_GEMMA,
    ),
    Family(
        "phi",
        "phi",
        "PhiConfig",
        "PhiAttention",
        _decoder("Phi", _SEQUENCES, _TOKENS),
        output="dense",
        query_norm="q_layernorm",  # there only with qk_layernorm
        key_norm="k_layernorm",
        rotary_width="rotary_ndims",
        layer="PhiDecoderLayer",
        mlp_gate="",
        mlp_up="fc1",
        mlp_down="fc2",
        mlp_activation="activation_fn",
        **_PARALLEL,
    ),
    Family(
        "phi3",
        "phi3",
        "Phi3Config",
        "Phi3Attention",
        _decoder("Phi3", _SEQUENCES, _TOKENS),
        fused="qkv_proj",
        layer="Phi3DecoderLayer",
        mlp_gate="gate_up_proj",
        mlp_up="gate_up_proj",
        mlp_activation="activation_fn",
    ),
    Family(
        "olmo2",
        "olmo2",
        "Olmo2Config",
        "Olmo2Attention",
        _decoder("Olmo2", _SEQUENCES),
        query_norm="q_norm",
        key_norm="k_norm",
        joint_norms=True,
        layer="Olmo2DecoderLayer",
        first_norm="",
        second_norm="",
        **_NORMS_AROUND,
    ),
    Family(
        "granite",
        "granite",
        "GraniteConfig",
        "GraniteAttention",
        _decoder("Granite"),
        layer="GraniteDecoderLayer",
        residual_scale="residual_multiplier",
    ),
    Family(
        "cohere",
        "cohere",
        "CohereConfig",
        "CohereAttention",
        _decoder("Cohere"),
        query_norm="q_norm",  # there only with use_qk_norm
        key_norm="k_norm",
        rotary="neighbours",
        layer="CohereDecoderLayer",
        **_PARALLEL,
    ),
    Family(
        "cohere2",
        "cohere2",
        "Cohere2Config",
        "Cohere2Attention",
        _decoder("Cohere2"),
        rotary="neighbours",
        rotary_where="sliding_window",
        layer="Cohere2DecoderLayer",
        **_PARALLEL,
    ),
    Family(
        "starcoder2",
        "starcoder2",
        "Starcoder2Config",
        "Starcoder2Attention",
        _decoder("Starcoder2", _SEQUENCES, _TOKENS),
        finish=with_residual_rate,
        layer="Starcoder2DecoderLayer",
        mlp_gate="",
        mlp_up="c_fc",
        mlp_down="c_proj",
        mlp_activation="act",
    ),
    Family(
        "gpt_neox",
        "gpt_neox",
        "GPTNeoXConfig",
        "GPTNeoXAttention",
        _decoder("GPTNeoX", _SEQUENCES, _TOKENS, _ANSWERS),
        attention_of_layer="attention",
        fused="query_key_value",
        fused_by_head=True,
        output="dense",
        layer="GPTNeoXLayer",
        parallel="use_parallel_residual",
        mlp_gate="",
        mlp_up="dense_h_to_4h",
        mlp_down="dense_4h_to_h",
        mlp_activation="act",
    ),
    Family(
        "lfm3",
        "lfm3",
        "Lfm3Config",
        "Lfm3Attention",
        _decoder("Lfm3"),
        query_norm="q_norm",
        key_norm="k_norm",
        gate="g_proj",
    ),
    Family(
        "gpt2",
        "gpt2",
        "GPT2Config",
        "GPT2Attention",
        _decoder("GPT2", _SEQUENCES, _TOKENS, _ANSWERS) | {"AutoModelForCausalLM": "GPT2LMHeadModel"},
        layers="h",
        attention_of_layer="attn",
        fused="c_attn",
        output="c_proj",
        rotary="",
        dropout="attn_dropout.p",
        finish=with_residual_dropout,
        max_positions="max_position_embeddings",
    ),
    Family(
        "opt",
        "opt",
        "OPTConfig",
        "OPTAttention",
        _decoder("OPT", _SEQUENCES, _ANSWERS),
        layers="decoder.layers",
        output="out_proj",
        rotary="",
        dropout="dropout",
        max_positions="max_position_embeddings",
    ),
    _like_bert("bert", "bert", "Bert"),
    _like_bert("roberta", "roberta", "Roberta", positions_after_padding=True),
    _like_bert("xlm-roberta", "xlm_roberta", "XLMRoberta", positions_after_padding=True),
    Family(
        "modernbert",
        "modernbert",
        "ModernBertConfig",
        "ModernBertAttention",
        _encoder("ModernBert"),
        attention_of_layer="attn",
        fused="Wqkv",
        output="Wo",
        finish=with_output_dropout,
        encoder=True,
    ),
    _like_vit("vit", "ViT"),
    _like_vit("deit", "DeiT", more="DeiTForImageClassificationWithTeacher"),
    _like_vit("dinov2", "Dinov2", **_DINO),
    _like_vit("dinov2_with_registers", "Dinov2WithRegisters", **_DINO),
)  # fmt: skip


def family_of(model_type: str) -> Family | None:
    """The family with this `config.model_type`, dense or ours, or None."""
    return next((f for f in FAMILIES if model_type in (f.model_type, f"moh_{f.model_type}")), None)


def known_families() -> list[Family]:
    """The families that the installed transformers has; to be asked once it is imported."""
    return [family for family in FAMILIES if find_spec(f"transformers.models.{family.package}") is not None]


def attentions(family: Family, backbone: Any) -> list[Any]:
    """The attention modules of a model's layers, in order; of a hybrid model without the layers that have none."""
    first = family.attention_of_layer.split(".")[0]
    return [at(layer, family.attention_of_layer) for layer in at(backbone, family.layers) if hasattr(layer, first)]


def is_text_encoder(config: Any) -> bool:
    """Whether a model of this configuration reads texts and predicts no next token."""
    family = family_of(config.model_type)
    return family is not None and family.encoder and not family.images


def most_positions(config: Any) -> int | None:
    """Most tokens of a sequence, of a model with learned positions; None for one without. `config` as `check_positions`."""
    family = family_of(config.model_type)
    if family is None or not family.max_positions:
        return None
    taken = config.pad_token_id + 1 if family.positions_after_padding else 0
    most: int = getattr(config, family.max_positions) - taken
    return most


def supported_positions(config: Any) -> int | None:
    """Tokens of a sequence that a model supports, by its learned positions or its configuration; None without a limit."""
    stated: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most_positions(config) or stated


def check_positions(config: Any, tokens: int, *, name: str) -> None:
    """Check that a sequence is within a model's learned positions; models without them have no limit.

    Args:
        config: of any model of transformers.
        tokens: length of the sequence.
        name: what has this length, for the message.

    Raises:
        ValueError: the sequence is longer.
    """
    most = most_positions(config)
    if most is not None and tokens > most:
        raise ValueError(f"{name} must be at most the model's {most} positions, got {tokens} tokens")
