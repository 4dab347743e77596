"""`Family`: where the parts of a family's attention and layers are, and the last step of its attention module.

Neither torch nor transformers is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # `import moh` reads the table, which must not load torch
    from torch import Tensor


def as_it_is(attention: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    return out


def with_residual_dropout(attention: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    dropped: Tensor = attention.resid_dropout(out)
    return dropped


def with_residual_rate(attention: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    if not attention.training:
        return out
    from torch.nn.functional import dropout

    return dropout(out, attention.residual_dropout)


def with_residual_norm(attention: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    normalised: Tensor = attention.output.LayerNorm(attention.output.dropout(out) + hidden_states)
    return normalised


def with_output_dropout(attention: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    dropped: Tensor = attention.out_drop(out)
    return dropped


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
    finish: Callable[[Any, Tensor, Tensor], Tensor] = as_it_is
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
        return self.rotary == "halves" and not more and self.finish in (as_it_is, with_residual_rate)


def at(module: Any, path: str) -> Any:
    """The attribute at a dotted path; the module itself for ""."""
    for name in filter(None, path.split(".")):
        module = getattr(module, name)
    return module
