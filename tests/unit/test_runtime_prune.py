"""`steer build --prune`: what is in use stays, the rest goes, and the bytes are counted right."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from steer_plugins.cli.build import build as build_command
from steer_plugins.runtime import locate
from steer_plugins.runtime import prune as module
from steer_plugins.runtime.bindings import Bindings, library_names
from steer_plugins.runtime.host import HostGgml
from steer_plugins.runtime.patching import load_patch
from steer_plugins.runtime.prune import exclusive_bytes, prune_runtimes

from .test_runtime_locate import make_runtime

HOOKS = """== src/graph.cpp
-- the graph
after: int graph;
| // ours
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STEER_PATCH_DIR", str(tmp_path / "patch"))  # does not change while a test runs
    (tmp_path / "patch").mkdir()
    for name in ("core.hooks", "server.hooks"):
        (tmp_path / "patch" / name).write_text(HOOKS)
    monkeypatch.delenv("STEER_RUNTIME", raising=False)
    monkeypatch.setattr(locate, "find_bindings", lambda: Bindings("0.3.36", Path("/nowhere"), None))
    return tmp_path / "cache"


def runtime(cache: Path, name: str, at: int, **meta: Any) -> Path:
    folder = make_runtime(cache / "runtime" / name, built_at=at, **meta)
    if meta.get("server"):
        (folder / meta["server"]).write_text("server")
    return folder


def server() -> dict[str, Any]:
    return {"server": "lib/llama-server", "server_patch": load_patch().server_hash}


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "runtime").iterdir())


def test_nothing_to_do(cache: Path) -> None:
    assert prune_runtimes().as_json() == {"removed": [], "kept": [], "freed": 0}
    assert not cache.exists()


def test_the_newest_in_use_stay(cache: Path) -> None:
    runtime(cache, "old-patch", 90, patch="old")
    runtime(cache, "other-version", 91, version="0.3.35")
    runtime(cache, "older", 10)
    runtime(cache, "older-server", 5, **server())
    runtime(cache, "server", 20, **server())
    runtime(cache, "newest", 30)
    damaged = runtime(cache, "damaged", 99)
    (damaged / "runtime.json").write_text("{")
    (cache / "runtime" / ".stage-x-1").mkdir()
    (cache / "runtime" / "a file").write_text("")
    result = prune_runtimes()
    assert left(cache) == ["a file", "newest", "server"]
    assert {path.name for path, _ in result.kept} == {"newest", "server"}
    assert result.freed > 0 and len(result.removed) == 6


def test_when_none_fits_the_newest_stays(cache: Path) -> None:
    runtime(cache, "a", 1, patch="old")
    runtime(cache, "b", 2, patch="old")
    prune_runtimes()
    assert left(cache) == ["b"]


def test_what_the_variable_names_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = runtime(cache, "named", 1, patch="old")
    runtime(cache, "newest", 2)
    runtime(cache, "old", 1)
    monkeypatch.setenv("STEER_RUNTIME", str(named))
    prune_runtimes()
    assert left(cache) == ["named", "newest"]


def test_runtimes_for_hosts_stay_as_long_as_the_host_is_the_same(cache: Path, tmp_path: Path) -> None:
    name = library_names("ggml")[0]
    for host in ("one", "two", "gone"):
        (tmp_path / host).mkdir()
        for base in ("ggml", "ggml-base"):
            (tmp_path / host / library_names(base)[0]).write_text(host)

    def on(host: str, folder: str, at: int, **meta: Any) -> None:
        source = tmp_path / host
        ggml = {"mode": "copy", "host": str(source), "id": HostGgml(source, source).ggml_id()}
        runtime(cache, folder, at, ggml=ggml, **meta)

    on("one", "one-older", 1)
    on("one", "one", 2)
    on("two", "two", 3)
    on("gone", "gone", 4)
    on("two", "two-old-patch", 5, patch="old")
    runtime(cache, "newest", 9)
    (tmp_path / "gone" / name).write_text("upgraded")
    result = prune_runtimes()
    assert left(cache) == ["newest", "one", "two"]
    assert f"it is for {tmp_path / 'one'}" in dict((path.name, why) for path, why in result.kept)["one"]


def test_bytes_count_once_and_only_when_they_are_freed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "alone").write_bytes(b"x" * 1000)
    (tmp_path / "a" / "twice").write_bytes(b"x" * 100)
    os.link(tmp_path / "a" / "twice", tmp_path / "a" / "again")
    (tmp_path / "elsewhere").write_bytes(b"x" * 10_000)
    os.link(tmp_path / "elsewhere", tmp_path / "a" / "linked")
    (tmp_path / "a" / "link").symlink_to("alone")
    assert exclusive_bytes(tmp_path / "a") == 1100


def test_what_is_open_stays_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime(cache, "newest", 2)
    old = runtime(cache, "old", 1)

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "in use")

    monkeypatch.setattr(module.os, "replace", refuse)
    result = prune_runtimes()
    assert result.removed == [] and (old / "lib" / library_names("llama")[0]).exists()
    assert "a program has it open" in dict((path.name, why) for path, why in result.kept)["old"]


def test_the_command_line(cache: Path) -> None:
    runtime(cache, "newest", 2)
    old = runtime(cache, "old", 1)
    size = exclusive_bytes(old)
    result = CliRunner().invoke(build_command, ["--prune", "--json"])
    assert json.loads(result.stdout)["removed"] == [{"path": str(old), "bytes": size}]
    text = CliRunner().invoke(build_command, ["--prune"]).stdout
    assert text.endswith("0.0 MB freed\n") and f"kept {cache / 'runtime' / 'newest'} (the engines use it)" in text
