"""Mixture-of-Heads: transformers whose attention heads are experts (arXiv 2410.11842).

`import moh` needs torch alone, and loads it, like the extras, when a name below is first used. The Auto classes of
transformers and timm's `create_model` know our models as soon as both packages are imported, in either order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moh._lazy import lazy
from moh.config import MoHConfig
from moh.models.registration import (
    register_with_diffusers,
    register_with_peft,
    register_with_timm,
    register_with_torch,
    register_with_transformers,
)

if TYPE_CHECKING:
    from moh import attention as attention
    from moh import checkpoints as checkpoints
    from moh import evaluation as evaluation
    from moh import inspection as inspection
    from moh import layer as layer
    from moh import models as models
    from moh import routing as routing
    from moh import training as training
    from moh.attention import moh_attention
    from moh.conversion import convert
    from moh.layer import KVCache, MoHAttention, RotaryEmbedding
    from moh.models.dial import active_heads, set_active_heads
    from moh.models.published import load_published, save_published
    from moh.routing import RoutingInfo, balance_over_processes, loss_scale, record_routing

__version__ = "0.1.0"

__all__ = [
    "KVCache",
    "MoHAttention",
    "MoHConfig",
    "RotaryEmbedding",
    "RoutingInfo",
    "active_heads",
    "balance_over_processes",
    "convert",
    "load_published",
    "loss_scale",
    "moh_attention",
    "record_routing",
    "save_published",
    "set_active_heads",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "KVCache": "moh.layer",
        "MoHAttention": "moh.layer",
        "RotaryEmbedding": "moh.layer",
        "RoutingInfo": "moh.routing",
        "active_heads": "moh.models.dial",
        "attention": "moh.attention",
        "balance_over_processes": "moh.routing",
        "checkpoints": "moh.checkpoints",
        "convert": "moh.conversion",
        "evaluation": "moh.evaluation",
        "inspection": "moh.inspection",
        "layer": "moh.layer",
        "load_published": "moh.models.published",
        "loss_scale": "moh.routing",
        "models": "moh.models",
        "moh_attention": "moh.attention",
        "record_routing": "moh.routing",
        "routing": "moh.routing",
        "save_published": "moh.models.published",
        "set_active_heads": "moh.models.dial",
        "training": "moh.training",
    },
)

register_with_torch()
register_with_transformers()
register_with_peft()
register_with_timm()
register_with_diffusers()
