"""The tab's handlers and what they show, with stand-ins for gradio, the webui and the server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from steer_plugins_textgen import extension, hooks, jobs, link, loader, replies, settings

from steer_plugins.errors import SteerError
from steer_plugins.steering.grammar import parse
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library
from tests.unit.steering_server import IDENTITY, FakeServer
from tests.unit.textgen_gradio import Page, install
from tests.unit.textgen_webui import StandIn


def put(name: str, **more: Any) -> None:
    Library().put(SteeringVector(name, {(1, "resid_post"): [0.0, 0.0, 0.0, 1.0]}, {(1, "resid_post"): 2.0}, **more), IDENTITY)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    found = StandIn(monkeypatch, tmp_path / "user_data")
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setattr(settings, "_settings", settings.Settings(None))
    monkeypatch.setattr(loader, "state", loader.State())
    monkeypatch.setattr(link, "_links", {})
    monkeypatch.setattr(replies, "last", None)
    monkeypatch.setattr(jobs, "trainer", jobs.Trainer())
    monkeypatch.setitem(sys.modules, "llama_cpp_binaries", None)
    monkeypatch.setattr(loader, "find_server", lambda: ("ours", ""))
    monkeypatch.setattr(loader, "devices", lambda server: ())
    install(monkeypatch)
    return found


@pytest.fixture
def server(stand_in: StandIn) -> Iterator[FakeServer]:
    with FakeServer() as found:
        stand_in.port = found.server_address[1]
        extension.setup()
        stand_in.shared.model, _ = stand_in.load("m")
        yield found


def opened() -> Page:
    """The tab, and a page of it that has just been opened."""
    from steer_plugins_textgen.tab import Tab

    page = Page(Tab())
    for output, answer in zip(page.tab.all, page.tab.view(fresh=True), strict=True):
        page.shown[id(output)] = answer if isinstance(answer, dict) else {"value": answer}
    return page


def test_bundled_traits_have_sliders_from_the_start(server: FakeServer) -> None:
    put("mood")
    put("zeal", provenance={"source": {"poles": {"negative": "idle", "positive": "eager"}}})
    page = opened()
    tab = page.tab
    assert page.value(tab.text) == "mood:0" and "Ready" in page.value(tab.status) and "CPU" in page.value(tab.status)
    row, slider, _, _ = tab.rows[0]
    assert page.value(row, "visible") and not page.value(tab.rows[1][0], "visible")
    assert "sombre" in page.value(slider, "info") and page.value(slider, "value") == 0.0
    page.do(tab.add, "click", "zeal")
    assert page.value(tab.text) == "mood:0 + zeal:0" and "eager" in page.value(tab.rows[1][1], "info")


def test_watching_nothing_changes_nothing(server: FakeServer) -> None:
    put("mood")
    page = opened()
    before = {key: dict(values) for key, values in page.shown.items()}
    for button in (page.tab.fit, page.tab.train):
        page.do(button, "then")
    assert page.shown == before


def test_sliders_and_expression_keep_in_step(server: FakeServer) -> None:
    put("mood")
    put("succinctness")
    page = opened()
    tab = page.tab
    page.do(tab.rows[1][1], "input", -0.35)
    assert page.value(tab.text) == "mood:0 + succinctness:-0.35" and "1 active" in page.value(tab.status)
    page.do(tab.text, "submit", "mood:0.4@1 + succinctness:2")
    assert [page.value(tab.rows[i][1], "value") for i in (0, 1)] == [0.4, 2.0]
    assert page.value(tab.rows[1][1], "maximum") == 2.0  # wide enough for what was typed
    page.do(tab.rows[0][2], "click")
    assert page.value(tab.text) == "mood:0@1 + succinctness:2"
    page.do(tab.zero_all, "click")
    assert page.value(tab.text) == "mood:0@1 + succinctness:0"
    page.do(tab.rows[0][3], "click")
    assert page.value(tab.text) == "succinctness:0" and not page.value(tab.rows[1][0], "visible")
    page.do(tab.text, "submit", "succinctness:nonsense")
    assert "character 14" in page.value(tab.note) and page.value(tab.text) == "succinctness:0"
    page.do(tab.text, "blur", "")
    assert page.value(tab.text) == "" and "No sliders" in page.value(tab.empty)


def test_more_terms_than_sliders_are_told(server: FakeServer) -> None:
    put("mood")
    page = opened()
    page.do(page.tab.text, "submit", " + ".join(["mood:0.1"] * 14))
    assert "2 more terms act" in page.value(page.tab.empty)


def test_advanced(server: FakeServer) -> None:
    put("mood")
    page = opened()
    tab = page.tab
    assert page.value(tab.term, "choices") == ["1. mood"]
    page.do(tab.apply, "click", 0, "1", "clamp", "response")
    assert page.value(tab.text) == "mood:0@1?response%clamp"
    page.do(tab.term, "input", 0)
    assert [page.value(c) for c in (tab.window, tab.op, tab.scope)] == ["1", "clamp", "response"]
    for values, named in (
        ((None, "", "", ""), "choose a term"),
        ((0, "x", "add", ""), "expected layers"),
        ((0, "", "add", "often"), "scope"),
    ):
        page.do(tab.apply, "click", *values)
        assert named in page.value(tab.note) and page.value(tab.text) == "mood:0@1?response%clamp"


def test_what_does_not_fit_is_said(server: FakeServer) -> None:
    put("mood")
    page = opened()
    page.do(page.tab.text, "submit", "mood:1 + absent:1")
    assert "&#x27;absent&#x27;" in page.value(page.tab.note) and "<code>" in page.value(page.tab.note)
    page.do(page.tab.on, "input", False)
    assert page.value(page.tab.note) == "" and "switched off" in page.value(page.tab.status)


def test_presets(server: FakeServer, stand_in: StandIn) -> None:
    from steer_plugins_textgen import tab as module

    put("mood")
    stand_in.shared.gradio["character_menu"] = menu = module.gr.Dropdown()
    page = opened()
    tab = page.tab
    page.do(tab.text, "submit", "mood:0.7")
    page.do(tab.save, "click", "Evening")
    assert page.value(tab.preset, "choices") == ["Evening"]
    page.do(tab.character, "input", True, "Evening", "Ada")
    page.do(tab.text, "submit", "mood:-1")
    page.do(menu, "change", "Ada")
    assert page.value(tab.text) == "mood:-1"  # she was there already
    page.do(menu, "change", "Bob")
    page.do(menu, "change", "Ada")
    assert page.value(tab.text) == "mood:0.7"
    page.do(tab.load, "click", "Morning")
    assert "Morning" in page.value(tab.note)
    page.do(tab.save, "click", "../x")
    assert "preset&#x27;s name" in page.value(tab.note)
    page.do(tab.delete, "click", "Evening")
    assert page.value(tab.preset, "choices") == [] and settings.settings().characters == {}


def test_what_was_chosen_stays_chosen(server: FakeServer) -> None:
    put("mood")
    put("calm")
    page = opened()
    tab = page.tab
    assert page.value(tab.along) == "calm" and page.value(tab.traits) == page.value(tab.traits, "choices")
    page.shown[id(tab.along)]["value"] = "mood"  # by the user
    page.do(tab.on, "input", False)
    assert page.value(tab.along) == "mood"
    put("zeal")
    page.do(tab.refresh, "click")
    assert page.value(tab.along, "choices") == ["calm", "mood", "zeal"]


def test_fitting_shows_progress_and_ends_in_sliders(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, stand_in: StandIn
) -> None:
    class Training:
        def __init__(self, engine: Any, name: str, source: Any, options: Any) -> None:
            self.name = name

        def plan(self) -> Any:
            return SimpleNamespace(tokens=10, seconds=1.0)

        def run(self, report: Any) -> SteeringVector:
            report("reading", 5)
            return SteeringVector(self.name, {(1, "resid_post"): [1.0, 0, 0, 0]}, {(1, "resid_post"): 2.0})

    monkeypatch.setattr(jobs, "Training", Training)
    page = opened()
    tab = page.tab
    assert "mood" in page.value(tab.traits, "choices") and not page.value(tab.cancel, "visible")
    page.do(tab.fit, "click", [])
    assert "at least one" in page.value(tab.note)
    page.do(tab.train, "click", "polite", "Descriptions", "none", 8, "warm", "", False)
    assert "negative box is empty" in page.value(tab.note)
    handler, _, _ = tab.fit.events["click"]
    handler(["mood"])
    worker = jobs.trainer._worker
    if worker is not None:
        worker.join(20)
    page.do(tab.refresh, "click")
    assert "Fitted" in page.value(tab.progress) and page.value(tab.text) == "mood:0"
    assert "mood" not in page.value(tab.traits, "choices") and not page.value(tab.cancel, "visible")


def test_no_model_and_no_server_are_said(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "find_server", lambda: (None, "There is none. Make one with: steer build --on <x>"))
    extension.setup()
    page = opened()
    tab = page.tab
    assert "no model is loaded" in page.value(tab.status) and "<code>steer build --on &lt;x&gt;</code>" in page.value(tab.status)
    assert page.value(tab.traits, "visible") is False and not page.value(tab.fit, "visible")
    for component, values in (
        (tab.run, ("hello", 32)),
        (tab.read, ("mood",)),
        (tab.train, ("a", "x", "none", 8, "b", "c", False)),
    ):
        page.do(component, "click", *values)
    assert "nothing is steered" in page.value(tab.compare_note)
    assert "no model" in page.value(tab.picture) and "no model" in page.value(tab.note)


def test_no_sliders_where_strangers_share_the_page(stand_in: StandIn) -> None:
    stand_in.shared.args.multi_user = True
    extension.ui()  # needs no model, makes no tab
    settings.settings().set_terms(parse("mood:1"))
    extension.setup()
    model, _ = stand_in.load("m")
    assert model.prepare_payload({"temperature": 1}) == {"temperature": 1}


def test_the_tab_names_what_hooks_lack(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    put("mood")
    blocks = SimpleNamespace(layers=[object()] * IDENTITY.n_layer)
    config = SimpleNamespace(num_hidden_layers=IDENTITY.n_layer, hidden_size=IDENTITY.n_embd)
    stand_in.shared.model = SimpleNamespace(model=blocks, config=config)
    stand_in.shared.args.loader = "Transformers"
    page = opened()
    assert "through hooks" in page.value(page.tab.status) and page.value(page.tab.text) == "mood:0"
    page.do(page.tab.text, "submit", "mood:1?thinking")
    assert "cannot tell" in page.value(page.tab.note)
    with pytest.raises(SteerError):
        hooks.check(parse("absent"))
