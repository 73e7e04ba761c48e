"""`steer build --wheel`: what goes in, under which names, and that it is found after pip has put it somewhere."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from steer_plugins.cli.build import build as build_command
from steer_plugins.errors import BuildError, RuntimeMissing
from steer_plugins.native import API_VERSION
from steer_plugins.runtime import locate, wheel
from steer_plugins.runtime.bindings import Bindings, library_names
from steer_plugins.runtime.locate import find_runtime, installed_runtime, read_runtime
from steer_plugins.runtime.patching import load_patch
from steer_plugins.runtime.plan import BuildOptions

from .test_runtime_locate import make_runtime

LINUX = sys.platform.startswith("linux")
pytestmark = pytest.mark.skipif(not (LINUX and shutil.which("cc")), reason="compiles small ELF libraries")
META: dict[str, Any] = {
    "llama_cpp": "0.5.0",
    "patch": load_patch().core_hash,
    "steer_api": f"llama-steer {API_VERSION}",
    "server": "bin/llama-server",
    "source": "/home/me/llama.cpp",
    "cmake_args": ["-DGGML_NATIVE=OFF"],
    "steer_plugins": "0.1.0",
    "ggml": {"mode": "own", "source": "/home/me/lib", "host": "/home/me/host", "files": {}},
}


def compile_c(path: Path, code: str, *options: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cc", "-x", "c", "-", "-o", str(path), *options], input=code.encode(), check=True)


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> locate.Runtime:
    """A small runtime of real libraries: versioned names, links, and a place of this machine in the search path."""
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STEER_RUNTIME", raising=False)
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    monkeypatch.setattr(locate, "find_bindings", lambda: Bindings("0.3.36", Path("/nowhere"), None))
    folder = make_runtime(tmp_path / "cache" / "runtime" / "a", **META)
    lib = folder / "lib"
    (lib / "libllama.so").unlink()
    here = f"-Wl,-rpath,$ORIGIN:{lib}"
    ggml = "#include <stddef.h>\nsize_t ggml_backend_dev_count(void) { return 0; }\n" + "".join(
        f"void * ggml_backend_dev_{name}(void) {{ return 0; }}\n" for name in ("get", "name", "description", "memory")
    )
    llama = (
        'size_t ggml_backend_dev_count(void);\nconst char * llama_steer_version(void) { ggml_backend_dev_count(); return "1"; }'
    )
    compile_c(lib / "libggml.so.0.1", ggml, "-shared", "-fPIC", "-Wl,-soname,libggml.so.0")
    for link, target in (("libggml.so.0", "libggml.so.0.1"), ("libggml.so", "libggml.so.0"), ("libllama.so", "libllama.so.0")):
        (lib / link).symlink_to(target)
    options = (f"-L{lib}", "-lggml", here)
    compile_c(lib / "libllama.so.0", "#include <stddef.h>\n" + llama, "-shared", "-fPIC", "-Wl,-soname,libllama.so.0", *options)
    main = "const char * llama_steer_version(void);\nint main(void) { return llama_steer_version()[0] != '1'; }"
    compile_c(folder / "bin" / "llama-server", main, f"-L{lib}", "-lllama", f"-Wl,-rpath,$ORIGIN/../lib:{lib}")
    (folder / "LICENSE.llama.cpp").write_text("MIT License")
    return read_runtime(folder)


def unpack(path: Path, target: Path) -> Path:
    """What pip does with a wheel."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            archive.extract(entry, target)
            (target / entry.filename).chmod(entry.external_attr >> 16)
    return target / "steer_plugins_runtime"


def test_the_files_of_the_wheel(built: locate.Runtime, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in built.path.rglob("*") if path.is_file()}
    path = wheel.build_wheel(built, tmp_path / "out")
    version = f"0.3.36+p{built.patch[:10]}"
    machine = os.uname().machine
    assert path.name == f"steer_plugins_runtime-{version}-py3-none-linux_{machine}.whl"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with zipfile.ZipFile(path) as archive:
        info = f"steer_plugins_runtime-{version}.dist-info"
        package = "steer_plugins_runtime"
        assert {entry.filename: oct(entry.external_attr >> 16) for entry in archive.infolist()} == {
            f"{package}/__init__.py": "0o100644",
            f"{package}/runtime.json": "0o100644",
            f"{package}/bin/llama-server": "0o100755",
            f"{package}/lib/libggml.so": "0o100755",
            f"{package}/lib/libllama.so": "0o100755",
            f"{info}/METADATA": "0o100644",
            f"{info}/WHEEL": "0o100644",
            f"{info}/RECORD": "0o100644",
            f"{info}/licenses/LICENSE.llama.cpp": "0o100644",
        }
        rows = list(csv.reader(io.StringIO(archive.read(f"{info}/RECORD").decode())))
        assert sorted(row[0] for row in rows) == sorted(archive.namelist())
        for name, digest, size in rows:
            content = archive.read(name)
            if name.endswith("RECORD"):
                assert (digest, size) == ("", "")
            else:
                expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                assert (digest, size) == (f"sha256={expected}", str(len(content)))
        metadata = archive.read(f"{info}/METADATA").decode()
        assert (
            f"\nVersion: {version}\n" in metadata
            and "\nLicense-File: LICENSE.llama.cpp\n" in metadata
            and built.patch in metadata
        )
        assert f"Tag: py3-none-linux_{machine}\n" in archive.read(f"{info}/WHEEL").decode()
        meta = json.loads(archive.read(f"{package}/runtime.json"))
    assert str(tmp_path) not in json.dumps(meta) and "/home/me" not in json.dumps(meta)
    assert meta["wheel"] == version and list(meta["ggml"]["files"]) == ["libggml.so"]
    assert {path: path.read_bytes() for path in built.path.rglob("*") if path.is_file()} == before


def test_it_runs_from_anywhere(built: locate.Runtime, tmp_path: Path) -> None:
    package = unpack(wheel.build_wheel(built, tmp_path), tmp_path / "some where")
    shutil.rmtree(built.path)
    runtime = read_runtime(package)
    assert runtime.problem() is None and runtime.server is not None
    assert subprocess.run([str(runtime.server)], check=False).returncode == 0
    report = wheel.probe(runtime.lib_dir)
    assert report["steer"] == "1" and set(report["loaded"]) == {str(package / "lib" / f"lib{n}.so") for n in ("llama", "ggml")}
    program = "import steer_plugins_runtime; print(steer_plugins_runtime.folder())"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=True)
    assert done.stdout == f"{package}\n"


def test_a_library_that_needs_its_old_place_is_refused(built: locate.Runtime, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    compile_c(elsewhere / "libggml-x.so", "int x(void) { return 1; }", "-shared", "-fPIC")
    options = ("-shared", "-fPIC", f"-L{elsewhere}", "-lggml-x", f"-Wl,-rpath,{elsewhere}")
    compile_c(built.lib_dir / "libmtmd.so", "int x(void); int y(void) { return x(); }", *options)
    with pytest.raises(BuildError, match="cannot be loaded .*libggml-x.so"):
        wheel.build_wheel(built, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_library_found_outside_is_refused(built: locate.Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "probe", lambda lib: {"steer": "1", "loaded": [str(lib / "libllama.so"), "/usr/lib/libggml.so"]})
    with pytest.raises(BuildError, match=r"still load /usr/lib/libggml\.so"):
        wheel.build_wheel(built, tmp_path)


@pytest.mark.parametrize("what", ["in-place", "no licence", "lost library", "unwritable", "not a library"])
def test_what_cannot_be_packed_is_one_sentence(built: locate.Runtime, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    if what == "in-place":
        content = {**built.meta, "ggml": {"mode": "in-place"}}
        (built.path / "runtime.json").write_text(json.dumps(content))
    elif what == "no licence":
        (built.path / "LICENSE.llama.cpp").unlink()
    elif what == "lost library":
        (built.lib_dir / "libllama.so").unlink()
    elif what == "not a library":
        (built.lib_dir / "libmtmd.so").write_text("text")
    else:
        out.write_text("a file")
    with pytest.raises(BuildError) as caught:
        wheel.build_wheel(read_runtime(built.path), out)
    assert "\n" not in str(caught.value) and (what != "unwritable" or f"no wheel can be written to {out}" in str(caught.value))
    assert not out.is_dir() or not list(out.iterdir())


@pytest.mark.parametrize(
    ("meta", "version"),
    [
        ({"version": "0.3.36", "patch": "ab" * 32}, "0.3.36+pababababab"),
        ({"version": "0.3.36", "patch": "ab" * 32, "server_patch": "01" * 32}, "0.3.36+pababababab.s0101010101"),
        (
            {"version": "llama.cpp-0.5.0-12AB34cd", "llama_cpp": "0.5.0", "patch": "ab" * 32},
            "0.5.0+llamacpp.12ab34cd.pababababab",
        ),
        ({"version": "my tree", "patch": ""}, "0+llamacpp.mytree.punknown"),
    ],
)
def test_versions(meta: dict[str, Any], version: str) -> None:
    assert wheel.wheel_version(meta) == version
    # PEP 440, public and local part
    assert re.fullmatch(r"\d+(\.\d+)*\+[a-z0-9]+(\.[a-z0-9]+)*", version)


def test_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel.sysconfig, "get_platform", lambda: "win-amd64")
    assert wheel.platform_tag() == "win_amd64"
    monkeypatch.setattr(wheel.sys, "platform", "darwin")
    monkeypatch.setattr(wheel.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(wheel.platform, "mac_ver", lambda: ("15.3.1", ("", "", ""), "arm64"))
    assert wheel.platform_tag() == "macosx_15_0_arm64"
    assert wheel.platform_tag({"CMAKE_OSX_DEPLOYMENT_TARGET": "12.3"}) == "macosx_12_0_arm64"
    assert wheel.platform_tag({"CMAKE_OSX_DEPLOYMENT_TARGET": "10.15"}) == "macosx_10_15_arm64"


def test_a_wheel_is_built_for_other_machines_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    options = wheel.portable_options(BuildOptions(cmake_args=("-DGGML_CUDA=ON",)))
    assert options.own_ggml and options.cmake_args == ("-DGGML_NATIVE=OFF", "-DGGML_CUDA=ON")
    native = BuildOptions(cmake_args=("-DGGML_NATIVE=ON",))
    assert wheel.portable_options(native).cmake_args == native.cmake_args
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=ON")
    assert wheel.portable_options(BuildOptions()).cmake_args == ()
    on = BuildOptions(on=Path("/host"))
    assert wheel.portable_options(on) == on


def test_the_command_line(built: locate.Runtime, tmp_path: Path) -> None:
    arguments = ["--wheel", "--runtime", str(built.path), "--out", str(tmp_path / "out")]
    answer = json.loads(CliRunner().invoke(build_command, [*arguments, "--json"]).stdout)
    assert Path(answer["wheel"]).stat().st_size == answer["bytes"] and answer["runtime"] == str(built.path)
    text = CliRunner().invoke(build_command, arguments)
    assert text.exit_code == 0 and "pip install" in text.stdout and text.stderr == ""
    (built.path / "runtime.json").write_text(json.dumps({**built.meta, "cmake_args": []}))
    assert "may crash on an older one" in CliRunner().invoke(build_command, arguments).stderr
    for wrong in (["--out", "x"], ["--wheel", "--check"], ["--wheel", "--into", "x"], ["--prune", "--wheel"], ["--runtime", "x"]):
        assert CliRunner().invoke(build_command, wrong).exit_code == 2, wrong


# after pip install


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed wheel (without anything real in it), and a runtime in the cache."""
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STEER_RUNTIME", raising=False)
    monkeypatch.setattr(locate, "find_bindings", lambda: Bindings("0.3.36", Path("/nowhere"), None))
    make_runtime(tmp_path / "cache" / "runtime" / "a")
    package = make_runtime(tmp_path / "site" / "steer_plugins_runtime", **{**META, "server": None, "wheel": "0.3.36+p1"})
    (package / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    monkeypatch.syspath_prepend(str(package.parent))
    return package


def change(package: Path, **meta: Any) -> None:
    path = package / "runtime.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **meta}))


def found(need_server: bool = False) -> Path | None:
    runtime = find_runtime(need_server)
    return runtime.path if runtime else None


def test_no_wheel_is_installed() -> None:
    assert installed_runtime() is None


def test_the_wheel_comes_before_the_cache_and_after_the_variable(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found() == installed
    change(installed, patch="another patch with the same API")
    assert found() == installed
    named = make_runtime(tmp_path / "mine")
    monkeypatch.setenv("STEER_RUNTIME", str(named))
    assert found() == named


def test_a_wheel_for_other_bindings_is_left_alone(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(installed, version="0.3.35")
    assert found() == tmp_path / "cache" / "runtime" / "a"
    monkeypatch.setattr(locate, "find_bindings", lambda: None)
    assert found() == installed


def test_the_server_of_a_wheel(installed: Path) -> None:
    assert found(need_server=True) is None
    (installed / "bin").mkdir()
    (installed / "bin" / "llama-server").write_text("")
    change(installed, server="bin/llama-server", server_patch="another protocol")
    assert found(need_server=True) is None and found() == installed
    change(installed, server_patch=load_patch().server_hash)
    assert found(need_server=True) == installed


@pytest.mark.parametrize("what", ["api", "no api", "library", "server", "json"])
def test_an_unusable_wheel_is_one_sentence(installed: Path, what: str) -> None:
    if what == "library":
        (installed / "lib" / library_names("llama")[0]).unlink()
    elif what == "json":
        (installed / "runtime.json").write_text("{")
    elif what == "server":
        change(installed, server="bin/llama-server")
    else:
        change(installed, steer_api=f"llama-steer {API_VERSION + 1}" if what == "api" else None)
    with pytest.raises(RuntimeMissing) as caught:
        find_runtime()
    message = str(caught.value)
    assert "the installed steer-plugins-runtime" in message and "pip uninstall" in message and "\n" not in message
    if what == "api":
        assert f"speaks 'llama-steer {API_VERSION + 1}', but this package needs 'llama-steer {API_VERSION}'" in message
