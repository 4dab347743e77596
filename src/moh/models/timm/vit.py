"""Mixture-of-Head attention in timm's `VisionTransformer`: the same parameters under the same names, and a router per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from timm.layers.attention import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn

from moh.attention import moh_attention, project_output, project_qkv, route, whole_layer
from moh.config import MoHConfig
from moh.routing import build_router, router_class
from moh.routing.router import is_untouched

ROUTER_STD = 0.02
"""Standard deviation of a new router's weights, as in timm's other linear maps."""


class MoHViTAttention(Attention):
    """Mixture-of-Head attention in place of `timm.layers.Attention`.

    Args:
        dim: C, the width of the input.
        num_heads: h.
        shared_heads: h_s: a number (the first ones) or the indices of the heads that are always active.
        active_heads: k, routed heads active per token.
        router: one of `moh.config.ROUTERS`, as in `moh.MoHConfig`.
        backend: attention backend, None for the fastest that supports the call (`moh.attention.backends`).
        options: all other arguments of `timm.layers.Attention`, which depend on timm's version (`qkv_bias`, `qk_norm`,
            `scale_norm`, `norm_layer`, `attn_drop`, `proj_drop`, `gated`, `device`, `dtype`, ...).

    Parameters: those of timm's attention (`qkv`, `q_norm`, `k_norm`, `norm`, `gate`, `proj`) and `router.*`.

    Attributes:
        static_backend: the one that exports use, whose shapes don't depend on the chosen heads.

    Raises:
        ValueError: sizes don't match, or the query-norm router is given normalised queries.
    """

    static_backend: ClassVar[str] = "grouped"  # all heads: no group has more than one

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        shared_heads: int | Sequence[int],
        active_heads: int,
        router: str = "two_stage",
        backend: str | None = None,
        **options: Any,
    ) -> None:
        config = MoHConfig(num_heads, shared_heads, active_heads, router)
        super().__init__(dim, num_heads, **options)
        self._add_router(config, backend)

    @classmethod
    def from_dense(cls, dense: Attention, config: MoHConfig, *, backend: str | None = None) -> Self:
        """A MoH attention with the modules of `dense` (not copies) and a new router.

        Raises:
            ValueError: `config` has a different number of heads, or the query-norm router is given normalised queries.
        """
        if config.num_heads != dense.num_heads:
            raise ValueError(f"config must have the attention's num_heads = {dense.num_heads}, got {config.num_heads}")
        moh = cls.__new__(cls)
        nn.Module.__init__(moh)
        for name, value in vars(dense).items():  # plain values: which ones depends on timm's version
            if not name.startswith("_"):
                setattr(moh, name, value)
        for name, child in dense.named_children():
            setattr(moh, name, child)
        moh._add_router(config, backend)
        return moh

    def _add_router(self, config: MoHConfig, backend: str | None) -> None:
        if router_class(config.router).reads_queries and not isinstance(self.q_norm, nn.Identity):
            raise ValueError(
                f"router must not be {config.router!r} where queries are normalised (qk_norm): all have about the same norm, "
                "which carries no information; 'linear' and 'two_stage' read the layer's input"
            )
        weight = self.qkv.weight
        self.backend = backend
        self.router = build_router(config, self.qkv.in_features, device=weight.device, dtype=weight.dtype)
        self.router.train(self.training)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise the router; timm's `VisionTransformer.init_weights` calls it after the layers inside."""
        for parameter in self.router.parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=ROUTER_STD)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, N, C]` -> `[B, N, dim_out]`.

        Args:
            x: `[B, N, C]`.
            attn_mask: broadcastable to `[B, h, N, N]`; bool (True = may be seen) or added to the scores.
            is_causal: token i sees tokens 0 to i.
        """
        B, N, _ = x.shape
        share = self.router.usual_share()
        dropout = self.attn_drop.p if self.training else 0.0
        changed = changes_heads(self) or not is_untouched(self.norm)
        if self.router.reads_queries:
            q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim).unbind(2)  # [B, N, h, D]
            routing = self.router(q=q)
        else:
            routing = route(self.router, x, self.backend)
            whole = None
            if not changed:
                whole = whole_layer(
                    x,
                    routing.gates,
                    [self.qkv],
                    self.proj,
                    share,
                    between=(self.q_norm, self.k_norm),
                    special=(attn_mask,),
                    dropout_p=dropout,
                    is_causal=is_causal,
                    scale=self.scale,
                    backend=self.backend,
                )
            if whole is not None:
                return self.proj_drop(whole)  # type: ignore[no-any-return]
            q, k, v = project_qkv(self.qkv, x, routing.gates, share, self.backend)
        q, k = self.q_norm(q), self.k_norm(k)
        heads = moh_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            routing.gates,
            is_causal=is_causal,
            attn_mask=attn_mask,
            scale=self.scale,
            dropout_p=dropout,
            backend=self.backend,
        )  # [B, N, h, D]
        if changed:
            out = self.proj(self._changed(heads.flatten(2), x))
        else:
            out = project_output(self.proj, heads, routing.gates, share, self.backend)
        return self.proj_drop(out)  # type: ignore[no-any-return]

    def _changed(self, heads: Tensor, x: Tensor) -> Tensor:
        heads = self.norm(heads)  # [B, N, h * D]
        gate = getattr(self, "gate", None)
        return heads if gate is None else heads * torch.sigmoid(gate(x))


def changes_heads(attention: Attention) -> bool:
    """Whether the heads are changed before the output projection (timm's `scale_norm` and `gated`)."""
    return type(attention.norm) is not nn.Identity or getattr(attention, "gate", None) is not None


def dense_attentions(model: nn.Module) -> list[Attention]:
    """The attention layers of a dense `VisionTransformer`, in the order of its blocks.

    Raises:
        ValueError: the model's attention can't be replaced; names the reason and the supported models.
    """
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"model must be a timm VisionTransformer (vit_*, deit_*, deit3_* and others of that class), "
            f"got {type(model).__name__}, whose attention is of another kind"
        )
    if moh_attentions(model):
        raise ValueError("model is a MoH model already: convert the dense model that it was made from")
    attentions: list[Attention] = []
    for index, block in enumerate(model.blocks):
        found = [module for module in block.modules() if type(module) is Attention]
        if not found:
            raise ValueError(
                f"model can't be converted: its block {index} ({type(block).__name__}) holds no timm.layers.Attention; "
                "models whose blocks are timm's Block can (vit_*_patch*, deit_*, deit3_*)"
            )
        attentions += found
    heads = {attention.num_heads for attention in attentions}
    if len(heads) != 1:
        raise ValueError(f"model must have the same number of heads in every layer, got {sorted(heads)}")
    for index, attention in enumerate(attentions):
        for name in ("qkv", "proj"):
            kind = type(getattr(attention, name))
            if kind is not nn.Linear:
                raise ValueError(
                    f"model must have plain nn.Linear projections, but {name} of attention layer {index} is a "
                    f"{kind.__name__}: merge adapters or undo the quantisation first"
                )
    return attentions


def moh_attentions(model: nn.Module) -> list[MoHViTAttention]:
    """The MoH attention layers of a model, in order; empty for a dense one."""
    return [module for module in model.modules() if isinstance(module, MoHViTAttention)]


def replace_attention(
    model: nn.Module, layers: Sequence[MoHConfig], *, backend: str | None = None
) -> list[MoHViTAttention]:
    """Replace the attention layers of a dense model, in place; weights stay, routers are new.

    Args:
        model: a timm `VisionTransformer` or a subclass (a distilled DeiT).
        layers: heads and routing of each attention layer.
        backend: attention backend, None for the fastest that supports the call.

    Returns:
        the new layers, in the order of the blocks.

    Raises:
        ValueError: as in `dense_attentions`, or `layers` has the wrong length; the model is unchanged.
    """
    dense = dense_attentions(model)
    if len(layers) != len(dense):
        raise ValueError(f"layers must have one entry per attention layer ({len(dense)}), got {len(layers)}")
    new = {
        old: MoHViTAttention.from_dense(old, layer, backend=backend) for old, layer in zip(dense, layers, strict=True)
    }
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child in new:
                setattr(module, name, new[child])
    return list(new.values())
