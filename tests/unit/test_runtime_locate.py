"""Finding a runtime, and making a process use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from steer_plugins.errors import RuntimeMissing
from steer_plugins.runtime import ensure, locate
from steer_plugins.runtime.bindings import Bindings, library_names
from steer_plugins.runtime.ensure import ensure_runtime
from steer_plugins.runtime.locate import activate, find_runtime, read_runtime
from steer_plugins.runtime.patching import load_patch, patch_dir

LIBRARY = library_names("llama")[0]


def make_runtime(folder: Path, **meta: Any) -> Path:
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / LIBRARY).write_text("library")
    content = {"format": 1, "version": "0.3.36", "patch": load_patch().core_hash, "built_at": 1, **meta}
    (folder / "runtime.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STEER_RUNTIME", raising=False)
    bindings_are(monkeypatch, "0.3.36")
    return tmp_path / "cache"


def bindings_are(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    found = Bindings(version, Path("/nowhere/llama_cpp"), None) if version else None
    monkeypatch.setattr(locate, "find_bindings", lambda: found)


def test_the_newest_current_one_for_the_installed_version(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_runtime() is None
    old = make_runtime(cache / "runtime" / "a", built_at=10)
    make_runtime(cache / "runtime" / "b", built_at=30, patch="another")
    make_runtime(cache / "runtime" / "c", built_at=40, version="0.3.35")
    make_runtime(cache / "runtime" / ".stage-d", built_at=50)
    found = find_runtime()
    assert found is not None and found.path == old
    newer = make_runtime(cache / "runtime" / "e", built_at=20)
    found = find_runtime()
    assert found is not None and found.path == newer
    bindings_are(monkeypatch, None)
    found = find_runtime()
    assert found is not None and found.path == cache / "runtime" / "c"


def test_a_server_must_match_its_part_of_the_patch(cache: Path) -> None:
    patch = load_patch()
    folder = make_runtime(cache / "runtime" / "a", server="bin/llama-server", server_patch=patch.server_hash or None)
    (folder / "bin").mkdir()
    (folder / "bin" / "llama-server").write_text("")
    assert find_runtime(need_server=True) is not None
    make_runtime(cache / "runtime" / "b", built_at=99)
    found = find_runtime(need_server=True)
    assert found is not None and found.path == folder
    make = json.loads((folder / "runtime.json").read_text())
    (folder / "runtime.json").write_text(json.dumps({**make, "server_patch": "other"}))
    assert find_runtime(need_server=True) is None


def test_steer_runtime_comes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_runtime(cache / "runtime" / "a")
    named = make_runtime(tmp_path / "mine", patch="any")
    for folder in (named, named / "lib"):
        monkeypatch.setenv("STEER_RUNTIME", str(folder))
        found = find_runtime()
        assert found is not None and found.path == named and found.patch == "any"
    (named / "runtime.json").unlink()
    found = find_runtime()
    assert found is not None and found.lib_dir == named / "lib" and found.version == ""
    with pytest.raises(RuntimeMissing, match="no llama-server"):
        find_runtime(need_server=True)


@pytest.mark.parametrize("kind", ["missing", "empty", "damaged", "no library"])
def test_a_wrong_steer_runtime_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    folder = tmp_path / "mine"
    if kind == "empty":
        folder.mkdir()
    elif kind != "missing":
        make_runtime(folder)
        if kind == "damaged":
            (folder / "runtime.json").write_text("[]")
        else:
            (folder / "lib" / LIBRARY).unlink()
    monkeypatch.setenv("STEER_RUNTIME", str(folder))
    with pytest.raises(RuntimeMissing) as caught:
        find_runtime()
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_finished_runtime_is_not_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_runtime(cache / "runtime" / "a")
    assert ensure_runtime().path == folder


def test_first_use_says_so_and_builds(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module: Any = sys.modules["steer_plugins.runtime.build"]
    asked = []

    def build(options: Any, reporter: Any) -> Any:
        asked.append(options.server)
        return types.SimpleNamespace(runtime=read_runtime(make_runtime(cache / "runtime" / f"r{len(asked)}")), seconds=1.0)

    monkeypatch.setattr(module, "build_runtime", build)
    ensure_runtime()
    said = capsys.readouterr()
    assert "compiles llama.cpp" in said.err and said.out == "" and asked == [False]
    module.remove_tree(cache / "runtime")
    ensure_runtime(quiet=True, need_server=True)
    assert capsys.readouterr().err == "" and asked == [False, True]


# activate


def test_without_bindings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings_are(monkeypatch, None)
    with pytest.raises(RuntimeMissing, match=r"steer-plugins\[local\].*LLAMA_BUILD=OFF pip install --no-cache-dir"):
        activate(read_runtime(make_runtime(tmp_path / "r")))


def test_bindings_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings_are(monkeypatch, "0.3.35")
    with pytest.raises(RuntimeMissing, match=r"0\.3\.36, but 0\.3\.35 is installed; run `steer build`"):
        activate(read_runtime(make_runtime(tmp_path / "r")))


class FakeLibrary:
    def __init__(self, path: Path, steering: bool) -> None:
        self._name = str(path)
        if steering:
            self.llama_steer_version = lambda: b"1"


def fake_llama_cpp(monkeypatch: pytest.MonkeyPatch, library: Any) -> types.ModuleType:
    package, inner = types.ModuleType("llama_cpp"), types.ModuleType("llama_cpp.llama_cpp")
    inner._lib = library  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", inner)
    return package


def test_already_imported_with_other_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = read_runtime(make_runtime(tmp_path / "r"))
    other = tmp_path / LIBRARY
    other.write_text("stock")
    fake_llama_cpp(monkeypatch, FakeLibrary(other, False))
    with pytest.raises(RuntimeMissing) as caught:
        activate(runtime)
    assert f"LLAMA_CPP_LIB_PATH={runtime.lib_dir}" in str(caught.value) and str(other) in str(caught.value)


def test_already_imported_with_ours_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = read_runtime(make_runtime(tmp_path / "r"))
    package = fake_llama_cpp(monkeypatch, FakeLibrary(runtime.library, True))
    assert activate(runtime) is package and activate(runtime) is package


def twin_of(folder: Path) -> Path:
    lib = folder / "stock" / "lib"
    lib.mkdir(parents=True)
    (lib / LIBRARY).write_text("stock")
    return lib


def test_the_unmodified_library_of_the_bindings(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_RUNTIME", "stock")
    with pytest.raises(RuntimeMissing, match="without a library of its own"):
        find_runtime()
    twin = twin_of(make_runtime(cache / "runtime" / "a", patch="old"))
    twin_of(make_runtime(cache / "runtime" / "b", version="0.3.35"))
    found = find_runtime()
    assert found is not None and found.stock and found.lib_dir == twin
    package = tmp_path / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    (package / "lib" / LIBRARY).write_text("its own")
    monkeypatch.setattr(locate, "find_bindings", lambda: Bindings("0.3.31", package, None))
    found = find_runtime()
    assert found is not None and found.stock and found.lib_dir == package / "lib" and found.version == "0.3.31"
    bindings_are(monkeypatch, None)
    with pytest.raises(RuntimeMissing, match="is not installed"):
        find_runtime()


def test_patched_where_there_is_one_else_stock(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ensure, "_said", False)
    twin_of(make_runtime(cache / "runtime" / "a", patch="old"))
    assert ensure_runtime().stock and ensure_runtime().stock
    said = capsys.readouterr()
    assert said.err.replace("\n", " ").count("through the unmodified llama-cpp-python 0.3.36") == 1 and said.out == ""
    make_runtime(cache / "runtime" / "b")
    assert not ensure_runtime().stock and ensure_runtime(wish="stock").stock and not ensure_runtime(wish="patched").stock
    assert capsys.readouterr().err == ""


def test_what_the_process_has_loaded_is_used(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_runtime(cache / "runtime" / "a")
    other = tmp_path / "theirs" / LIBRARY
    other.parent.mkdir()
    other.write_text("stock")
    package = fake_llama_cpp(monkeypatch, FakeLibrary(other, False))
    found = ensure_runtime(quiet=True)
    assert found.stock and found.lib_dir == other.parent and activate(found) is package


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    # In a process of its own: a failed import leaves half a package behind.
    runtime = make_runtime(tmp_path / "r", version="tree")
    package = tmp_path / "site" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os\nraise RuntimeError('cannot load ' + os.environ['LLAMA_CPP_LIB_PATH'])\n")
    (tmp_path / "site" / "llama_cpp_python-0.3.36.dist-info").mkdir()
    (tmp_path / "site" / "llama_cpp_python-0.3.36.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\n"
    )
    program = (
        "import sys; from pathlib import Path; from steer_plugins.runtime.locate import *\n"
        "from steer_plugins.errors import RuntimeMissing\n"
        "try: activate(read_runtime(Path(sys.argv[1])))\n"
        "except RuntimeMissing as error: print(error)\n"
    )
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", program, str(runtime)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout == f"llama_cpp cannot be imported (cannot load {runtime / 'lib'}); run `steer doctor`\n"


def test_the_patch_folder_is_found() -> None:
    assert (patch_dir() / "core.hooks").is_file()
