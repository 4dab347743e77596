"""Attention layers whose heads are fixed (`router="fixed"`): smaller projections, no routing; without heads no attention at all.

A layer has the projections of its shared heads and of the key/value heads that these read, in the order of the dense layer.
One without heads has neither and no cache; it adds nothing, or a linear map of its input (`config.without_heads`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from moh.attention import moh_attention
from moh.config import FIXED, MoHConfig
from moh.models.transformers.attention import IMPLEMENTATIONS, RoutedAttention
from moh.models.transformers.decoding import decode
from moh.models.transformers.family import Family, at

WITHOUT_HEADS = ("nothing", "linear")
"""What a layer without heads adds to the residual stream (its bias apart): nothing, or a linear map of its input."""


class FixedAttention(RoutedAttention):
    """`RoutedAttention` of a layer whose heads are fixed; `cut` gives it its projections.

    Attributes:
        eager: the family's own attention function for `attn_implementation="eager"`.
        heads_of_group: how many heads read each of the layer's key/value heads.
        keeps_length: whether a layer without heads has to keep one number for each token in the cache: the first layer of its
            kind (full or with a window), whose length is taken for all, and those with a window, which can't be empty.
    """

    eager: ClassVar[Any]
    heads_of_group: tuple[int, ...]
    keeps_length: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        family, core = self.family, self.core
        cache = past_key_values
        for name in ("layer_past", "cache"):  # GPT-NeoX's name, and that of all since transformers 5.24
            given = kwargs.pop(name, None)  # an empty cache is falsy
            cache = given if cache is None else cache
        if self.router.is_observed():
            self.router(hidden_states)
        if not self.heads_of_group:
            if cache is not None and self.keeps_length:
                mark = hidden_states.new_zeros(*hidden_states.shape[:2], 1)[:, None]  # [B, 1, N, 1]
                cache.update(mark, mark, core.layer_idx)
            return family.finish(self, self.output_projection(hidden_states), hidden_states), None
        implementation = core.config._attn_implementation
        is_ours = implementation in IMPLEMENTATIONS
        backend = IMPLEMENTATIONS.get(implementation)
        most = max(self.heads_of_group)
        is_even = min(self.heads_of_group) == most
        if is_ours and is_even and family.is_plain:
            decoded = decode(self, hidden_states, position_embeddings, attention_mask, cache, backend)
            if decoded is not None:
                return family.finish(self, decoded, hidden_states), None
        q, k, v = self.placed(*self._projected(hidden_states), position_embeddings, cache)  # [B, H or Hkv, N, D]
        weights, own = None, self.own_gates(hidden_states)
        scale = getattr(core, "scaling", q.shape[-1] ** -0.5)  # the usual one where a class keeps none
        if is_ours:
            gates = self.gates(hidden_states) if own is None else own
            if not is_even:  # the kernels take groups of one size, and compute nothing for a gate of 0
                q, gates = self._padded(q, 1, most), self._padded(gates, 2, most)
            heads = moh_attention(
                q,
                k,
                v,
                gates,
                is_causal=bool(core.is_causal) and attention_mask is None and q.shape[2] > 1,
                attn_mask=attention_mask,
                scale=scale,
                dropout_p=self.dropout_rate if self.training else 0.0,
                backend=backend,
            )  # [B, N, H, D]
            if not is_even:
                parts = heads.split(most, dim=2)
                heads = torch.cat([p[:, :, :n] for p, n in zip(parts, self.heads_of_group, strict=True)], dim=2)
        else:
            if not is_even:
                k, v = self._repeated(k), self._repeated(v)
            window = getattr(core, "sliding_window", getattr(core.config, "sliding_window", None))
            attend = AttentionInterface().get_interface(implementation, type(self).eager)
            options = kwargs if window is None else kwargs | {"sliding_window": window}
            heads, weights = attend(
                core,
                q,
                k,
                v,
                attention_mask,
                dropout=self.dropout_rate if self.training else 0.0,
                scaling=scale,
                **options,
            )
            if own is not None:
                heads = heads * own[..., None]
        return family.finish(self, self.output_projection(heads.flatten(2)), hidden_states), weights

    def gates(self, x: Tensor) -> Tensor:
        return x.new_ones(*x.shape[:2], sum(self.heads_of_group))

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, N, H or Hkv, D]`."""
        H, Hkv = sum(self.heads_of_group), len(self.heads_of_group)
        if self.family.fused_by_head:
            q, k, v = self.query_projection(x).unflatten(-1, (H, -1)).chunk(3, dim=-1)
            return q, k, v
        if self.family.fused:
            q, k, v = self.query_projection(x).unflatten(-1, (H + 2 * Hkv, -1)).split((H, Hkv, Hkv), dim=2)
            return q, k, v
        q = self.query_projection(x).unflatten(-1, (H, -1))
        return q, *(p(x).unflatten(-1, (Hkv, -1)) for p in (self.key_projection, self.value_projection))

    def _padded(self, x: Tensor, dim: int, size: int) -> Tensor:
        """`x`, whose dimension `dim` has the heads, with zeros behind each group of fewer than `size` heads."""
        parts = []
        for part in x.split(self.heads_of_group, dim=dim):
            missing = list(part.shape)
            missing[dim] = size - part.shape[dim]
            parts += [part, part.new_zeros(missing)]
        return torch.cat(parts, dim=dim)

    def _repeated(self, x: Tensor) -> Tensor:
        """Keys or values `[B, Hkv, N, D]`, once for each head that reads them."""
        groups = zip(x.split(1, dim=1), self.heads_of_group, strict=True)
        return torch.cat([group.expand(-1, n, -1, -1) for group, n in groups], dim=1)


class Nothing(nn.Module):
    """W_O of a layer that has no heads and adds nothing but the bias of the dense W_O, if it had one."""

    bias: Tensor | None

    def __init__(self, dense: Any) -> None:
        super().__init__()
        self.register_parameter("bias", None if dense.bias is None else nn.Parameter(torch.zeros_like(dense.bias)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.bias is None else self.bias.expand_as(x)


@torch.no_grad()
def cut(attention: Any, without_heads: str) -> None:
    """Replace the projections of a layer, built for all heads, by those of its fixed heads; their weights are new.

    Args:
        attention: the `FixedAttention`, with its router.
        without_heads: what it adds without heads, one of `WITHOUT_HEADS`.
    """
    family, core, layer = attention.family, attention.core, attention.router.config
    config, output = core.config, attention.output_projection
    width = _sizes(output)[0] // layer.num_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or layer.num_heads
    groups = _groups(layer, kv_heads)
    attention.heads_of_group = tuple(groups.values())
    index = getattr(core, "layer_idx", None)
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    has_window = getattr(core, "sliding_window", getattr(config, "sliding_window", None)) is not None
    attention.keeps_length = index is not None and (has_window or kinds.index(kinds[index]) == index)
    made: nn.Module | None
    for path, heads, count in _kept(family, core, layer, kv_heads):
        projection = at(core, path)
        inputs, rows = _sizes(projection)
        made = _like(projection, inputs, rows // count * len(heads), projection.bias is not None) if heads else None
        _replace(core, path, made)
    for name, heads in _norms(family, core, layer, kv_heads):
        norm = getattr(core, name)
        if not heads:
            setattr(core, name, None)
        elif norm.weight.dim() == 2:  # [heads, D]: each head has weights of its own
            norm.weight = nn.Parameter(norm.weight[: len(heads)].clone())
    if groups:
        made = _like(output, width * layer.num_shared, _sizes(output)[1], output.bias is not None)
    elif without_heads == "linear":
        made = _like(output, config.hidden_size, _sizes(output)[1], True)
    else:
        made = Nothing(output)
    _replace(attention, family.output, made)
    if hasattr(core, "num_key_value_groups"):  # of the family's attention functions
        core.num_key_value_groups = max(groups.values(), default=1) if len(set(groups.values())) == 1 else 1


def cut_weights(family: Family, dense: Any, layer: MoHConfig, kv_heads: int | None) -> dict[str, Tensor]:
    """The weights of a dense layer's input projections that remain with fixed heads, by their names in the layer.

    Args:
        dense: the family's own attention module.
        layer: the layer's heads.
        kv_heads: of the dense layer; None for as many as heads.
    """
    state: dict[str, Tensor] = {}
    core = at(dense, family.core)
    for path, heads, count in _kept(family, core, layer, kv_heads or layer.num_heads):
        projection, name = at(core, path), f"{family.core}.{path}".removeprefix(".")
        is_transposed = isinstance(projection, Conv1D)
        weight = projection.weight.T if is_transposed else projection.weight
        if heads:
            kept = weight.detach().unflatten(0, (count, -1))[heads].flatten(0, 1)
            state[f"{name}.weight"] = kept.T.contiguous() if is_transposed else kept
        if heads and projection.bias is not None:
            state[f"{name}.bias"] = projection.bias.detach().unflatten(0, (count, -1))[heads].flatten()
    for name, heads in _norms(family, core, layer, kv_heads or layer.num_heads):
        for part, tensor in getattr(core, name).named_parameters():
            if heads:
                full_name = f"{family.core}.{name}.{part}".removeprefix(".")
                state[full_name] = tensor.detach()[heads] if tensor.dim() == 2 else tensor.detach().clone()
    return state


def refuse_fixed_heads(layers: list[MoHConfig], what: str) -> None:
    """Refuse what needs layers of one shape.

    Raises:
        ValueError: some layers' heads are fixed, so that layers differ in their projections.
    """
    fixed = [index for index, layer in enumerate(layers) if layer.router == FIXED]
    if fixed:
        raise ValueError(
            f"{what} needs the same heads and key/value heads in every layer, and this model has fixed heads "
            f"(router='fixed') in {len(fixed)} of {len(layers)} layers, layer {fixed[0]} first"
        )


def _groups(layer: MoHConfig, kv_heads: int) -> dict[int, int]:
    """Key/value head -> how many of the layer's heads read it, without those that none reads; ascending."""
    groups: dict[int, int] = {}
    for head in layer.shared_indices:
        group = head * kv_heads // layer.num_heads
        groups[group] = groups.get(group, 0) + 1
    return groups


def _kept(family: Family, core: Any, layer: MoHConfig, kv_heads: int) -> Iterator[tuple[str, list[int], int]]:
    """Each input projection: its path from the core, the parts whose rows are kept, and how many equal parts its rows are."""
    heads, groups = list(layer.shared_indices), list(_groups(layer, kv_heads))
    if family.fused_by_head:
        yield family.fused, heads, layer.num_heads
    elif family.fused:
        keys = [layer.num_heads + group for group in groups]
        yield family.fused, [*heads, *keys, *(key + kv_heads for key in keys)], layer.num_heads + 2 * kv_heads
    else:
        yield family.queries, heads, layer.num_heads
        yield family.keys, groups, kv_heads
        yield family.values, groups, kv_heads
    if family.gate and getattr(core, family.gate) is not None:
        yield family.gate, heads, layer.num_heads


def _norms(family: Family, core: Any, layer: MoHConfig, kv_heads: int) -> Iterator[tuple[str, list[int]]]:
    """Name of each norm of queries or keys in the core, and the heads that it is for."""
    if family.query_norm and getattr(core, family.query_norm, None) is not None:
        yield family.query_norm, list(layer.shared_indices)
        yield family.key_norm, list(_groups(layer, kv_heads))


def _sizes(linear: Any) -> tuple[int, int]:
    """Channels that a linear layer reads and gives."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def _like(linear: Any, inputs: int, outputs: int, bias: bool) -> nn.Module:
    with torch.device(linear.weight.device):
        made = Conv1D(outputs, inputs) if isinstance(linear, Conv1D) else nn.Linear(inputs, outputs, bias=bias)
    return made.to(linear.weight.dtype)


def _replace(module: Any, path: str, made: nn.Module | None) -> None:
    *parents, name = path.split(".")
    setattr(at(module, ".".join(parents)), name, made)
