"""The patched llama.cpp: building it, finding it, and making this process use it."""

from __future__ import annotations

from .bindings import PINNED_VERSION, Bindings, find_bindings
from .build import BuildResult, CheckResult, build_runtime, check_patch
from .cache import cache_dir
from .ensure import ensure_runtime
from .locate import Runtime, activate, find_runtime, find_stock, has_steering
from .plan import BuildOptions
from .process import Reporter
from .prune import prune_runtimes
from .stock import stock_library

__all__ = [
    "PINNED_VERSION",
    "Bindings",
    "BuildOptions",
    "BuildResult",
    "CheckResult",
    "Reporter",
    "Runtime",
    "activate",
    "build_runtime",
    "cache_dir",
    "check_patch",
    "ensure_runtime",
    "find_bindings",
    "find_runtime",
    "find_stock",
    "has_steering",
    "prune_runtimes",
    "stock_library",
]
