"""The families of transformers models that share one MoH attention, and how each family's own attention is put together.

Only data: neither torch nor transformers is imported here. A new family is one more entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # `import moh` reads the table, which must not load torch
    from torch import Tensor


def _as_it_is(attention: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    return out


def _residual_dropout(attention: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    dropped: Tensor = attention.resid_dropout(out)
    return dropped


def _residual_rate(attention: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    if not attention.training:
        return out
    from torch.nn.functional import dropout

    return dropout(out, attention.residual_dropout)


def _residual_norm(attention: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    normalised: Tensor = attention.output.LayerNorm(attention.output.dropout(out) + hidden_states)
    return normalised


def _output_dropout(attention: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    dropped: Tensor = attention.out_drop(out)
    return dropped


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
        more_models: the same for a second class that an Auto class loads where a checkpoint names it.
        layers: path of the layers, from the backbone (`base_model`).
        attention_of_layer: path of a layer's attention; layers of hybrid models that have none are left as they are.
        scale_of_layer: path of `[C]` factors of the attention's output on its way into the residual stream, from the layer;
            "" for none.
        core: path of what holds the projections, `scaling`, `is_causal` and `config`; "" for the attention itself.
        queries, keys, values: the projections, from the core.
        fused: one projection for all three instead, its rows those of queries, keys and values; "" for none.
        fused_by_head: whether its rows are those of each head's query, key and value instead.
        gate: projection of the input to a logit per head, whose sigmoid weights the head's output, from the core; "" or None
            for none.
        output: the output projection W_O.
        query_norm, key_norm: norms of each head's queries and keys, from the core; "" or absent for none.
        joint_norms: whether these are norms over the channels of all heads together.
        rotary: which channels of queries and keys are rotated against each other: "halves", "neighbours", or "" for none.
        rotary_width: path of how many of the first channels are rotated; "" for all, or if the family's function knows.
        rotary_where: path of what is None in layers that rotate nothing; "" if all layers rotate.
        dropout: path of the probability of dropping an attention weight, from the core.
        finish: `(attention, W_O's output, input) -> output`, the last step of the attention module.
        encoder: whether tokens see what comes after them and a head predicts no next token.
        images: whether the model reads pixels; others read token ids.
        max_positions: the configuration's number of learned positions; "" for none.
        positions_after_padding: whether the first of them that a token gets is the one after the padding token's id.
        defaults: fields of the configuration whose default isn't supported -> ours.
        since: the first version of transformers whose modules are laid out like this; "" for all that we work with.
        layer: name of the layer's class if a layer is `y = x + added_norm(attention(first_norm(x)))`, then
            `y + result_norm(mlp(second_norm(y)))`; "" for layers of another kind.
        first_norm, second_norm, added_norm, result_norm: these norms, from the layer; "" for none.
        parallel: whether the MLP reads `second_norm(x)` instead, or the path that says so, from the layer; "" for no.
        norm_offset: what these norms add to their weight.
        residual_scale: what multiplies whatever a layer adds to x, from the layer; "" for 1.
        mlp_gate, mlp_up, mlp_down, mlp_activation: the MLP `down(activation(gate(x)) * up(x))`, from the layer's `mlp`;
            without a gate ("") `down(activation(up(x)))`. One name for gate and up is one projection with the gate's rows
            first.
    """

    model_type: str
    package: str
    config: str
    attention: str
    models: Mapping[str, str]
    more_models: Mapping[str, str] = field(default_factory=dict)
    layers: str = "layers"
    attention_of_layer: str = "self_attn"
    scale_of_layer: str = ""
    core: str = ""
    queries: str = "q_proj"
    keys: str = "k_proj"
    values: str = "v_proj"
    fused: str = ""
    fused_by_head: bool = False
    gate: str = ""
    output: str = "o_proj"
    query_norm: str = ""
    key_norm: str = ""
    joint_norms: bool = False
    rotary: Literal["halves", "neighbours", ""] = "halves"
    rotary_width: str = ""
    rotary_where: str = ""
    dropout: str = "attention_dropout"
    finish: Callable[[Any, Tensor, Tensor], Tensor] = _as_it_is
    encoder: bool = False
    images: bool = False
    max_positions: str = ""
    positions_after_padding: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    since: str = ""
    layer: str = ""
    first_norm: str = "input_layernorm"
    second_norm: str = "post_attention_layernorm"
    added_norm: str = ""
    result_norm: str = ""
    parallel: bool | str = ""
    norm_offset: float = 0.0
    residual_scale: str = ""
    mlp_gate: str = "gate_proj"
    mlp_up: str = "up_proj"
    mlp_down: str = "down_proj"
    mlp_activation: str = "act_fn"

    @property
    def moh_config(self) -> str:
        """Name of our configuration's class."""
        return f"MoH{self.config}"

    @property
    def moh_models(self) -> dict[str, str]:
        """Name of an Auto class -> name of our model's class."""
        return {auto: f"MoH{name}" for auto, name in self.models.items()}

    def auto_class(self, saved: Sequence[str]) -> str:
        """Name of the Auto class that loads a model of one of the dense classes `saved`; "AutoModel" if none is known."""
        named = (*self.models.items(), *self.more_models.items())
        return next((auto for auto, dense in named if dense in saved), "AutoModel")

    @property
    def dense_models(self) -> tuple[str, ...]:
        """Names of all classes of the dense model."""
        return (*self.models.values(), *self.more_models.values())

    @cached_property
    def is_plain(self) -> bool:
        """Whether each attention is three projections, rotary embedding of all channels by halves and W_O, but for dropout.

        Such attention decodes a token by one operator (`decoding`) and can be split over processes (`tensor_parallel`).
        """
        more = self.core or self.fused or self.query_norm or self.rotary_width or self.rotary_where or self.gate
        return self.rotary == "halves" and not more and self.finish in (_as_it_is, _residual_rate)


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
        finish=_residual_norm,
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
        finish=_residual_rate,
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
        finish=_residual_dropout,
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
        finish=_output_dropout,
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


def at(module: Any, path: str) -> Any:
    """The attribute at a dotted path; the module itself for ""."""
    for name in filter(None, path.split(".")):
        module = getattr(module, name)
    return module
