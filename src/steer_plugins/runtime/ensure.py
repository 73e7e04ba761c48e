"""A runtime in any case: the one that is found, or one that is built now."""

from __future__ import annotations

import os

from . import build
from .bindings import DISTRIBUTION
from .locate import PATCHED, Runtime, find_runtime, find_stock, loaded_stock
from .plan import BuildOptions
from .process import Reporter

_said = False


def ensure_runtime(quiet: bool = False, need_server: bool = False, wish: str | os.PathLike[str] | None = None) -> Runtime:
    """The runtime to use: what is wished for (``STEER_RUNTIME`` when None), else the patched one where there is one, else the
    unmodified library of the bindings, which is said once.

    Where a patched one is needed (a server, the wish ``patched``) or there is no other, and none is found, it is built now, after
    saying so on stderr. Raises RuntimeMissing or BuildError with one sentence.
    """
    wish = wish or os.environ.get("STEER_RUNTIME") or None
    if wish is None and not need_server and (loaded := loaded_stock()) is not None:
        return _told(loaded, quiet)
    found = find_runtime(need_server, wish)
    if found is not None:
        return found
    if not need_server and wish != PATCHED and (stock := find_stock()) is not None:
        return _told(stock, quiet)
    reporter = Reporter(quiet=quiet)
    what = "llama.cpp and llama-server" if need_server else "llama.cpp"
    reporter.say(f"steer-plugins compiles {what} with its patch now, once; this takes some minutes (`steer build`)")
    result = build.build_runtime(BuildOptions(server=need_server), reporter)
    reporter.say(f"built {result.runtime.path} in {result.seconds:.0f} s")
    return result.runtime


def _told(stock: Runtime, quiet: bool) -> Runtime:
    global _said
    if not _said:
        Reporter(quiet=quiet).say(
            f"steering through the unmodified {DISTRIBUTION} {stock.version}; "
            "`steer build` makes it faster and serves other programs"
        )
        _said = True
    return stock
