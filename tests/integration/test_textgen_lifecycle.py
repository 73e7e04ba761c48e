"""Our server under a real text-generation-webui: put there, kept out, taken back; models that come and go.

See textgen_webui.py for what it needs.
"""

from __future__ import annotations

import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from steer_plugins import testing
from tests.integration.textgen_webui import ROOT, Webui, needed, opened, put_direction

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins for llama-server are scripts with a #! line")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Webui]]:
    made: list[Webui] = []

    def webui(**options: Any) -> Webui:
        made.append(Webui(tmp_path / f"webui{len(made)}", **options))
        return made[-1]

    needed()
    yield webui
    for one in made:
        one.stop()


def stock_server() -> Path:
    """The unpatched twin of our llama-server."""
    _, _, runtime = needed()
    if runtime.stock_server is None:
        pytest.skip("no unpatched llama-server: build one with `steer build --server --stock-twin`")
    return runtime.stock_server


def script(path: Path, text: str) -> Path:
    """A program in sh."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def broken_runtime(folder: Path, text: str) -> Path:
    """Our runtime with a llama-server that runs ``text`` before (or in place of) what it should."""
    _, _, runtime = needed()
    assert runtime.server is not None
    shutil.copytree(runtime.path, folder, symlinks=True, ignore=shutil.ignore_patterns("stock", "bin"))
    script(folder / runtime.server.relative_to(runtime.path), text.replace("REAL", str(runtime.server)))
    return folder


def test_switched_on_in_the_session_tab_of_a_running_webui(make: Callable[..., Webui]) -> None:
    """By hand: the folder is copied, the extension ticked; the API was on before, with a key."""
    webui = make(stock=stock_server())
    shutil.copytree(ROOT / "integrations" / "textgen_webui" / "steering", webui.user_data / "extensions" / "steering")
    webui.key = "secret"
    webui.start("--portable", "--api-key", "secret", extension=False)
    assert webui.post("/v1/chat/completions", {"messages": [], "steering": 7}).status_code != 400  # nobody looks at it yet
    with opened(webui, steering=False) as page:
        page.tab("Session")
        page.page.locator("label", has_text="steering").locator("input").check()
        page.page.get_by_role("button", name="Apply flags/extensions and restart").click()
        page.expect(lambda: webui.said().count("public link") >= 2)
        page.open()
        page.tab("Steering")
        page.expect(lambda: "Ready" in page.text("status"))
    put_direction(webui, "push")
    assert webui.chat(steering="push:1") != webui.chat() == webui.chat(steering="push:0")
    refused = webui.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "steering": "absent:1"})
    assert refused.status_code == 400 and "absent" in refused.text
    webui.key = "wrong"
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert webui.post(path, {"messages": [], "prompt": "hi", "steering": "push:1"}).status_code == 401
    plain = requests.get(f"http://127.0.0.1:{webui.api_port}/v1/internal/steering", timeout=60)
    assert plain.status_code == 401


def test_models_come_and_go_without_a_page(make: Callable[..., Webui], tmp_path: Path) -> None:
    webui = make(stock=stock_server())
    testing.write("llama", webui.user_data / "models" / "tiny.gguf")
    assert "steering/script.py" in webui.install().replace("\\", "/")
    webui.start("--nowebui", "--portable")
    put_direction(webui, "push")
    steered, plain = webui.chat(steering="push:1"), webui.chat()
    assert steered != plain
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "steering": "push:1"}

    webui.post("/v1/internal/model/unload", {})
    answer = webui.post("/v1/chat/completions", body)
    assert answer.status_code == 400 and "No model is loaded" in answer.text
    webui.post("/v1/internal/model/load", {"model_name": "tiny.gguf"})
    assert webui.get("/v1/internal/steering")["vectors"] == []
    answer = webui.post("/v1/chat/completions", body)
    assert answer.status_code == 400 and "no vector 'push' for this model" in answer.text
    webui.post("/v1/internal/model/load", {"model_name": webui.model})
    assert (webui.chat(steering="push:1"), webui.chat()) == (steered, plain)

    webui.stop()
    assert "Removed" in webui.install("uninstall") and not (webui.user_data / "extensions" / "steering").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('case "$*" in *--help*) exit 0;; *--list-devices*) exec REAL "$@";; esac\nexit 3', "did not start .*exit code: 3"),
        ("echo 'error: invalid argument: --no-webui' >&2; exit 1", "does not take the webui's flags .*--no-webui"),
    ],
)
def test_a_server_of_ours_that_fails_leaves_the_webuis_own(
    make: Callable[..., Webui], tmp_path: Path, text: str, why: str
) -> None:
    import re

    webui = make(stock=stock_server(), runtime=broken_runtime(tmp_path / "runtime", text))
    webui.install()
    webui.start("--nowebui", "--portable", ready="problem")
    facts = webui.get("/v1/internal/steering")
    assert not facts["steers"] and re.search(why, facts["problem"])
    assert webui.chat()  # the webui's own server answers
    answer = webui.post("/v1/completions", {"prompt": "hi", "max_tokens": 2, "steering": "push:1"})
    assert answer.status_code == 400 and re.search(why, answer.json()["error"]["message"])
    loads = webui.said().count("model loaded")
    assert loads == (2 if "did not start" in why else 1)  # refused flags cost no reload


def test_a_gpu_is_kept(make: Callable[..., Webui], tmp_path: Path) -> None:
    listed = 'echo "Available devices:"; echo "  CUDA0: A GPU (24000 MiB, 23000 MiB free)"; exit 0'
    fake = f'case "$*" in *--list-devices*) {listed};; esac'
    webui = make(stock=script(tmp_path / "stock" / "llama-server", f'{fake}\nexec {stock_server()} "$@"'))
    webui.install()
    webui.start("--portable", ready="problem")
    problem = webui.get("/v1/internal/steering")["problem"]
    assert "A GPU" in problem and f"steer build --on {tmp_path / 'stock'}" in problem
    assert webui.said().count("model loaded") == 1
    with opened(webui) as page:
        page.tab("Steering")
        page.expect(lambda: "Not available" in page.text("status") and "A GPU" in page.text("status"))
        page.unfold("server")
        page.page.get_by_label("Use the steering server although it runs on the CPU only").check()
        page.press("adopt")
        page.expect(lambda: "Ready" in page.text("status") and "CPU" in page.text("status"))
    put_direction(webui, "push")
    assert webui.chat(steering="push:1") != webui.chat()
