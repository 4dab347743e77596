"""Routing: a layer's input or queries -> which heads each token uses, and with what weight."""

from moh.routing.balance import balance_over_processes
from moh.routing.info import RoutingInfo
from moh.routing.recording import RoutingRecord, record_routing
from moh.routing.routers import LinearRouter, QueryNormRouter, Router, TwoStageRouter, build_router

__all__ = [
    "LinearRouter",
    "QueryNormRouter",
    "Router",
    "RoutingInfo",
    "RoutingRecord",
    "TwoStageRouter",
    "balance_over_processes",
    "build_router",
    "record_routing",
]
