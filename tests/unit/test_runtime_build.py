"""`steer build` from end to end on a toy tree with a toy cmake: what is kept, reused, staged, cleaned up and said."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from steer_plugins.cli.build import build as build_command
from steer_plugins.errors import BuildError
from steer_plugins.runtime import bindings, locate, plan, tools
from steer_plugins.runtime.build import build_runtime, check_patch
from steer_plugins.runtime.cache import cache_lock
from steer_plugins.runtime.libraries import link_libraries
from steer_plugins.runtime.plan import BuildOptions, CMakeArguments, parse_cmake_arguments, plan_build
from steer_plugins.runtime.syntax import syntax_command

module: Any = sys.modules["steer_plugins.runtime.build"]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="the toy cmake is a script with a #! line")

# It "compiles" by copying the sources' text into the libraries, and counts how often each file was compiled.
CMAKE = """#!{python}
import os, shutil, sys, time
from collections.abc import Iterator
from pathlib import Path
args = sys.argv[1:]
if os.environ.get("TOY_SLEEP") and "--build" in args:
    print("[1/9] started", flush=True)
    time.sleep(60)
if "-S" in args:
    src, out = Path(args[args.index("-S") + 1]), Path(args[args.index("-B") + 1])
    out.mkdir(exist_ok=True)
    (out / "args.txt").write_text("\\n".join(args))
    (out / "src.txt").write_text(str(src))
    if "cmake-broken" in (src / "CMakeLists.txt").read_text():
        print("CMake Error at CMakeLists.txt:1 (include):\\n\\n  no such thing\\n")
        sys.exit(1)
else:
    out = Path(args[1])
    src = Path((out / "src.txt").read_text())
    files = sorted((src / "src").glob("*.cpp"))
    (out / "bin").mkdir(exist_ok=True)
    stamps = out / "stamps"
    stamps.mkdir(exist_ok=True)
    for index, path in enumerate(files, 1):
        print(f"[{{index}}/{{len(files)}}] {{path.name}}")
        stamp = stamps / path.name
        if stamp.exists() and stamp.stat().st_mtime_ns == path.stat().st_mtime_ns:
            continue
        if "syntax error" in path.read_text():
            print(f"{{path}}:1:1: error: expected ';'")
            sys.exit(1)
        shutil.copystat(path, stamp) if stamp.exists() else stamp.write_text("")
        shutil.copystat(path, stamp)
        with open(src.parent.parent.parent / "compiled.txt", "a") as log:
            log.write(path.name + "\\n")
    text = "".join(path.read_text() for path in files)
    (out / "bin" / "libllama.so.0").write_text(text)
    link = out / "bin" / "libllama.so"
    link.unlink(missing_ok=True)
    link.symlink_to("libllama.so.0")
    targets = args[args.index("--target") + 1:]
    if "mtmd" in targets:
        (out / "bin" / "libmtmd.so").write_text("mtmd")
    if not any("SYSTEM_GGML=ON" in arg for arg in (out / "args.txt").read_text().splitlines()):
        for name in ("ggml", "ggml-base"):
            (out / "bin" / f"lib{{name}}.so").write_text(name)
    if "llama-server" in targets:
        (out / "bin" / "llama-server").write_text("server")
        (out / "bin" / "libllama-common.so").write_text("common")
"""
HOOKS = """== src/graph.cpp
-- the graph
after: int graph;
| // llama_steer
"""


class Toy:
    """A cache, a source tree, a patch folder and a cmake."""

    def __init__(self, base: Path) -> None:
        self.cache, self.source, self.patch = base / "cache", base / "source", base / "patch"
        for name, text in {
            "CMakeLists.txt": "project",
            "include/llama.h": "api",
            "src/CMakeLists.txt": "lib",
            "src/graph.cpp": "int graph;\nint end;\n",
            "src/model.cpp": "int model;\n",
        }.items():
            (self.source / name).parent.mkdir(parents=True, exist_ok=True)
            (self.source / name).write_text(text)
        self.patch.mkdir()
        (self.patch / "core.hooks").write_text(HOOKS)
        (self.patch / "llama-steer.h").write_text("// header\n")
        (self.patch / "llama-steer.cpp").write_text("// ours\n")
        self.cmake = base / "cmake"
        self.cmake.write_text(CMAKE.format(python=sys.executable))
        self.cmake.chmod(0o755)

    def options(self, **more: Any) -> BuildOptions:
        return BuildOptions(**{"source": self.source, "version": "0.3.36", "server": False, **more})

    def runtimes(self) -> list[str]:
        folder = self.cache / "runtime"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def compiled(self) -> list[str]:
        """What was compiled since the last call."""
        path = self.cache / "compiled.txt"
        names = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return names


def toy_probe(lib: Path) -> dict[str, Any]:
    text = (lib / "libllama.so").read_text()
    if "unloadable" in text or not ((lib / "libggml.so").exists() or "in-place" in text):
        return {"error": "cannot load"}
    return {"steer": "1" if "llama_steer" in text else None, "devices": []}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = Toy(tmp_path)
    for name in ("CMAKE_ARGS", "STEER_KEEP_BUILD", "STEER_RUNTIME", "TOY_SLEEP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STEER_CACHE", str(toy.cache))
    monkeypatch.setenv("STEER_PATCH_DIR", str(toy.patch))
    monkeypatch.setattr(module, "probe", toy_probe)
    monkeypatch.setattr(plan, "find_bindings", lambda: None)
    monkeypatch.setattr(locate, "find_bindings", lambda: None)
    monkeypatch.setattr(tools, "toolchain", lambda *_: tools.Toolchain(str(toy.cmake), "/toy/ninja", "/toy/c++"))
    monkeypatch.setattr(tools, "require_compiler", lambda *_: "/toy/c++")
    return toy


def test_a_runtime_is_built_and_found_again(toy: Toy) -> None:
    first = build_runtime(toy.options())
    assert not first.reused and first.runtime.problem() is None
    assert sorted(path.name for path in first.runtime.lib_dir.iterdir()) == [
        "libggml-base.so",
        "libggml.so",
        "libllama.so",
        "libllama.so.0",
        "libmtmd.so",
    ]
    assert (first.runtime.path / "include" / "llama-steer.h").read_text() == "// header\n"
    assert "llama_steer" in first.runtime.library.read_text()
    second = build_runtime(toy.options())
    assert second.reused and second.runtime.path == first.runtime.path
    assert build_runtime(toy.options(stock_twin=False, force=True)).reused is False
    found = locate.find_runtime()
    assert found is not None and found.path == first.runtime.path
    assert toy.runtimes() == [first.runtime.path.name]


def test_the_work_tree_goes_unless_it_is_kept(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    build_runtime(toy.options())
    assert list((toy.cache / "work").iterdir()) == []
    monkeypatch.setenv("STEER_KEEP_BUILD", "1")
    build_runtime(toy.options(force=True))
    assert len(list((toy.cache / "work").iterdir())) == 1


def test_a_changed_patch_compiles_only_what_it_touches(toy: Toy) -> None:
    first = build_runtime(toy.options(keep=True))
    assert toy.compiled() == ["graph.cpp", "llama-steer.cpp", "model.cpp"]
    (toy.patch / "llama-steer.cpp").write_text("// ours, improved\n")
    assert locate.find_runtime() is None
    second = build_runtime(toy.options(keep=True))
    assert toy.compiled() == ["llama-steer.cpp"]
    assert second.runtime.path != first.runtime.path and first.runtime.path.is_dir()
    found = locate.find_runtime()
    assert found is not None and found.path == second.runtime.path


def test_a_server_runtime_serves_both(toy: Toy) -> None:
    plain = build_runtime(toy.options()).runtime
    assert plain.server is None and locate.find_runtime(need_server=True) is None
    server = build_runtime(toy.options(server=True)).runtime
    assert server.server is not None and server.server.read_text() == "server"
    assert (server.lib_dir / "libllama-common.so").exists() and not (plain.lib_dir / "libllama-common.so").exists()
    module.remove_tree(plain.path)
    assert build_runtime(toy.options()).runtime.path == server.path
    found = locate.find_runtime(need_server=True)
    assert found is not None and found.path == server.path


def test_flags_make_other_runtimes(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {build_runtime(toy.options()).runtime.path}
    paths.add(build_runtime(toy.options(cmake_args=("-DGGML_CUDA=ON",))).runtime.path)
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON -DLLAMA_BUILD=OFF")
    again = build_runtime(toy.options())
    assert again.reused and again.runtime.path in paths
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_VULKAN=ON")
    paths.add(build_runtime(toy.options()).runtime.path)
    assert len(paths) == 3


def test_the_source_is_not_touched(toy: Toy) -> None:
    before = {path: path.read_bytes() for path in toy.source.rglob("*") if path.is_file()}
    build_runtime(toy.options())
    assert {path: path.read_bytes() for path in toy.source.rglob("*") if path.is_file()} == before


def test_a_compile_error_is_one_sentence_and_leaves_no_trace(toy: Toy) -> None:
    good = build_runtime(toy.options()).runtime
    (toy.patch / "llama-steer.cpp").write_text("syntax error\n")
    with pytest.raises(BuildError) as caught:
        build_runtime(toy.options())
    message = str(caught.value)
    assert "llama-steer.cpp:1:1: error: expected ';'" in message and "\n" not in message
    log = Path(message.rsplit("full log: ", 1)[1].rstrip(")"))
    assert "expected ';'" in log.read_text()
    assert toy.runtimes() == [good.path.name] and list((toy.cache / "work").iterdir()) == []


def test_a_cmake_error_is_one_sentence(toy: Toy) -> None:
    (toy.source / "CMakeLists.txt").write_text("cmake-broken")
    with pytest.raises(BuildError, match=r"could not configure.*no such thing"):
        build_runtime(toy.options())


def test_a_misfit_names_version_and_file(toy: Toy) -> None:
    (toy.source / "src" / "graph.cpp").write_text("int graph2;\n")
    with pytest.raises(
        BuildError,
        match=r"does not fit .*source: src/graph\.cpp: the graph: there is no .*llama-cpp-python==0\.3\.36",
    ):
        build_runtime(toy.options())
    assert toy.runtimes() == []


@pytest.mark.parametrize(("text", "words"), [("unloadable", "cannot be loaded"), ("", "no steering in it")])
def test_libraries_that_do_not_work_are_not_installed(toy: Toy, text: str, words: str) -> None:
    (toy.patch / "core.hooks").write_text(HOOKS.replace("llama_steer", "nothing " + text))
    with pytest.raises(BuildError, match=words):
        build_runtime(toy.options())
    assert toy.runtimes() == []


def test_an_error_while_staging_leaves_nothing(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(BuildError, match="disk is full"):
        build_runtime(toy.options())
    assert toy.runtimes() == []


def test_what_a_killed_build_left_is_swept_and_never_taken_for_finished(toy: Toy) -> None:
    result = build_runtime(toy.options())
    (result.runtime.path / "runtime.json").unlink()  # as if it had been killed before the last step
    stale = toy.cache / "runtime" / ".stage-x-1"
    stale.mkdir()
    assert locate.find_runtime() is None
    assert not build_runtime(toy.options()).reused
    assert not stale.exists() and locate.find_runtime() is not None
    assert len(toy.runtimes()) == 1


def test_a_damaged_runtime_is_built_again(toy: Toy) -> None:
    result = build_runtime(toy.options())
    (result.runtime.lib_dir / "libggml.so").unlink()
    assert locate.find_runtime() is None
    assert not build_runtime(toy.options()).reused
    (result.runtime.path / "runtime.json").write_text("{")
    assert not build_runtime(toy.options()).reused


INTERRUPTED = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.unit import test_runtime_build as t
from collections.abc import Iterator
from pathlib import Path
t.module.probe = t.toy_probe
t.plan.find_bindings = lambda: None
t.tools.toolchain = lambda *_: t.tools.Toolchain(sys.argv[2], "/toy/ninja", "/toy/c++")
t.tools.require_compiler = lambda *_: "/toy/c++"
try:
    t.build_runtime(t.BuildOptions(source=Path(sys.argv[3]), version="0.3.36", server=False))
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


def test_ctrl_c(toy: Toy) -> None:
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", INTERRUPTED, root, str(toy.cmake), str(toy.source)]
    environment = {**os.environ, "TOY_SLEEP": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not any("started" in log.read_text() for log in toy.cache.glob("logs/*")):
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        assert child.stdout is not None and child.stdout.read() == "stopped\n"
    assert toy.runtimes() == [] and locate.find_runtime() is None
    with cache_lock(toy.cache / "build.lock", on_wait=lambda text: pytest.fail(text)):
        pass
    assert not build_runtime(toy.options()).reused


def test_two_builds_do_not_collide(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    @contextlib.contextmanager
    def waiting(*args: Any) -> Iterator[None]:
        # another process built it while this one waited
        monkeypatch.setattr(module, "cache_lock", cache_lock)
        build_runtime(toy.options())
        said.append("built")
        with cache_lock(*args):
            yield

    monkeypatch.setattr(module, "cache_lock", waiting)
    assert build_runtime(toy.options()).reused and said == ["built"]


def test_the_stock_twin(toy: Toy) -> None:
    result = build_runtime(toy.options(stock_twin=True, keep=True))
    assert result.stock is not None and result.runtime.stock_lib_dir == result.stock
    assert "llama_steer" not in (result.stock / "libllama.so").read_text()
    assert "llama_steer" in result.runtime.library.read_text()
    assert os.path.samefile(result.stock / "libggml.so", result.runtime.lib_dir / "libggml.so")
    toy.compiled()
    assert build_runtime(toy.options(stock_twin=True, keep=True)).reused
    assert toy.compiled() == []
    (toy.patch / "llama-steer.cpp").write_text("// improved\n")
    again = build_runtime(toy.options(stock_twin=True, keep=True))
    assert toy.compiled() == ["llama-steer.cpp"]  # the unpatched library does not depend on the patch
    assert again.stock is not None and again.stock.is_dir()


def test_the_twin_of_a_runtime_that_is_there_already(toy: Toy) -> None:
    plain = build_runtime(toy.options())
    twin = build_runtime(toy.options(stock_twin=True))
    assert twin.reused and twin.runtime.path == plain.runtime.path
    assert twin.stock is not None and "llama_steer" not in (twin.stock / "libllama.so").read_text()


# building on the ggml of an installed llama-cpp-python


def full_install(base: Path, monkeypatch: pytest.MonkeyPatch) -> bindings.Bindings:
    lib = base / "site" / "llama_cpp" / "lib"
    (base / "site" / "include").mkdir(parents=True)
    (base / "site" / "include" / "ggml.h").write_text("ggml")
    lib.mkdir(parents=True)
    for name in ("ggml", "ggml-base", "ggml-cuda", "llama"):
        for ending in (".so", ".so.0"):
            (lib / f"lib{name}{ending}").write_text(f"their {name}")
    installed = bindings.Bindings("0.3.36", base / "site" / "llama_cpp", base / "site")
    monkeypatch.setattr(plan, "find_bindings", lambda: installed)
    monkeypatch.setattr(locate, "find_bindings", lambda: installed)
    return installed


def test_the_installed_ggml_is_used(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = full_install(tmp_path, monkeypatch)
    before = {path: path.read_bytes() for path in (tmp_path / "site").rglob("*") if path.is_file()}
    runtime = build_runtime(toy.options(keep=True)).runtime
    assert runtime.ggml_mode == "copy"
    assert (runtime.lib_dir / "libggml-cuda.so").read_text() == "their ggml-cuda"
    assert os.path.samefile(runtime.lib_dir / "libggml-cuda.so", runtime.lib_dir / "libggml-cuda.so.0")
    assert "llama_steer" in runtime.library.read_text()
    arguments = next((toy.cache / "work").glob("*/build/args.txt")).read_text().splitlines()
    assert "-DLLAMA_USE_SYSTEM_GGML=ON" in arguments
    assert f"-DCMAKE_PREFIX_PATH={tmp_path / 'site'}" in arguments
    assert {path: path.read_bytes() for path in (tmp_path / "site").rglob("*") if path.is_file()} == before
    module.remove_tree(tmp_path / "site")  # upgraded or removed: the runtime has its own links
    assert runtime.problem() is None
    assert installed.ggml_files() == []


def test_another_installed_ggml_is_another_runtime(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = full_install(tmp_path, monkeypatch)
    first = build_runtime(toy.options())
    (installed.library_dir / "libggml-cuda.so").unlink()
    (installed.library_dir / "libggml-cuda.so.0").unlink()
    second = build_runtime(toy.options())
    assert not second.reused and second.runtime.path != first.runtime.path


def test_libraries_that_cannot_be_moved_are_used_in_place(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = full_install(tmp_path, monkeypatch)
    (toy.patch / "core.hooks").write_text(HOOKS.replace("llama_steer", "llama_steer in-place"))
    real = module.probe

    def probe(lib: Path) -> dict[str, Any]:
        return {"error": "libgomp is elsewhere"} if (lib / "libggml.so").exists() else real(lib)

    monkeypatch.setattr(module, "probe", probe)
    runtime = build_runtime(toy.options()).runtime
    assert runtime.ggml_mode == "in-place" and runtime.problem() is None
    assert not (runtime.lib_dir / "libggml.so").exists()
    (installed.library_dir / "libggml.so").unlink()
    assert "libggml.so" in str(runtime.problem())
    assert locate.find_runtime() is None


@pytest.mark.parametrize("more", [{"own_ggml": True}, {"cmake_args": ("-DGGML_NATIVE=OFF",)}, {"version": "0.3.35"}])
def test_when_ggml_is_built_too(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    full_install(tmp_path, monkeypatch)
    assert build_runtime(toy.options(**more)).runtime.ggml_mode == "own"


def test_linking_keeps_one_file_for_all_names(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    for name in ("libx.so", "libx.so.0", "libx.so.0.1"):
        (tmp_path / "from" / name).write_text("same")
    (tmp_path / "from" / "liby.so").write_text("other")
    link_libraries((tmp_path / "from").iterdir(), tmp_path / "to")
    assert len({(tmp_path / "to" / name).stat().st_ino for name in ("libx.so", "libx.so.0", "libx.so.0.1")}) == 1
    assert (tmp_path / "to" / "liby.so").read_text() == "other"


# arguments, keys, check, command line


def test_cmake_arguments() -> None:
    parsed = parse_cmake_arguments(["-DA=2", "-DB:PATH=/x y"], "-DA=1 -D C=3 -G 'Unix Makefiles' -DLLAMA_BUILD=OFF")
    assert parsed == CMakeArguments({"C": "3", "A": "2", "B": "/x y"}, ("-G", "Unix Makefiles"))
    assert not parsed.wants_ggml and parse_cmake_arguments(["-DGGML_CUDA=ON"]).wants_ggml


@pytest.mark.parametrize("argument", ["A=1", "-D", "-DA", "-D=1", "--help", "; rm", ""])
def test_strange_cmake_arguments_are_refused(argument: str) -> None:
    with pytest.raises(BuildError, match="--cmake-arg"):
        parse_cmake_arguments([argument])
    with pytest.raises(BuildError, match="CMAKE_ARGS"):
        parse_cmake_arguments([], "-DX='")


def test_keys_depend_on_what_matters(toy: Toy) -> None:
    one = plan_build(toy.options(cmake_args=("-DA=1", "-DB=2")))
    assert one.work_key == plan_build(toy.options(cmake_args=("-DB=2", "-DA=1"))).work_key
    assert one.work_key == plan_build(toy.options(cmake_args=("-DA=1", "-DB=2"), server=True)).work_key
    for more in ({"cmake_args": ("-DA=1",)}, {"cmake_args": ("-DA=1", "-DB=2"), "version": "0.3.35"}):
        assert one.work_key != plan_build(toy.options(**more)).work_key


def test_check_says_when_it_does_not_apply(toy: Toy) -> None:
    (toy.source / "src" / "graph.cpp").write_text("int graph2;\n")
    result = check_patch(toy.options())
    assert result.problem is not None and "src/graph.cpp: the graph: there is no" in result.problem
    assert toy.runtimes() == [] and list((toy.cache / "work").iterdir()) == []


def test_check_compiles_what_is_touched(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(module._Build, "_compile_touched", lambda self, files: seen.append(list(files)) or list(files))
    result = check_patch(toy.options())
    assert result.problem is None and seen == [["src/graph.cpp", "src/llama-steer.cpp"]]
    assert result.as_json()["fits"] is True
    assert list((toy.cache / "work").iterdir()) == []


def test_check_finds_what_does_not_compile(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\nfor last; do :; done\ngrep -q "syntax error" "$last" && echo "$last:9:9: error: bad" && exit 1\nexit 0\n'
    )
    compiler.chmod(0o755)
    configure = module._Build._configure

    def configured(self: Any) -> None:
        configure(self)
        entries = [
            {"directory": str(tmp_path), "file": str(self.src / "src" / name), "command": f"{compiler} -c x -o y"}
            for name in ("graph.cpp", "llama-steer.cpp")
        ]
        (self.build_dir / "compile_commands.json").write_text(json.dumps(entries))

    monkeypatch.setattr(module._Build, "_configure", configured)
    assert check_patch(toy.options()).problem is None
    (toy.patch / "llama-steer.cpp").write_text("syntax error\n")
    problem = check_patch(toy.options()).problem
    assert problem is not None and "src/llama-steer.cpp does not compile" in problem and ":9:9: error: bad" in problem


def test_syntax_commands(tmp_path: Path) -> None:
    unity = tmp_path / "unity_0_cxx.cxx"
    model = tmp_path / "models" / "x.cpp"
    unity.write_text(f'#include "{model}"\n')
    entries = [
        {"directory": "/b", "file": "/s/a.cpp", "command": "c++ -DX=1 -MD -MT a.o -MF a.d -o a.o -c /s/a.cpp"},
        {"directory": "/b", "file": str(unity), "command": f"c++ -O3 -o u.o -c {unity}"},
    ]
    assert syntax_command(entries, Path("/s/a.cpp")) == (["c++", "-fsyntax-only", "-DX=1", "/s/a.cpp"], "/b")
    assert syntax_command(entries, model) == (["c++", "-fsyntax-only", "-O3", str(model)], "/b")
    assert syntax_command(entries, Path("/s/none.cpp")) is None


def test_the_command_line(toy: Toy) -> None:
    arguments = ["--source", str(toy.source), "--version", "0.3.36", "--no-server"]
    first = CliRunner().invoke(build_command, [*arguments, "--json"])
    assert first.exit_code == 0, first.output
    answer = json.loads(first.stdout)
    assert answer["reused"] is False and {"runtime", "version", "patch", "seconds"} <= set(answer)
    second = CliRunner().invoke(build_command, arguments)
    assert second.stdout == f"already built: {answer['runtime']}\n"
    (toy.source / "src" / "graph.cpp").write_text("int graph2;\n")
    misfit = CliRunner().invoke(build_command, [*arguments, "--check", "--json"])
    assert misfit.exit_code == 1 and json.loads(misfit.stdout)["fits"] is False
    strange = CliRunner().invoke(build_command, [*arguments, "--cmake-arg", "X"])
    assert isinstance(strange.exception, BuildError)
