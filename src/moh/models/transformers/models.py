"""The classes of a family: transformers' own with our attention and a load-balance loss (`balance`).

Made from the table on first use (`moh.models.transformers`). Method: docs/method.md. Tensor names are the family's; a
learned router adds `router.*` to its layer's attention.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from packaging.version import Version
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, modeling_outputs
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from moh.config import FIXED
from moh.models.card import TAG, PushedWithCard, card_of, write_card
from moh.models.dial import HasActiveHeads
from moh.models.heads import HasLayerHeads
from moh.models.transformers.attention import DEFAULT, IMPLEMENTATIONS, RoutedAttention, parts
from moh.models.transformers.balance import output_class, with_balance_loss
from moh.models.transformers.decoder_layer import DecodedLayer, with_output_layer
from moh.models.transformers.families import FAMILIES, PACKAGE, attentions, family_of, known_families
from moh.models.transformers.family import Family, at
from moh.models.transformers.fixed import WITHOUT_HEADS, FixedAttention, cut, refuse_fixed_heads
from moh.models.transformers.remote_code import keep_remote_code
from moh.models.transformers.tensor_parallel import check_split, plan_with_gates, splits_heads
from moh.routing import Scorer, ThresholdRouter, build_router

_FIELDS: dict[str, tuple[Any, Any]] = {
    "router": (str | list[str], "two_stage"),
    "shared_heads": (int | list[int | list[int]] | None, None),
    "active_heads": (int | list[int], 0),
    "routing_unit": (str, "head"),
    "without_heads": (str, "nothing"),
    "router_aux_loss_coef": (float, 0.0),
    "output_router_logits": (bool, False),
}
"""Fields of every configuration -> type and default; what they mean is in `RoutedConfig`."""


class RoutedConfig(HasLayerHeads):
    """A family's configuration with the heads of each layer.

    Args:
        router: as in `moh.MoHConfig`, one name or a list with one per layer. A layer with "fixed" has the projections of
            its shared heads alone; these may be none.
        shared_heads: a number (every layer shares its first heads), or a list with one entry per layer: a number or
            the list of that layer's shared heads. None shares all heads that are not active routed ones.
        active_heads: routed heads active per token, a number or a list with one per layer.
        routing_unit: as in `moh.MoHConfig`.
        without_heads: what a layer without heads adds: "nothing", or "linear", a linear map of its input.
        router_aux_loss_coef: beta, weight of the load-balance loss in `outputs.loss` and, in training, in the gradient
            of any other loss (0.01 in the paper); 0 adds none.
        output_router_logits: whether outputs have `router_logits` and `aux_loss` unless the argument says otherwise.

    Raises:
        ValueError: the heads of a layer don't add up, or the family's attention is set up in a way that can't be
            computed for some heads alone; the message names the field and what is allowed.
    """

    model_type: str
    without_heads: str

    def __post_init__(self, **kwargs: Any) -> None:
        if backend := kwargs.pop("moh_backend", None):  # of early versions
            raise ValueError(f"moh_backend is now attn_implementation='{DEFAULT}_{backend}', got {backend!r}")
        if self.model_type == "moh_llama":
            _check_not_an_imitation(self, kwargs)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        reason = refusal(self)
        if reason is not None:
            raise ValueError(reason)
        kv_heads = getattr(self, "num_key_value_heads", None)
        if kv_heads and self.num_attention_heads % kv_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads = {kv_heads}, got {self.num_attention_heads}"
            )
        if self.without_heads not in WITHOUT_HEADS:
            raise ValueError(
                f"without_heads must be {' or '.join(map(repr, WITHOUT_HEADS))}, got {self.without_heads!r}"
            )
        self.check_heads()

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: the class comes with the package; its source is no file to be saved with a model."""

    @property
    def num_attention_layers(self) -> int:
        """Layers that have heads: in a hybrid model not those of convolutions."""
        return self.num_hidden_layers - (getattr(self, "layer_types", None) or []).count("conv")

    @property
    def num_experts(self) -> int:
        """Routed heads of the layer that has most; width of `outputs.router_logits`."""
        return max(layer.num_routed for layer in self.layer_configs())

    @property
    def num_experts_per_tok(self) -> int:
        """Routed heads that a token activates, as the mean of the layers that route, rounded."""
        active = [layer.active_heads for layer in self.layer_configs() if layer.active_heads]
        return round(sum(active) / max(1, len(active)))


def _check_not_an_imitation(config: Any, fields: dict[str, Any]) -> None:
    """Remove from a Llama's `fields` those by which early versions imitated other families.

    Raises:
        ValueError: they were used; the message states what the model is now.
    """
    window, out_bias = fields.pop("sliding_window", None), fields.pop("attention_out_bias", None)
    biases_differ = out_bias not in (None, config.attention_bias)
    if window is None and not biases_differ:
        return
    found = f"attention_out_bias = {out_bias}" if window is None else f"sliding_window = {window}"
    name = "Qwen2" if biases_differ else "Mistral"
    model = f"MoH{name}ForCausalLM"
    advice = f"convert the {name} again, which gives a {model}"
    if window is None or not biases_differ:  # else the window has other fields too
        advice += f", or write model_type 'moh_{name.lower()}' and architectures ['{model}'] into the saved config.json"
    raise ValueError(f"MoHLlamaConfig no longer has {found}: an early version made the model from a {name}; {advice}")


def refusal(config: Any) -> str | None:
    """Why a model with this configuration, dense or ours, can't have MoH attention, and what works; None if it can."""
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None and config.model_type.removeprefix("moh_") == "gemma2":
        return (
            f"attn_logit_softcapping must be None, got {cap}: scores capped by a tanh can't be computed by the kernels "
            "for chosen heads; config.attn_logit_softcapping = None gives a model that can be converted, and differs "
            f"little where the scores are well below {cap}; Gemma and Gemma 3 have no such cap"
        )
    if getattr(config, "add_cross_attention", False):
        return "add_cross_attention must be False: layers that read another model's tokens can't be converted"
    family = family_of(config.model_type)
    if family is not None and family.encoder and getattr(config, "is_decoder", False):
        return (
            f"is_decoder must be False: of type {family.model_type!r} only encoders can be converted; a GPT-2 is a decoder of "
            "the same kind"
        )
    return None


class RoutedModel(PushedWithCard, HasActiveHeads):
    """Mixed into a model class of a family: it is built as usual, then its attention layers get routers."""

    _supports_sdpa = True  # Gemma 2 only lacks it for the cap on its scores, which ours don't have

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        implementation = config._attn_implementation or DEFAULT
        config._attn_implementation = DEFAULT  # first a dense model is built, and not every dense family supports sdpa
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        route(self)
        self.set_attn_implementation(implementation)  # type: ignore[attr-defined]
        self.post_init()  # again, for the routers

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ThresholdRouter):
            module.reset_thresholds()
        # A router starts as the family's linear layers do
        super()._init_weights(module.as_linear() if isinstance(module, Scorer) else module)  # type: ignore[misc]

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any) -> Any:
        """As in transformers, after a check that the heads can be split."""
        if distributed_config is not None and distributed_config.tp_size > 1 and splits_heads(model.tp_plan):
            check_split(model.config, distributed_config.tp_size, name="tp_size")
        return super().maybe_distribute_model(model, distributed_config, *args)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and a model card (README.md), unless there is one."""
        push = kwargs.pop("push_to_hub", False)  # the library would push before the card and the code are there
        of_hub = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags")
        repository = {name: kwargs.pop(name) for name in of_hub if push and name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        is_main = kwargs.get("is_main_process", args[0] if args else True)
        if is_main and (folder / "config.json").is_file():  # an adapter alone is saved without one
            if card_of(self) or not (folder / "README.md").exists():  # else what a card of ours says is not known here
                write_card(folder, self.config.layer_configs(), **card_of(self))  # type: ignore[attr-defined]
            keep_remote_code(self, folder)
        if push and is_main:
            name = repository.pop("repo_id", folder.name)
            of_both = {key: kwargs[key] for key in ("token", "max_shard_size") if key in kwargs}
            self.push_to_hub(name, **repository, **of_both)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: the class comes with the package; its source is no file to be saved with a model."""


class _BatchedContinuously:
    """Mixed into models that generate: continuous batching, which knows only names of transformers, gets `sdpa`."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        refuse_fixed_heads(self.config.layer_configs(), "continuous batching")  # type: ignore[attr-defined]
        implementation = self.config._attn_implementation  # type: ignore[attr-defined]
        if implementation not in IMPLEMENTATIONS:
            return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        self.set_attn_implementation("sdpa")  # type: ignore[attr-defined]
        try:
            manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            self.set_attn_implementation(implementation)  # type: ignore[attr-defined]
            raise
        manager._original_attn_impl = implementation  # what it sets when it stops
        return manager


def route(model: Any) -> None:
    """Give the attention layers of a family's model, built with our configuration, their routers.

    The modules stay the family's own, and get our classes, which compute the same with a router. A layer that has a
    router keeps it.
    """
    family = family_of_config(type(model.config))
    check_version(family)
    model.add_model_tags(TAG)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not isinstance(module, RoutedModel):
            module.__class__ = _routed_model_class(type(module))  # type: ignore[arg-type]
            # As its constructor does for its first class; `dict`'s own, as the key is the class's name in every version
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(module)), module._can_record_outputs)
    for attention, config in zip(attentions(family, model.base_model), model.config.layer_configs(), strict=True):
        if not isinstance(attention, RoutedAttention):
            is_fixed = config.router == FIXED
            attention.__class__ = _routed_attention_class(family, fixed=is_fixed)
            attention.router = build_router(config, model.config.hidden_size)
            if is_fixed:
                cut(attention, model.config.without_heads)
    for layer in at(model.base_model, family.layers) if family.layer else ():
        if not isinstance(layer, DecodedLayer):
            layer.__class__ = _decoded_layer_class(family)


def make_class(name: str) -> type:
    """The class of this name, such as "MoHQwen3ForCausalLM".

    Raises:
        AttributeError: no family has it.
        ImportError: the installed transformers is older than the family.
    """
    dense_name = name.removeprefix("MoH")
    known = known_families()
    for family in FAMILIES:
        if name in (family.moh_config, *family.moh_models.values()) and family not in known:
            raise ImportError(
                f"{name} needs a transformers that has models of type {family.model_type!r}: {transformers.__version__} "
                "has none; pip install --upgrade transformers"
            )
        if name == family.moh_config:
            return _config_class(family)
        if dense_name in family.dense_models:
            return _routed_model_class(getattr(modeling(family), dense_name))
    # What is needed to read a pickled model or its outputs: classes that transformers has no Auto class for
    kind: Any = getattr(modeling_outputs, dense_name, None)
    if isinstance(kind, type) and issubclass(kind, ModelOutput):
        made: type = output_class(kind)
        return made
    for family in known:
        if dense_name.removeprefix("Fixed") == family.attention:
            return _routed_attention_class(family, fixed=dense_name != family.attention)
        if dense_name == family.layer:
            return _decoded_layer_class(family)
        kind = getattr(modeling(family), dense_name, None)
        if isinstance(kind, type) and issubclass(kind, ModelOutput):
            made = output_class(kind)
            return made
        is_model = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
        if is_model and family_of(kind.config_class.model_type) is family:
            return _routed_model_class(kind)
    raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")


def check_version(family: Family) -> None:
    """Check that the installed transformers has the family's modules where its entry says.

    Raises:
        ValueError: it is too old.
    """
    if family.since and Version(transformers.__version__) < Version(family.since):
        raise ValueError(
            f"models of type {family.model_type!r} need transformers {family.since} or newer, and {transformers.__version__} is "
            "installed: pip install --upgrade transformers"
        )


def modeling(family: Family) -> ModuleType:
    """transformers' own module with the family's models."""
    return importlib.import_module(f"transformers.models.{family.package}.modeling_{family.package}")


def family_of_config(kind: type[PreTrainedConfig]) -> Family:
    """The family of a configuration's class, ours or the dense one."""
    family = family_of(kind.model_type)
    assert family is not None
    return family


@functools.cache
def _config_class(family: Family) -> type[PreTrainedConfig]:
    folder = importlib.import_module(f"transformers.models.{family.package}")
    dense: type[PreTrainedConfig] = getattr(folder, family.config)
    inherited = {name: (dense.__dataclass_fields__[name].type, value) for name, value in family.defaults.items()}
    fields = _FIELDS | inherited
    namespace = {
        "__module__": PACKAGE,
        "__doc__": RoutedConfig.__doc__,
        "__annotations__": {name: kind for name, (kind, _) in fields.items()},
        "model_type": f"moh_{family.model_type}",
        "base_model_tp_plan": plan_with_gates(family, dense.base_model_tp_plan),
        **{name: default for name, (_, default) in fields.items()},
    }
    return strict(type(family.moh_config, (RoutedConfig, dense), namespace))


@functools.cache
def _routed_model_class(dense: type[PreTrainedModel]) -> type[PreTrainedModel]:
    family = family_of_config(dense.config_class)
    generates = issubclass(dense, GenerationMixin)
    namespace: dict[str, Any] = {
        "__module__": PACKAGE,
        "__doc__": f"transformers' `{dense.__name__}` with MoH attention, and the load-balance loss in its loss if it has one.",
        "config_class": _config_class(family),
        "forward": with_balance_loss(with_output_layer(dense.forward) if generates else dense.forward),
    }
    bases = (_BatchedContinuously, RoutedModel) if generates else (RoutedModel,)
    return type(f"MoH{dense.__name__}", (*bases, dense), namespace)


@functools.cache
def _routed_attention_class(family: Family, *, fixed: bool = False) -> type[nn.Module]:
    module = modeling(family)
    rotate = staticmethod(module.apply_rotary_pos_emb) if family.rotary else None
    dense = getattr(module, family.attention)
    namespace = {"__module__": PACKAGE, "family": family, "family_attention": dense, "rotate": rotate, **parts(family)}
    if fixed:
        namespace["eager"] = staticmethod(module.eager_attention_forward)
        return type(f"MoHFixed{family.attention}", (FixedAttention, dense), namespace)
    return type(f"MoH{family.attention}", (RoutedAttention, dense), namespace)


@functools.cache
def _decoded_layer_class(family: Family) -> type[nn.Module]:
    module = modeling(family)
    dense = getattr(module, family.layer)
    # accelerate and FSDP find layers by the name of their class, which therefore stays; pickle finds it by the other name
    namespace = {
        "__module__": PACKAGE,
        "__qualname__": f"MoH{family.layer}",
        "family": family,
        "own_module": module.__name__,
    }
    return type(family.layer, (DecodedLayer, dense), namespace)
