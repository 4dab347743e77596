"""Routed attention: `(q, k, v, gates) -> heads`, one function over several backends."""

from moh.attention.backends import BACKENDS, BY_NAME, Backend, backends_passed_over, choose_backend, moh_attention
from moh.attention.call import Call
from moh.attention.flex import BlockCounts, flex_block_counts
from moh.attention.projections import project_output, project_qkv, project_queries, route_and_project
from moh.attention.routed import attend, project, route, whole_layer

__all__ = [
    "BACKENDS",
    "BY_NAME",
    "Backend",
    "BlockCounts",
    "Call",
    "attend",
    "backends_passed_over",
    "choose_backend",
    "flex_block_counts",
    "moh_attention",
    "project",
    "project_output",
    "project_qkv",
    "project_queries",
    "route",
    "route_and_project",
    "whole_layer",
]
