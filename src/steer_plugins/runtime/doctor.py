"""`steer doctor`: what is here, what is missing, and what to do about it."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..atomic import file_sha256
from ..errors import BuildError, ModelError, RuntimeMissing
from . import tools
from .bindings import DISTRIBUTION, PINNED_VERSION, Bindings, find_bindings, ggml_files
from .cache import cache_dir
from .host import host_of, same_host
from .libraries import probe
from .locate import (
    INSTALL_BINDINGS,
    WHEEL_NAME,
    Runtime,
    cached_runtimes,
    find_runtime,
    find_stock,
    installed_runtime,
    is_current,
)
from .patching import Patch, load_patch
from .sources import pip_available
from .stock import present_library


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``state``: "ok", "note" (works, worth knowing) or "missing" (steering does not work)."""

    topic: str
    state: str
    text: str
    advice: str = ""


@dataclass
class Diagnosis:
    """All findings, and the same facts for machines."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        """Whether steering works as things are."""
        return all(finding.state != "missing" for finding in self.findings)

    def add(self, topic: str, state: str, text: str, advice: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(topic, state, text, advice))

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        todo = [finding.advice for finding in self.findings if finding.advice]
        return {
            "works": self.works,
            **self.facts,
            "findings": [vars(finding) for finding in self.findings],
            "todo": todo,
        }


def diagnose(model: Path | None = None) -> Diagnosis:
    """Look at everything steering needs. Changes nothing, imports no llama.cpp, raises nothing."""
    report = Diagnosis()
    version = platform.python_version()
    report.facts["steer_plugins"] = __version__
    report.facts["python"] = {"version": version, "executable": sys.executable, "platform": platform.platform()}
    report.add("python", "ok", f"{version} on {platform.platform()}, steer-plugins {__version__}")
    bindings = _bindings(report)
    patch = _patch(report, bindings)
    stock = _stock(report)
    runtime = _runtime(report, bindings, patch, stock)
    _devices(report, runtime)
    _model(report, model)
    _tools(report, runtime)
    _library(report)
    return report


def _bindings(report: Diagnosis) -> Bindings | None:
    bindings = find_bindings()
    report.facts["bindings"] = None
    if bindings is None:
        advice = f"pip install 'steer-plugins[local]', or to compile llama.cpp only once: {INSTALL_BINDINGS}"
        report.add("bindings", "missing", f"{DISTRIBUTION} is not installed", advice)
        return None
    own = "with a library of its own" if bindings.has_library else "without a library of its own"
    report.facts["bindings"] = {
        "version": bindings.version,
        "own_library": bindings.has_library,
        "shares_ggml": bindings.shares_ggml,
        "path": str(bindings.package),
    }
    text = f"{DISTRIBUTION} {bindings.version}, {own}"
    if bindings.version == PINNED_VERSION:
        report.add("bindings", "ok", text)
    else:
        report.add(
            "bindings",
            "note",
            f"{text}; the patch is made for {PINNED_VERSION}",
            f"see whether it fits with `steer build --check`, or pip install {DISTRIBUTION}=={PINNED_VERSION}",
        )
    return bindings


def _patch(report: Diagnosis, bindings: Bindings | None) -> Patch | None:
    report.facts["patch"] = None
    try:
        patch = load_patch()
    except (BuildError, OSError) as error:
        report.add("patch", "missing", str(error), "reinstall steer-plugins")
        return None
    files, hooks = len(patch.files(False)), len(patch.hooks)
    report.facts["patch"] = {"hash": patch.core_hash, "files": files, "hooks": hooks}
    report.facts["architectures"] = patch.architectures()
    report.add("patch", "ok", f"{patch.core_hash[:10]} ({files} files, {hooks} hooks)")
    return patch


def _stock(report: Diagnosis) -> Runtime | None:
    """The unmodified llama.cpp, if it can be steered here."""
    report.facts["stock"] = None
    stock = find_stock()
    if stock is None:
        return None
    library = present_library()
    report.facts["stock"] = {"path": str(stock.lib_dir), "version": stock.version, "library": str(library) if library else None}
    text = f"the unmodified llama.cpp of {DISTRIBUTION} {stock.version}, {stock.lib_dir}"
    if library is None and tools.find_compiler() is None:
        advice = f"pip install a wheel of steer-plugins for this platform, or {tools.compiler_advice()}"
        report.add("stock", "note", f"{text}; the library that steers beside it is missing", advice)
        return None
    report.add("stock", "ok", f"{text}; {library or 'the library that steers beside it is compiled when it is needed'}")
    return stock


def _runtime(report: Diagnosis, bindings: Bindings | None, patch: Patch | None, stock: Runtime | None) -> Runtime | None:
    report.facts["runtime"] = None
    report.facts["cache"] = str(cache_dir())
    try:
        runtime = find_runtime()
    except RuntimeMissing as error:
        if os.environ.get("STEER_RUNTIME"):
            advice = "unset STEER_RUNTIME, then run `steer build`"
        else:
            advice = f"pip uninstall {WHEEL_NAME}, then run `steer build`, or pip install a wheel that fits"
        report.add("runtime", "missing", str(error), advice)
        return None
    if runtime is None:
        others = cached_runtimes()
        why = f"none fits in {cache_dir()}"
        if others:
            newest = others[0]
            same = "this" if is_current(newest) else "another"
            why += f" (the newest there is for {newest.version} with {same} patch)"
        if stock is not None:
            report.add("runtime", "note", f"no patched llama.cpp: {why}; the unmodified one is steered", "steer build")
            return stock
        report.add("runtime", "missing", f"no patched llama.cpp: {why}", "steer build")
        return None
    if runtime.stock:
        report.add("runtime", "ok", "STEER_RUNTIME=stock: the unmodified one is steered")
        return runtime
    report.facts["runtime"] = {
        "path": str(runtime.path),
        "version": runtime.version,
        "patch": runtime.patch,
        "current_patch": is_current(runtime),
        "ggml": runtime.ggml_mode,
        "server": str(runtime.server) if runtime.server else None,
        "wheel": runtime.meta.get("wheel"),
        "host": str(host_of(runtime.meta) or "") or None,
    }
    ggml = {
        "own": "its own ggml",
        "copy": f"the ggml of {DISTRIBUTION}, linked in",
        "in-place": f"the ggml of {DISTRIBUTION}, where that is installed",
    }.get(runtime.ggml_mode, "unknown ggml")
    host = host_of(runtime.meta)
    if host is not None:
        ggml = f"the ggml of {host}"
    if runtime.meta.get("wheel"):
        ggml = f"from {WHEEL_NAME} {runtime.meta['wheel']}"
    server = "with llama-server" if runtime.server else "without llama-server"
    report.add("runtime", "ok", f"{runtime.path} ({runtime.version or 'unknown version'}, {ggml}, {server})")
    if not is_current(runtime):
        report.add("runtime", "note", "it was not built with this package's patch", "unset STEER_RUNTIME or `steer build`")
    if bindings is not None and runtime.version[:1].isdigit() and runtime.version != bindings.version:
        text = f"it is for {DISTRIBUTION} {runtime.version}, but {bindings.version} is installed"
        report.add("runtime", "missing", text, "unset STEER_RUNTIME, then run `steer build`")
    _hosts(report, runtime)
    _unused_wheel(report, runtime)
    if bindings is not None and bindings.shares_ggml and _other_ggml(runtime, bindings):
        report.add(
            "runtime",
            "note",
            f"{DISTRIBUTION} now brings another ggml than the one this runtime uses",
            "run `steer build` to use the ggml (and the devices) of the installed one",
        )
    return runtime


def _hosts(report: Diagnosis, used: Runtime) -> None:
    """The runtimes built on the ggml of other programs (`steer build --on`)."""
    report.facts["hosts"] = []
    for runtime in {found.path: found for found in (used, *cached_runtimes())}.values():
        host = host_of(runtime.meta)
        if host is None or runtime.problem() is not None:
            continue
        same = same_host(runtime.meta)
        facts = {"host": str(host), "path": str(runtime.path), "current_patch": is_current(runtime), "same_ggml": same}
        report.facts["hosts"].append({**facts, "server": str(runtime.server) if runtime.server else None})
        text = f"for {host}: {runtime.server or runtime.path} (ggml {runtime.meta['ggml'].get('version')})"
        if same and is_current(runtime):
            report.add("host", "ok", text)
        else:
            why = "it was built with another patch" if same else "that now brings another ggml, or is gone"
            report.add("host", "note", f"{text}; {why}", f"steer build --on {host}")


def _unused_wheel(report: Diagnosis, used: Runtime) -> None:
    if used.meta.get("wheel") or os.environ.get("STEER_RUNTIME"):
        return
    installed = installed_runtime()
    if installed is not None:
        text = f"{WHEEL_NAME} {installed.meta.get('wheel')} is for {DISTRIBUTION} {installed.version}, and not used"
        report.add("runtime", "note", text, f"pip uninstall {WHEEL_NAME}, or pip install one that fits")


def _other_ggml(runtime: Runtime, bindings: Bindings) -> bool:
    ggml = runtime.meta.get("ggml")
    if not isinstance(ggml, dict) or runtime.meta.get("cmake_args") or runtime.meta.get("wheel") or host_of(runtime.meta):
        return False  # somebody chose their own
    built = ggml.get("files") or {}
    return any(file_sha256(path) != built.get(path.name) for path in ggml_files(bindings.library_dir))


def _devices(report: Diagnosis, runtime: Runtime | None) -> None:
    report.facts["devices"] = []
    if runtime is None:
        return
    answer = probe(runtime.lib_dir)
    if "error" in answer:
        report.add("devices", "missing", f"the libraries cannot be loaded: {answer['error']}", "steer build --rebuild")
        return
    if not answer.get("steer") and not runtime.stock:
        report.add("devices", "missing", f"{runtime.lib_dir} is a llama.cpp without steering", "steer build")
        return
    devices = answer.get("devices") or []
    report.facts["devices"] = devices
    report.facts["steer_api"] = answer.get("steer")
    names = "; ".join(f"{device['name']}: {device['description']}" for device in devices)
    report.add("devices", "ok", names or "none", "" if devices else "steer build --rebuild --own-ggml")


def _model(report: Diagnosis, model: Path | None) -> None:
    from ..store.identity import identity_of_gguf, shards_of  # numpy: not for `steer --help`
    from .demo_model import default_model_path

    report.facts["model"] = None
    try:
        path = model if model is not None else default_model_path()
        identity = identity_of_gguf(path)
        files = shards_of(path)
    except ModelError as error:
        report.add("model", "missing", str(error), "give a GGUF with --model, or fetch the demo model: ./scripts/demo")
        return
    report.facts["model"] = {
        "path": str(path),
        "architecture": identity.architecture,
        "name": identity.name,
        "n_layer": identity.n_layer,
        "n_embd": identity.n_embd,
        "files": len(files),
    }
    parts = f", {len(files)} files" if len(files) > 1 else ""
    text = f"{path} ({identity.architecture}, {identity.n_layer} layers of {identity.n_embd}{parts})"
    report.add("model", "ok", text)


def _tools(report: Diagnosis, runtime: Runtime | None) -> None:
    """What a build would need; a note only, as long as there is a runtime."""
    compiler, cmake, ninja = tools.find_compiler(), tools.find_cmake(), tools.find_ninja()
    pip = pip_available()
    report.facts["tools"] = {"compiler": compiler, "cmake": cmake, "ninja": ninja, "pip": pip}
    needed = "missing" if runtime is None else "note"
    if compiler:
        report.add("compiler", "ok", compiler)
    else:
        report.add("compiler", needed, "no C++ compiler", tools.compiler_advice())
    if cmake and ninja:
        report.add("cmake, ninja", "ok", f"{cmake}, {ninja}")
    elif pip:
        absent = " and ".join(name for name, path in (("cmake", cmake), ("ninja", ninja)) if not path)
        report.add("cmake, ninja", "ok", f"no {absent} of the system's; pip fetches what a build needs")
    else:
        report.add("cmake, ninja", needed, "not found, and there is no pip to fetch them", "install cmake and ninja")


def _library(report: Diagnosis) -> None:
    """The folder of steering vectors."""
    try:
        from ..store.library import Library  # type: ignore[import-not-found,unused-ignore]

        folder = Path(Library().root)
    except Exception as error:  # a broken library folder must not hide the rest of the report
        report.add("library", "note", f"cannot be opened ({str(error).splitlines()[0] if str(error) else error!r})")
        report.facts["library"] = None
        return
    count = sum(1 for _ in folder.glob("*/*.safetensors")) if folder.is_dir() else 0
    report.facts["library"] = {"path": str(folder), "vectors": count}
    writable = os.access(folder if folder.exists() else _existing_parent(folder), os.W_OK)
    text = f"{folder} ({count} vectors)"
    if writable:
        report.add("library", "ok", text)
    else:
        report.add("library", "note", f"{text} is not writable", f"make {folder} writable to keep trained vectors")


def _existing_parent(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
