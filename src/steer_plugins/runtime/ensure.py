"""A runtime in any case: the one that is found, or one that is built now."""

from __future__ import annotations

from . import build
from .locate import Runtime, find_runtime
from .plan import BuildOptions
from .process import Reporter


def ensure_runtime(quiet: bool = False, need_server: bool = False) -> Runtime:
    """The runtime to use; built now, after saying so on stderr, when there is none.

    Raises RuntimeMissing or BuildError with one sentence.
    """
    found = find_runtime(need_server)
    if found is not None:
        return found
    reporter = Reporter(quiet=quiet)
    what = "llama.cpp and llama-server" if need_server else "llama.cpp"
    reporter.say(f"steer-plugins compiles {what} with its patch now, once; this takes some minutes (`steer build`)")
    result = build.build_runtime(BuildOptions(server=need_server), reporter)
    reporter.say(f"built {result.runtime.path} in {result.seconds:.0f} s")
    return result.runtime
