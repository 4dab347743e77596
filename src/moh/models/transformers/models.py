"""The classes of a family: transformers' own, in which only the attention is another.

Made from the table when they are asked for (`moh.models.transformers`). Method: docs/method.md.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from types import ModuleType
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from moh.models.budget import HasActiveHeads
from moh.models.layer_heads import HasLayerHeads
from moh.models.transformers.attention import RoutedAttention
from moh.models.transformers.families import FAMILIES, Family, at
from moh.models.transformers.loss import with_balance_loss
from moh.routing import build_router

_MODULE = "moh.models.transformers"

_FIELDS: dict[str, tuple[Any, Any]] = {
    "router": (str, "two_stage"),
    "shared_heads": (int | list[int | list[int]] | None, None),
    "active_heads": (int | list[int], 0),
    "routing_unit": (str, "head"),
    "router_aux_loss_coef": (float, 0.0),
    "moh_backend": (str | None, None),
}
"""Fields of every configuration -> type and default; what they mean is in `RoutedConfig`."""


class RoutedConfig(HasLayerHeads):
    """A family's configuration with the heads of each layer.

    Args:
        router: "two_stage", "single_stage", "query_norm" or "linear" (`moh.config.ROUTERS`).
        shared_heads: a number (every layer shares its first heads), or a list with one entry per layer: a number or
            the list of that layer's shared heads. None shares all heads that are not active routed ones.
        active_heads: routed heads active per token, a number or a list with one per layer.
        routing_unit: what a token chooses: "head", "group_balanced" (as many heads in every group that shares keys and
            values) or "kv_group" (whole such groups); see `moh.MoHConfig`.
        router_aux_loss_coef: beta, weight of the load-balance loss that is added to `outputs.loss` when labels are
            given (0.01 in the paper); 0 adds none.
        moh_backend: attention backend, None for the fastest that supports the call (`moh.attention.backends`).

    Raises:
        ValueError: the heads of a layer don't add up, or the family's attention is set up in a way that can't be
            computed for some heads alone; the message names the field and what is allowed.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        reason = refusal(self)
        if reason is not None:
            raise ValueError(reason)
        self.check_heads()


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
    if config.model_type.removeprefix("moh_") == "bert" and config.is_decoder:
        return "is_decoder must be False: of BERT only encoders can be converted; a GPT-2 is a decoder of the same kind"
    return None


class RoutedModel(HasActiveHeads):
    """Mixed into a model class of a family: it is built as ever, then its attention layers get routers."""

    # These compute all heads of all tokens; ours is chosen by config.moh_backend.
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        implementation = config._attn_implementation or "sdpa"
        config._attn_implementation = "eager"  # what is built first is dense, and not every dense family knows sdpa
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        route(self)
        self.set_attn_implementation(implementation)  # type: ignore[attr-defined]
        self.post_init()  # once more, for the routers


def route(model: Any) -> None:
    """Give the attention layers of a family's model, built with our configuration, their routers.

    The modules are the family's own and stay so; they become of our classes, which compute the same with a router. A
    layer that has one already keeps it.
    """
    family = family_of_config(type(model.config))
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not isinstance(module, RoutedModel):
            module.__class__ = _routed_model_class(type(module))  # type: ignore[arg-type]
            _CAN_RECORD_REGISTRY[module] = module._can_record_outputs  # as its constructor does for its first class
    layers = at(model.base_model, family.layers)
    for layer, config in zip(layers, model.config.layer_configs(), strict=True):
        attention = at(layer, family.attention_of_layer)
        if not isinstance(attention, RoutedAttention):
            attention.__class__ = _routed_attention_class(family)
            attention.router = build_router(config, model.config.hidden_size)


def make_class(name: str) -> type:
    """The class of this name, such as "MoHQwen3ForCausalLM".

    Raises:
        AttributeError: no family has it.
    """
    for family in FAMILIES:
        if name == family.moh_config:
            return _config_class(family)
        if name in family.moh_models.values():
            return _routed_model_class(getattr(modeling(family), name.removeprefix("MoH")))
    raise AttributeError(f"module {_MODULE!r} has no attribute {name!r}")


def modeling(family: Family) -> ModuleType:
    """transformers' own module with the family's models."""
    return importlib.import_module(f"transformers.models.{family.package}.modeling_{family.package}")


def family_of_config(kind: type[PreTrainedConfig]) -> Family:
    """The family of a configuration's class, ours or the dense one."""
    return next(f for f in FAMILIES if kind.model_type in (f.model_type, f"moh_{f.model_type}"))


@functools.cache
def _config_class(family: Family) -> type[PreTrainedConfig]:
    folder = importlib.import_module(f"transformers.models.{family.package}")
    dense: type[PreTrainedConfig] = getattr(folder, family.config)
    inherited = {name: (dense.__dataclass_fields__[name].type, value) for name, value in family.defaults.items()}
    fields = _FIELDS | inherited
    namespace = {
        "__module__": _MODULE,
        "__doc__": RoutedConfig.__doc__,
        "__annotations__": {name: kind for name, (kind, _) in fields.items()},
        "model_type": f"moh_{family.model_type}",
        **{name: default for name, (_, default) in fields.items()},
    }
    return strict(type(family.moh_config, (RoutedConfig, dense), namespace))


@functools.cache
def _routed_model_class(dense: type[PreTrainedModel]) -> type[PreTrainedModel]:
    family = family_of_config(dense.config_class)
    namespace: dict[str, Any] = {
        "__module__": _MODULE,
        "__doc__": f"transformers' `{dense.__name__}` with MoH attention; `forward` is its own.",
        "config_class": _config_class(family),
    }
    recorded = getattr(dense, "_can_record_outputs", None) or {}
    namespace["_can_record_outputs"] = {n: kind for n, kind in recorded.items() if "attentions" not in n}
    if "labels" in inspect.signature(dense.forward).parameters:
        namespace["forward"] = with_balance_loss(dense.forward)
    return type(f"MoH{dense.__name__}", (RoutedModel, dense), namespace)


@functools.cache
def _routed_attention_class(family: Family) -> type[nn.Module]:
    module = modeling(family)
    rotate = staticmethod(module.apply_rotary_pos_emb) if family.rotary else None
    namespace = {"__module__": _MODULE, "family": family, "rotate": rotate}
    return type(f"MoH{family.attention}", (RoutedAttention, getattr(module, family.attention)), namespace)
