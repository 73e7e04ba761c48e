"""What the user sets in the tab, and which steering a generation gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from steer_plugins_textgen.settings import Settings, check_preset_name
from steer_plugins_textgen.wishes import fitting, from_page, terms_of, wish_of

from steer_plugins.errors import SpecError
from steer_plugins.steering.grammar import TermSpec, parse
from tests.unit.textgen_webui import StandIn


def saved(path: Path) -> Settings:
    settings = Settings(path)
    settings.set_terms(parse("mood:0.5 + succinctness:0@3-5?all"))
    settings.set_flag("api_too", True)
    settings.save_preset("Calm evening")
    settings.set_character("Chiharu", "Calm evening")
    settings.flush()
    return settings


def test_settings_come_back(tmp_path: Path) -> None:
    path = tmp_path / "steering" / "settings.json"
    before, after = saved(path), Settings(path)
    assert after.terms == before.terms == parse("mood:0.5 + succinctness:0@3-5?all")
    assert (after.on, after.api_too, after.cpu_too, after.touched) == (True, True, False, True)
    assert after.preset("Calm evening") == before.terms
    assert after.characters == {"Chiharu": "Calm evening"}
    assert [p.name for p in path.parent.iterdir()] == ["settings.json"]


def test_active_terms() -> None:
    settings = Settings(None)
    assert not settings.touched
    settings.set_terms(parse("mood:0.5 + succinctness:0"))
    assert settings.active == parse("mood:0.5")
    settings.set_flag("on", False)
    assert settings.active == [] and settings.expression == "mood:0.5 + succinctness:0"
    settings.change_term(1, strength=-1.0)
    settings.change_term(7, strength=1.0)  # a page of before
    assert settings.expression == "mood:0.5 + succinctness:-1"


@pytest.mark.parametrize("content", ["{", "[]", '{"steering": [{"vector": 1}]}', '{"presets": {"../x": []}}', "[" * 100_000])
def test_a_damaged_file_is_set_aside(tmp_path: Path, content: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(content)
    settings = Settings(path)
    assert settings.terms == [] and "settings.damaged.json" in settings.problem
    assert (tmp_path / "settings.damaged.json").read_text() == content


def test_a_preset_that_is_deleted_leaves_its_characters() -> None:
    settings = Settings(None)
    settings.save_preset("a")
    settings.set_character("Chiharu", "a")
    settings.delete_preset("a")
    assert settings.characters == {} and settings.presets == {}


@pytest.mark.parametrize("name", ["", " ", "../a", "a/b", "-a", "x" * 65, None, "a\nb"])
def test_bad_preset_names(name: object) -> None:
    with pytest.raises(SpecError, match="preset's name"):
        check_preset_name(name)


def test_steering_fields() -> None:
    settings = Settings(None)
    settings.presets["calm"] = parse("mood:-0.4")
    assert terms_of("mood:0.6 + !hedging", settings) == parse("mood:0.6 + !hedging")
    assert terms_of([{"vector": "mood", "strength": 0.6}], settings) == [TermSpec("mood", 0.6)]
    assert terms_of({"vector": "mood"}, settings) == [TermSpec("mood")]
    assert terms_of({"preset": "calm"}, settings) == parse("mood:-0.4")
    assert terms_of([], settings) == terms_of("", settings) == []


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (5, "5"),
        (True, "True"),
        ("mood:", "character 6"),
        ([{"vector": "mood", "sthrength": 1}], "sthrength"),
        ({"preset": "calm", "strength": 1}, "without other keys"),
        ({"preset": "nope"}, "'nope'"),
        ({"preset": ["calm"]}, "preset"),
    ],
)
def test_wrong_fields_are_named(value: object, named: str) -> None:
    settings = Settings(None)
    settings.presets["calm"] = []
    with pytest.raises(SpecError, match=named):
        terms_of(value, settings)


def test_whose_steering_a_generation_gets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in = StandIn(monkeypatch, tmp_path)
    settings = Settings(None)
    settings.set_terms(parse("mood:1"))
    page, silent, empty, own = {}, {"steering": None}, {"steering": []}, {"steering": "succinctness:0.5"}
    assert wish_of(page, settings) == parse("mood:1") and from_page(page)
    assert wish_of(silent, settings) is None and not from_page(silent)
    assert wish_of(empty, settings) == [] and wish_of(own, settings) == parse("succinctness:0.5")
    settings.set_flag("api_too", True)
    assert wish_of(silent, settings) == parse("mood:1")
    assert wish_of(empty, settings) == [] and wish_of(own, settings) == parse("succinctness:0.5")
    stand_in.shared.args.multi_user = True  # sliders of an earlier session, which nobody sees now
    assert wish_of(page, settings) is None and wish_of(own, settings) == parse("succinctness:0.5")


def test_terms_that_do_not_go_together() -> None:
    def check(terms: list[TermSpec]) -> None:
        if len({term.op for term in terms}) > 1:
            raise SpecError(f"{terms[-1].vector} does not go with {terms[0].vector}")

    good, wrong = fitting(parse("a%add + b%renorm + c%add"), check)
    assert [term.vector for term in good] == ["a", "c"] and wrong == ["b does not go with a"]


def test_a_preset_comes_with_its_character_and_not_with_each_page(tmp_path: Path) -> None:
    settings = saved(tmp_path / "s.json")
    settings.set_terms(parse("mood:1"))
    assert not settings.meet("Chiharu") and settings.expression == "mood"  # bound while the chat was with her
    assert not settings.meet("Assistant") and settings.expression == "mood"
    assert settings.meet("Chiharu") and settings.terms == settings.preset("Calm evening")
    settings.set_terms(parse("mood:-1"))
    settings.flush()
    again = Settings(tmp_path / "s.json")
    assert not again.meet("Chiharu") and again.expression == "mood:-1"  # a page that is opened once more


def test_the_file_is_the_grammars_json(tmp_path: Path) -> None:
    saved(tmp_path / "s.json")
    data = json.loads((tmp_path / "s.json").read_text("utf-8"))
    assert data["steering"][1] == {"vector": "succinctness", "strength": 0.0, "layers": [3, 5], "scope": "all"}


def test_what_could_not_be_read_again_is_not_kept(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "settings.json")
    settings.set_terms(parse("mood:0.5"))
    for strength in (float("nan"), float("inf")):
        with pytest.raises(SpecError, match="not a finite number"):
            settings.change_term(0, strength=strength)
    with pytest.raises(SpecError, match="256 are the limit"):
        settings.set_character("x" * 257, "half")
    for i in range(1000):
        settings.characters[f"c{i}"] = "half"
    with pytest.raises(SpecError, match="1000 characters"):
        settings.set_character("one more", "half")
    settings.set_character("c1", "half")
    settings.set_character("c1", None)
    assert settings.expression == "mood:0.5" and "c1" not in settings.characters


def test_the_most_that_can_be_kept_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    settings = Settings(path)
    term = parse('"a-vector-with-quite-a-long-name":-0.123456789@10-20?response[cosine:1234:0.25]')
    settings.set_terms(term * 64)
    for i in range(500):
        settings.save_preset(f"preset number {i}")
    settings.flush()
    again = Settings(path)
    assert again.problem == "" and len(again.presets) == 500 and again.terms == settings.terms
