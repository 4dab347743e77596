"""Mixture-of-Head attention (MoH, arXiv 2410.11842) for one family of transformers models, in one file without our package.

`moh export remote-code` copies this file into a model's directory, with the family at `FAMILY`; transformers runs it with
`trust_remote_code=True`. Where the package `mixture-of-heads` is installed, its classes are used instead: they compute only
the heads that each token has chosen. Here the family's own attention computes all heads, and each is then weighted by its
gate: the same outputs and gradients, but no time is saved, and there is no load-balance loss.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils import logging

try:
    import moh.models.transformers as installed
except ImportError:
    installed = None  # type: ignore[assignment]

_LOGGER = logging.get_logger(__name__)

FAMILY: dict[str, Any] = {
    "package": "llama",  # the folder in transformers.models
    "config": "LlamaConfig",
    "attention": "LlamaAttention",
    "saved_as": "LlamaForCausalLM",  # transformers keeps one class per Auto class and text of this file
    "models": ["LlamaModel", "LlamaForCausalLM"],  # the first is the backbone
    "layers": "layers",  # path from the backbone
    "attention_of_layer": "self_attn",  # path from a layer
    "queries": "q_proj",  # path from the attention, as the next
    "output": "o_proj",
    "fused": "",  # order of a joint projection's rows: "parts" (queries, keys, values), "heads", or "" if there is none
}

_BY_NORM = ("query_norm", "query_norm_rounded")


class Scorer(nn.Module):
    """A linear map that quantisers, which replace every `nn.Linear`, leave as it is."""

    def __init__(self, dim: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        linear = nn.Linear(dim, outputs, bias)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Router(nn.Module):
    """Input x `[B, N, C]` and queries q `[B, N, H, D]` -> gates `[B, N, H]`, as the routers of the package.

    Parameters: `shared.weight`, `routed.weight`, `stage.weight` (the paper's learned routers) or `contribution.*` ("linear",
    "threshold").
    """

    balance_weight = 0.0

    def __init__(self, config: Any, kind: str, shared: Any, active: int, thresholds: Any = None) -> None:
        super().__init__()
        heads, dim = config.num_attention_heads, config.hidden_size
        self.kind, self.active, self.thresholds = kind, active, thresholds
        self.unit, self.groups = getattr(config, "routing_unit", "head"), getattr(config, "num_key_value_heads", heads)
        if shared is None:
            shared = heads - active
        if isinstance(shared, int):  # the first ones, in every group where groups have equally many
            size = heads // self.groups if self.unit == "group_balanced" else heads
            first = shared * size // heads
            shared = [head for head in range(heads) if head % size < first]
        self.of_shared = sorted(shared)
        self.of_routed = [head for head in range(heads) if head not in self.of_shared]
        together = self.of_shared + self.of_routed
        self.places = [together.index(head) for head in range(heads)]
        if self.kind in ("linear", "threshold"):
            self.contribution = Scorer(dim, heads, bias=True)
        elif self.kind in ("two_stage", "single_stage"):
            if len(self.of_shared) > 1:
                self.shared = Scorer(dim, len(self.of_shared))
            if active:
                self.routed = Scorer(dim, len(self.of_routed))
            if active and self.of_shared and self.kind == "two_stage":
                self.stage = Scorer(dim, 2)
        elif self.kind not in _BY_NORM:
            raise ValueError(f"router {self.kind!r} is newer than this file: pip install mixture-of-heads")

    def forward(self, x: Tensor, q: Tensor | None) -> Tensor:
        shared, routed = x.new_ones((*x.shape[:-1], len(self.of_shared)), dtype=torch.float32), None
        if self.kind in ("linear", "threshold"):  # the gates' gradient stops at the router
            scores = self.contribution(x.detach()).float()[..., self.of_routed]
            routed = self._hard(scores, scores)
        elif self.kind in _BY_NORM:
            assert q is not None
            rounds, queries = self.kind == "query_norm_rounded", q[..., self.of_routed, :]
            norms = (queries if rounds else queries.float()).norm(dim=-1)
            if norms.shape[-1] > 1:
                norms = norms / norms.std(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
            probs = norms.softmax(-1)
            routed = self._hard((probs if rounds else norms).float(), probs.float())
        else:
            if hasattr(self, "shared"):
                shared = self.shared(x).float().softmax(-1) * len(self.of_shared)
            routed = x.new_zeros((*x.shape[:-1], len(self.of_routed)), dtype=torch.float32)
            if self.active:
                probs = self.routed(x).float().softmax(-1)
                chosen = torch.where(self._chosen(probs), probs, 0.0)
                routed = self.active * chosen / chosen.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).eps)
            if hasattr(self, "stage"):
                stage = self.stage(x).float().softmax(-1) * 2
                shared, routed = stage[..., :1] * shared, stage[..., 1:] * routed
        return torch.cat([shared, routed], -1)[..., self.places].to(x.dtype)

    def _hard(self, scores: Tensor, surrogate: Tensor) -> Tensor:
        """Gates of 1 and 0 by the scores, with the surrogate's gradient."""
        if not self.active:
            return torch.zeros_like(scores)
        return self._chosen(scores).to(scores.dtype) + (surrogate - surrogate.detach())

    def _chosen(self, scores: Tensor) -> Tensor:
        """Which routed heads are active, `[B, N, h_r]`: the k with the largest scores, or as the routing unit has it."""
        if self.active == scores.shape[-1]:
            return torch.ones_like(scores, dtype=torch.bool)
        if self.kind == "threshold":
            under: Tensor = scores <= self.thresholds[self.active]
            return ~under
        if self.unit == "group_balanced":
            return _largest(scores.unflatten(-1, (self.groups, -1)), self.active // self.groups).flatten(-2)
        if self.unit == "kv_group":
            size = len(self.places) // self.groups
            groups = _largest(scores.unflatten(-1, (-1, size)).sum(-1), self.active // size)
            return groups.repeat_interleave(size, -1)
        return _largest(scores, self.active)


def _largest(scores: Tensor, k: int) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k, dim=-1).indices, True)


class _WithGates:
    """Stands in for a module in one call of its class's `forward`, and weights the heads that W_O gets."""

    def __init__(self, module: nn.Module, output: list[str], gates: Tensor) -> None:
        self._module, (name, *rest) = module, output
        part = getattr(module, name)
        setattr(self, name, _WithGates(part, rest, gates) if rest else lambda heads: part(_weighted(heads, gates)))

    def __getattr__(self, name: str) -> Any:  # whatever else the family's code reads
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._module).forward(self, *args, **kwargs)


def _weighted(heads: Tensor, gates: Tensor) -> Tensor:
    """Heads `[B, N, H * D]`, weighted; as in the package, a gate of 0 gets no gradient."""
    gates = gates[..., None].to(heads.dtype)
    return (torch.where(gates != 0, heads.unflatten(-1, (gates.shape[-2], -1)), 0.0) * gates).flatten(-2)


class _RoutedAttention(nn.Module):
    family_attention: Any
    router: Router

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.training and self.router.balance_weight:
            _LOGGER.warning_once(
                "router_aux_loss_coef has no effect here; pip install mixture-of-heads to train with it"
            )
        queries = self._queries(hidden_states) if self.router.kind in _BY_NORM else None
        attention = _WithGates(self, FAMILY["output"].split("."), self.router(hidden_states, queries))
        return type(self).family_attention.forward(attention, hidden_states, *args, **kwargs)

    def _queries(self, x: Tensor) -> Any:  # [B, N, H, D]
        q, heads = _at(self, FAMILY["queries"])(x), len(self.router.places)
        if FAMILY["fused"] == "heads":
            return q.unflatten(-1, (heads, -1)).chunk(3, dim=-1)[0]
        if FAMILY["fused"] == "parts":
            q = q.unflatten(-1, (heads + 2 * self.router.groups, -1))[..., :heads, :].flatten(-2)
        return q.unflatten(-1, (heads, -1))


class _RoutedModel:
    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        layers = _at(self.base_model, FAMILY["layers"])  # type: ignore[attr-defined]
        path = FAMILY["attention_of_layer"]
        attentions = [_at(layer, path) for layer in layers if hasattr(layer, path)]  # hybrid models have layers without
        for index, attention in enumerate(attentions):
            if isinstance(attention, MoHAttention):  # of a model inside, made by `AutoModel`
                continue
            of_all: list[Any] = [config.router, getattr(config, "shared_heads", None), config.active_heads]
            of_all.append(getattr(config, "thresholds", None))
            kind, shared, active, thresholds = (value[index] if isinstance(value, list) else value for value in of_all)
            attention.__class__ = MoHAttention
            attention.router = Router(config, kind, shared, active, thresholds)
            attention.router.balance_weight = getattr(config, "router_aux_loss_coef", 0.0)
            if changes := getattr(config, "output_changes", None):  # kept for the package's dial; W_O already holds one
                weight, count = _at(attention, FAMILY["output"]).weight, len(changes["heads"])
                attention.output_changes = nn.Module()
                for name, shape in (
                    ("left", (weight.shape[0], changes["rank"])),
                    ("right", (changes["rank"], weight.shape[1])),
                ):
                    attention.output_changes.register_buffer(name, weight.new_zeros(count, *shape))


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _made(name: str, *bases: type, **namespace: Any) -> type:
    return type(name, bases, {"__module__": __name__, **namespace})


if installed is not None:
    for _name in (FAMILY["config"], *FAMILY["models"]):
        globals()[f"MoH{_name}"] = getattr(installed, f"MoH{_name}")
else:
    _folder = f"transformers.models.{FAMILY['package']}."
    _modeling = importlib.import_module(f"{_folder}modeling_{FAMILY['package']}")
    _Config = getattr(importlib.import_module(f"{_folder}configuration_{FAMILY['package']}"), FAMILY["config"])
    _Attention = getattr(_modeling, FAMILY["attention"])
    MoHAttention: Any = _made(f"MoH{FAMILY['attention']}", _RoutedAttention, _Attention, family_attention=_Attention)
    _MoHConfig = globals()[f"MoH{FAMILY['config']}"] = _made(
        f"MoH{FAMILY['config']}", _Config, model_type=f"moh_{_Config.model_type}"
    )
    for _name in FAMILY["models"]:
        globals()[f"MoH{_name}"] = _made(
            f"MoH{_name}", _RoutedModel, getattr(_modeling, _name), config_class=_MoHConfig
        )
    AutoModel.register(_MoHConfig, globals()[f"MoH{FAMILY['models'][0]}"], exist_ok=True)  # some classifiers make it so
