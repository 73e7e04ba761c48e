"""The patched llama.cpp: building it, finding it, and making this process use it."""

from __future__ import annotations

from .bindings import PINNED_VERSION, Bindings, find_bindings
from .build import BuildResult, CheckResult, build_runtime, check_patch
from .cache import cache_dir
from .ensure import ensure_runtime
from .locate import Runtime, activate, find_runtime
from .plan import BuildOptions
from .process import Reporter
from .prune import prune_runtimes

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
    "prune_runtimes",
]
