"""The extension in a real text-generation-webui: its API, and its page in headless Chromium (see textgen_webui.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.integration.textgen_webui import PROMPT, Page, Webui, fit, needed, opened, server_port


@pytest.fixture(scope="module")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webui]:
    needed()
    found = Webui(tmp_path_factory.mktemp("textgen"))
    found.install()
    try:
        found.start("--portable")
        fit(found, "mood", "succinctness")
        yield found
    finally:
        found.stop()


@pytest.fixture
def page(webui: Webui) -> Iterator[Page]:
    with opened(webui) as found:
        yield found


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


def test_a_slider_changes_the_reply(page: Page, webui: Webui) -> None:
    page.tab("Steering")
    page.expect(lambda: "Ready" in page.text("status"))
    page.expect(lambda: page.value("expression") == "mood:0 + succinctness:0")  # the bundled traits, from the start
    # the second reply is the one to compare with: in llama.cpp, sampled replies to a prompt of 64 tokens or more that is computed
    # at once and to the same prompt out of the cache differ, with or without steering
    page.say(PROMPT)
    plain = page.say(PROMPT)
    page.tab("Steering")
    page.slide(0, -1)
    page.expect(lambda: page.value("expression") == "mood:-1 + succinctness:0")
    assert page.say(PROMPT) != plain
    page.tab("Steering")
    page.press("on")
    page.expect(lambda: "switched off" in page.text("status"))
    assert page.say(PROMPT) == plain
    page.tab("Steering")
    page.press("on")
    assert webui.chat() == webui.chat(steering=[])  # the page's steering stays in the page


def test_the_expression_and_presets(page: Page, webui: Webui) -> None:
    page.tab("Steering")
    page.write("mood:0.4@10-20 + !succinctness")
    page.expect(lambda: "2 active" in page.text("status"))
    assert page.page.locator("#steering-slider-0 input[type=number]").input_value() == "0.4"
    page.fill("preset-name", "Evening")
    page.press("save-preset")
    page.expect(lambda: "Evening" in webui.get("/v1/internal/steering/presets")["presets"])
    page.fill("expression", "mood:nonsense")
    page.page.locator("#steering-expression textarea").press("Enter")
    page.expect(lambda: "character 6" in page.text("note"))
    assert webui.get("/v1/internal/steering")["page"]["steering"] == "mood:0.4@10-20 + !succinctness"
    assert webui.chat(steering={"preset": "Evening"}) == webui.chat(steering="mood:0.4@10-20 + !succinctness")


def test_comparing_and_activations(page: Page, webui: Webui) -> None:
    page.tab("Steering")
    page.write("mood:-1")
    page.say(PROMPT)
    page.tab("Steering")
    page.unfold("compare")
    page.press("run")
    page.expect(lambda: len(page.value("plain")) > 40 and len(page.value("steered")) > 40)
    assert page.value("plain")[:40] != page.value("steered")[:40]
    page.unfold("activations")
    page.press("read")
    page.expect(lambda: page.page.locator("#steering-picture table").count() == 2)
    assert "forest" in page.text("picture")


def test_the_running_reply_follows_a_slider(page: Page, webui: Webui) -> None:
    page.tab("Steering")
    page.write("mood:0")
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

    def status() -> Any:
        return requests.get(url, timeout=30).json()

    page.expect(lambda: status()["n_requests"] > 0)
    before = status()["memory"]["device_bytes"]
    page.tab("Steering")
    page.slide(0, 0.5)
    page.expect(lambda: status()["memory"]["device_bytes"] > before and status()["n_requests"] > 0)  # it acts on this reply
    page.tab("Chat")
    page.page.locator("#stop").first.evaluate("button => button.click()")


def test_training_in_the_tab(page: Page, webui: Webui) -> None:
    page.tab("Steering")
    page.unfold("train")
    page.fill("name", "politeness")
    page.fill("positive", "polite, warm and full of respect")
    page.fill("negative", "rude, cold and full of contempt")
    page.page.locator("#steering-level input").click()
    page.page.locator("[role=option]", has_text="none").first.click()
    page.press("start")
    page.expect(lambda: "not calibrated" in page.text("train-progress"), seconds=900)
    page.expect(lambda: page.value("expression").endswith("politeness:0"))
    page.expect(lambda: page.page.locator("#steering-report svg").count() >= 1)
    assert webui.chat(steering="politeness:-1") != webui.chat()


def test_fitting_traits_in_the_background(page: Page, webui: Webui) -> None:
    page.tab("Steering")
    traits = page.page.locator("#steering-traits input[type=checkbox]")
    page.expect(lambda: traits.count() == 4)
    traits.first.check()
    page.press("fit")
    page.expect(lambda: page.page.locator("#steering-progress .steer-bar").count() == 1)
    assert webui.chat()  # the chat goes on
    page.press("cancel")
    page.expect(lambda: "cancelled" in page.text("progress"))
    page.expect(lambda: not page.page.locator("#steering-cancel").is_visible())
    assert traits.count() == 4 and "creativity" not in page.value("expression")


def test_resetting_and_a_restart_from_the_session_tab(page: Page, webui: Webui) -> None:
    page.tab("Steering")
    page.write("mood:-0.5 + succinctness:0.3")
    page.expect(lambda: page.page.locator("#steering-slider-1 input[type=number]").input_value() == "0.3")
    page.page.locator("#steering-slider-1 .steer-zero").click()
    page.expect(lambda: page.value("expression") == "mood:-0.5 + succinctness:0")
    port, loads = server_port(webui), webui.said().count('Loading "')
    page.tab("Session")
    page.page.get_by_role("button", name="Apply flags/extensions and restart").click()
    page.expect(lambda: webui.said().count("public link") >= 2)
    page.open()
    page.tab("Steering")
    page.expect(lambda: "Ready" in page.text("status"))
    page.expect(lambda: page.value("expression") == "mood:-0.5 + succinctness:0")
    assert (server_port(webui), webui.said().count('Loading "')) == (port, loads)  # the model stayed where it was
    assert webui.chat(steering="mood:1") != webui.chat()
    steered = page.say(PROMPT)
    page.tab("Steering")
    page.press("zero")
    page.expect(lambda: page.value("expression") == "mood:0 + succinctness:0")
    assert page.say(PROMPT) != steered


def test_settings_survive_a_restart(webui: Webui) -> None:
    before = webui.get("/v1/internal/steering")
    assert before["presets"] and before["page"]["steering"]
    webui.stop()
    assert json.loads((webui.user_data / "steering" / "settings.json").read_text("utf-8"))["presets"]
    webui.start("--nowebui")
    after = webui.get("/v1/internal/steering")
    assert (after["page"], after["presets"], after["vectors"]) == (before["page"], before["presets"], before["vectors"])
    assert webui.chat(steering="mood:1") != webui.chat()
