"""`steer build`: fetch llama.cpp, patch it, compile it, and put the result into the cache as a finished runtime.

A runtime is a folder ``<cache>/runtime/<key>/`` with ``lib/``, ``bin/``, ``include/`` and ``runtime.json``. It is
staged beside its place and renamed into it, ``runtime.json`` written last, so a folder with that file is a finished
one. The folder may be moved: libraries find each other through their own place.

Where a full llama-cpp-python is installed, its ggml is built upon. The ggml libraries are hard-linked into the runtime
(copied where the file system cannot link): the runtime then survives an upgrade or removal of llama-cpp-python, and
takes no second gigabyte for CUDA. Only when such a copy cannot be loaded (libraries repaired to look for their
dependencies relative to their own place) are they used where they are. The ggml of another host (``--on``, host.py)
is treated alike.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..atomic import file_sha256, write_atomically
from ..errors import BuildError, RuntimeMissing
from . import rpc, tools
from .bindings import DISTRIBUTION, PINNED_VERSION, find_library, ggml_files, is_ggml
from .cache import RUNTIME_FILE, cache_dir, cache_lock, make_dir, remove_tree
from .host import HostGgml, lost_devices, read_host, require_same_ggml, source_ggml, write_cmake_package
from .libraries import base_name, free_from_place, is_shared_library, link_libraries, probe
from .locate import Runtime, read_runtime
from .patching import DoesNotFit, Patch, PatchedTree, load_patch
from .plan import RUNTIME_FORMAT, BuildOptions, BuildPlan, plan_build
from .process import BuildLog, Reporter, first_error, run_logged
from .sources import llama_cpp_version, prepare_tree
from .syntax import syntax_command

_SERVER = "llama-server.exe" if sys.platform == "win32" else "llama-server"
_KEPT_LOGS = 20

# What is compiled and what is not. Nothing may be downloaded while building, hence no prebuilt web page for the server.
_DEFINITIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "LLAMA_BUILD_COMMON": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
}


@dataclass(frozen=True)
class BuildResult:
    """A finished runtime and how it came about."""

    runtime: Runtime
    seconds: float
    reused: bool
    stock: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        result: dict[str, Any] = {
            "runtime": str(self.runtime.path),
            "version": self.runtime.version,
            "patch": self.runtime.patch,
            "server": self.runtime.server is not None,
            "ggml": self.runtime.ggml_mode,
            "seconds": round(self.seconds, 1),
            "reused": self.reused,
        }
        if self.stock is not None:
            result["stock"] = str(self.stock)
        return result


@dataclass(frozen=True)
class CheckResult:
    """Whether the patch fits a version: ``problem`` is None when every hook has its place and what they touch compiles.

    ``hooks`` tells of each where it goes, ``misfits`` is one sentence for each that has no place.
    """

    version: str
    files: list[str]
    compiled: list[str]
    problem: str | None
    seconds: float
    hooks: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "fits": self.problem is None,
            "version": self.version,
            "files": self.files,
            "compiled": self.compiled,
            "problem": self.problem,
            "hooks": self.hooks,
            "misfits": self.misfits,
            "seconds": round(self.seconds, 1),
        }


def build_runtime(options: BuildOptions, reporter: Reporter | None = None) -> BuildResult:
    """Build the patched llama.cpp, or find that it is built already.

    Raises BuildError with one sentence; files and finished runtimes are then as they were.
    """
    reporter = reporter or Reporter(quiet=True)
    started = time.monotonic()
    try:
        plan = plan_build(options)
        cache = make_dir(cache_dir())
        if not options.stock_twin and (found := _finished(plan, cache)) and not options.force:
            return BuildResult(found, time.monotonic() - started, reused=True)
        with cache_lock(cache / "build.lock", reporter.say):
            _clean_leftovers(cache)
            # Another process may have built it while we waited.
            found = None if options.force else _finished(plan, cache)
            stock = found.stock_lib_dir if found else None
            twin = stock is not None and found is not None and (found.stock_server is not None or not plan.server)
            if found and (twin or not options.stock_twin):
                return BuildResult(found, time.monotonic() - started, True, stock if options.stock_twin else None)
            return _Build(plan, options, cache, reporter, started).run(found)
    except OSError as error:
        raise _from_os_error(error) from None
    finally:
        reporter.finish()


def check_patch(options: BuildOptions, reporter: Reporter | None = None) -> CheckResult:
    """Whether the patch applies to a version and the files it touches compile. Nothing is kept.

    A misfit is a result; BuildError is raised when it cannot be found out (no sources, no compiler).
    """
    reporter = reporter or Reporter(quiet=True)
    started = time.monotonic()
    try:
        plan = plan_build(options)
        cache = make_dir(cache_dir())
        work = cache / "work" / f"check-{os.getpid()}"
        try:
            return _Build(plan, options, cache, reporter, started, work).check()
        finally:
            remove_tree(work)
    except OSError as error:
        raise _from_os_error(error) from None
    finally:
        reporter.finish()


def _finished(plan: BuildPlan, cache: Path) -> Runtime | None:
    """A finished runtime that serves the plan; one with a server also serves a plan without."""
    patch = load_patch()
    for server in (True,) if plan.server else (False, True):
        key = replace(plan, server=server).key(patch)
        with contextlib.suppress(RuntimeMissing):
            runtime = read_runtime(plan.place(cache, key))
            # In the cache the folder's name is the key; other folders may hold any runtime.
            if runtime.problem() is None and (plan.into is None or runtime.meta.get("key") == key):
                return runtime
    return None


def _clean_leftovers(cache: Path) -> None:
    """Remove what a killed build left half done; the lock is held, so nobody is at work on it."""
    for pattern in ("runtime/.stage-*", "runtime/.old-*", "work/*/src.part", "work/*/src.download"):
        for path in cache.glob(pattern):
            remove_tree(path)
    for path in cache.glob("work/check-*"):  # checks hold no lock: leave one that may be running
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 3600:
                remove_tree(path)
    for path in sorted(cache.glob("logs/*.log"))[:-_KEPT_LOGS]:
        with contextlib.suppress(OSError):
            path.unlink()


class _Build:
    """One run of the build, in one work tree."""

    def __init__(
        self,
        plan: BuildPlan,
        options: BuildOptions,
        cache: Path,
        reporter: Reporter,
        started: float,
        work: Path | None = None,
    ) -> None:
        self.plan = plan
        self.options = options
        self.cache = cache
        self.reporter = reporter
        self.started = started
        self.work = work or cache / "work" / plan.work_key
        self.src = self.work / "src"
        self.build_dir = self.work / "build"
        self.tree = PatchedTree(self.src, self.work / "pristine")
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        self.log = BuildLog(cache / "logs" / f"{stamp}-{plan.work_key}-{os.getpid()}.log")
        self.host_facts: dict[str, Any] = {}
        self.environment = dict(os.environ)
        self.environment.pop("CMAKE_ARGS", None)
        self.environment["NINJA_STATUS"] = "[%f/%t] "
        # llama.cpp asks git for its commit: do not let it find a repository that the cache happens to lie in.
        self.environment["GIT_CEILING_DIRECTORIES"] = str(self.work.resolve())

    # the two things that can be asked for

    def run(self, finished: Runtime | None) -> BuildResult:
        fresh = not self.work.exists()
        keep = self.options.keep or os.environ.get("STEER_KEEP_BUILD", "") not in ("", "0")
        ok = interrupted = False
        try:
            result = self._run(finished)
            ok = True
            return result
        except KeyboardInterrupt:
            interrupted = True
            self.reporter.finish()
            self.reporter.say("stopped; the next `steer build` goes on from here")
            raise
        finally:
            self.log.close()
            if not keep and not interrupted and (ok or fresh):
                remove_tree(self.work)

    def _run(self, finished: Runtime | None) -> BuildResult:
        self._prepare(tools.build_bytes(not self.build_dir.exists(), self.plan.arguments.definitions))
        self._look_at_host()
        patch, content = self._fit()
        stock = self.work / "stock"
        if self.options.stock_twin and not self._has_twin(stock):
            # First, so that in a fresh tree only what the patch touches is compiled twice.
            self.tree.put({})
            self._compile(["llama", *(["llama-server"] if self.plan.server else [])], "compiling llama.cpp (unpatched)")
            remove_tree(stock)
            own = {"llama", "llama-common", "llama-server-impl"} if self.plan.server else {"llama"}
            self._copy_libraries(self._outputs(), stock, lambda name: base_name(name) in own)
            if self.plan.server:
                shutil.copy2(self._outputs() / _SERVER, stock / _SERVER)
        self.tree.put(content)
        runtime = finished
        if runtime is None:
            targets = ["llama", "mtmd", *(["llama-server"] if self.plan.server else [])]
            targets += ["ggml-rpc-server"] if self._has_rpc() else []
            self._compile(targets, "compiling llama.cpp")
            runtime = self._install(patch)
        twin = self._install_stock(runtime, stock) if self.options.stock_twin else None
        return BuildResult(runtime, time.monotonic() - self.started, finished is not None, twin)

    def check(self) -> CheckResult:
        self._prepare(tools.NEXT_BUILD_BYTES)
        self._look_at_host()
        placement = load_patch().place(self.tree.original, self.plan.server)
        files = sorted(placement.content)
        compiled: list[str] = []
        problem = None
        if placement.misfits:
            problem = self._misfit(DoesNotFit(placement.misfits))
        else:
            self.tree.put(placement.content)
            try:
                self._configure()
                compiled = self._compile_touched([path for path in files if path.endswith((".cpp", ".c", ".cc"))])
            except BuildError as error:
                problem = str(error)
        self.log.close()
        if problem is None:
            self.log.path.unlink(missing_ok=True)
        hooks = [str(placed) for placed in placement.hooks]
        seconds = time.monotonic() - self.started
        return CheckResult(self.plan.origin.version, files, compiled, problem, seconds, hooks, placement.misfits)

    # the steps

    def _prepare(self, space: int) -> None:
        """Compiler, disk space, sources, cmake and ninja: what fails soonest comes first."""
        tools.require_compiler(self.plan.arguments.definitions)
        tools.require_space(self.cache, space)
        if not self.src.exists():
            local = self.plan.origin.folder or self.plan.origin.archive
            self.reporter.say(f"{'copying' if local else 'fetching the sources of'} {self.plan.origin}")
            make_dir(self.work)
            prepare_tree(self.plan.origin, self.src)
        self.toolchain = tools.toolchain(self.cache / "tools", self.plan.arguments.definitions)

    def _look_at_host(self) -> None:
        """With ``--on``: make sure that the host's ggml is that of the sources, and ready to be linked to."""
        host = self.plan.shared
        if self.plan.host is None or host is None:
            return
        source = source_ggml(self.src, self.plan.origin)
        extra = host.extra if isinstance(host, HostGgml) else None
        self.host_facts = read_host(host.library_dir, len(source.operations), extra)
        require_same_ggml(self.plan.host, self.host_facts, source)
        if isinstance(host, HostGgml):
            for folder in host.left_out():
                self.reporter.say(f"the back ends in {folder} are left out; take them with --on {folder}")
            write_cmake_package(self._host_prefix, host, self.src / "ggml" / "include", int(self.host_facts["tensor"]))

    @property
    def _host_prefix(self) -> Path:
        return self.work / "host-ggml"

    def _fit(self) -> tuple[Patch, dict[str, bytes]]:
        patch = load_patch()
        try:
            return patch, patch.plan(self.tree.original, self.plan.server)
        except DoesNotFit as error:
            raise BuildError(f"{self._misfit(error)}; install {DISTRIBUTION}=={PINNED_VERSION}") from None

    def _misfit(self, error: DoesNotFit) -> str:
        return f"the patch does not fit {self.plan.origin}: {error}"

    def _configure(self) -> None:
        existed = self.build_dir.exists()
        code, lines = self._run_cmake()
        if code != 0 and existed:
            # A kept tree may have been configured by tools that are gone.
            remove_tree(self.build_dir)
            code, lines = self._run_cmake()
        if code != 0:
            raise self._failure("cmake could not configure llama.cpp", lines)

    def _run_cmake(self) -> tuple[int, list[str]]:
        definitions = dict(_DEFINITIONS)
        origin = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
        rpath = [origin, f"{origin}/../lib"]
        if self.plan.shared is not None:
            definitions["LLAMA_USE_SYSTEM_GGML"] = "ON"
            definitions["CMAKE_PREFIX_PATH"] = _cmake_path(self.plan.shared.ggml_prefix or self._host_prefix)
            rpath.append(_cmake_path(self.plan.shared.library_dir))
        else:
            # GPU libraries outside the system's folders (CUDA's) are found where the linker found them.
            definitions["CMAKE_INSTALL_RPATH_USE_LINK_PATH"] = "ON"
        definitions["CMAKE_INSTALL_RPATH"] = ";".join(rpath)
        if sys.platform.startswith("linux"):
            # As DT_RPATH: a host's LD_LIBRARY_PATH (Ollama sets one) must not put another ggml under our libraries, and
            # libraries that say nothing themselves look there too.
            for kind in ("EXE", "SHARED"):
                definitions[f"CMAKE_{kind}_LINKER_FLAGS"] = "-Wl,--disable-new-dtags"
        if self.toolchain.ninja:
            definitions["CMAKE_MAKE_PROGRAM"] = _cmake_path(self.toolchain.ninja)
        user = dict(self.plan.arguments.definitions)
        if self.plan.shared is not None and "CMAKE_PREFIX_PATH" in user:
            user["CMAKE_PREFIX_PATH"] = f"{definitions['CMAKE_PREFIX_PATH']};{user['CMAKE_PREFIX_PATH']}"
        definitions.update(user)
        generator = ["-G", "Ninja"] if self.toolchain.ninja else []
        others = self.plan.arguments.others
        if any(word.startswith("-G") for word in others):
            generator = []
        command = [self.toolchain.cmake, "-S", str(self.src), "-B", str(self.build_dir), *generator, *others]
        command += [f"-D{name}={value}" for name, value in definitions.items()]
        return run_logged(command, self.log, cwd=self.work, env=self.environment)

    def _compile(self, targets: Sequence[str], what: str) -> None:
        self._configure()
        command = [self.toolchain.cmake, "--build", str(self.build_dir), "--config", "Release"]
        command += ["--parallel", str(self.options.jobs or tools.default_jobs()), "--target", *targets]
        self.reporter.progress(0, 1, what)
        code, lines = run_logged(
            command,
            self.log,
            cwd=self.work,
            env=self.environment,
            on_step=lambda done, total: self.reporter.progress(done, total, what),
        )
        self.reporter.finish()
        if code != 0:
            raise self._failure("llama.cpp could not be compiled", lines)

    def _failure(self, what: str, lines: Sequence[str]) -> BuildError:
        if any("No space left on device" in line for line in lines):
            return BuildError("the disk is full; make room or set STEER_CACHE to a folder on another disk")
        return BuildError(f"{what}: {first_error(lines)} (full log: {self.log.path})")

    def _compile_touched(self, files: Sequence[str]) -> list[str]:
        """Compile single files of the configured tree, looking at errors only. Raises BuildError with the first one."""
        database = self.build_dir / "compile_commands.json"
        if not database.is_file():  # Visual Studio's generator writes none
            self._compile(["llama"], "compiling llama.cpp")
            return list(files)
        entries = json.loads(database.read_text(encoding="utf-8"))
        commands = {}
        for path in files:
            command = syntax_command(entries, self.src / path)
            if command is None:
                raise BuildError(f"the build of llama.cpp does not compile {path}, so the patch would do nothing there")
            commands[path] = command

        def compile_one(path: str) -> tuple[str, int, list[str]]:
            command, folder = commands[path]
            done = subprocess.run(
                command,
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                check=False,
            )
            return path, done.returncode, (done.stderr + done.stdout).splitlines()

        self.reporter.say(f"compiling {len(files)} touched files")
        with ThreadPoolExecutor(self.options.jobs or tools.default_jobs()) as pool:
            for path, code, lines in pool.map(compile_one, files):
                self.log.write("\n".join([f"$ {shlex.join(commands[path][0])}", *lines]))
                if code != 0:
                    raise self._failure(f"{path} does not compile with the patch", lines)
        return list(files)

    def _has_twin(self, stock: Path) -> bool:
        return find_library(stock, "llama") is not None and (not self.plan.server or (stock / _SERVER).is_file())

    # the result

    def _outputs(self) -> Path:
        """The folder with the compiled libraries and programs."""
        for folder in (self.build_dir / "bin" / "Release", self.build_dir / "bin"):
            if find_library(folder, "llama"):
                return folder
        raise BuildError(f"the build ended without a llama library in {self.build_dir} (full log: {self.log.path})")

    def _copy_libraries(self, source: Path, target: Path, wanted: Callable[[str], bool]) -> None:
        make_dir(target)
        for path in sorted(source.iterdir()):
            if is_shared_library(path.name) and wanted(path.name):
                shutil.copy2(path, target / path.name, follow_symlinks=False)

    def _install(self, patch: Patch) -> Runtime:
        key = self.plan.key(patch)
        final = self.plan.place(self.cache, key)
        stage = make_dir(final.parent) / f".stage-{key}-{os.getpid()}"
        remove_tree(stage)
        try:
            meta = {**self._stage(stage, patch), "key": key}
            write_atomically(stage / RUNTIME_FILE, (json.dumps(meta, indent=2) + "\n").encode())
            old = final.with_name(f".old-{key}-{os.getpid()}")
            if final.exists():
                os.replace(final, old)
            os.replace(stage, final)
            remove_tree(old)
        finally:
            remove_tree(stage)
        return read_runtime(final)

    def _stage(self, stage: Path, patch: Patch) -> dict[str, Any]:
        """Fill ``stage`` and try the result; the content of runtime.json."""
        outputs, lib = self._outputs(), stage / "lib"
        core = {"llama", "mtmd"}
        server_libraries = {"llama-common", "llama-server-impl"} if self.plan.server else set()
        own = self.plan.shared is None
        self._copy_libraries(
            outputs,
            lib,
            lambda name: base_name(name) in core | server_libraries or (own and is_ggml(name)),
        )
        mode = "own"
        if self.plan.shared is not None:
            mode = "copy"
            link_libraries(self.plan.shared.ggml_files(), lib)
            if self.plan.host is not None:
                free_from_place(ggml_files(lib))
        report = probe(lib)
        if self.plan.shared is not None and "error" in report:
            mode = "in-place"
            for path in self.plan.shared.ggml_files():
                (lib / path.name).unlink(missing_ok=True)
            report = probe(lib)
        if self.plan.host is not None and "error" not in report:
            lost = lost_devices(self.host_facts.get("devices") or (), report.get("devices") or ())
            if lost or (mode == "in-place" and self.host_facts.get("modules")):
                what = f"device {lost[0]}" if lost else "back ends"
                raise BuildError(f"the {what} of {self.plan.host} cannot be used from another place; leave out --on")
        if "error" in report:
            raise BuildError(f"the compiled libraries cannot be loaded ({report['error']}); full log: {self.log.path}")
        if not report.get("steer"):
            raise BuildError(f"the compiled library has no steering in it; the patch is broken (log: {self.log.path})")
        modules = bool(report.get("modules"))
        server = self._stage_server(stage, outputs, modules) if self.plan.server else None
        if self._has_rpc():
            self._stage_rpc(stage, outputs, modules)
        self._stage_headers(stage / "include")
        source = self.plan.shared.library_dir if self.plan.shared else None
        ggml = self.plan.shared.ggml_files() if self.plan.shared else ggml_files(lib)
        return {
            "format": RUNTIME_FORMAT,
            "version": self.plan.origin.version,
            "llama_cpp": llama_cpp_version(self.src),
            "source": "sdist" if self.plan.origin.id == "sdist" else str(self.plan.origin),
            "patch": patch.core_hash,
            "server_patch": patch.server_hash if self.plan.server else None,
            "steer_api": report["steer"],
            "server": server,
            "cmake_args": self.plan.arguments.as_list(),
            "ggml": {
                "mode": mode,
                "source": str(source) if source else None,
                "host": str(self.plan.host.absolute()) if self.plan.host else None,
                "version": self.host_facts.get("version"),
                "id": self.plan.ggml_id,
                "modules": modules,
                "files": {path.name: file_sha256(path) for path in ggml if is_ggml(path.name) and not path.is_symlink()},
            },
            "platform": f"{sys.platform} {platform.machine()}",
            "steer_plugins": __version__,
            "built_at": time.time(),
            "seconds": round(time.monotonic() - self.started, 1),
        }

    def _has_rpc(self) -> bool:
        return self.plan.arguments.definitions.get(rpc.DEFINITION, "").upper() in ("ON", "1", "TRUE", "YES")

    def _stage_rpc(self, stage: Path, outputs: Path, modules: bool) -> None:
        """Put the program of RPC workers in place."""
        folder = stage / ("lib" if sys.platform == "win32" or modules else "bin")
        make_dir(folder)
        shutil.copy2(outputs / f"ggml-{rpc.PROGRAM}", folder / rpc.PROGRAM)

    def _stage_server(self, stage: Path, outputs: Path, modules: bool) -> str:
        """Put llama-server in place; its path inside the runtime."""
        # Windows looks for libraries beside the program and nowhere else of ours; ggml does so for its modules.
        folder = "lib" if sys.platform == "win32" or modules else "bin"
        make_dir(stage / folder)
        shutil.copy2(outputs / _SERVER, stage / folder / _SERVER)
        return f"{folder}/{_SERVER}"

    def _stage_headers(self, include: Path) -> None:
        ggml = self.src / "ggml" / "include"
        folders = [self.src / "include", ggml if self.plan.shared is None else self._shared_include()]
        headers = [path for folder in folders for path in folder.glob("*.h")]
        headers += [
            self.src / path
            for path in ("tools/mtmd/mtmd.h", "tools/mtmd/mtmd-helper.h", "src/llama-steer.h", "src/llama-steer-plan.h")
        ]
        make_dir(include)
        for path in filter(Path.is_file, headers):
            shutil.copyfile(path, include / path.name)
        for path in self.src.glob("LICENSE*"):
            shutil.copyfile(path, include.parent / f"{path.name}.llama.cpp")
        # Of what it vendors: licenses/LICENSE-jsonhpp, vendor/cpp-httplib/LICENSE -> LICENSE-cpp-httplib
        for path in self.src.glob("licenses/LICENSE-*"):
            shutil.copyfile(path, include.parent / path.name)
        for path in self.src.glob("vendor/**/LICENSE*"):
            name = "-".join(path.parent.relative_to(self.src / "vendor").parts)
            shutil.copyfile(path, include.parent / f"LICENSE-{name}")

    def _shared_include(self) -> Path:
        prefix = self.plan.shared.ggml_prefix if self.plan.shared is not None else None
        return prefix / "include" if prefix else self.src / "ggml" / "include"

    def _install_stock(self, runtime: Runtime, stock: Path) -> Path:
        """Put the unpatched library, and llama-server if it was built, beside the patched ones, with links to the same ggml."""
        target = runtime.path / "stock"
        partial = runtime.path / ".stage-stock"
        remove_tree(partial)
        remove_tree(target)
        lib = make_dir(partial / "lib")
        self._copy_libraries(stock, lib, lambda name: True)
        same = [path for path in runtime.lib_dir.iterdir() if is_ggml(path.name) or base_name(path.name) == "mtmd"]
        link_libraries(same, lib)
        report = probe(lib)
        if "error" in report or report.get("steer"):
            remove_tree(partial)
            why = report.get("error", "it is patched")
            raise BuildError(f"the unpatched twin is unusable ({why}); remove {self.work}")
        if self.plan.server:
            self._stage_server(partial, stock, bool(report.get("modules")))
        os.replace(partial, target)
        return target / "lib"


def _cmake_path(path: Path | str) -> str:
    return str(path).replace("\\", "/")


def _from_os_error(error: OSError) -> BuildError:
    if error.errno == errno.ENOSPC:
        return BuildError("the disk is full; make room or set STEER_CACHE to a folder on another disk")
    where = f" at {error.filename}" if error.filename else ""
    return BuildError(f"the build stopped{where} ({error.strerror or error}); check permissions and free disk space")
