"""Shared vectors in the webui's tab: found, shown, pulled, and on a slider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from steer_plugins_textgen import settings
from steer_plugins_textgen.link import current

from steer_plugins.errors import HubError
from steer_plugins.hub import safety
from steer_plugins.hub.contents import preset_data
from steer_plugins.hub.publish import Folder, draft
from steer_plugins.steering.grammar import parse
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library
from tests.unit.hub_world import CALIBRATION, OTHER, World, make
from tests.unit.steering_server import IDENTITY, FakeServer
from tests.unit.test_textgen_tab import Window, opened, server, stand_in
from tests.unit.textgen_gradio import Page
from tests.unit.textgen_webui import StandIn

__all__ = ["server", "stand_in"]  # fixtures


@pytest.fixture
def world(tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> World:  # noqa: F811
    """A hub with a vector of the loaded model and one of another. What the vector does is measured elsewhere."""
    world = World(tmp_path)
    direction = {(1, "resid_post"): [0.0, 0.0, 0.0, 1.0]}
    vector = SteeringVector("mood", direction, {(1, "resid_post"): 2.0}, identity=IDENTITY, calibration=CALIBRATION)
    world.publish(vector, description="Happy <b>or</b> sad.")
    world.publish(make(OTHER), name="ann/other")
    monkeypatch.setattr(safety, "measured", lambda engine, vector: {"kl": 0.1, "refusal": -0.5})
    return world


def added(world: World) -> tuple[Page, Any]:
    page = opened()
    panel = page.tab.shared
    page.do(panel.add, "click", str(world.there))
    assert "2 entries, signed by RW" in page.value(panel.note)
    return page, panel


def test_search_card_pull_slider(world: World, server: FakeServer) -> None:  # noqa: F811
    page, panel = added(world)
    page.do(panel.search, "click", "")
    assert "2 found" in page.value(panel.note)
    labels, values = zip(*page.value(panel.found, "choices"), strict=True)
    assert values == ("there ann/mood", "there ann/other") and "not this model" in labels[1] and "not this" not in labels[0]
    page.do(panel.found, "change", values[0])
    card = page.value(panel.card)
    assert "<svg" in card and "Happy &lt;b&gt;or&lt;/b&gt; sad." in card and "Apache-2.0" in card and "██" not in card
    page.do(panel.pull, "click", values[0])
    assert "ann/mood@1</b> pulled: its slider is there, at 0" in page.value(panel.note)
    assert "measured here" in page.value(panel.note)
    page.do(panel.pull, "then")
    assert settings.settings().expression == "ann/mood:0"
    assert Library().get("ann/mood", IDENTITY).name == "mood"
    fields = current().fields(parse("ann/mood:0.5"))
    assert fields["steering"][0]["strength"] == 0.5 and server.vectors  # it was uploaded, under the server's own name for it
    page.do(panel.pull, "click", values[0])  # again: still one slider
    assert settings.settings().expression == "ann/mood:0"


def test_progress_is_shown(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    page, panel = added(world)
    seen, go_on = [], threading.Event()

    def measured(engine: Any, vector: Any) -> dict[str, float]:
        go_on.wait(60)
        return {"kl": 0.1, "refusal": -0.5}

    monkeypatch.setattr(safety, "measured", measured)
    for said in panel.fetch("there ann/mood"):
        seen.append(said)
        if "measuring what it does to this model" in said:
            go_on.set()
    assert "steer-bar" in seen[0] and "pulled" in seen[-1]


def test_a_preset_becomes_a_preset(world: World, tmp_path: Path) -> None:
    import json

    path = tmp_path / "preset.json"
    path.write_text(json.dumps(preset_data("ann/mood:0.5 - terse:0.2")))
    card = draft("ann/evening", {"preset": path}, licence="CC0-1.0")
    Folder(world.there, world.key).publish(card, {"preset": path})
    page = opened()
    page.do(page.tab.shared.add, "click", str(world.there))
    page.do(page.tab.shared.pull, "click", "there ann/evening")
    assert "it is the preset ann evening" in page.value(page.tab.shared.note)
    window = Window()
    window.wish("load", name="ann evening")
    assert window.told["text"] == "ann/mood:0.5 + terse:-0.2"


def test_what_goes_wrong_is_said(world: World, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    page = opened()
    panel = page.tab.shared
    page.do(panel.search, "click", "mood")
    assert "no index is known yet" in page.value(panel.note) and page.value(panel.found, "choices") == []
    for address, said in (
        ("", "write the address"),
        ("/nowhere", "there is no folder"),
        ("ftp://y", "is not a hub&#x27;s address"),
    ):
        page.do(panel.add, "click", address)
        assert said in page.value(panel.note)
    page.do(panel.pull, "click", None)
    assert "choose what to pull" in page.value(panel.note)
    page, panel = added(world)
    for chosen, said in (
        ("there ann/other", "is not for this model"),
        ("there ../../etc/passwd", "is not the name of something on a hub"),
        ("nowhere ann/mood", "no index &#x27;nowhere&#x27;"),
    ):
        page.do(panel.pull, "click", chosen)
        assert said in page.value(panel.note)
        page.do(panel.found, "change", chosen)
        assert said in page.value(panel.card)

    monkeypatch.setattr(safety, "measured", lambda engine, vector: {"kl": 0.1, "refusal": -20.0})
    page.do(panel.pull, "click", "there ann/mood")
    assert "lowers refusals" in page.value(panel.note) and Library().list() == []

    def broken(engine: Any, vector: Any) -> Any:
        raise RuntimeError("unexpected")

    monkeypatch.setattr(safety, "measured", broken)
    page.do(panel.pull, "click", "there ann/mood")
    assert "RuntimeError: unexpected" in page.value(panel.note) and Library().list() == []
    stand_in.shared.model = None
    for component, event, values in ((panel.search, "click", [""]), (panel.pull, "click", ["there ann/mood"])):
        page.do(component, event, *values)
        assert "no model is loaded" in page.value(panel.note)


def test_where_others_reach_the_page(world: World, stand_in: StandIn) -> None:  # noqa: F811
    stand_in.shared.args.listen = True
    page = opened()
    page.do(page.tab.shared.add, "click", str(world.there))
    assert "add it with: <code>steer hub add ADDRESS" in page.value(page.tab.shared.note)
    from steer_plugins.hub.hub import Hub

    assert Hub().indexes() == {}


def test_updates(world: World) -> None:
    page, panel = added(world)
    page.do(panel.update, "click")
    assert "nothing has changed" in page.value(panel.note)
    page.do(panel.pull, "click", "there ann/mood")
    vector = Library().get("ann/mood", IDENTITY)
    world.publish(vector)
    page.do(panel.update, "click")
    assert "there changed: newer: ann/mood 2" in page.value(panel.note)
    with pytest.raises(HubError):
        Library().pull("ann/nothing")
