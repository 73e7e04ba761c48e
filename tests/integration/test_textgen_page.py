"""Nothing a user sets in the Steering tab is lost, and no window shows what is not so: the real webui, two windows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from steer_plugins.steering.grammar import parse
from tests.integration.textgen_webui import Page, Webui, needed, opened, put_direction

SHOWN = """() => ({
    text: document.querySelector('#steering-expression textarea').value,
    on: document.querySelector('#steering-on').checked,
    values: [...document.querySelectorAll('.steer-row')].map(row => [row.querySelector('.steer-name').textContent,
        Number(row.querySelector('input[type=range]').value), Number(row.querySelector('input[type=number]').value)]),
    preset: document.querySelector('#steering-preset').value,
    waiting: window.steering.waiting,
})"""
MOVE = """([i, value, wait]) => {
    const tab = [...document.querySelectorAll('button[role=tab]')].find(one => one.textContent.trim() === 'Steering');
    if (wait !== null) tab.click();
    return new Promise(done => setTimeout(() => {
        const slider = document.querySelector(`#steering-slider-${i} input[type=range]`);
        slider.value = value;
        for (const event of ['input', 'change', 'pointerup']) slider.dispatchEvent(new Event(event, {bubbles: true}));
        done();
    }, wait || 0));
}"""


@pytest.fixture(scope="module")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webui]:
    needed()
    found = Webui(tmp_path_factory.mktemp("textgen"))
    found.install()
    try:
        found.start("--portable")
        for name in ("mood", "succinctness", "zeal"):
            put_direction(found, name)
        yield found
    finally:
        found.stop()


class Windows:
    """Two windows, and what a user who has done all that expects of them."""

    def __init__(self, webui: Webui, first: Page) -> None:
        self.webui, self.first = webui, first
        self.pages = [first, Page(first.page.context.browser.new_page(viewport={"width": 1280, "height": 1000}), webui)]
        for page in self.pages:
            page.tab("Steering")
        self.terms: list[list[Any]] = []
        self.on = True
        self.presets: dict[str, list[list[Any]]] = {}
        self.loaded = ""
        self.write(first, [["mood", 0.5], ["succinctness", -0.25]])

    def write(self, page: Page, terms: list[list[Any]]) -> None:
        page.fill("expression", " + ".join(f"{name}:{value}" for name, value in terms))
        page.page.locator("#steering-expression textarea").press("Enter")
        self.terms = [list(term) for term in terms]

    def move(self, page: Page, i: int, value: float, wait: int | None = None) -> None:
        page.page.evaluate(MOVE, [i, value, wait])
        self.terms[i][1] = value

    def wrong(self, page: Page) -> str:
        """What in this window, on the server or in the file is not as expected; "" when all is."""
        shown = page.page.evaluate(SHOWN)
        server = self.webui.get("/v1/internal/steering")["page"]
        file = json.loads((self.webui.user_data / "steering" / "settings.json").read_text("utf-8"))
        want = [(name, float(value)) for name, value in self.terms]
        found = {
            "file": [(term["vector"], term["strength"]) for term in file["steering"]],
            "server": [(term.vector, term.strength) for term in parse(server["steering"])],
            "text": [(term.vector, term.strength) for term in parse(shown["text"])],
            "sliders": [(name, value) for name, value, _ in shown["values"]],
            "numbers": [(name, value) for name, _, value in shown["values"]],
        }
        bad = [f"{what} {is_}" for what, is_ in found.items() if is_ != want]
        switches = {"page": shown["on"], "server": server["on"], "file": file["on"]}
        bad += [f"switch of the {what} {is_}" for what, is_ in switches.items() if is_ != self.on]
        if {name: [[t["vector"], t["strength"]] for t in terms] for name, terms in file["presets"].items()} != self.presets:
            bad.append(f"presets {file['presets']}")
        if shown["preset"] != self.loaded or file["loaded"] != self.loaded:
            bad.append(f"loaded {shown['preset']!r} {file['loaded']!r}")
        if shown["waiting"]:
            bad.append("still waiting")
        return "; ".join(bad) and f"wanted {want} {self.on} {self.loaded!r}: " + "; ".join(bad)

    def agree(self, where: str) -> None:
        """All windows, the server and the file come to agree with what was done."""
        for page in self.pages:
            page.page.evaluate("window.dispatchEvent(new Event('focus'))")  # the user looks at it
            said = ""
            for _ in range(100):
                said = self.wrong(page)
                if not said:
                    break
                page.page.wait_for_timeout(200)
            assert not said, f"{where}, window {self.pages.index(page)}: {said}"


@pytest.fixture
def windows(webui: Webui) -> Iterator[Windows]:
    with opened(webui) as page:
        found = Windows(webui, page)
        found.agree("at the start")
        yield found


def test_a_slider_moved_while_the_tab_opens_is_not_lost(windows: Windows) -> None:
    for wait in range(0, 240, 10):
        windows.pages[0].tab("Chat")
        windows.move(windows.pages[0], 0, (wait // 10 - 12) / 20, wait)
        windows.agree(f"{wait} ms after the tab was chosen")


def test_an_older_window_never_sends_what_it_shows(windows: Windows) -> None:
    first, second = windows.pages
    second.page.evaluate("window.steering.take = () => {}")  # it hears nothing any more
    windows.move(first, 0, 0.9)
    windows.first.expect(lambda: "mood:0.9" in windows.webui.get("/v1/internal/steering")["page"]["steering"])
    box = second.page.locator("#steering-expression textarea")
    for _ in range(3):
        box.focus()
        box.blur()
        second.tab("Chat")
        second.tab("Steering")
    second.page.wait_for_timeout(1000)
    assert "mood:0.9" in windows.webui.get("/v1/internal/steering")["page"]["steering"]


def test_a_slider_that_another_window_removed_is_not_mistaken_for_its_neighbour(windows: Windows) -> None:
    first, second = windows.pages
    second.page.evaluate("window.kept = document.querySelector('#steering-slider-0 input[type=range]')")
    first.page.locator("#steering-slider-0 .steer-drop").click()
    windows.terms = windows.terms[1:]
    first.expect(lambda: "mood" not in windows.webui.get("/v1/internal/steering")["page"]["steering"])
    second.page.evaluate("() => { kept.value = 1; for (const e of ['input', 'change']) kept.dispatchEvent(new Event(e)) }")
    windows.agree("after both")


def test_a_mistake_keeps_what_was_typed(windows: Windows) -> None:
    page = windows.pages[0]
    page.fill("expression", "mood:0.5 zeal:1")
    page.page.locator("#steering-expression textarea").press("Enter")
    page.expect(lambda: "character 10" in page.text("note"))
    assert page.value("expression") == "mood:0.5 zeal:1"
    selected = "[document.activeElement.selectionStart, document.activeElement.selectionEnd]"
    assert page.page.evaluate(selected) == [9, 10]
    page.page.locator("#steering-expression textarea").press("Escape")
    windows.agree("after Escape")


def test_two_hundred_steps_in_two_windows(windows: Windows) -> None:
    dice = random.Random(21)

    def act(page: Page) -> str:
        n = len(windows.terms)
        what = dice.choice("move move move early early number zero zeros switch drop add write save load forget".split())
        row = dice.randrange(n) if n else 0
        value = dice.randrange(-20, 21) / 20
        if what in ("move", "early", "number", "zero", "drop") and not n:
            what = "write"
        if what == "move":
            for _ in range(dice.randint(1, 3)):
                windows.move(page, row, value)
        elif what == "early":
            windows.move(page, row, value, dice.randrange(200))
        elif what == "number":
            page.slide(row, value)
            windows.terms[row][1] = value
        elif what == "zero":
            page.page.locator(f"#steering-slider-{row} .steer-zero").click()
            windows.terms[row][1] = 0
        elif what == "zeros" and n > 1:
            page.press("zero")
            windows.terms = [[name, 0] for name, _ in windows.terms]
            if dice.random() < 0.5:
                windows.move(page, row, value)
        elif what == "switch":
            page.press("on")
            windows.on = not windows.on
        elif what == "drop":
            page.page.locator(f"#steering-slider-{row} .steer-drop").click()
            del windows.terms[row]
        elif what == "add":
            there = {name for name, _ in windows.terms}
            left = [name for name in ("mood", "succinctness", "zeal") if name not in there]
            if left:
                page.page.locator("#steering-choice").select_option(left[0])
                page.press("add")
                windows.terms.append([left[0], 0])
        elif what == "write":
            names = dice.sample(["mood", "succinctness", "zeal"], dice.randint(1, 3))
            windows.write(page, [[name, dice.randrange(-20, 21) / 20] for name in names])
        elif what == "save":
            name = dice.choice(["Evening", "Morning"])
            page.fill("preset-name", name)
            page.press("save-preset")
            windows.presets[name], windows.loaded = [list(term) for term in windows.terms], name
        elif what == "load" and windows.presets:
            name = dice.choice(sorted(windows.presets))
            page.page.locator("#steering-preset").select_option("")
            page.page.locator("#steering-preset").select_option(name)
            windows.terms, windows.loaded = [list(term) for term in windows.presets[name]], name
        elif what == "forget" and windows.loaded:
            page.press("delete-preset")
            del windows.presets[windows.loaded]
            windows.loaded = ""
        return what

    done = []
    for step in range(200):
        page = dice.choice(windows.pages)
        done.append(f"{act(page)} in {windows.pages.index(page)}")
        windows.agree(f"step {step} ({', '.join(done[-4:])})")
