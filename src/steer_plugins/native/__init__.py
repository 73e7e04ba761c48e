"""The ctypes binding of ``cpp_patch/llama-steer.h``. Knows numbers, sequence ids and pointers; nothing of vectors or text."""

from .binding import (
    API_VERSION,
    OPS,
    SITES,
    STREAM_ALL,
    STREAM_MEAN,
    AddTokens,
    NativeTerm,
    ReadRows,
    SteerContext,
    SteerInfo,
    SteerStats,
    load,
    model_info,
    tested_architectures,
)

__all__ = [
    "API_VERSION",
    "OPS",
    "SITES",
    "STREAM_ALL",
    "STREAM_MEAN",
    "AddTokens",
    "NativeTerm",
    "ReadRows",
    "SteerContext",
    "SteerInfo",
    "SteerStats",
    "load",
    "model_info",
    "tested_architectures",
]
