"""From a model without a vector to the first steered reply, in the real webui, with few actions."""

from __future__ import annotations

from pathlib import Path

from tests.integration.textgen_webui import PROMPT, Webui, needed, opened


def test_the_first_steered_reply_takes_three_actions(tmp_path: Path) -> None:
    needed()
    webui = Webui(tmp_path / "webui")
    webui.install()
    try:
        webui.start("--portable")
        with opened(webui) as window:
            page = window.page
            page.locator("#steering-first").click()  # 1
            slider = page.locator("#steering-strip input[type=range]")
            window.expect(lambda: slider.count() == 1, seconds=900)
            assert page.evaluate("steering.state.terms[0].provisional && steering.state.busy")  # calibrating goes on behind it
            slider.fill("0.5")  # 2
            window.expect(lambda: webui.get("/v1/internal/steering")["page"]["steering"] == "mood:0.5")
            page.locator("#chat-input textarea").fill(PROMPT)
            page.locator("#chat-input textarea").press("Enter")  # 3
            bodies = page.locator("#chat .message-body")
            window.expect(lambda: bodies.count() >= 2 and len(bodies.last.inner_text()) > 20)
            said = page.locator("#chat [title*='Steering: mood:0.5']")
            window.expect(lambda: said.count() >= 1)
            page.evaluate("document.querySelector('#stop').click()")
            window.tab("Steering")
            page.locator("#steering-cancel").click()
            window.expect(lambda: "its slider stays, provisional" in window.text("progress"))
    finally:
        webui.stop()
