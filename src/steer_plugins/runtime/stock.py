"""The unmodified llama.cpp of this machine, and the small library that steers beside it.

The library comes with the wheel. In a checkout, or from a source distribution, it is compiled once and kept in the cache.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import BuildError, RuntimeMissing
from .cache import cache_dir, cache_lock, make_dir
from .compiling import compile_library, library_name
from .patching import patch_dir
from .process import Reporter
from .tools import compiler_advice, find_compiler


def present_library() -> Path | None:
    """The one that came with the package, or was compiled before."""
    root = patch_dir()
    places = (Path(__file__).parent.parent / "native", cache_dir() / "stock")
    return next((place / library_name(root) for place in places if (place / library_name(root)).is_file()), None)


def stock_library(quiet: bool = False) -> Path:
    """The library that steers beside an unmodified llama.cpp; compiled now, after saying so, where there is none.

    Raises:
        RuntimeMissing: there is none, and no compiler either.
        BuildError: it could not be compiled.
    """
    found = present_library()
    if found is not None:
        return found
    root = patch_dir()
    name = library_name(root)
    target = cache_dir() / "stock" / name
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeMissing(
            "this installation came without the library that steers beside an unmodified llama.cpp, and there is no C++ "
            f"compiler to make it: install steer-plugins from a wheel for this platform ({sys.platform}), or {compiler_advice()}"
        )
    reporter = Reporter(quiet=quiet)
    make_dir(target.parent)
    with cache_lock(cache_dir() / "stock.lock", reporter.say):
        if not target.is_file():
            reporter.say("compiling the library that steers beside an unmodified llama.cpp, once")
            try:
                compile_library(root, compiler, target)
            except OSError as error:
                raise BuildError(f"{target} cannot be made: {error.strerror or error}") from None
            except RuntimeError as error:
                raise BuildError(f"{compiler} cannot compile {name}: {error}") from None
    return target
