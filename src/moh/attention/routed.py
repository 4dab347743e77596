"""A layer's routing and what follows it, by as few operators as the call allows.

`Router.forward`, the projections and `moh_attention` are the definition and handle everything. Without gradients, and where
nothing observes or changes the steps in between, routing is one operator (`moh::cpu_route`), and so are projections and
attention (`moh::cpu_layer`): in small layers, calling the steps takes as long as their arithmetic. A cache needs them apart:
projections with rotary embedding are then one operator (`moh::cpu_project`), attention with W_O another (`moh::cpu_attend`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from moh.attention import cpu
from moh.attention.backends import moh_attention
from moh.attention.call import DTYPES, autocasts, transforms_are_active, with_four_dims
from moh.attention.projections import is_plain, project_output, sparse_pays_on_cpu
from moh.config import MoHConfig
from moh.routing import Router, RoutingInfo
from moh.routing.router import is_untouched
from moh.routing.routers import is_as_named


def route(router: Router, x: Tensor, backend: str | None = None) -> RoutingInfo:
    """The routing of `x` `[B, N, C]` by a router that reads it: `router(x)`, by one operator where that is possible.

    The operator adds up scores in another order: two that are equal but for rounding may be ranked differently.
    """
    if (
        not _needs_no_steps(x, backend)  # first: training asks nothing else
        or not is_as_named(router)
        or (maps := router.linear_maps()) is None
        or router.is_observed()
        or not all(is_plain(scorer, x) for scorer in maps[:3] if scorer is not None)
    ):
        info: RoutingInfo = router(x)
        return info
    config = router.config
    shared, routed, stage = (None if scorer is None else scorer.weight for scorer in maps[:3])
    gates, probs = torch.ops.moh.cpu_route(
        x,
        shared,
        routed,
        stage,
        maps.routed.bias if maps.is_hard and maps.routed is not None else None,
        config.shared_indices,
        config.num_heads,
        maps.is_hard,
        config.active_heads,
        *parts_and_neighbours(config),
        router.threshold(),
    )
    return RoutingInfo(config, gates, probs if probs.shape[0] else None)


def parts_and_neighbours(config: MoHConfig) -> tuple[int, int]:
    """(parts of the routed heads in which equally many are chosen, neighbours that are chosen together)"""
    if config.routing_unit == "group_balanced":
        return config.step, 1
    return 1, config.step


def whole_layer(
    x: Tensor,
    gates: Tensor,
    projections: Sequence[nn.Module],
    output: nn.Module,
    share: float,
    *,
    between: Sequence[nn.Module] = (),
    special: Sequence[object] = (),
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor | None:
    """Projections and attention of a layer by one operator: `[B, N, C]`; None where it can't be used.

    Args:
        x: `[B, N, C]`.
        gates: `[B, N, H]`.
        projections: of queries, keys and values: one fused module, C -> 3 * H * D, or three.
        output: W_O.
        share: expected share of pairs that are active, which decides whether sparse products are worth it.
        between: modules that the layer has for queries, keys or heads; they must do nothing.
        special: what would change queries and keys, which keys are seen, or heads, None where it is absent; there must be none.
        dropout_p, is_causal, scale, backend: as of `moh_attention`.
    """
    queries = projections[0]
    if (
        not _needs_no_steps(x, backend)
        or dropout_p > 0
        or any(part is not None for part in special)
        or gates.dtype != x.dtype
        or not all(type(module) is nn.Identity and is_untouched(module) for module in between)
        or not all(isinstance(linear, nn.Linear) and is_plain(linear, x) for linear in (*projections, output))
    ):
        return None
    assert isinstance(queries, nn.Linear)
    width = queries.out_features // gates.shape[2] // (3 if len(projections) == 1 else 1)
    if width > cpu.MAX_WIDTH:
        return None
    out: Tensor = torch.ops.moh.cpu_layer(
        x,
        gates,
        [linear.weight for linear in projections],
        [linear.bias for linear in projections],
        output.weight,
        output.bias,
        is_causal,
        scale,
        sparse_pays_on_cpu(x, width, share),
    )
    return out


def project(
    x: Tensor,
    gates: Tensor,
    projections: Sequence[nn.Module],
    share: float,
    *,
    angles: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries `[B, H, N, D]` and keys and values `[B, Hkv, N, D]` by one operator; None where it can't be used.

    Queries of inactive pairs may be any numbers, but with a share of 1, for which every query is computed.

    Args:
        x, gates, share, backend: as of `whole_layer`.
        projections: of queries, keys and values.
        angles: cosines and sines `[1 or B, N, D]`, by which numbers i and i + D/2 of queries and keys are rotated.
    """
    if (
        not _needs_no_steps(x, backend)
        or gates.dtype != x.dtype
        or not all(is_plain(linear, x) for linear in projections)
        or (angles is not None and any(angle.dtype != x.dtype for angle in angles))
    ):
        return None
    queries = projections[0]
    assert isinstance(queries, nn.Linear)
    width = queries.out_features // gates.shape[2]
    if width > cpu.MAX_WIDTH or (angles is not None and angles[0].shape[-1] != width):
        return None
    q, k, v = torch.ops.moh.cpu_project(
        x,
        gates,
        [linear.weight for linear in projections],
        [linear.bias for linear in projections],
        *(angles or (None, None)),
        share < 1 and sparse_pays_on_cpu(x, width, share),
    )
    return q, k, v


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    output: nn.Module,
    share: float,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention and W_O `[B, N, C]` by one operator, where `project` gave q; arguments as of `moh_attention`.

    Where W_O is more than a product, attention is an operator of its own.
    """
    if not is_plain(output, gates):
        heads = moh_attention(q, k, v, gates, is_causal=is_causal, attn_mask=attn_mask, scale=scale, backend="cpu")
        return project_output(output, heads, gates, share)
    out: Tensor = torch.ops.moh.cpu_attend(
        q,
        k,
        v,
        gates,
        None if attn_mask is None else with_four_dims(attn_mask),
        output.weight,
        output.bias,
        is_causal,
        scale,
        sparse_pays_on_cpu(gates, q.shape[-1], share),
    )
    return out


def _needs_no_steps(x: Tensor, backend: str | None) -> bool:
    """Whether operators without gradients can be used for x, and nothing looks at what they call."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and _get_current_dispatch_mode() is None  # such as a counter of operations
        and backend in (None, "cpu")
        and x.dim() == 3
        and x.numel() > 0
        and x.device.type == "cpu"
        and type(x) in (Tensor, nn.Parameter)
        and x.dtype in DTYPES
        and not autocasts(x)
        and not transforms_are_active()
        and cpu.unavailable() is None
    )
