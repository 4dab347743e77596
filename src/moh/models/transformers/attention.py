"""The MoH attention of all families: what each family's attention computes, for the heads that each token chooses.

`families` states where projections, norms and scale are; rotary embedding is the family's own function. With an
`attn_implementation` that is not ours, the family's own `forward` computes all heads, weighted in front of W_O.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.utils import logging

from moh.attention import (
    BY_NAME,
    attend,
    moh_attention,
    project,
    project_output,
    project_queries,
    route,
    route_and_project,
)
from moh.models.transformers.decoding import decode
from moh.models.transformers.family import Family, at
from moh.routing import Router

_LOGGER = logging.get_logger(__name__)

DEFAULT = "moh"
"""The `attn_implementation` of our models unless another is chosen."""

IMPLEMENTATIONS: dict[str, str | None] = {DEFAULT: None} | {f"{DEFAULT}_{name}": name for name in BY_NAME}
"""Values of `attn_implementation` that compute the active heads alone -> attention backend, None for the fastest."""

for _name in IMPLEMENTATIONS:
    # A layer without a router uses all of its heads; ours don't get as far as looking up the function.
    AttentionInterface.register(_name, AttentionInterface()["sdpa"])
    AttentionMaskInterface.register(_name, AttentionMaskInterface()["sdpa"])


class RoutedAttention(nn.Module):
    """Mixed into a family's own attention class: the same parameters, a router, and each token's choice of heads.

    The parts of the attention are properties of the class that `parts` makes for a family.

    Attributes:
        family: where the parts of the attention are.
        family_attention: the family's own class.
        rotate: the family's rotary embedding `(q, k, cos, sin) -> (q, k)`; None where it has none.
        router: of this layer.
        core: what holds the projections, `scaling`, `is_causal` and `config`.
        query_projection: the projection of the queries, alone or with keys and values.
        key_projection, value_projection: None where one projection gives all three.
        output_projection: W_O.
        rotates: whether this layer rotates queries and keys.
        rotated_channels: how many channels are rotated; None for all.
        dropout_rate: probability of dropping an attention weight in training.
    """

    family: ClassVar[Family]
    family_attention: ClassVar[type[nn.Module]]
    rotate: ClassVar[Callable[..., tuple[Tensor, Tensor]] | None]
    router: Router
    core: Any
    query_projection: Any
    key_projection: Any
    value_projection: Any
    output_projection: Any
    rotates: bool
    rotated_channels: int | None
    dropout_rate: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        family, core, router = self.family, self.core, self.router
        implementation = core.config._attn_implementation
        if implementation not in IMPLEMENTATIONS:
            given = dict(kwargs, past_key_values=past_key_values, position_embeddings=position_embeddings)
            return self._with_all_heads(hidden_states, attention_mask, given)
        if past_key_values is None:
            past_key_values = kwargs.get("layer_past")  # GPT-NeoX's name
        backend = IMPLEMENTATIONS[implementation]
        if kwargs.get("output_attentions"):
            _LOGGER.warning_once(
                f"attn_implementation={implementation!r} gives no attention weights: they are None with "
                "output_attentions=True; model.set_attn_implementation('eager') gives them"
            )
        if family.is_plain:
            cache = kwargs.get("cache", past_key_values)
            decoded = decode(self, hidden_states, position_embeddings, attention_mask, cache, backend)
            if decoded is not None:
                return family.finish(self, decoded, hidden_states), None
        # "cache" is its name since transformers 5.24; before, that of a paged cache
        paged = None if kwargs.get("cache") is None else kwargs
        cache = past_key_values if paged is None else kwargs["cache"]
        gates, q, k, v, by_operator = self._project_and_place(hidden_states, position_embeddings, backend)
        k, v = self._cached(k, v, cache, paged)
        if (own := self.own_gates(hidden_states)) is not None:
            gates = gates * own
        share = router.usual_share()
        # transformers omits the mask where it is plainly causal, or where a single token sees everything before it
        seen: dict[str, Any] = dict(
            is_causal=bool(core.is_causal) and attention_mask is None and q.shape[2] > 1,
            attn_mask=attention_mask,
            scale=getattr(core, "scaling", None),  # the usual one where a class keeps none
        )
        if by_operator:
            out = attend(q, k, v, gates, self.output_projection, share, **seen)
            return family.finish(self, out, hidden_states), None
        heads = moh_attention(
            q,
            k,
            v,
            gates,
            **seen,
            dropout_p=self.dropout_rate if self.training else 0.0,
            heads_per_group=router.heads_per_group,
            backend=backend,
        )  # [B, N, H, D]
        out = project_output(self.output_projection, heads, gates, share, backend)
        return family.finish(self, out, hidden_states), None

    def _project_and_place(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, backend: str | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
        """Gates `[B, N, H]` of x `[B, N, C]`, then queries, keys and values `[B, heads, N, D]`, with norms and rotation.

        The last entry is whether an operator without gradients has projected, which leaves queries of inactive pairs out.
        """
        family, router = self.family, self.router
        gates = None
        if not (
            torch.is_grad_enabled() or family.fused or router.reads_queries or (self.training and self.dropout_rate)
        ):
            gates = route(router, x, backend).gates
            # A norm over all heads together reads the queries of all of them
            share = 1.0 if family.joint_norms else router.usual_share()
            projections = (self.query_projection, self.key_projection, self.value_projection)
            angles = position_embeddings if family.is_plain else None
            projected = project(x, gates, projections, share, angles=angles, backend=backend)
            if projected is not None:
                if angles is None:
                    q, k, v = (part.transpose(1, 2) for part in projected)
                    projected = self._positioned(q, k, v, position_embeddings)
                return gates, *projected, True
        gates, q, k, v = self._project(x, backend, gates)
        return gates, *self._positioned(q, k, v, position_embeddings), False

    def placed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        paged: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected queries, keys and values `[B, N, heads, D]`, normalised, rotated and joined with the cache.

        Args:
            paged: the call's arguments where a paged cache needs them.

        Returns:
            q `[B, H, N, D]`, k and v `[B, Hkv, Nk, D]`.
        """
        q, k, v = self._positioned(q, k, v, position_embeddings)
        return q, *self._cached(k, v, cache, paged)

    def _cached(
        self, k: Tensor, v: Tensor, cache: Cache | None, paged: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        if cache is None:
            return k, v
        joined: tuple[Tensor, Tensor] = cache.update(
            k, v, self.core.layer_idx, **({} if paged is None else {"kwargs": paged})
        )
        return joined

    def _positioned(
        self, q: Tensor, k: Tensor, v: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected queries, keys and values `[B, N, heads, D]` -> the same `[B, heads, N, D]`, normalised and rotated."""
        family, core = self.family, self.core
        if family.query_norm and hasattr(core, family.query_norm):
            q = self._normalised(q, getattr(core, family.query_norm))
            k = self._normalised(k, getattr(core, family.key_norm))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if position_embeddings is not None and self.rotates:
            q, k = self._rotated(q, k, *position_embeddings)
        return q, k, v

    def gates(self, x: Tensor) -> Tensor:
        """Gates `[B, N, H]` of the heads that the layer has, by its input."""
        gates: Tensor = self.router(x).gates
        return gates

    def own_gates(self, x: Tensor) -> Tensor | None:
        """The family's own weights of the layer's heads, by its input: `[B, N, H]`; None where it has none."""
        gate = getattr(self.core, self.family.gate) if self.family.gate else None
        return None if gate is None else gate(x).sigmoid()

    def _with_all_heads(
        self, x: Tensor, attention_mask: Tensor | None, given: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The family's own attention, its heads weighted by the gates in front of W_O; also the attention weights."""
        if not self.router.reads_queries:
            gates = self.router(x).gates
        elif self.family.fused:
            gates = self._project(x, None)[0]
        else:  # projected twice, as families differ in what they do to queries before the attention sees them
            gates = self.router(q=self.query_projection(x).unflatten(-1, (self.router.heads_here, -1))).gates
        attention = _WithGates(self, self.family.output.split("."), gates)
        given = {name: value for name, value in given.items() if value is not None}
        own: Callable[..., tuple[Tensor, Tensor | None]] = self.family_attention.forward
        return own(attention, x, attention_mask=attention_mask, **given)

    def _project(
        self, x: Tensor, backend: str | None, gates: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gates of x `[B, N, C]` by x or its queries, unless they are given; then queries, keys and values, split into heads."""
        family, router = self.family, self.router
        if not family.fused:
            # A norm over all heads together reads the queries of all of them: "reference" computes them all
            of_queries = "reference" if family.joint_norms else backend
            if gates is None:
                routing, q = route_and_project(router, self.query_projection, x, of_queries)
                gates = routing.gates
            else:
                q = project_queries(self.query_projection, x, gates, router.usual_share(), of_queries)
            k, v = (p(x).unflatten(-1, (-1, q.shape[-1])) for p in (self.key_projection, self.value_projection))
            return gates, q, k, v
        H, qkv = router.config.num_heads, self.query_projection(x)
        if family.fused_by_head:
            q, k, v = qkv.unflatten(-1, (H, -1)).chunk(3, dim=-1)
        else:
            Hkv = getattr(self.core.config, "num_key_value_heads", H)
            q, k, v = qkv.unflatten(-1, (H + 2 * Hkv, -1)).split((H, Hkv, Hkv), dim=2)
        return (router(q=q) if router.reads_queries else router(x)).gates, q, k, v

    def _normalised(self, heads: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """Queries or keys `[B, N, H, D]` after their norm, which is of each head or of all heads together."""
        return norm(heads.flatten(-2)).view_as(heads) if self.family.joint_norms else norm(heads)

    def _rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotate = type(self).rotate
        assert rotate is not None
        width = self.rotated_channels
        if width is None or width == q.shape[-1]:
            return rotate(q, k, cos, sin)
        rotated_q, rotated_k = rotate(q[..., :width], k[..., :width], cos, sin)
        return torch.cat((rotated_q, q[..., width:]), dim=-1), torch.cat((rotated_k, k[..., width:]), dim=-1)


class _WithGates:
    """Stands in for a module in one call of its class's `forward`, and weights the heads that W_O gets.

    No hook or attribute of the module is changed, so several threads may call it.
    """

    def __init__(self, module: nn.Module, output: list[str], gates: Tensor) -> None:
        """`output` is W_O's path from the module."""
        self._module = module
        name, *rest = output
        part = getattr(module, name)
        setattr(self, name, _WithGates(part, rest, gates) if rest else lambda heads: part(weighted(heads, gates)))

    def __getattr__(self, name: str) -> Any:  # whatever else the class's code reads
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._module).forward(self, *args, **kwargs)


def weighted(heads: Tensor, gates: Tensor) -> Tensor:
    """Heads `[B, N, H * D]`, weighted by gates `[B, N, H]`; as in `moh_attention`, a gate of 0 gets no gradient."""
    gates = gates[..., None].to(heads.dtype)
    weighted = torch.where(gates != 0, heads.unflatten(-1, (gates.shape[-2], -1)), 0.0) * gates
    return weighted.flatten(-2)


def parts(family: Family) -> dict[str, property]:
    """The properties of a family's `RoutedAttention` that name its parts; paths are split once, not per call."""
    return {
        "core": _at(family.core),
        "query_projection": _at(family.core, family.fused or family.queries),
        "key_projection": _at(family.core, family.keys, exists=not family.fused),
        "value_projection": _at(family.core, family.values, exists=not family.fused),
        "output_projection": _at(family.output),
        "rotates": property(lambda attention: bool(family.rotary) and at(attention, family.rotary_where) is not None),
        "rotated_channels": _at(family.rotary_width, exists=bool(family.rotary_width)),
        "dropout_rate": _at(family.core, family.dropout),
    }


def _at(*paths: str, exists: bool = True) -> property:
    """A property that follows these paths one after the other; None unless it `exists`."""
    names = [name for path in paths for name in path.split(".") if name]

    def follow(attention: Any) -> Any:
        for name in names:
            attention = getattr(attention, name)
        return attention

    return property(follow if exists else lambda _: None)
