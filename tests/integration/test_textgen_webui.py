"""The extension in a real text-generation-webui: its API, and its page in headless Chromium.

``STEER_TEXTGEN_DIR`` is a checkout (or a portable build) of the webui, ``STEER_TEXTGEN_PYTHON`` the Python that runs it (this one
by default). Nothing in the checkout is changed: user data, models and settings are in a folder of the test's own. The page needs
Chromium (``STEER_CHROMIUM``, or on the PATH) and ``playwright``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from steer_plugins.cli.textgen import SCRIPT
from steer_plugins.engine.server import ServerEngine
from steer_plugins.errors import SteerError
from steer_plugins.library import Library
from steer_plugins.models import default_model_path
from steer_plugins.runtime import find_runtime
from steer_plugins.server import free_port
from steer_plugins.training import TrainOptions, train
from steer_plugins.traits import load_trait

ROOT = Path(__file__).parents[2]
PROMPT = "Describe a walk in the forest."
SETTINGS = "mode: instruct\nseed: 7\ntemperature: 0.7\nmax_new_tokens: 48\n"


class Webui:
    """The webui as a process. ``start()`` and ``stop()`` may take turns; user data stay."""

    def __init__(self, folder: Path, checkout: Path, model: Path, environment: dict[str, str]) -> None:
        self.folder, self.checkout, self.environment = folder, checkout, environment
        self.model = model.name
        self.user_data = folder / "user_data"
        shutil.copytree(
            checkout / "user_data",
            self.user_data,
            ignore=shutil.ignore_patterns("models", "extensions", "steering", "cache", "logs"),
        )
        script = self.user_data / "extensions" / "steering" / "script.py"
        script.parent.mkdir(parents=True)
        script.write_text(SCRIPT)
        (self.user_data / "settings.yaml").write_text(SETTINGS)
        (self.user_data / "models").mkdir()
        shutil.copyfile(model, self.user_data / "models" / model.name)
        self.log = folder / "webui.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *flags: str) -> None:
        self.api_port, self.page_port = free_port(), free_port()
        python = os.environ.get("STEER_TEXTGEN_PYTHON") or sys.executable
        command = [python, "server.py", "--portable", "--api", "--api-port", str(self.api_port)]
        command += ["--listen-port", str(self.page_port), "--user-data-dir", str(self.user_data)]
        command += ["--model-dir", str(self.user_data / "models"), "--model", self.model, "--extensions", "steering"]
        command += ["--ctx-size", "4096", "--gpu-layers", "0", "--threads", "1", "--parallel", "2", *flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.checkout, env=self.environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        self._wait(lambda: self.get("/v1/internal/steering")["steers"])

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

    def tail(self) -> str:
        return self.log.read_text("utf-8", errors="replace")[-3000:]

    def get(self, path: str) -> Any:
        return requests.get(f"http://127.0.0.1:{self.api_port}{path}", timeout=60).json()

    def post(self, path: str, body: dict[str, Any]) -> requests.Response:
        return requests.post(f"http://127.0.0.1:{self.api_port}{path}", json=body, timeout=300)

    def chat(self, prompt: str = PROMPT, **more: Any) -> str:
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 24, "temperature": 0, **more}
        answer = self.post("/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webui]:
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
    folder = tmp_path_factory.mktemp("textgen")
    paths = [ROOT / "src", ROOT / "integrations" / "textgen_webui"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "STEER_LIBRARY": str(folder / "library"),
        "STEER_RUNTIME": str(runtime.lib_dir if not runtime.meta else runtime.path),
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("LLAMA_CPP_LIB_PATH", None)
    found = Webui(folder, Path(named).absolute(), model, environment)
    found.start()
    with ServerEngine(f"http://127.0.0.1:{server_port(found)}") as engine:
        library = Library(folder / "library")
        for name in ("mood", "succinctness"):
            library.put(train(engine, name, load_trait(name), TrainOptions(calibrate="none")), engine.info.identity)
    yield found
    found.stop()


def server_port(webui: Webui) -> int:
    """Where the webui has started its llama-server."""
    return int(re.findall(r"listening on http://127\.0\.0\.1:(\d+)", webui.tail())[-1])


# ---- the API ----


def test_requests_carry_their_steering(webui: Webui) -> None:
    plain = webui.chat()
    cheerful, sombre = webui.chat(steering="mood:1"), webui.chat(steering=[{"vector": "mood", "strength": -1}])
    assert len({plain, cheerful, sombre}) == 3
    assert plain == webui.chat(steering=[]) == webui.chat(steering="mood:0") == webui.chat()
    assert webui.chat(steering={"vector": "mood", "strength": 1.0}) == cheerful


def test_two_at_once_do_not_mix(webui: Webui) -> None:
    wishes = ["mood:1", "mood:-1", None, "succinctness:1 + mood:-0.5"]
    alone = [webui.chat(steering=wish) for wish in wishes]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda wish: webui.chat(steering=wish), wishes))
    assert len(set(alone)) == 4
    for mine, shared in zip(alone, together, strict=True):
        assert mine[:20] == shared[:20]  # a batch may change the last bits, and so a close choice further on


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("wish", "named"),
    [
        ("nothing:1", "'nothing'"),
        ("mood:", "character 6"),
        ([{"vector": "mood", "strenght": 1}], "strenght"),
        ("mood@29", "29"),
        ({"preset": "none"}, "'none'"),
        (7, "7"),
    ],
)
def test_faults_are_named_before_a_stream_begins(webui: Webui, wish: Any, named: str, stream: bool) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "prompt": "hi", "max_tokens": 4, "stream": stream, "steering": wish}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/internal/logits"):
        answer = webui.post(path, body)
        assert (answer.status_code, named in answer.json()["error"]["message"]) == (400, True), (path, answer.text)


def test_the_other_routes_are_steered(webui: Webui) -> None:
    def logits(wish: Any) -> Any:
        return webui.post("/v1/internal/logits", {"prompt": "She felt very", "top_logits": 5, "steering": wish}).json()

    def completion(wish: Any) -> str:
        body = {"prompt": "She felt very", "max_tokens": 12, "temperature": 0, "steering": wish}
        return str(webui.post("/v1/completions", body).json()["choices"][0]["text"])

    def message(wish: Any) -> str:
        body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12, "temperature": 0, "steering": wish}
        return str(webui.post("/v1/messages", body).json()["content"][0]["text"])

    for ask in (logits, completion, message):
        assert ask("mood:-1") != ask(None) == ask([])


def test_vectors_and_presets_are_listed(webui: Webui) -> None:
    assert [one["name"] for one in webui.get("/v1/internal/steering/vectors")["vectors"]][:2] == ["mood", "succinctness"]
    assert webui.get("/v1/internal/steering/presets") == {"presets": {}}
    assert webui.get("/v1/internal/steering")["device"]


# ---- the page ----


class Page:
    """The page in Chromium, by what a user sees of it."""

    def __init__(self, page: Any, webui: Webui) -> None:
        self.page = page
        page.goto(f"http://127.0.0.1:{webui.page_port}")
        page.wait_for_selector("#chat-tab", state="attached")
        page.wait_for_timeout(1500)

    def tab(self, name: str) -> None:
        self.page.locator("button[role=tab]", has_text=name).first.click()
        self.page.wait_for_timeout(700)

    def value(self, name: str) -> str:
        return str(self.page.locator(f"#steering-{name} textarea").input_value())

    def fill(self, name: str, text: str) -> None:
        self.page.locator(f"#steering-{name}").locator("textarea, input").first.fill(text)

    def press(self, name: str) -> None:
        self.page.locator(f"#steering-{name}").click()

    def unfold(self, name: str) -> None:
        self.page.locator(f"#steering-{name} button").first.click()
        self.page.wait_for_timeout(400)

    def slide(self, row: int, strength: float) -> None:
        box = self.page.locator(f"#steering-slider-{row} input[type=number]")
        box.fill(str(strength))
        box.press("Enter")
        box.blur()

    def expect(self, wanted: Callable[[], bool], seconds: float = 90) -> None:
        for _ in range(int(seconds * 5)):
            if wanted():
                return
            self.page.wait_for_timeout(200)
        raise AssertionError("the page never showed it")

    def say(self, text: str) -> str:
        """A message in a new chat; returns the whole reply."""
        self.tab("Chat")
        self.page.get_by_role("button", name="New chat", exact=True).first.click()
        self.page.wait_for_timeout(1500)
        box = self.page.locator("#chat-input textarea")
        box.fill(text)
        box.press("Enter")
        bodies = self.page.locator("#chat .message-body")
        self.expect(lambda: bodies.count() >= 2)
        self.expect(lambda: self.page.locator("._generating").count() == 0)
        self.page.wait_for_timeout(500)
        return str(bodies.last.inner_text())


@pytest.fixture
def page(webui: Webui) -> Iterator[Page]:
    playwright = pytest.importorskip("playwright.sync_api", reason="driving the page needs playwright")
    chromium = os.environ.get("STEER_CHROMIUM") or shutil.which("chromium")
    if not chromium:
        pytest.skip("driving the page needs Chromium: name it with STEER_CHROMIUM")
    flags = "--no-sandbox --disable-gpu --disable-quic --disable-background-networking --disable-component-update --disable-sync"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=flags.split())
        yield Page(browser.new_page(viewport={"width": 1280, "height": 1000}), webui)
        browser.close()


def test_a_slider_changes_the_reply(page: Page, webui: Webui) -> None:
    page.tab("Steering")
    assert "Ready" in page.page.locator("#steering-status").inner_text()
    assert page.value("expression") == "mood:0 + succinctness:0"  # the bundled traits are there from the start
    plain = page.say(PROMPT)
    page.tab("Steering")
    page.slide(0, -1)
    page.expect(lambda: page.value("expression") == "mood:-1 + succinctness:0")
    assert page.say(PROMPT) != plain
    page.tab("Steering")
    page.press("on input")
    page.expect(lambda: "switched off" in page.page.locator("#steering-status").inner_text())
    assert page.say(PROMPT) == plain
    page.tab("Steering")
    page.press("on input")
    assert webui.chat() == webui.chat(steering=[])  # the page's steering stays in the page


def test_the_expression_and_presets(page: Page, webui: Webui) -> None:
    page.tab("Steering")
    page.fill("expression", "mood:0.4@10-20 + !succinctness")
    page.page.locator("#steering-expression textarea").press("Enter")
    page.expect(lambda: "2 active" in page.page.locator("#steering-status").inner_text())
    assert page.page.locator("#steering-slider-0 input[type=number]").input_value() == "0.4"
    page.fill("preset", "Evening")
    page.page.locator("#steering-preset input").press("Enter")
    page.press("save-preset")
    page.expect(lambda: "Evening" in webui.get("/v1/internal/steering/presets")["presets"])
    page.fill("expression", "mood:nonsense")
    page.page.locator("#steering-expression textarea").press("Enter")
    page.expect(lambda: "character 6" in page.page.locator("#steering-note").inner_text())
    assert webui.get("/v1/internal/steering")["page"]["steering"] == "mood:0.4@10-20 + !succinctness"
    assert webui.chat(steering={"preset": "Evening"}) == webui.chat(steering="mood:0.4@10-20 + !succinctness")


def test_comparing_and_activations(page: Page, webui: Webui) -> None:
    page.tab("Steering")
    page.fill("expression", "mood:-1")
    page.page.locator("#steering-expression textarea").press("Enter")
    page.expect(lambda: webui.get("/v1/internal/steering")["page"]["steering"] == "mood:-1")
    page.say(PROMPT)
    page.tab("Steering")
    page.unfold("compare")
    page.press("run")
    page.expect(lambda: len(page.value("plain")) > 40 and len(page.value("steered")) > 40)
    assert page.value("plain")[:40] != page.value("steered")[:40]
    page.unfold("activations")
    page.press("read")
    page.expect(lambda: page.page.locator("#steering-picture table").count() == 2)
    assert "forest" in page.page.locator("#steering-picture").inner_text()


def test_the_running_reply_follows_a_slider(page: Page, webui: Webui) -> None:
    page.tab("Steering")
    page.fill("expression", "mood:0")
    page.page.locator("#steering-expression textarea").press("Enter")
    page.tab("Parameters")
    page.page.get_by_label("Ban the eos_token").check()
    length = page.page.get_by_label("max_new_tokens").first
    length.fill("1500")
    length.press("Enter")
    page.page.wait_for_timeout(700)
    page.tab("Chat")
    page.page.locator("#chat-input textarea").fill("Tell me a long story.")
    page.page.locator("#chat-input textarea").press("Enter")
    url = f"http://127.0.0.1:{server_port(webui)}/steering"

    def running() -> Any:
        return requests.get(url, timeout=30).json()["requests"]

    page.expect(lambda: any(one["tokens"] > 0 for one in running()))
    page.tab("Steering")
    page.slide(0, 0.5)
    page.expect(lambda: any([term["strength"] for term in one["steering"]] == [0.5] for one in running()), seconds=20)
    page.tab("Chat")
    page.page.locator("#stop").evaluate("button => button.click()")


def test_training_in_the_tab(page: Page, webui: Webui) -> None:
    page.tab("Steering")
    page.unfold("train")
    page.fill("name", "politeness")
    page.fill("positive", "polite, warm and full of respect")
    page.fill("negative", "rude, cold and full of contempt")
    page.page.locator("#steering-level input").click()
    page.page.locator("[role=option]", has_text="none").first.click()
    page.press("start")
    page.expect(lambda: "not calibrated" in page.page.locator("#steering-train-progress").inner_text(), seconds=240)
    page.expect(lambda: page.value("expression").endswith("politeness:0"))
    page.expect(lambda: page.page.locator("#steering-report svg").count() >= 1)
    assert webui.chat(steering="politeness:-1") != webui.chat()


def test_settings_survive_a_restart(webui: Webui) -> None:
    before = webui.get("/v1/internal/steering")
    assert before["presets"] and before["page"]["steering"]
    webui.stop()
    assert json.loads((webui.user_data / "steering" / "settings.json").read_text("utf-8"))["presets"]
    webui.start("--nowebui")
    after = webui.get("/v1/internal/steering")
    assert (after["page"], after["presets"], after["vectors"]) == (before["page"], before["presets"], before["vectors"])
    assert webui.chat(steering="mood:1") != webui.chat()
