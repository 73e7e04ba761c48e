"""A machine that has never seen a compiler: the wheel and a full, unmodified llama-cpp-python are enough for the whole recipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from steer_plugins.runtime import find_bindings, find_stock
from steer_plugins.runtime.compiling import library_name
from tests.integration.test_wheel import ROOT, run, wheel  # noqa: F401  # the fixture


@pytest.fixture(scope="module")
def machine(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:  # noqa: F811
    """Its environment: nothing on the PATH, an empty cache, the unpatched twin as the library of the bindings."""
    stock, bindings = find_stock(), find_bindings()
    if stock is None or bindings is None:
        reason = "no unmodified libllama: run `steer build --stock-twin`"
        if os.environ.get("STEER_REQUIRE_STOCK") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("machine")
    site, full, empty = root / "site", root / "full", root / "bin"
    empty.mkdir()
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    shutil.copytree(bindings.package, full / "llama_cpp", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    shutil.copytree(stock.lib_dir, full / "llama_cpp" / "lib", symlinks=True)
    meta = full / f"llama_cpp_python-{bindings.version}.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text(distribution("llama-cpp-python").read_text("METADATA") or "", encoding="utf-8")
    drop = ("STEER_RUNTIME", "LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB", "CXX", "CC", "STEER_PATCH_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    return {
        **environment,
        "PATH": str(empty),
        "PYTHONPATH": os.pathsep.join([str(site), str(full)]),
        "STEER_CACHE": str(root / "cache"),
        "STEER_LIBRARY": str(root / "library"),
    }


def steer(machine: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, as the wheel has it."""
    done = subprocess.run(
        [sys.executable, "-m", "steer_plugins", *arguments], env=machine, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_doctor_sees_what_there_is(machine: dict[str, str]) -> None:
    found = json.loads(steer(machine, "doctor", "--json").stdout)
    assert found["works"] and found["tools"]["compiler"] is None and found["runtime"] is None
    assert Path(found["stock"]["library"]).name == library_name(ROOT / "cpp_patch")
    assert Path(found["stock"]["path"]) == Path(machine["PYTHONPATH"].split(os.pathsep)[1]) / "llama_cpp" / "lib"


def test_train_generate_inspect_and_bench(machine: dict[str, str], tmp_path: Path) -> None:
    said = steer(machine, "train", "mood", "--calibrate", "none", "--layers", "10-18")
    assert said.stderr.replace("\n", " ").count("steering through the unmodified llama-cpp-python") == 1
    prompt, length = "The weather in the old town is", ("--max-tokens", "12")
    plain = steer(machine, "generate", prompt, *length).stdout
    moved = steer(machine, "generate", prompt, "--steer", "mood:2.5", *length).stdout
    assert plain.strip() and moved.strip() and plain != moved
    page = tmp_path / "page.html"
    steer(machine, "inspect", prompt, "--vector", "mood", "--out", str(page))
    assert "<table" in page.read_text(encoding="utf-8")
    rows = json.loads(steer(machine, "bench", "speed", "--rounds", "1", "--json").stdout)["rows"]
    assert {"stock-add", "stock-callback-1", "stock-callback-9"} <= {row["name"] for row in rows}
    assert not list(Path(machine["STEER_CACHE"]).rglob("*.so")), "nothing was compiled"
