"""`steer build --on`: finding a host's ggml, refusing one that is not that of the sources, and building on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steer_plugins.errors import BuildError
from steer_plugins.runtime import host, locate
from steer_plugins.runtime.bindings import Bindings, library_names
from steer_plugins.runtime.build import build_runtime
from steer_plugins.runtime.elf import make_relative, read_dynamic
from steer_plugins.runtime.libraries import free_from_place
from steer_plugins.runtime.sources import SourceOrigin

from .test_runtime_build import Toy, module, toy  # noqa: F401

COMPILER = shutil.which("cc")
LINUX = sys.platform.startswith("linux")
needs_compiler = pytest.mark.skipif(not (COMPILER and LINUX), reason="compiles small ELF libraries")
posix_only = pytest.mark.skipif(os.name != "posix", reason="the toy cmake is a script with a #! line")

GGML_C = """
static const char * GGML_OP_NAME[GGML_OP_COUNT] = {
    "NONE",

    "ADD",
};
static const char * GGML_OP_SYMBOL[GGML_OP_COUNT] = { "none", "x+y" };
"""
GGML_CMAKE = "set(GGML_VERSION_MAJOR 0)\nset(GGML_VERSION_MINOR 25)\nset(GGML_VERSION_PATCH 3)\n"
COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
SAME = {"version": "0.25.3", "commit": "unknown", "tensor": 368, "operations": ["NONE", "ADD"], "devices": [{"name": "CPU"}]}
SOURCE = host.SourceGgml("0.25.3", COMMIT, ("NONE", "ADD"))


def host_folder(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for base in ("ggml", "ggml-base", *names):
        (folder / library_names(base)[0]).write_text(f"their {base}")
    return folder


def compile_library(path: Path, code: str, *options: str) -> Path:
    assert COMPILER is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path), *options], input=code.encode(), check=True)
    return path


# finding it


@pytest.mark.skipif(sys.platform == "win32", reason="needs import libraries there")
@pytest.mark.parametrize("place", [".", "lib", "bin", "build/bin", "lib/ollama", "llama_cpp_binaries/bin", "llama_cpp/lib"])
def test_where_hosts_keep_their_libraries(tmp_path: Path, place: str) -> None:
    folder = host_folder(tmp_path / "x" / place)
    found = host.host_ggml(tmp_path / "x")
    assert isinstance(found, host.HostGgml) and found.library_dir == folder.resolve() and found.ggml_prefix is None


@pytest.mark.skipif(not LINUX, reason="names of Linux")
def test_a_version_in_the_name_will_do(tmp_path: Path) -> None:
    for name in ("libggml.so.0", "libggml.so.0.25.3", "libggml-base.so.0"):
        (tmp_path / name).write_text("")
    assert isinstance(host.host_ggml(tmp_path), host.HostGgml)
    assert host.find_any_library(tmp_path, "ggml") == tmp_path / "libggml.so.0"


def test_no_ggml_to_build_on(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="not a folder"):
        host.host_ggml(tmp_path / "none")
    (tmp_path / library_names("ggml-base")[0]).write_text("")
    with pytest.raises(BuildError, match="holds no shared libraries ggml and ggml-base"):
        host.host_ggml(tmp_path)


def test_a_site_packages_with_a_full_llama_cpp_python(tmp_path: Path) -> None:
    host_folder(tmp_path / "llama_cpp" / "lib")
    info = tmp_path / "llama_cpp_python-0.3.36.dist-info"
    for folder in (info, tmp_path / "lib" / "cmake" / "ggml", tmp_path / "include"):
        folder.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\n")
    (tmp_path / "lib" / "cmake" / "ggml" / "ggml-config.cmake").write_text("")
    (tmp_path / "include" / "ggml.h").write_text("")
    assert host.host_ggml(tmp_path) == Bindings("0.3.36", tmp_path / "llama_cpp", tmp_path)


def test_the_hash_is_that_of_its_ggml(tmp_path: Path) -> None:
    folder = host_folder(tmp_path / "x", "ggml-cuda", "llama")
    before = host.HostGgml(folder, folder).ggml_id()
    (folder / library_names("llama")[0]).write_text("another")
    assert host.HostGgml(folder, folder).ggml_id() == before
    (folder / library_names("ggml-cuda")[0]).write_text("another")
    assert host.HostGgml(folder, folder).ggml_id() != before


@pytest.mark.skipif(sys.platform == "win32", reason="needs import libraries there")
def test_one_of_several_kinds_of_back_ends(tmp_path: Path) -> None:
    folder = host_folder(tmp_path / "lib" / "ollama")
    for kind in ("cuda_v12", "cuda_v13"):
        (folder / kind).mkdir()
        (folder / kind / library_names("ggml-cuda")[0]).write_text(kind)
    plain, one = host.host_ggml(tmp_path), host.host_ggml(folder / "cuda_v13")
    assert isinstance(plain, host.HostGgml) and plain.left_out() == [folder / "cuda_v12", folder / "cuda_v13"]
    assert isinstance(one, host.HostGgml) and one.library_dir == folder and one.left_out() == []
    names = [path.relative_to(folder).as_posix() for path in one.ggml_files()]
    expected = [library_names("ggml-base")[0], library_names("ggml")[0], f"cuda_v13/{library_names('ggml-cuda')[0]}"]
    assert names == expected and one.ggml_id() != plain.ggml_id()


@needs_compiler
def test_what_its_ggml_needs_comes_along_and_nothing_else(tmp_path: Path) -> None:
    compile_library(tmp_path / "libdep.so.12", "int dep(void) { return 1; }", "-Wl,-soname,libdep.so.12")
    compile_library(tmp_path / "libllama.so", "int llama;")
    compile_library(tmp_path / "libother.so", "int other;")
    compile_library(tmp_path / "libggml-base.so", "int base;")
    options = ("-Wl,--no-as-needed", f"-L{tmp_path}", "-l:libdep.so.12", "-l:libllama.so")
    compile_library(tmp_path / "libggml-cuda.so", "int dep(void); int cuda(void) { return dep(); }", *options)
    assert [path.name for path in host.with_dependencies(tmp_path)] == ["libdep.so.12", "libggml-base.so", "libggml-cuda.so"]


# is it the same ggml?


def test_what_the_sources_say(tmp_path: Path) -> None:
    (tmp_path / "ggml" / "src").mkdir(parents=True)
    origin = SourceOrigin("0.3.36")
    with pytest.raises(BuildError, match="do not say which ggml"):
        host.source_ggml(tmp_path, origin)
    (tmp_path / "ggml" / "CMakeLists.txt").write_text(GGML_CMAKE)
    (tmp_path / "ggml" / "src" / "ggml.c").write_text(GGML_C)
    assert host.source_ggml(tmp_path, origin) == SOURCE
    assert host.source_ggml(tmp_path, SourceOrigin("0.3.35")).commit == ""
    assert host.source_ggml(tmp_path, SourceOrigin("0.3.36", tmp_path)).commit == ""  # a tree without git


@pytest.mark.skipif(not shutil.which("git"), reason="asks git")
def test_the_commit_of_a_checkout_but_not_of_what_lies_around_it(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    (tmp_path / "inner").mkdir()
    assert host._commit(SourceOrigin("x", tmp_path)) == git("rev-parse", "HEAD")
    assert host._commit(SourceOrigin("x", tmp_path / "inner")) == ""


@pytest.mark.parametrize("commit", ["unknown", "", "0c1e570", "0c1e57098", "0c1e570-dirty", "0C1E570", "not hex"])
def test_the_same_ggml_is_accepted(commit: str) -> None:
    host.require_same_ggml(Path("/host"), {**SAME, "commit": commit}, SOURCE)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"version": "0.25.2"},
            r"/host brings ggml 0\.25\.2, but the sources carry ggml 0\.25\.3; give the .* with --source DIR",
        ),
        ({"version": "0.26.0", "commit": "abcdef123"}, r"sources of commit abcdef123 with --source DIR"),
        ({"commit": "abcdef123"}, r"of llama\.cpp commit abcdef123, but the sources are of commit 0c1e57098; .*--source"),
        ({"operations": ["NONE", "MUL"]}, "operations are not those of the sources"),
        ({"operations": None}, "operations are not those of the sources"),
        ({"version": None, "error": "wrong ELF class"}, r"cannot be built upon: wrong ELF class; leave out --on"),
        ({"version": None}, "does not tell its version"),
    ],
)
def test_another_ggml_is_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(BuildError, match=words) as caught:
        host.require_same_ggml(Path("/host"), {**SAME, **more}, SOURCE)
    assert "\n" not in str(caught.value)


def test_with_an_unknown_commit_the_rest_decides() -> None:
    source = host.SourceGgml("0.25.3", "", ("NONE", "ADD"))
    host.require_same_ggml(Path("/host"), {**SAME, "commit": "abcdef123"}, source)


BASE = """
#include <stddef.h>
const char * ggml_version(void) { return "0.25.3"; }
const char * ggml_commit(void) { return "0c1e570"; }
size_t ggml_tensor_overhead(void) { return 368; }
static const char * names[] = { "NONE", "ADD" };
const char * ggml_op_name(int op) { return op < 2 ? names[op] : (const char *) 8; }
size_t ggml_backend_reg_count(void) { return 1; }
size_t ggml_backend_dev_count(void) { return 1; }
void * ggml_backend_dev_get(size_t i) { return &names[i]; }
const char * ggml_backend_dev_name(void * d) { return "CPU"; }
const char * ggml_backend_dev_description(void * d) { return "x"; }
void ggml_backend_dev_memory(void * d, size_t * a, size_t * b) { *a = *b = 1; }
"""


@needs_compiler
def test_the_host_is_asked_in_another_process_and_may_crash(tmp_path: Path) -> None:
    compile_library(tmp_path / "libggml-base.so.0", BASE)
    compile_library(tmp_path / "libggml.so.0", BASE)
    answer = host.read_host(tmp_path, 2)
    assert answer["version"] == "0.25.3" and answer["commit"] == "0c1e570" and answer["operations"] == ["NONE", "ADD"]
    assert answer["tensor"] == 368 and [device["name"] for device in answer["devices"]] == ["CPU"] and not answer["modules"]
    host.require_same_ggml(tmp_path, answer, SOURCE)
    crashed = host.read_host(tmp_path, 3)  # the sources know an operation more: reading its name kills the child
    with pytest.raises(BuildError, match="operations are not those"):
        host.require_same_ggml(tmp_path, crashed, SOURCE)
    (tmp_path / "libggml-base.so.0").write_text("no library")
    with pytest.raises(BuildError, match="cannot be built upon"):
        host.require_same_ggml(tmp_path, host.read_host(tmp_path, 2), SOURCE)


# building on it


@pytest.fixture
def on(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    (toy.source / "ggml" / "src").mkdir(parents=True)
    (toy.source / "ggml" / "CMakeLists.txt").write_text(GGML_CMAKE)
    (toy.source / "ggml" / "src" / "ggml.c").write_text(GGML_C)
    answer = dict(SAME)
    monkeypatch.setattr(module, "read_host", lambda *_: answer)
    monkeypatch.setattr(module, "probe", lambda lib: {"steer": "llama-steer 1", **answer})
    return host_folder(tmp_path / "host", "ggml-cuda", "llama")


@posix_only
def test_a_runtime_on_a_host(toy: Toy, on: Path, tmp_path: Path) -> None:  # noqa: F811
    before = {path: path.read_bytes() for path in on.iterdir()}
    runtime = build_runtime(toy.options(on=on, keep=True)).runtime
    assert runtime.ggml_mode == "copy" and host.host_of(runtime.meta) == on
    assert (runtime.lib_dir / library_names("ggml-cuda")[0]).read_text() == "their ggml-cuda"
    assert "llama_steer" in runtime.library.read_text()  # ours, not the host's
    (work,) = (toy.cache / "work").iterdir()
    arguments = (work / "build" / "args.txt").read_text().splitlines()
    assert "-DLLAMA_USE_SYSTEM_GGML=ON" in arguments and f"-DCMAKE_PREFIX_PATH={work / 'host-ggml'}" in arguments
    config = (work / "host-ggml" / "lib" / "cmake" / "ggml" / "ggml-config.cmake").read_text()
    assert str(on / library_names("ggml")[0]) in config and str(work / "src" / "ggml" / "include") in config
    assert {path: path.read_bytes() for path in on.iterdir()} == before
    assert build_runtime(toy.options(on=on)).reused
    (on / library_names("ggml-cuda")[0]).write_text("an upgrade")
    assert not host.same_host(runtime.meta)
    again = build_runtime(toy.options(on=on))
    assert host.same_host(again.runtime.meta)
    assert not again.reused and again.runtime.path != runtime.path


@posix_only
def test_another_version_is_refused_before_anything_is_compiled(
    toy: Toy,  # noqa: F811
    on: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "read_host", lambda *_: {**SAME, "version": "0.9.4"})
    for ask in (build_runtime, module.check_patch):
        with pytest.raises(BuildError, match=r"brings ggml 0\.9\.4, but the sources carry ggml 0\.25\.3"):
            ask(toy.options(on=on))
    assert toy.compiled() == [] and toy.runtimes() == []


@posix_only
@pytest.mark.parametrize("more", [{"own_ggml": True}, {"cmake_args": ("-DGGML_CUDA=ON",)}, {"stock_twin": True}])
def test_what_does_not_go_with_a_host(toy: Toy, on: Path, more: dict[str, Any]) -> None:  # noqa: F811
    with pytest.raises(BuildError, match="leave out"):
        build_runtime(toy.options(on=on, **more))


@posix_only
def test_modules_are_looked_for_beside_the_server(toy: Toy, on: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(module, "probe", lambda lib: {**SAME, "steer": "llama-steer 1", "modules": True})
    runtime = build_runtime(toy.options(on=on, server=True)).runtime
    assert runtime.server is not None and runtime.server.parent == runtime.lib_dir
    assert runtime.meta["ggml"]["modules"] is True


@posix_only
def test_a_device_that_gets_lost_is_an_error(toy: Toy, on: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    devices = [{"name": "CPU"}, {"name": "CUDA0"}]
    monkeypatch.setattr(module, "read_host", lambda *_: {**SAME, "devices": devices})
    with pytest.raises(BuildError, match="device CUDA0 of .* cannot be used from another place"):
        build_runtime(toy.options(on=on))
    assert toy.runtimes() == []


@posix_only
def test_into_a_folder(toy: Toy, on: Path, tmp_path: Path) -> None:  # noqa: F811
    place = tmp_path / "mine"
    runtime = build_runtime(toy.options(on=on, into=place)).runtime
    assert runtime.path == place and toy.runtimes() == [] and locate.find_runtime() is None
    assert build_runtime(toy.options(on=on, into=place)).reused
    other = build_runtime(toy.options(into=place))  # another kind of runtime takes its place
    assert not other.reused and host.host_of(other.runtime.meta) is None
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    with pytest.raises(BuildError, match="has other things in it"):
        build_runtime(toy.options(into=tmp_path / "full"))
    assert (tmp_path / "full" / "precious").exists()


@needs_compiler
@pytest.mark.skipif(not shutil.which("cmake"), reason="runs cmake")
@pytest.mark.parametrize("tensor", [32 + 336, 32 + 400])
def test_the_cmake_package(tmp_path: Path, tensor: int) -> None:
    folder = tmp_path / "a host"
    for base in ("ggml-base", "ggml"):
        compile_library(folder / f"lib{base}.so.0", BASE, f"-Wl,-soname,lib{base}.so.0")
    include = tmp_path / "include"
    include.mkdir()
    (include / "ggml.h").write_text("struct ggml_tensor { char content[336]; };\nconst char * ggml_version(void);\n")
    host.write_cmake_package(tmp_path / "prefix", host.HostGgml(folder, folder), include, tensor)
    (tmp_path / "main.c").write_text('#include "ggml.h"\nint main(void) { return !ggml_version(); }\n')
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.14...3.28)\nproject(x C)\nfind_package(ggml REQUIRED)\n"
        "add_library(ggml ALIAS ggml::ggml)\nadd_executable(main main.c)\ntarget_link_libraries(main ggml)\n"
    )
    command = ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build"), f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if tensor != 368:
        assert done.returncode != 0 and "a tensor of the host's ggml has another size" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    subprocess.run(["cmake", "--build", str(tmp_path / "build")], capture_output=True, check=True)
    assert subprocess.run([str(tmp_path / "build" / "main")], check=False).returncode == 0


# moving libraries


@needs_compiler
def test_names_and_places_in_a_library(tmp_path: Path) -> None:
    one = compile_library(tmp_path / "libone.so.0", "int one(void) { return 1; }", "-Wl,-soname,libone.so.0")
    options = (f"-L{tmp_path}", "-l:libone.so.0", "-Wl,-soname,libtwo.so.0", f"-Wl,-rpath,{tmp_path}:$ORIGIN")
    two = compile_library(tmp_path / "libtwo.so.0", "int one(void); int two(void) { return one() + 1; }", *options)
    dynamic = read_dynamic(two)
    assert dynamic is not None and dynamic.soname == "libtwo.so.0" and "libone.so.0" in dynamic.needed
    assert dynamic.runpath == f"{tmp_path}:$ORIGIN"
    names = {"libone.so.0": "libone.so", "libtwo.so.0": "libtwo.so"}
    new = tmp_path / "elsewhere"
    new.mkdir()
    for path in (one, two):
        make_relative(Path(shutil.move(path, new / names[path.name])), names)
    dynamic = read_dynamic(new / "libtwo.so")
    assert (
        dynamic is not None and dynamic.soname == "libtwo.so" and "libone.so" in dynamic.needed and dynamic.runpath == "$ORIGIN"
    )
    program = f"import ctypes; print(ctypes.CDLL({str(new / 'libtwo.so')!r}).two())"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "2\n"
    with pytest.raises(ValueError, match="no room"):
        make_relative(new / "libtwo.so", {"libone.so": "liblonger.so"})


@needs_compiler
def test_a_fixed_place_is_replaced_in_a_copy(tmp_path: Path) -> None:
    theirs = compile_library(tmp_path / "host" / "libggml.so", "int ggml;", "-Wl,-rpath,/somewhere/on/this/machine")
    content = theirs.read_bytes()
    (tmp_path / "lib").mkdir()
    os.link(theirs, tmp_path / "lib" / "libggml.so")
    free_from_place([tmp_path / "lib" / "libggml.so"])
    dynamic = read_dynamic(tmp_path / "lib" / "libggml.so")
    assert dynamic is not None and dynamic.runpath == "$ORIGIN" and not dynamic.yields
    assert theirs.read_bytes() == content


@needs_compiler
def test_a_library_path_of_the_host_does_not_come_between(tmp_path: Path) -> None:
    """LD_LIBRARY_PATH leads to other back ends, as under a host that sets it for its own."""
    for folder, number in (("ours", 1), ("theirs", 2)):
        code = f"int number(void) {{ return {number}; }}"
        compile_library(tmp_path / folder / "libggml-cpu.so", code, "-Wl,-soname,libggml-cpu.so")
    options = (f"-L{tmp_path / 'ours'}", "-lggml-cpu", "-Wl,-rpath,$ORIGIN", "-Wl,--enable-new-dtags")
    ggml = compile_library(tmp_path / "ours" / "libggml.so", "int number(void); int get(void) { return number(); }", *options)
    program = f"import ctypes; print(ctypes.CDLL({str(ggml)!r}).get())"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path / "theirs")}

    def answer() -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    assert answer() == "2"
    free_from_place([ggml])
    assert answer() == "1"


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + b"\xff" * 58, b"MZ" + b"\0" * 100])
def test_other_files_are_no_libraries(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert read_dynamic(tmp_path / "x") is None
    with pytest.raises(ValueError, match="not a readable 64-bit ELF"):
        make_relative(tmp_path / "x", {})


def test_devices_that_were_lost() -> None:
    assert host.lost_devices([{"name": "CPU"}, {"name": "A"}], [{"name": "CPU"}]) == ["A"]
    assert json.dumps(SAME)
