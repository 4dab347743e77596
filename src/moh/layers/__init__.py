"""Layers: drop-in modules that join projections, router and routed attention."""

from moh.layers.attention import MoHAttention

__all__ = ["MoHAttention"]
