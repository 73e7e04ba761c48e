"""Finding a finished runtime, and making this process use it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import BuildError, RuntimeMissing
from ..paths import expand_path
from .bindings import DISTRIBUTION, PINNED_VERSION, find_bindings, find_library, ggml_files
from .cache import RUNTIME_FILE, cache_dir
from .patching import load_patch
from .probe import load_modules
from .waiting import short_waits

# What `steer build --wheel` makes.
WHEEL_NAME = "steer-plugins-runtime"
RUNTIME_PACKAGE = "steer_plugins_runtime"

# pip's own cache is left out of it: a wheel without the library, cached there, would be what the next plain
# `pip install llama-cpp-python` of any other environment gets.
INSTALL_BINDINGS = f"CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install --no-cache-dir {DISTRIBUTION}=={PINNED_VERSION}"


# What --runtime, STEER_RUNTIME and LocalEngine(runtime=...) may say instead of a folder.
PATCHED = "patched"
STOCK = "stock"


@dataclass(frozen=True)
class Runtime:
    """A llama.cpp, ready to load: a patched one, or (``stock``) the unmodified one of the bindings.

    ``path``: its folder; ``lib_dir``: the shared libraries; ``server``: llama-server or None; ``version``: of
    llama-cpp-python, or a label where the sources were no release of it ("" when unknown); ``patch``: content hash of
    the patch ("" when unknown); ``ggml_mode``: "own", "copy" or "in-place" (of an installed llama-cpp-python), "" when
    unknown; ``meta``: the content of runtime.json.
    """

    path: Path
    lib_dir: Path
    server: Path | None
    version: str
    patch: str
    ggml_mode: str
    meta: dict[str, Any]

    @property
    def stock(self) -> bool:
        """Whether it is an unmodified library, which is steered from outside."""
        return bool(self.meta.get("stock"))

    @property
    def library(self) -> Path:
        """Its libllama."""
        found = find_library(self.lib_dir, "llama")
        if found is None:
            raise RuntimeMissing(f"the runtime {self.path} has lost its llama library; run `steer build --rebuild`")
        return found

    @property
    def stock_lib_dir(self) -> Path | None:
        """The unpatched twin's libraries, where it was built (`steer build --stock-twin`)."""
        folder = self.path / "stock" / "lib"
        return folder if find_library(folder, "llama") else None

    @property
    def stock_server(self) -> Path | None:
        """The unpatched twin's llama-server, where it was built."""
        name = "llama-server.exe" if sys.platform == "win32" else "llama-server"
        places = [self.path / "stock" / folder / name for folder in ("bin", "lib")]
        return next((place for place in places if place.is_file()), None)

    def problem(self) -> str | None:
        """What is wrong with its files, as the end of a sentence; None when they are as they were built."""
        if find_library(self.lib_dir, "llama") is None:
            return "its llama library is gone"
        if self.server is not None and not self.server.is_file():
            return "its llama-server is gone"
        ggml = self.meta.get("ggml")
        if isinstance(ggml, dict) and isinstance(ggml.get("files"), dict):
            folder = Path(str(ggml.get("source"))) if self.ggml_mode == "in-place" else self.lib_dir
            present = {path.name for path in ggml_files(folder)}
            gone = sorted(set(ggml["files"]) - present)
            if gone:
                return f"the ggml library it uses, {folder / gone[0]}, is gone"
        return None


def read_runtime(folder: Path) -> Runtime:
    """The runtime in ``folder``. Raises RuntimeMissing: not a finished one, or its runtime.json is damaged."""
    try:
        meta = json.loads((folder / RUNTIME_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RuntimeMissing(f"{folder} is not a finished runtime (no {RUNTIME_FILE}); run `steer build`") from None
    except (OSError, ValueError):
        meta = None
    if not isinstance(meta, dict) or meta.get("format") != 1:
        raise RuntimeMissing(f"{folder / RUNTIME_FILE} cannot be read; run `steer build --rebuild`")
    server = meta.get("server")
    ggml = meta.get("ggml")
    return Runtime(
        path=folder,
        lib_dir=folder / "lib",
        server=folder / server if isinstance(server, str) and ".." not in server else None,
        version=str(meta.get("version", "")),
        patch=str(meta.get("patch", "")),
        ggml_mode=str(ggml.get("mode", "")) if isinstance(ggml, dict) else "",
        meta=meta,
    )


def runtime_at(folder: Path) -> Runtime:
    """The runtime a user pointed at: a finished one, or any folder with the libraries (in it or in its ``lib``).

    Raises RuntimeMissing when there is none.
    """
    if (folder / RUNTIME_FILE).is_file():
        return read_runtime(folder)
    if folder.name == "lib" and (folder.parent / RUNTIME_FILE).is_file():
        return read_runtime(folder.parent)
    for lib in (folder / "lib", folder):
        if find_library(lib, "llama"):
            binary = "llama-server.exe" if sys.platform == "win32" else "llama-server"
            server = next((path for path in (lib / binary, folder / "bin" / binary) if path.is_file()), None)
            return Runtime(folder, lib, server, "", "", "", {})
    raise RuntimeMissing(
        f"the runtime {folder} holds neither a {RUNTIME_FILE} nor the llama libraries; "
        "name a folder that `steer build` made, `patched` or `stock`, or leave --runtime and STEER_RUNTIME away"
    )


def cached_runtimes() -> list[Runtime]:
    """Every finished runtime in the cache, newest first."""
    found = []
    root = cache_dir() / "runtime"
    for path in root.iterdir() if root.is_dir() else ():
        if path.is_dir() and not path.name.startswith("."):
            with contextlib.suppress(RuntimeMissing):
                found.append(read_runtime(path))
    return sorted(found, key=lambda runtime: -_number(runtime.meta.get("built_at")))


def installed_runtime() -> Runtime | None:
    """The runtime that pip installed (the wheel of `steer build --wheel`), or None. Nothing is imported.

    Raises RuntimeMissing with one sentence: it is damaged, or speaks another version of the steering API.
    """
    try:
        spec = importlib.util.find_spec(RUNTIME_PACKAGE)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin:
        return None
    way_out = f"pip install another, or `pip uninstall {WHEEL_NAME}` and `steer build`"
    try:
        runtime = read_runtime(Path(spec.origin).parent)
        problem = runtime.problem()
    except RuntimeMissing:
        problem = f"its {RUNTIME_FILE} cannot be read"
    if problem:
        raise RuntimeMissing(f"the installed {WHEEL_NAME} ({Path(spec.origin).parent}) cannot be used: {problem}; {way_out}")
    from ..native import API_VERSION  # numpy: not for `steer --help`

    spoken, wanted = str(runtime.meta.get("steer_api")), f"llama-steer {API_VERSION}"
    if spoken != wanted:
        name = f"{WHEEL_NAME} {runtime.meta.get('wheel') or ''}".rstrip()
        raise RuntimeMissing(f"the installed {name} speaks '{spoken}', but this package needs '{wanted}'; {way_out}")
    return runtime


def _serves(runtime: Runtime, need_server: bool) -> bool:
    """Whether an installed runtime is of use here. The API decides, not the exact patch; the server's part has no API
    version, so that must be the very one."""
    if need_server:
        try:
            wanted = load_patch().server_hash
        except BuildError:
            return False
        return runtime.server is not None and (runtime.meta.get("server_patch") or "") == wanted
    bindings = find_bindings()
    return bindings is None or not runtime.version[:1].isdigit() or runtime.version == bindings.version


def is_current(runtime: Runtime, need_server: bool = False) -> bool:
    """Whether a runtime was built with the patch this package carries."""
    try:
        patch = load_patch()
    except BuildError:
        return False
    if need_server and (runtime.server is None or (runtime.meta.get("server_patch") or "") != patch.server_hash):
        return False
    return runtime.patch == patch.core_hash


def find_runtime(need_server: bool = False, wish: str | os.PathLike[str] | None = None) -> Runtime | None:
    """The patched runtime to use, or None: the installed wheel, else the newest in the cache that was built with the current
    patch. Where llama-cpp-python is installed, wheel and cache must be for its version.

    ``wish`` (``STEER_RUNTIME`` when None): a folder is taken instead, whatever is in it; ``stock`` is the unmodified library.

    Raises RuntimeMissing when the wish is unusable, or the wheel is (installed_runtime).
    """
    named = os.fspath(wish) if wish is not None else os.environ.get("STEER_RUNTIME")
    if named == STOCK:
        if need_server:
            raise RuntimeMissing("requests cannot steer an unmodified llama-server: leave out --runtime stock (STEER_RUNTIME)")
        return _stock()
    if named and named != PATCHED:
        runtime = runtime_at(expand_path(named).absolute())
        problem = runtime.problem()
        if problem:
            raise RuntimeMissing(f"the runtime {named} cannot be used: {problem}")
        if need_server and runtime.server is None:
            raise RuntimeMissing(f"the runtime {named} has no llama-server; name another, and run `steer build`")
        return runtime
    installed = installed_runtime()
    if installed is not None and _serves(installed, need_server):
        return installed
    return find_cached_runtime(need_server)


def find_stock() -> Runtime | None:
    """The unmodified llama.cpp of the bindings, or None: their own library; where they came without one, the unpatched twin in
    the cache that was built for their version."""
    bindings = find_bindings()
    if bindings is None:
        return None
    if bindings.has_library:
        return _as_stock(bindings.library_dir, bindings.version)
    for runtime in cached_runtimes():
        folder = runtime.stock_lib_dir
        if folder is not None and runtime.version == bindings.version:
            return _as_stock(folder, bindings.version)
    return None


def _stock() -> Runtime:
    found = find_stock()
    if found is not None:
        return found
    bindings = find_bindings()
    if bindings is None:
        raise RuntimeMissing(f"{DISTRIBUTION} is not installed; install it with `pip install 'steer-plugins[local]'`")
    raise RuntimeMissing(
        f"{DISTRIBUTION} {bindings.version} was installed without a library of its own; install it with one "
        f"(`pip install --force-reinstall --no-cache-dir {DISTRIBUTION}`), or use the patched runtime (`steer build`)"
    )


def _as_stock(folder: Path, version: str) -> Runtime:
    return Runtime(path=folder, lib_dir=folder, server=None, version=version, patch="", ggml_mode="", meta={"stock": True})


def loaded_stock() -> Runtime | None:
    """The unmodified library that somebody has imported ``llama_cpp`` with in this process, or None."""
    module = sys.modules.get("llama_cpp.llama_cpp")
    library = getattr(module, "_lib", None)
    name = getattr(library, "_name", None)
    bindings = find_bindings()
    if library is None or not name or bindings is None or has_steering(library):
        return None
    return _as_stock(Path(name).absolute().parent, bindings.version)


def find_cached_runtime(need_server: bool = False) -> Runtime | None:
    """The runtime in the cache to use, or None."""
    bindings = find_bindings()
    for runtime in cached_runtimes():
        if bindings is not None and runtime.version != bindings.version and not need_server:
            continue
        if is_current(runtime, need_server) and runtime.problem() is None:
            return runtime
    return None


def activate(runtime: Runtime) -> ModuleType:
    """Import llama_cpp on the runtime's libraries and return it; fine to call again.

    ``LLAMA_CPP_LIB_PATH`` and ``MTMD_CPP_LIB`` are set for this process; its threads wait as :mod:`.waiting` says.
    Raises RuntimeMissing: no bindings, bindings of another version, or llama_cpp already loaded with other libraries.
    """
    bindings = find_bindings()
    if bindings is None:
        raise RuntimeMissing(
            f"{DISTRIBUTION} is not installed; install the bindings with `pip install 'steer-plugins[local]'`, "
            f"or, to compile llama.cpp only once, `{INSTALL_BINDINGS}`"
        )
    # Labels of trees that are not releases say nothing about the bindings, so the user is trusted.
    if runtime.version[:1].isdigit() and runtime.version != bindings.version:
        raise RuntimeMissing(
            f"the runtime {runtime.path} was built for {DISTRIBUTION} {runtime.version}, but {bindings.version} is "
            "installed; run `steer build`, and unset STEER_RUNTIME if it is set"
        )
    library = runtime.library
    if "llama_cpp" not in sys.modules and not (runtime.stock and bindings.has_library):
        os.environ["LLAMA_CPP_LIB_PATH"] = str(runtime.lib_dir)
        os.environ["MTMD_CPP_LIB"] = str(runtime.lib_dir)
    try:
        with short_waits():
            module = importlib.import_module("llama_cpp")
        loaded = importlib.import_module("llama_cpp.llama_cpp")._lib
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RuntimeMissing(f"llama_cpp cannot be imported ({reason}); run `steer doctor`") from None
    if not _same_file(getattr(loaded, "_name", ""), library):
        raise RuntimeMissing(
            f"llama_cpp is already imported with {getattr(loaded, '_name', 'other libraries')}; import steer_plugins "
            f"before llama_cpp, or set LLAMA_CPP_LIB_PATH={runtime.lib_dir}"
        )
    _load_modules(runtime)
    return module


def has_steering(library: ctypes.CDLL) -> bool:
    """Whether a loaded libllama carries the patch."""
    return hasattr(library, "llama_steer_version")


def _load_modules(runtime: Runtime) -> None:
    """Load back ends that are modules: by itself ggml looks for them beside the program, which is Python."""
    path = find_library(runtime.lib_dir, "ggml")
    if path is None or not (isinstance(runtime.meta.get("ggml"), dict) and runtime.meta["ggml"].get("modules")):
        return
    load_modules(ctypes.CDLL(str(path)), str(runtime.lib_dir))


def _same_file(one: str, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
