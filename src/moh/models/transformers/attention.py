"""The MoH attention of all families: what each family's attention computes, of the heads that a token chooses.

A family says in `table` where its projections, norms and scale are; rotary embedding is its own function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from moh.attention import moh_attention, project_output
from moh.layers.queries import route_and_project
from moh.models.transformers.families import Family, at
from moh.routing import Router, RoutingInfo


class RoutedAttention(nn.Module):
    """Mixed into a family's own attention class: the same parameters, a router, and each token's choice of heads.

    Attributes:
        family: where the parts of the attention are.
        rotate: the family's rotary embedding `(q, k, cos, sin) -> (q, k)`; None where it has none.
        router: of this layer.
    """

    family: ClassVar[Family]
    rotate: ClassVar[Callable[..., tuple[Tensor, Tensor]] | None]
    router: Router

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        family, core, layer = self.family, at(self, self.family.core), self.router.config
        # `eager` is the definition
        backend = "reference" if core.config._attn_implementation == "eager" else core.config.moh_backend
        routing, q, k, v = self._project(core, hidden_states, backend)  # [B, N, H, D], [B, N, Hkv, D] twice
        if family.query_norm and hasattr(core, family.query_norm):
            q, k = getattr(core, family.query_norm)(q), getattr(core, family.key_norm)(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if position_embeddings is not None and self.rotate is not None:
            q, k = self._rotated(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, core.layer_idx)
        # transformers leaves the mask out where it is plainly causal, or where a single token sees everything before it
        heads = moh_attention(
            q,
            k,
            v,
            routing.gates,
            is_causal=bool(core.is_causal) and attention_mask is None and q.shape[2] > 1,
            attn_mask=attention_mask,
            scale=core.scaling,
            dropout_p=at(core, family.dropout) if self.training else 0.0,
            heads_per_group=layer.heads_per_group,
            groups_per_token=layer.groups_per_token,
            backend=backend,
        )  # [B, N, H, D]
        out = project_output(at(self, family.output), heads, routing.gates, layer.share, backend)
        return family.finish(self, out, hidden_states), None

    @property
    def query_projection(self) -> nn.Module:
        """The projection of the queries, alone or with keys and values."""
        family = self.family
        projection: nn.Module = at(at(self, family.core), family.fused or family.queries)
        return projection

    def _project(self, core: Any, x: Tensor, backend: str | None) -> tuple[RoutingInfo, Tensor, Tensor, Tensor]:
        """The routing of x `[B, N, C]`, decided by it or by the queries, and queries, keys and values by heads."""
        family = self.family
        if not family.fused:
            routing, q = route_and_project(self.router, at(core, family.queries), x, backend)
            width = q.shape[-1]
            return routing, q, *(at(core, p)(x).unflatten(-1, (-1, width)) for p in (family.keys, family.values))
        H = self.router.config.num_heads
        Hkv = getattr(core.config, "num_key_value_heads", H)
        qkv = at(core, family.fused)(x).unflatten(-1, (H + 2 * Hkv, -1))  # [B, N, H + 2 Hkv, D]
        q, k, v = qkv.split((H, Hkv, Hkv), dim=2)
        return self.router(q=q) if self.router.uses_queries else self.router(x), q, k, v

    def _rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotate = type(self).rotate
        assert rotate is not None
        width = at(self, self.family.rotary_width) if self.family.rotary_width else q.shape[-1]
        if width == q.shape[-1]:
            return rotate(q, k, cos, sin)
        rotated_q, rotated_k = rotate(q[..., :width], k[..., :width], cos, sin)
        return torch.cat((rotated_q, q[..., width:]), dim=-1), torch.cat((rotated_k, k[..., width:]), dim=-1)
