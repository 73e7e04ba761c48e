"""How long the threads of ggml spin while they wait for one another.

Between two operations of the graph, hundreds of times a token, all threads meet at a barrier. There GNU's OpenMP runtime lets
whoever is early spin 300,000 times before it sleeps: some milliseconds. When other programs use the cores, the thread that is
waited for does not run meanwhile, and the spinning ones take its time: a token takes tens of times as long. A thousand times is
long enough for a thread that is about to come (an idle machine loses nothing), and short where it is not. The figures are in
docs/runtime.md.

The runtime reads its settings once, when it is loaded. LLVM's OpenMP runtime and ggml's own threads have no such middle way, and
are left as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

SPINS = 1000
LONG_WAITS = {"GOMP_SPINCOUNT": "300000"}
"""What GNU's runtime does by itself, to compare with."""
_OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def with_short_waits(environment: Mapping[str, str]) -> dict[str, str]:
    """A copy of the environment for a process that computes, with :data:`SPINS`; what the user has set of it stays."""
    found = dict(environment)
    if not any(name in found for name in _OWN):
        found["GOMP_SPINCOUNT"] = str(SPINS)
    return found


@contextmanager
def short_waits() -> Iterator[None]:
    """The same for libraries that this process loads meanwhile; its environment is afterwards as before."""
    if any(name in os.environ for name in _OWN):
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]
