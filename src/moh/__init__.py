"""Mixture-of-Heads: transformers whose attention heads are experts (arXiv 2410.11842).

`import moh` needs torch alone. What needs an extra is loaded when it is first used; the Auto classes of transformers
and timm's `create_model` know our models as soon as both packages are imported, in either order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moh.attention import moh_attention
from moh.config import MoHConfig
from moh.layer import MoHAttention
from moh.models.dial import active_heads, set_active_heads
from moh.models.registration import register_with_transformers
from moh.models.timm_registration import register_with_timm
from moh.routing import RoutingInfo, balance_over_processes, record_routing

if TYPE_CHECKING:
    from moh.conversion import convert

__version__ = "0.1.0"

__all__ = [
    "MoHAttention",
    "MoHConfig",
    "RoutingInfo",
    "active_heads",
    "balance_over_processes",
    "convert",
    "moh_attention",
    "record_routing",
    "set_active_heads",
]


register_with_transformers()
register_with_timm()


def __getattr__(name: str) -> Any:
    if name == "convert":
        from moh.conversion import convert

        return convert
    raise AttributeError(f"module 'moh' has no attribute {name!r}")
