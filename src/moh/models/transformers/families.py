"""The families of transformers models that share one MoH attention, and how each family's own attention is put together.

Only data: neither torch nor transformers is imported here. A new family is one more entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `import moh` reads the table, which must not load torch
    from torch import Tensor


def _as_it_is(attention: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    return out


def _residual_dropout(attention: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    dropped: Tensor = attention.resid_dropout(out)
    return dropped


def _residual_norm(attention: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    normalised: Tensor = attention.output.LayerNorm(attention.output.dropout(out) + hidden_states)
    return normalised


PACKAGE = "moh.models.transformers"
"""Where the classes that are made for the families are found."""


@dataclass(frozen=True, eq=False)
class Family:
    """One family. Paths are dotted attributes, from the attention module unless stated otherwise.

    Attributes:
        model_type: `config.model_type` of the dense model; ours is "moh_" and this.
        package: its folder in `transformers.models`.
        config, attention: names of its configuration's and its attention's class.
        models: name of an Auto class -> name of the dense model's class.
        layers: path of the layers, from the backbone (`base_model`).
        attention_of_layer: path of a layer's attention.
        core: path of what holds the projections, `scaling`, `is_causal` and `config`; "" for the attention itself.
        queries, keys, values: the projections, from the core.
        fused: one projection for all three instead, its rows those of queries, keys and values; "" for none.
        output: the output projection W_O.
        query_norm, key_norm: norms of each head's queries and keys, from the core; "" or absent for none.
        rotary: whether queries and keys are rotated, first half of the channels against second half.
        rotary_width: path of how many of the first channels are rotated; "" for all channels.
        dropout: path of the probability of dropping an attention weight, from the core.
        finish: `(attention, W_O's output, input) -> output`, the last step of the attention module.
        encoder: whether tokens see what comes after them and a head predicts no next token.
        images: whether the model reads pixels; others read token ids.
        max_positions: the configuration's number of learned positions; "" for none.
        defaults: fields of the configuration whose default isn't supported -> ours.
    """

    model_type: str
    package: str
    config: str
    attention: str
    models: Mapping[str, str]
    layers: str = "layers"
    attention_of_layer: str = "self_attn"
    core: str = ""
    queries: str = "q_proj"
    keys: str = "k_proj"
    values: str = "v_proj"
    fused: str = ""
    output: str = "o_proj"
    query_norm: str = ""
    key_norm: str = ""
    rotary: bool = True
    rotary_width: str = ""
    dropout: str = "attention_dropout"
    finish: Callable[[Any, Tensor, Tensor], Tensor] = _as_it_is
    encoder: bool = False
    images: bool = False
    max_positions: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def moh_config(self) -> str:
        """Name of our configuration's class."""
        return f"MoH{self.config}"

    @property
    def moh_models(self) -> dict[str, str]:
        """Name of an Auto class -> name of our model's class."""
        return {auto: f"MoH{name}" for auto, name in self.models.items()}

    @cached_property
    def is_plain(self) -> bool:
        """Whether each attention is three projections, rotary embedding of all channels and W_O, in this order, and no more.

        Such attention decodes a token by one operator (`decoding`) and can be split over processes (`tensor_parallel`).
        """
        more = self.core or self.fused or self.query_norm or self.rotary_width or self.finish is not _as_it_is
        return self.rotary and not more


def _decoder(model: str, causal_lm: str, classifier: str = "") -> dict[str, str]:
    names = {"AutoModel": model, "AutoModelForCausalLM": causal_lm}
    return names | ({"AutoModelForSequenceClassification": classifier} if classifier else {})


FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        "llama",
        "LlamaConfig",
        "LlamaAttention",
        _decoder("LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification"),
    ),
    Family(
        "mistral",
        "mistral",
        "MistralConfig",
        "MistralAttention",
        _decoder("MistralModel", "MistralForCausalLM", "MistralForSequenceClassification"),
    ),
    Family(
        "qwen2",
        "qwen2",
        "Qwen2Config",
        "Qwen2Attention",
        _decoder("Qwen2Model", "Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    ),
    Family(
        "qwen3",
        "qwen3",
        "Qwen3Config",
        "Qwen3Attention",
        _decoder("Qwen3Model", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
        query_norm="q_norm",
        key_norm="k_norm",
    ),
    Family(
        "gemma",
        "gemma",
        "GemmaConfig",
        "GemmaAttention",
        _decoder("GemmaModel", "GemmaForCausalLM", "GemmaForSequenceClassification"),
    ),
    Family(
        "gemma2",
        "gemma2",
        "Gemma2Config",
        "Gemma2Attention",
        _decoder("Gemma2Model", "Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
        defaults={"attn_logit_softcapping": None},
    ),
    Family(
        "gemma3_text",
        "gemma3",
        "Gemma3TextConfig",
        "Gemma3Attention",
        _decoder("Gemma3TextModel", "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
        query_norm="q_norm",
        key_norm="k_norm",
    ),
    Family(
        "phi",
        "phi",
        "PhiConfig",
        "PhiAttention",
        _decoder("PhiModel", "PhiForCausalLM", "PhiForSequenceClassification"),
        output="dense",
        query_norm="q_layernorm",  # there only with qk_layernorm
        key_norm="k_layernorm",
        rotary_width="rotary_ndims",
    ),
    Family(
        "phi3",
        "phi3",
        "Phi3Config",
        "Phi3Attention",
        _decoder("Phi3Model", "Phi3ForCausalLM", "Phi3ForSequenceClassification"),
        fused="qkv_proj",
    ),
    Family(
        "gpt2",
        "gpt2",
        "GPT2Config",
        "GPT2Attention",
        _decoder("GPT2Model", "GPT2LMHeadModel", "GPT2ForSequenceClassification"),
        layers="h",
        attention_of_layer="attn",
        fused="c_attn",
        output="c_proj",
        rotary=False,
        dropout="attn_dropout.p",
        finish=_residual_dropout,
        max_positions="max_position_embeddings",
    ),
    Family(
        "opt",
        "opt",
        "OPTConfig",
        "OPTAttention",
        _decoder("OPTModel", "OPTForCausalLM", "OPTForSequenceClassification"),
        layers="decoder.layers",
        output="out_proj",
        rotary=False,
        dropout="dropout",
        max_positions="max_position_embeddings",
    ),
    Family(
        "bert",
        "bert",
        "BertConfig",
        "BertAttention",
        {
            "AutoModel": "BertModel",
            "AutoModelForMaskedLM": "BertForMaskedLM",
            "AutoModelForSequenceClassification": "BertForSequenceClassification",
            "AutoModelForTokenClassification": "BertForTokenClassification",
            "AutoModelForQuestionAnswering": "BertForQuestionAnswering",
        },
        layers="encoder.layer",
        attention_of_layer="attention",
        core="self",
        queries="query",
        keys="key",
        values="value",
        output="output.dense",
        rotary=False,
        dropout="dropout.p",
        finish=_residual_norm,
        encoder=True,
        max_positions="max_position_embeddings",
    ),
    Family(
        "vit",
        "vit",
        "ViTConfig",
        "ViTAttention",
        {"AutoModel": "ViTModel", "AutoModelForImageClassification": "ViTForImageClassification"},
        attention_of_layer="attention",
        rotary=False,
        encoder=True,
        images=True,
    ),
)  # fmt: skip


def family_of(model_type: str) -> Family | None:
    """The family with this `config.model_type`, dense or ours, or None."""
    return next((f for f in FAMILIES if model_type in (f.model_type, f"moh_{f.model_type}")), None)


def check_positions(config: Any, tokens: int, *, name: str) -> None:
    """Check that a sequence is within a model's learned positions; models without them have no limit.

    Args:
        config: of any model of transformers.
        tokens: length of the sequence.
        name: what has this length, for the message.

    Raises:
        ValueError: the sequence is longer.
    """
    family = family_of(config.model_type)
    most = getattr(config, family.max_positions) if family is not None and family.max_positions else None
    if most is not None and tokens > most:
        raise ValueError(f"{name} must be at most the model's {most} positions, got {tokens} tokens")


def at(module: Any, path: str) -> Any:
    """The attribute at a dotted path; the module itself for ""."""
    for name in filter(None, path.split(".")):
        module = getattr(module, name)
    return module
