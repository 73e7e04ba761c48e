"""A real text-generation-webui as a process, and its page in headless Chromium, for the tests that need them.

``STEER_TEXTGEN_DIR`` is a checkout (or a portable build) of the webui, ``STEER_TEXTGEN_PYTHON`` the Python that runs it (this one
by default). Nothing in the checkout is changed: user data, models and settings are in a folder of the test's own. The page needs
Chromium (``STEER_CHROMIUM``, or on the PATH) and ``playwright``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from click.testing import CliRunner

from steer_plugins.cli.textgen import textgen
from steer_plugins.client import free_port
from steer_plugins.client.engine import ServerEngine
from steer_plugins.errors import SteerError
from steer_plugins.runtime import find_runtime
from steer_plugins.runtime.demo_model import default_model_path
from steer_plugins.runtime.locate import Runtime
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library
from steer_plugins.training.train import TrainOptions, train
from steer_plugins.training.traits import load_trait

ROOT = Path(__file__).parents[2]
LAUNCH = Path(__file__).with_name("textgen_launch.py")
PROMPT = "Describe a walk in the forest."
SETTINGS = "mode: instruct\nseed: 7\ntemperature: 0.7\nauto_max_new_tokens: false\nmax_new_tokens: 48\n"


def needed() -> tuple[Path, Path, Runtime]:
    """(the webui's folder, the demo model, our runtime); skips what cannot be tested without one of them."""
    named = os.environ.get("STEER_TEXTGEN_DIR")
    if not named:
        pytest.skip("STEER_TEXTGEN_DIR names no text-generation-webui")
    libraries = os.environ.get("LLAMA_CPP_LIB_PATH")
    if libraries and not os.environ.get("STEER_RUNTIME"):
        os.environ["STEER_RUNTIME"] = libraries
    try:
        model, runtime = default_model_path(), find_runtime(need_server=True)
    except SteerError as error:
        pytest.skip(str(error))
    if runtime is None:
        pytest.skip("no runtime with a llama-server: build one with `steer build`")
    return Path(named).absolute(), model, runtime


@functools.cache
def has_server() -> bool:
    """Whether the webui's Python has the wheel with the webui's own llama-server."""
    command = [python(), "-c", "import llama_cpp_binaries"]
    return subprocess.run(command, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, check=False).returncode == 0


def python() -> str:
    """The Python that runs the webui."""
    return os.environ.get("STEER_TEXTGEN_PYTHON") or sys.executable


class Webui:
    """The webui as a process. ``start()`` and ``stop()`` may take turns; user data stay.

    ``stock``: a llama-server in place of the webui's own; by default its own, or the unpatched twin of ours where it has none.
    ``runtime``: in place of the one that was found.
    """

    def __init__(self, folder: Path, *, stock: Path | None = None, runtime: Path | None = None) -> None:
        checkout, model, found = needed()
        self.folder, self.checkout, self.model = folder, checkout, model.name
        self.user_data = folder / "user_data"
        self.library = Library(folder / "library")
        shutil.copytree(
            checkout / "user_data",
            self.user_data,
            ignore=shutil.ignore_patterns("models", "extensions", "steering", "cache", "logs"),
        )
        (self.user_data / "settings.yaml").write_text(SETTINGS)
        (self.user_data / "models").mkdir()
        (self.user_data / "models" / model.name).symlink_to(model)
        self.log = folder / "webui.log"
        self.key = ""  # of the API
        self.process: subprocess.Popen[bytes] | None = None
        paths = [ROOT / "src", ROOT / "integrations" / "textgen_webui"]
        stock = stock or (None if has_server() else found.stock_server)
        if stock is not None:
            shim = folder / "shim" / "llama_cpp_binaries"
            shim.mkdir(parents=True)
            (shim / "__init__.py").write_text(f"def get_binary_path():\n    return {str(stock)!r}\n")
            paths.insert(0, shim.parent)
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "STEER_LIBRARY": str(self.library.root),
            "STEER_RUNTIME": str(runtime or (found.path if found.meta else found.lib_dir)),
            "HF_HUB_OFFLINE": "1",
        }
        self.environment.pop("LLAMA_CPP_LIB_PATH", None)

    def install(self, command: str = "install") -> str:
        """``steer textgen install`` or ``uninstall``; returns what it says."""
        where = ["--dir", str(self.checkout), "--user-data-dir", str(self.user_data)]
        done = CliRunner().invoke(textgen, [command, *where], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    def start(self, *flags: str, ready: str = "steers", model: str | None = None, extension: bool = True) -> None:
        """Start, and wait until the API (and the page) answers. ``ready``: what ``/v1/internal/steering`` has to say."""
        self.api_port, self.page_port = free_port(), free_port()
        command = [python(), str(LAUNCH), "server.py", "--api", "--api-port", str(self.api_port)]
        command += ["--listen-port", str(self.page_port)]
        command += ["--user-data-dir", str(self.user_data), "--model-dir", str(self.user_data / "models")]
        command += ["--model", model or self.model, *(("--extensions", "steering") if extension else ())]
        command += ["--ctx-size", "4096", "--gpu-layers", "0", "--threads", "1", "--parallel", "2", *flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.checkout, env=self.environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        if extension:
            self._wait(lambda: self.get("/v1/internal/steering")[ready])
        else:
            self._wait(lambda: self.get("/v1/internal/model/info")["model_name"])
        if "--nowebui" not in flags:  # gradio gives up when a busy machine keeps it from seeing its own page
            self._wait(
                lambda: requests.get(f"http://127.0.0.1:{self.page_port}/", timeout=60).ok and "public link" in self.said()
            )

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait(self, ready: Callable[[], Any], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process is not None and self.process.poll() is None, self.tail()
            with contextlib.suppress(requests.RequestException, KeyError):
                if ready():
                    return
            time.sleep(0.2)
        raise AssertionError(f"the webui did not get ready: {self.tail()}")

    def said(self) -> str:
        return self.log.read_text("utf-8", errors="replace")

    def tail(self) -> str:
        return self.said()[-3000:]

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def get(self, path: str) -> Any:
        return requests.get(f"http://127.0.0.1:{self.api_port}{path}", headers=self._headers, timeout=60).json()

    def post(self, path: str, body: dict[str, Any]) -> requests.Response:
        return requests.post(f"http://127.0.0.1:{self.api_port}{path}", json=body, headers=self._headers, timeout=300)

    def chat(self, prompt: str = PROMPT, **more: Any) -> str:
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 24, "temperature": 0, **more}
        answer = self.post("/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])


def server_port(webui: Webui) -> int:
    """Where the webui has started its llama-server."""
    return int(re.findall(r"listening on http://127\.0\.0\.1:(\d+)", webui.said())[-1])


def fit(webui: Webui, *names: str) -> None:
    """Fit bundled traits on the model that is loaded, without calibration."""
    with ServerEngine(f"http://127.0.0.1:{server_port(webui)}") as engine:
        for name in names:
            webui.library.put(train(engine, name, load_trait(name), TrainOptions(calibrate="none")), engine.info.identity)


def put_direction(webui: Webui, name: str, dose: float = 8.0) -> None:
    """A vector that costs no fit: a random direction in the middle of the model that is loaded."""
    with ServerEngine(f"http://127.0.0.1:{server_port(webui)}") as engine:
        identity = engine.info.identity
    layers = range(identity.n_layer // 3, 2 * identity.n_layer // 3)
    random = np.random.default_rng(5)
    directions = {(il, "resid_post"): random.normal(size=identity.n_embd).astype(np.float32) for il in layers}
    webui.library.put(SteeringVector(name, directions, {key: dose for key in directions}), identity)


@contextlib.contextmanager
def opened(webui: Webui, *, steering: bool = True) -> Iterator[Page]:
    """The page in Chromium; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="driving the page needs playwright")
    chromium = os.environ.get("STEER_CHROMIUM") or shutil.which("chromium")
    if not chromium:
        pytest.skip("driving the page needs Chromium: name it with STEER_CHROMIUM")
    flags = "--no-sandbox --disable-gpu --disable-quic --disable-background-networking --disable-component-update --disable-sync"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=flags.split())
        try:
            yield Page(browser.new_page(viewport={"width": 1280, "height": 1000}), webui, steering=steering)
        finally:
            browser.close()


class Page:
    """The page in Chromium, by what a user sees of it. Nothing here waits for a fixed time where it can wait for something."""

    def __init__(self, page: Any, webui: Webui, *, steering: bool = True) -> None:
        self.page, self.webui = page, webui
        page.set_default_timeout(600_000)  # a busy machine is no fault of the page
        self.open(steering=steering)

    def open(self, *, steering: bool = True) -> None:
        """Load the page, also when it has just been restarted. ``steering``: the tab is there, and has been told what to show."""
        self.page.goto(f"http://127.0.0.1:{self.webui.page_port}")
        self.page.wait_for_selector("#steering-status .steer-status" if steering else "#chat-tab", state="attached")
        self.page.wait_for_timeout(1500)

    def tab(self, name: str) -> None:
        button = self.page.locator("button[role=tab]", has_text=name).first

        def chosen() -> bool:
            button.evaluate("button => button.click()")  # it may be scrolled out of the webui's own bar
            return bool(button.get_attribute("aria-selected") == "true")

        self.expect(chosen)

    def text(self, name: str) -> str:
        return str(self.page.locator(f"#steering-{name}").inner_text())

    def value(self, name: str) -> str:
        return str(self.page.locator(f"#steering-{name} textarea").input_value())

    def fill(self, name: str, text: str) -> None:
        at = self.page.locator(f"#steering-{name}")
        inside = at.locator("textarea, input")
        (inside.first if inside.count() else at).fill(text)

    def press(self, name: str) -> None:
        self.page.locator(f"#steering-{name}").click()

    def write(self, expression: str) -> None:
        """Type an expression, and wait until it is in force."""
        self.fill("expression", expression)
        self.page.locator("#steering-expression textarea").press("Enter")
        self.expect(lambda: self.webui.get("/v1/internal/steering")["page"]["steering"] == expression)

    def unfold(self, name: str) -> None:
        self.page.locator(f"#steering-{name} button").first.click()
        self.page.wait_for_timeout(400)

    def slide(self, row: int, strength: float) -> None:
        box = self.page.locator(f"#steering-slider-{row} input[type=number]")
        box.fill(str(strength))
        box.press("Enter")
        box.blur()

    def expect(self, wanted: Callable[[], bool], seconds: float = 300) -> None:
        for _ in range(int(seconds * 5)):
            if wanted():
                return
            self.page.wait_for_timeout(200)
        raise AssertionError("the page never showed it")

    def say(self, text: str) -> str:
        """A message in a new chat; returns the whole reply."""
        self.tab("Chat")
        self.page.get_by_role("button", name="New chat", exact=True).first.click()
        self.expect(lambda: self.page.locator("#chat .message-body").count() == 0)
        self.page.wait_for_timeout(1500)
        box = self.page.locator("#chat-input textarea")
        bodies = self.page.locator("#chat .message-body")

        def sent() -> bool:
            box.fill(text)  # a late answer to "New chat" empties the box
            box.press("Enter")
            for _ in range(300):
                if bodies.count() >= 2:
                    return True
                self.page.wait_for_timeout(200)
            return False

        self.expect(sent, seconds=1)
        self.expect(lambda: self.page.locator("._generating").count() == 0)
        self.page.wait_for_timeout(500)
        return str(bodies.last.inner_text())
