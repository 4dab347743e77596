"""Routed attention: `(q, k, v, gates) -> heads`, one function over several backends."""

from moh.attention.dispatch import Backend, backends, backends_passed_over, choose_backend, moh_attention
from moh.attention.flex_blocks import BlockCounts, flex_block_counts
from moh.attention.projections import project_output, project_qkv, project_queries
from moh.attention.reference import reference_attention

__all__ = [
    "Backend",
    "BlockCounts",
    "backends",
    "backends_passed_over",
    "choose_backend",
    "flex_block_counts",
    "moh_attention",
    "project_output",
    "project_qkv",
    "project_queries",
    "reference_attention",
]
