"""Routing: a layer's input or queries -> which heads each token uses, and with what weight."""

from moh.routing.attached import loss_scale
from moh.routing.info import RoutingInfo, balance_over_processes
from moh.routing.recording import RoutingRecord, record_routing
from moh.routing.router import Router
from moh.routing.routers import (
    LinearRouter,
    QueryNormRouter,
    SingleStageRouter,
    ThresholdRouter,
    TwoStageRouter,
    build_router,
    router_class,
)
from moh.routing.scorer import Scorer

__all__ = [
    "LinearRouter",
    "QueryNormRouter",
    "Router",
    "RoutingInfo",
    "RoutingRecord",
    "Scorer",
    "SingleStageRouter",
    "ThresholdRouter",
    "TwoStageRouter",
    "balance_over_processes",
    "build_router",
    "loss_scale",
    "record_routing",
    "router_class",
]
