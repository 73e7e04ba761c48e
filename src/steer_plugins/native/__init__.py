"""The ctypes binding of ``cpp_patch/llama-steer.h`` and ``llama-steer-plan.h``.

Knows numbers, sequence ids and pointers; nothing of steering vectors or of text.
"""

from .binding import (
    API_VERSION,
    OPS,
    SITES,
    STREAM_ALL,
    STREAM_MEAN,
    AddTokens,
    NativeTerm,
    PatchedSteering,
    ReadRows,
    SteerContext,
    SteerInfo,
    Steering,
    SteerStats,
    load,
    model_info,
    tested_architectures,
)
from .plan import SCHEDULES, SCOPE_RANGE, SCOPES, Plan, PlanTerm, PlanVector, Segment, Tags
from .stock import StockContext, StockSteering

__all__ = [
    "API_VERSION",
    "OPS",
    "SCHEDULES",
    "SCOPES",
    "SCOPE_RANGE",
    "SITES",
    "STREAM_ALL",
    "STREAM_MEAN",
    "AddTokens",
    "NativeTerm",
    "PatchedSteering",
    "Plan",
    "PlanTerm",
    "PlanVector",
    "ReadRows",
    "Segment",
    "SteerContext",
    "Steering",
    "StockContext",
    "StockSteering",
    "SteerInfo",
    "SteerStats",
    "Tags",
    "load",
    "model_info",
    "tested_architectures",
]
