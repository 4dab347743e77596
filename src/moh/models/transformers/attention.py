"""The MoH attention of all families: what each family's attention computes, for the heads that each token chooses.

`families` states where projections, norms and scale are; rotary embedding is the family's own function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from moh.attention import moh_attention, project_output, route_and_project
from moh.models.transformers.decoding import decode
from moh.models.transformers.families import Family
from moh.routing import Router, RoutingInfo


class RoutedAttention(nn.Module):
    """Mixed into a family's own attention class: the same parameters, a router, and each token's choice of heads.

    The parts of the attention are properties of the class that `parts` makes for a family.

    Attributes:
        family: where the parts of the attention are.
        rotate: the family's rotary embedding `(q, k, cos, sin) -> (q, k)`; None where it has none.
        router: of this layer.
        core: what holds the projections, `scaling`, `is_causal` and `config`.
        query_projection: the projection of the queries, alone or with keys and values.
        key_projection, value_projection: None where one projection gives all three.
        output_projection: W_O.
        rotated_channels: how many channels are rotated; None for all.
        dropout_rate: probability of dropping an attention weight in training.
    """

    family: ClassVar[Family]
    rotate: ClassVar[Callable[..., tuple[Tensor, Tensor]] | None]
    router: Router
    core: Any
    query_projection: Any
    key_projection: Any
    value_projection: Any
    output_projection: Any
    rotated_channels: int | None
    dropout_rate: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        family, core, layer = self.family, self.core, self.router.config
        # `eager` is the definition
        backend = "reference" if core.config._attn_implementation == "eager" else core.config.moh_backend
        if family.is_plain:
            decoded = decode(self, hidden_states, position_embeddings, attention_mask, past_key_values, backend)
            if decoded is not None:
                return decoded, None
        routing, q, k, v = self._project(core, hidden_states, backend)  # [B, N, H, D], [B, N, Hkv, D] twice
        if family.query_norm and hasattr(core, family.query_norm):
            q, k = getattr(core, family.query_norm)(q), getattr(core, family.key_norm)(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if position_embeddings is not None and self.rotate is not None:
            q, k = self._rotated(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, core.layer_idx)
        # transformers omits the mask where it is plainly causal, or where a single token sees everything before it
        heads = moh_attention(
            q,
            k,
            v,
            routing.gates,
            is_causal=bool(core.is_causal) and attention_mask is None and q.shape[2] > 1,
            attn_mask=attention_mask,
            scale=core.scaling,
            dropout_p=self.dropout_rate if self.training else 0.0,
            heads_per_group=layer.heads_per_group,
            backend=backend,
        )  # [B, N, H, D]
        out = project_output(self.output_projection, heads, routing.gates, layer.share, backend)
        return family.finish(self, out, hidden_states), None

    def _project(self, core: Any, x: Tensor, backend: str | None) -> tuple[RoutingInfo, Tensor, Tensor, Tensor]:
        """The routing of x `[B, N, C]`, by x or its queries; then queries, keys and values, split into heads."""
        if not self.family.fused:
            routing, q = route_and_project(self.router, self.query_projection, x, backend)
            k, v = (p(x).unflatten(-1, (-1, q.shape[-1])) for p in (self.key_projection, self.value_projection))
            return routing, q, k, v
        H = self.router.config.num_heads
        Hkv = getattr(core.config, "num_key_value_heads", H)
        qkv = self.query_projection(x).unflatten(-1, (H + 2 * Hkv, -1))  # [B, N, H + 2 Hkv, D]
        q, k, v = qkv.split((H, Hkv, Hkv), dim=2)
        return self.router(q=q) if self.router.reads_queries else self.router(x), q, k, v

    def _rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotate = type(self).rotate
        assert rotate is not None
        width = self.rotated_channels
        if width is None or width == q.shape[-1]:
            return rotate(q, k, cos, sin)
        rotated_q, rotated_k = rotate(q[..., :width], k[..., :width], cos, sin)
        return torch.cat((rotated_q, q[..., width:]), dim=-1), torch.cat((rotated_k, k[..., width:]), dim=-1)


def parts(family: Family) -> dict[str, property]:
    """The properties of a family's `RoutedAttention` that name its parts; paths are split once, not per call."""
    return {
        "core": _at(family.core),
        "query_projection": _at(family.core, family.fused or family.queries),
        "key_projection": _at(family.core, family.keys, exists=not family.fused),
        "value_projection": _at(family.core, family.values, exists=not family.fused),
        "output_projection": _at(family.output),
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
