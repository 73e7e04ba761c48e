"""What pages of the tab wish and are told, and the tab's own handlers, with stand-ins for gradio, the webui and the server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from steer_plugins_textgen import extension, hooks, jobs, link, loader, pages, replies, settings

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
    monkeypatch.setattr(pages, "pages", pages.Pages())
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


class Window:
    """A page in a browser: what it wishes, and the last that it was told."""

    def __init__(self, name: str = "0123456789abcdef") -> None:
        self.name, self.n = name, 0
        self.told: dict[str, Any] = {}
        self.wish()

    def wish(self, do: str | None = None, **more: Any) -> dict[str, Any]:
        """What the server answers to a wish, or to none; it must be newer than all before."""
        self.n += do is not None
        wishes = [] if do is None else [{"n": self.n, "do": do, **more}]
        told = json.loads(pages.pages.answer(json.dumps({"page": self.name, "wishes": wishes})))
        assert told["number"] > self.told.get("number", 0) and told["arrived"] == self.n
        self.told = told
        return told

    def said(self, do: str, **more: Any) -> str:
        """What the server says about a wish."""
        return " ".join(one["text"] for one in self.wish(do, **more)["said"] if one["n"] == self.n)


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
    window = Window()
    assert window.told["text"] == "mood:0" and "all sliders at 0" in window.told["status"] and "CPU" in window.told["status"]
    assert window.told["terms"][0]["poles"] == ["sombre", "cheerful"] and window.told["terms"][0]["provisional"]
    window.wish("add", name="zeal")
    assert window.told["text"] == "mood:0 + zeal:0" and window.told["terms"][1]["poles"] == ["idle", "eager"]
    assert [trait["name"] for trait in window.told["traits"]] == [n for n in jobs.bundled_traits() if n != "mood"]


def test_sliders_and_expression_keep_in_step(server: FakeServer) -> None:
    put("mood")
    put("succinctness")
    window = Window()
    window.wish("move", key="succinctness#1", value=-0.35)
    assert window.told["text"] == "mood:0 + succinctness:-0.35" and window.told["active"] == 1
    window.wish("write", text="mood:0.4@1 + succinctness:2")
    assert [(term["value"], term["reach"]) for term in window.told["terms"]] == [(0.4, 1.0), (2.0, 2.0)]
    window.wish("zero")
    assert window.told["text"] == "mood:0@1 + succinctness:0"
    window.wish("drop", key="mood#1")
    assert window.told["text"] == "succinctness:0"
    assert "character 14" in window.said("write", text="succinctness:nonsense") and window.told["text"] == "succinctness:0"
    assert window.told["said"][-1]["character"] == 14
    window.wish("write", text="")
    assert window.told["terms"] == [] and "no sliders" in window.told["status"]


def test_a_wish_that_is_repeated_is_done_once(server: FakeServer) -> None:
    put("mood")
    text = json.dumps(
        {"page": "a" * 16, "wishes": [{"n": 1, "do": "add", "name": "mood"}, {"n": 2, "do": "add", "name": "mood"}]}
    )
    pages.pages.answer(text)
    told = json.loads(pages.pages.answer(text))
    assert told["text"] == "mood:0 + mood:0" and told["arrived"] == 2
    later = json.dumps({"page": "b" * 16, "wishes": [{"n": 7, "do": "add", "name": "mood"}]})  # the server was started anew
    assert json.loads(pages.pages.answer(later))["arrived"] == 7 and len(settings.settings().terms) == 3


def test_a_slider_is_known_by_its_vector_and_not_by_its_place(server: FakeServer) -> None:
    put("mood")
    put("calm")
    one, other = Window("a" * 16), Window("b" * 16)
    one.wish("write", text="mood:0.1 + calm:0.2 + mood:0.3")
    other.wish()
    one.wish("drop", key="calm#1")
    other.wish("move", key="mood#2", value=0.9)
    assert other.told["text"] == "mood:0.1 + mood:0.9"
    assert "removed in another window" in other.said("move", key="calm#1", value=1)
    assert other.told["text"] == "mood:0.1 + mood:0.9"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "[" * 10000,
        '{"page": "../x", "wishes": []}',
        '{"page": "0123456789abcdef", "wishes": [{"n": 1, "do": "eval"}]}',
        '{"page": "0123456789abcdef", "wishes": [{"n": -1, "do": "zero"}]}',
        '{"page": "0123456789abcdef", "wishes": [{"n": true, "do": "zero"}]}',
        '{"page": 7, "wishes": []}',
        '{"page": "0123456789abcdef", "wishes": [{"n": 1, "do": ["zero"]}]}',
        "x" * (1 << 17),
    ],
)
def test_what_no_page_sends_does_nothing(server: FakeServer, text: str) -> None:
    before = settings.settings().expression
    assert pages.pages.answer(text) == "" and settings.settings().expression == before


@pytest.mark.parametrize(
    ("wish", "named"),
    [
        ({"do": "move", "key": "mood#1", "value": "x"}, "reload"),
        ({"do": "move", "key": "mood#1"}, "reload"),
        ({"do": "move", "key": "mood#1", "value": None}, "reload"),
        ({"do": "move", "key": 7, "value": 1}, "reload"),
        ({"do": "move", "key": "mood#1", "value": float("inf")}, "finite"),
        ({"do": "add", "name": ""}, "choose a vector"),
        ({"do": "load", "name": "Morning"}, "'Morning'"),
        ({"do": "forget", "name": "Morning"}, "'Morning'"),
        ({"do": "save", "name": "../x"}, "preset's name"),
        ({"do": "fit", "names": []}, "at least one"),
        ({"do": "fit", "names": ["../x"]}, "../x"),
        ({"do": "delete", "name": "../x"}, "../x"),
        ({"do": "delete", "name": "absent"}, "absent"),
        ({"do": "bind", "value": True}, "character"),
        ({"do": "shape", "key": "mood#1", "layers": "x", "op": "add", "scope": ""}, "layers 'x'"),
        ({"do": "shape", "key": "mood#1", "layers": "", "op": "", "scope": "often"}, "scope 'often'"),
        ({"do": "shape", "key": "mood#1", "layers": "", "op": "bend", "scope": ""}, "bend"),
    ],
)
def test_faults_are_said_and_change_nothing(server: FakeServer, wish: dict[str, Any], named: str) -> None:
    put("mood")
    window = Window()
    assert named in window.said(**wish)
    assert window.told["said"][-1]["at"] == wish["do"] and window.told["text"] == "mood:0"


def test_layers_operation_and_scope(server: FakeServer) -> None:
    put("mood")
    window = Window()
    window.wish("shape", key="mood#1", layers="1", op="clamp", scope="response")
    assert window.told["text"] == "mood:0@1?response%clamp"
    term = window.told["terms"][0]
    assert (term["layers"], term["op"], term["scope"], term["has"]) == ("1", "clamp", "response", "1")
    window.wish("shape", key="mood#1", layers="", op="", scope="")
    assert window.told["text"] == "mood:0"


def test_what_does_not_fit_is_said_and_not_counted(server: FakeServer) -> None:
    put("mood")
    window = Window()
    window.wish("write", text="mood:1 + absent:1")
    assert "'absent'" in window.told["note"][0] and "1 of 2 active" in window.told["status"] and window.told["active"] == 1
    window.wish("on", value=False)
    assert window.told["note"] == [] and "switched off" in window.told["status"]


def test_presets_come_and_go_with_the_character(server: FakeServer, stand_in: StandIn) -> None:
    from steer_plugins_textgen import tab as module

    put("mood")
    stand_in.shared.gradio["character_menu"] = menu = module.gr.Dropdown()
    page, window = opened(), Window()
    window.wish("write", text="mood:0.7")
    assert "saved as 'Evening'" in window.said("save", name="Evening")
    assert (window.told["presets"], window.told["loaded"], window.told["changed"]) == (["Evening"], "Evening", False)
    page.do(menu, "change", "Ada")
    window.wish("bind", value=True)
    assert (window.told["character"], window.told["bound"]) == ("Ada", "Evening")
    page.do(menu, "change", "Bob")
    window.wish("write", text="mood:-1")
    assert window.told["changed"]
    page.do(menu, "change", "Ada")
    assert window.wish()["text"] == "mood:0.7" and not window.told["changed"]
    page.do(menu, "change", "Bob")
    assert window.wish()["text"] == "mood:-1" and window.told["loaded"] == ""
    assert "replaced" in window.said("save", name="Evening")
    window.wish("forget", name="Evening")
    assert window.told["presets"] == [] and settings.settings().characters == {}


def test_a_vector_is_deleted_with_its_sliders(server: FakeServer) -> None:
    put("mood")
    put("calm")
    window = Window()
    window.wish("write", text="calm:1 + mood:1")
    assert "deleted" in window.said("delete", name="calm")
    assert window.told["text"] == "mood" and window.told["names"] == ["mood"]


def test_a_reply_keeps_its_steering(server: FakeServer, stand_in: StandIn) -> None:
    put("mood")
    settings.settings().set_terms(parse("mood:0.5 + absent:1"))
    kept: dict[str, Any] = {}
    note, told = stand_in.chat.update_message_metadata, stand_in.html_generator.get_message_tooltip
    note(kept, "user", 0, timestamp="now")
    note(kept, "assistant", 0, timestamp="now", model_name="m")
    assert "steering" not in kept["user_0"] and kept["assistant_0"]["steering"] == "mood:0.5"
    assert told({"metadata": kept}, "assistant", 0) == "Model: m | Steering: mood:0.5"
    settings.settings().set_flag("on", False)
    note(kept, "assistant", 0, timestamp="later", model_name="m")  # generated anew
    assert told({"metadata": kept}, "assistant", 0) == told({"metadata": {}}, "assistant", 0) == "Model: m"


def test_every_page_is_told_of_new_vectors(server: FakeServer) -> None:
    put("mood")
    put("calm")
    page, other = opened(), opened()
    assert page.value(page.tab.along) == "calm"
    page.shown[id(page.tab.along)]["value"] = "mood"  # by the user
    put("zeal")
    for one in (page, other):
        for output, answer in zip(one.tab.all, one.tab.view(), strict=True):
            one.shown[id(output)].update(answer if isinstance(answer, dict) else {"value": answer})
        assert one.value(one.tab.along, "choices") == ["calm", "mood", "zeal"]
    assert page.value(page.tab.along) == "mood"


def test_watching_nothing_changes_nothing(server: FakeServer) -> None:
    put("mood")
    page = opened()
    before = {key: dict(values) for key, values in page.shown.items()}
    page.do(page.tab.train, "then")
    assert page.shown == before


def test_a_fit_gives_a_provisional_slider_first(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []

    class Training:
        def __init__(self, engine: Any, name: str, source: Any, options: Any) -> None:
            self.name, self.level = name, options.calibrate

        def plan(self) -> Any:
            return SimpleNamespace(tokens=10, seconds=1.0)

        def fit(self, report: Any) -> str:
            report("reading", 5)
            return "fit"

        def finish(self, fit: str, report: Any = None) -> SteeringVector:
            if self.level != "none":
                term = window.wish()["terms"][0]
                seen.append((term["name"], term["provisional"]))
                report("calibrating", 5)
                assert "step 3 of 3, calibrating" in window.wish()["jobs"] and window.told["busy"]
            record = None if self.level == "none" else {"effect": 1.0, "objective": {"name": "mood"}}
            vector = SteeringVector(self.name, {(1, "resid_post"): [1.0, 0, 0, 0]}, {(1, "resid_post"): 2.0})
            return vector.replace(calibration=record)

    monkeypatch.setattr(jobs, "Training", Training)
    page, window = opened(), Window()
    page.do(page.tab.train, "click", "polite", "Descriptions", "none", 8, "warm", "", False)
    assert "negative box is empty" in page.value(page.tab.train_note)
    window.wish("fit", names=["mood"])
    worker = jobs.trainer._worker
    if worker is not None:
        worker.join(20)
    window.wish()
    assert seen == [("mood", True)] and window.told["text"] == "mood:0" and not window.told["terms"][0]["provisional"]
    assert "Fitted" in window.told["jobs"] and not window.told["busy"]


def test_no_model_and_no_server_are_said(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "find_server", lambda: (None, "There is none. Make one with: steer build --on <x>"))
    extension.setup()
    page, window = opened(), Window()
    tab = page.tab
    status = window.told["status"]
    assert "no model is loaded" in status and "<code>steer build --on &lt;x&gt;</code>" in status
    assert window.told["traits"] == [] and not window.told["ready"]
    for component, values in (
        (tab.run, ("hello", 32)),
        (tab.read, ("mood",)),
        (tab.train, ("a", "x", "none", 8, "b", "c", False)),
    ):
        page.do(component, "click", *values)
    assert "nothing is steered" in page.value(tab.compare_note)
    assert "no model" in page.value(tab.picture) and "no model" in page.value(tab.train_note)


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
    window = Window()
    assert "through hooks" in window.told["status"] and window.told["text"] == "mood:0"
    window.wish("write", text="mood:1?thinking")
    assert "cannot tell" in window.told["note"][0]
    with pytest.raises(SteerError):
        hooks.check(parse("absent"))


def test_a_reply_that_ends_in_repetition_is_said(server: FakeServer) -> None:
    put("mood")
    window = Window()
    good = " ".join(f"word{i % 61} other{i % 53} third{i}" for i in range(60))
    for text, terms, fell in (
        (good + " and so it is" * 60, "mood:1", True),
        (good + " and so it is" * 60, "", False),  # not by steering
        (good, "mood:1", False),
        ("yes " * 20, "mood:1", False),  # too short to tell
    ):
        replies.remember("prompt", {}, text, parse(terms))
        assert ("repetition" in window.wish()["fell"]) == fell, text


def test_a_slider_of_whom_the_chat_is_with(server: FakeServer, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, str]] = []

    class Imitation:
        def __init__(self, engine: Any, name: str, prompt: str) -> None:
            given.append((name, prompt))
            self.name = name

        def run(self, report: Any) -> SteeringVector:
            report("replies", 1, 2)
            return SteeringVector(self.name, {(1, "resid_post"): [1.0, 0, 0, 0]}, {(1, "resid_post"): 2.0})

    monkeypatch.setattr(jobs, "Imitation", Imitation)
    state: dict[str, Any] = {"mode": "chat", "context": ""}
    stand_in.shared.persistent_interface_state = state
    opened()
    window = Window()
    assert window.told["imitable"] == "" and "neither" in window.said("imitate")
    state["context"] = "{{char}} is a pirate who likes {{user}}."
    settings.settings().meet("Long John, the 2nd")
    assert window.wish()["imitable"] == "long-john-the-2nd"
    window.wish("imitate")
    state.update(mode="instruct", custom_system_message="Be terse.")
    window.wish("imitate")
    worker = jobs.trainer._worker
    if worker is not None:
        worker.join(20)
    pirate = ("long-john-the-2nd", "Long John, the 2nd is a pirate who likes the user.")
    assert given == [pirate, ("system-prompt", "Be terse.")]
    assert window.wish()["text"] == "long-john-the-2nd:0 + system-prompt:0"
