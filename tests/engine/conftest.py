"""The patched library of this process, tiny models, and the unpatched library (which has to run in a process of its own)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins import testing
from steer_plugins.errors import SteerError
from steer_plugins.runtime import Runtime, activate, ensure_runtime
from tests.engine import any_model, harness
from tests.engine.stock_limits import limit_of

STOCK_RUNNER = Path(__file__).with_name("stock_runner.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On an unmodified library, those tests that need the patch are left out by name."""
    if os.environ.get("STEER_RUNTIME") != "stock":
        return
    for item in items:
        if "tests/engine/" in item.nodeid and (why := limit_of(item.nodeid)) is not None:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    """The runtime under test: STEER_RUNTIME, a folder named by LLAMA_CPP_LIB_PATH, or the cache's newest."""
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if folder and not os.environ.get("STEER_RUNTIME"):
        os.environ["STEER_RUNTIME"] = folder
    try:
        return ensure_runtime()
    except SteerError as error:
        pytest.fail(f"no runtime to test: {error}")


@pytest.fixture(scope="session")
def llama_cpp(runtime: Runtime) -> Any:
    """The ``llama_cpp`` module on the runtime's libraries."""
    module = activate(runtime)
    harness.llama_cpp = module
    harness.silence()
    return module


@pytest.fixture(scope="module")
def float32_cache(llama_cpp: Any) -> Iterator[None]:
    """A KV cache in float32: the usual float16 turns noise in the last bit into differences of a thousandth."""
    original = llama_cpp.llama_context_default_params

    def exact() -> Any:
        params = original()
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0  # off: it computes in float16
        return params

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "llama_context_default_params", exact)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Path of a tiny GGUF: ``tiny("llama")``, ``tiny("deepseek4", split=3)``; equal arguments are written once."""
    folder = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def make(arch: str, **options: Any) -> Path:
        name = "-".join([arch, *(f"{k}{v}" for k, v in sorted(options.items()))])
        if name not in made:
            path = folder / f"{name}.gguf"
            if arch in testing.ARCHITECTURES:
                made[name] = testing.write(arch, path, **options)[0]
            else:  # libllama is asked for its tensors
                made[name] = any_model.write(arch, path, harness.llama_cpp.llama_cpp, **options)
        return made[name]

    return make


@pytest.fixture(scope="session")
def untested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF that llama.cpp loads, of an architecture that steering was never tested on."""
    from steer_plugins.testing import architectures, writer

    path = tmp_path_factory.mktemp("untested") / "llama-embed.gguf"
    plan = replace(architectures.blueprint("llama", n_layer=2, n_ctx=256), architecture="llama-embed")
    writer._write_files(plan, path, seed=0, weights="f32", split=1)
    return path


def skip_untested(arch: str) -> None:
    """Tiny models may exist before the patch lists their architecture; ``test_errors`` names those that must be there."""
    from steer_plugins import native

    if arch not in native.tested_architectures(harness.steer_library()):
        pytest.skip(f"the patch does not steer {arch}")


@pytest.fixture(scope="session")
def _raws(llama_cpp: Any, tiny: Callable[..., Path]) -> Iterator[Callable[..., harness.Raw]]:
    made: dict[Any, harness.Raw] = {}

    def make(arch: str, **options: Any) -> harness.Raw:
        skip_untested(arch)
        key = (arch, *sorted(options.items()))
        if key not in made:
            made[key] = harness.Raw(tiny(arch), **options)
        made[key].reset()
        return made[key]

    yield make
    for raw in made.values():
        raw.close()


@pytest.fixture
def raw(_raws: Callable[..., harness.Raw]) -> Callable[..., harness.Raw]:
    """A context with no steering and an empty cache: ``raw("llama", n_ubatch=4)``. Contexts are kept between tests."""
    return _raws


@pytest.fixture
def fresh(llama_cpp: Any, tiny: Callable[..., Path]) -> Iterator[Callable[..., harness.Raw]]:
    """A context that no other test has used."""
    made: list[harness.Raw] = []

    def make(arch: str, **options: Any) -> harness.Raw:
        skip_untested(arch)
        made.append(harness.Raw(tiny(arch), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def stock(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[np.ndarray]]:
    """``stock(path, steps, **options)``: what the unpatched library computes for the same steps, see ``stock_runner``.

    A process can load one libllama only, so it runs in another one. Skips when there is no unpatched library, unless
    STEER_REQUIRE_STOCK=1.
    """
    named = os.environ.get("STEER_STOCK_LIB")
    folder = Path(named) if named else runtime.stock_lib_dir
    if folder is None or not folder.is_dir():
        reason = "no unpatched libllama to compare with: run `steer build --stock-twin`, or set STEER_STOCK_LIB"
        if os.environ.get("STEER_REQUIRE_STOCK") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    scratch = tmp_path_factory.mktemp("stock")

    def run(path: Path, steps: list[dict[str, Any]], **options: Any) -> list[np.ndarray]:
        job, out = scratch / "job.json", scratch / "out.npz"
        job.write_text(json.dumps({"path": str(path), "steps": steps, "options": options, "out": str(out)}))
        environment = harness.child_environment(runtime, folder)
        done = subprocess.run(
            [sys.executable, str(STOCK_RUNNER), str(job)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        with np.load(out) as data:
            return [data[f"step{i}"] for i in range(len(data.files))]

    return run
