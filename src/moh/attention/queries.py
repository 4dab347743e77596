"""A layer's routing and its queries, in the order that its router asks for.

What every attention module with a query projection of its own does first; fused ones have `moh.attention.project_qkv`.
"""

from __future__ import annotations

from torch import Tensor, nn

from moh.attention import project_queries
from moh.routing import Router, RoutingInfo


def route_and_project(
    router: Router, q_proj: nn.Module, x: Tensor, backend: str | None = None
) -> tuple[RoutingInfo, Tensor]:
    """Route `x` `[B, N, C]` and compute the queries `[B, N, H, D]`.

    A router that reads the queries needs all of them; with another one they may be computed for the active heads alone
    (`moh.attention.project_queries`), and are 0 elsewhere.
    """
    if router.reads_queries:
        q = q_proj(x).unflatten(-1, (router.heads_here, -1))  # [B, N, H, D]
        return router(q=q), q
    routing: RoutingInfo = router(x)
    return routing, project_queries(q_proj, x, routing.gates, router.config.share, backend)
