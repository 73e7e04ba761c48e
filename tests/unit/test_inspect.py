"""Pictures of activations: the numbers against the formula, and pictures that show them, safely and legibly."""

from __future__ import annotations

import builtins
import dataclasses
import json
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from steer_plugins.cli.main import main
from steer_plugins.client.engine import ServerEngine
from steer_plugins.errors import DataError, SpecError, SteerError, VectorError
from steer_plugins.report import Inspection, Reading, inspect_prompt, neutral_levels, to_html, to_page, to_png, to_terminal
from steer_plugins.report.colour import NEGATIVE, POSITIVE, STRONGEST, mixed
from steer_plugins.report.tokens import legible
from steer_plugins.steering import formula
from steer_plugins.steering.terms import Steering, Term
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.vectorfile import write_vector

from . import steering_server
from .fakes import IDENTITY, N_LAYER, FakeEngine
from .steering_server import FakeServer


class Steered(FakeEngine):
    """A FakeEngine whose reading is steered at every token but position 0, as scope ``all`` is; layers do not add up."""

    def read_pairs(self, items: Any, *, steering: Any = None, **more: Any) -> Any:
        found = super().read_pairs(items, **more)
        for one in found:
            for il, rows in one.values.items():
                rows[1:] = formula.steer(rows[1:], Steering.of(steering), il)
        return found

    def read(self, prompts: Any, *, steering: Any = None, **more: Any) -> Any:
        found = super().read(prompts, **more)
        for one in found:
            for il, rows in one.values.items():
                rows[1:] = formula.steer(rows[1:], Steering.of(steering), il)
        return found


def mood(scale: float = 2.0, layers: tuple[int, ...] = (3, 4), **more: Any) -> SteeringVector:
    directions = {(il, "resid_post"): np.eye(4, dtype=np.float32)[0] for il in layers}
    return SteeringVector("mood", directions, dict.fromkeys(directions, scale), **{"identity": IDENTITY, **more})


def sample(**changes: Any) -> Inspection:
    values = np.array([[900.0, -1.0, 0.0, 2.0], [800.0, -2.0, 0.5, 1.0]], np.float32)
    found = Inspection(
        vector="mood",
        poles=("sombre", "cheerful"),
        model='llama 2x4 "A & B"',
        site="resid_post",
        layers=[7, 9],
        levels=[0.0, 0.0],
        tokens=[1, 2, 3, 4],
        texts=["<s>", " <b>\u23ce", "&amp;", ' "joy"'],
        n_prompt=3,
        before=Reading(values, values / 1000),
    )
    return dataclasses.replace(found, **changes)


# ---- numbers ----


def test_projections_are_strengths_above_neutral() -> None:
    found = inspect_prompt(FakeEngine(), "joy", mood())
    assert found.layers == [3, 4] and found.n_prompt == 4 and found.texts == list("^joy")
    # the state is (layer + 1) * (1, 1, position / 1024, 0) in a text with joy; neutral texts have 0 along the direction
    assert np.allclose(found.before.projections[:, 1:], [[4 / 2] * 3, [5 / 2] * 3])
    assert np.allclose(found.before.cosines[0, 1:], 1 / np.sqrt(2), atol=1e-5)
    assert found.after is None and found.steering == "" and found.levels == [0.0, 0.0]
    assert np.allclose(inspect_prompt(FakeEngine(), "woe", mood(scale=4.0)).before.projections[:, 1:], [[-1.0] * 3, [-1.25] * 3])


def test_levels_are_subtracted() -> None:
    vector = SteeringVector("ones", {(3, "resid_post"): np.eye(4, dtype=np.float32)[1]}, {(3, "resid_post"): 2.0})
    assert neutral_levels(FakeEngine(), vector, [3], chat=True) == {3: 2.0}
    assert np.allclose(inspect_prompt(FakeEngine(), "joy", vector).before.projections[:, 1:], 0.0)
    given = inspect_prompt(FakeEngine(), "joy", vector, levels={3: 0.5})
    assert np.allclose(given.before.projections[:, 1:], 1.5) and given.levels == [0.5]


def test_chats_are_compared_with_chats() -> None:
    class Chatty(FakeEngine):
        def _states(self, text: str, n: int, layer: int) -> np.ndarray:
            rows = super()._states(text, n, layer)
            rows[1:, 0] += 5.0 * ("<u>" in text)
            return rows

    joyful = [{"role": "user", "content": "joy"}]
    assert np.allclose(inspect_prompt(Chatty(), joyful, mood()).before.projections[:, 1:], [[2.0], [2.5]])
    assert np.allclose(inspect_prompt(Chatty(), "joy", mood()).before.projections[:, 1:], [[2.0], [2.5]])
    assert np.allclose(inspect_prompt(Chatty(), "joy", mood()).levels, 0.0)


@pytest.mark.parametrize("response", [None, "now"])
def test_after_steering_differs_by_the_strength(response: str | None) -> None:
    found = inspect_prompt(Steered(), "joy", mood(), steering=Term(mood(), -0.75), response=response)
    assert found.after is not None and found.steering == "mood:-0.75"
    assert np.allclose((found.after.projections - found.before.projections)[:, 1:], -0.75)
    assert [heading for heading, _ in found.readings] == ["before", "after mood:-0.75"]
    assert found.texts == list("^joy" + (response or "")) and found.n_prompt == 4


def test_strength_zero_is_no_second_pass() -> None:
    assert inspect_prompt(Steered(), "joy", mood(), steering=Term(mood(), 0.0)).after is None


def test_the_reply_is_the_steered_one() -> None:
    engine = Steered()
    found = inspect_prompt(engine, "joy", mood(), steering=Term(mood(), 1.0), max_tokens=5)
    assert engine.generated[0].steering.terms[0].strength == 1.0 and engine.generated[0].max_tokens == 5
    assert "".join(found.texts[4:]) == f"{engine._pull(mood())[0]:+.4f}"
    assert inspect_prompt(engine, "joy", mood(), response=[ord("x")]).texts[4:] == ["x"]


def test_layers_are_chosen_and_the_last_is_left_out() -> None:
    vector = mood(layers=(3, 4, N_LAYER - 1))
    assert inspect_prompt(FakeEngine(), "joy", vector).layers == [3, 4]
    assert inspect_prompt(FakeEngine(), "joy", vector, layers=[4]).layers == [4]
    with pytest.raises(SpecError, match="no direction at layer 5: it has 3-4"):
        inspect_prompt(FakeEngine(), "joy", vector, layers=[4, 5])
    with pytest.raises(SpecError, match="layer 9 is this model's last one"):
        inspect_prompt(FakeEngine(), "joy", vector, layers=[9])


def test_what_cannot_be_inspected() -> None:
    dead = mood(scale=0.0)
    with pytest.raises(VectorError, match="dose of 0 at every layer"):
        inspect_prompt(FakeEngine(), "joy", dead)
    other = mood(identity=dataclasses.replace(IDENTITY, norms_sha256="c" * 64))
    with pytest.raises(VectorError, match="another fine-tune"):
        inspect_prompt(FakeEngine(), "joy", other)
    assert inspect_prompt(FakeEngine(), "joy", other, force=True).layers == [3, 4]
    with pytest.raises(DataError, match="single token"):
        inspect_prompt(FakeEngine(), "", mood())


def test_poles() -> None:
    assert inspect_prompt(FakeEngine(), "joy", mood()).poles == ("sombre", "cheerful")
    assert inspect_prompt(FakeEngine(), "joy", mood().replace(name="x")).poles == ("negative", "positive")
    assert inspect_prompt(FakeEngine(), "joy", mood(), poles=("a", "b")).poles == ("a", "b")


def test_over_http() -> None:
    """On the stand-in: the state is (layer, position, token, sum of strengths), special tokens have names."""
    direction = {(2, "resid_post"): np.eye(4, dtype=np.float32)[3]}
    vector = SteeringVector("v", direction, {(2, "resid_post"): 2.0}, identity=steering_server.IDENTITY)
    with FakeServer() as server, ServerEngine(server.url) as engine:
        found = inspect_prompt(engine, "a\u00e9", vector, steering=Term(vector, 3.0), response="</think>!")
    assert found.texts == ["<s>", "a", "\u22ef", "\u00e9", "</think>", "!"]
    assert found.after is not None and found.n_prompt == 4
    assert np.allclose(found.after.projections - found.before.projections, 1.5)


def test_limit_follows_the_values_but_not_the_sink() -> None:
    assert sample().limit == 2.0
    quiet = Reading(np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32))
    assert sample(before=quiet).limit == 0.25
    assert sample(before=quiet, after=sample().before).limit == 2.0
    for top in (0.3, 1.0, 7.7, 40.0):
        values = np.full((2, 40), top, np.float32)
        assert top <= sample(before=Reading(values, values)).limit <= 1.5 * top + 0.05


def test_to_dict_is_json() -> None:
    data = json.loads(json.dumps(sample(after=sample().before, steering="mood:1").to_dict()))
    assert data["before"]["projections"][1] == [800.0, -2.0, 0.5, 1.0] and data["after"] == data["before"]
    assert data["texts"][3] == ' "joy"' and data["layers"] == [7, 9] and data["n_prompt"] == 3
    assert sample().to_dict()["after"] is None


# ---- tokens ----


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        ([b" a b"], [" a b"]),
        ([b"\n", b"\t", b"\r\n"], ["\u23ce", "\u21e5", "<U+000D>\u23ce"]),
        ([b"\x1b[2J"], ["<U+001B>[2J"]),
        (["a\u202eb\u200b\u2028".encode()], ["a<U+202E>b<U+200B><U+2028>"]),
        ([b"\xe2\x80", b"\x94x"], ["\u22ef", "\u2014x"]),
        ([b" \xf0\x9f", b"\x8c", b"\xb1!"], [" \u22ef", "\u22ef", "\U0001f331!"]),
        ([b"\xe2", b"x", b"\xff"], ["\u22ef", "<E2>x", "<FF>"]),
        ([b"x\xe2\x80"], ["x<E2 80>"]),
        ([b"", b"x"], ["<>", "x"]),
        ([], []),
    ],
)
def test_legible(pieces: list[bytes], texts: list[str]) -> None:
    assert legible(pieces) == texts


# ---- colours ----


def _contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Of WCAG 2."""

    def luminance(rgb: tuple[int, ...]) -> float:
        parts = [c / 255 for c in rgb]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_is_readable_on_every_colour() -> None:
    for value in (-9.0, -0.5, 0.5, 9.0):
        assert _contrast(mixed(value, 1.0), (0x1F, 0x23, 0x28)) >= 4.5
        assert _contrast(mixed(value, 1.0, (0x0D, 0x11, 0x17)), (0xE6, 0xED, 0xF3)) >= 4.5


def test_colour_blind_readers_tell_the_poles_apart() -> None:
    """Red-green blindness leaves blue against the rest: the poles differ there by most of the scale."""
    assert NEGATIVE[2] - POSITIVE[2] > 150
    assert mixed(0.0, 1.0) == (255, 255, 255) and mixed(5.0, 1.0) == mixed(1.0, 1.0) != mixed(0.5, 1.0)


# ---- HTML ----


class _Read(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_escapes_what_comes_from_the_model() -> None:
    evil = sample(
        texts=["<s>", "<script>alert(1)</script>", "&amp;", '"><img src=x onerror=y>'],
        vector="mood",
        model="<i>model</i>",
        poles=("<u>", "&"),
        steering="<b>",
        after=sample().before,
    )
    page = _Read(to_page(evil, title="<title>"))
    assert {tag for tag, _ in page.tags} <= set(
        "html head meta title style body main h1 h2 h3 section div span p b table thead tbody tr th td i".split()
    )
    assert not any(name.startswith("on") or name in ("src", "href") for _, given in page.tags for name in given)
    for text in evil.texts:
        assert text in page.text
    assert page.open == []


def test_html_is_self_contained() -> None:
    page = to_page(sample())
    assert "<script" not in page and "http" not in page and "url(" not in page and "@import" not in page
    assert "prefers-color-scheme:dark" in page and 'name="viewport"' in page and page.isprintable() is False  # ends in \n
    assert to_page(sample()) == page


def test_html_shows_the_numbers() -> None:
    found = sample(after=Reading(sample().before.projections + 1, sample().before.cosines), steering="mood:1")
    read = _Read(to_html(found))
    spans = [given for tag, given in read.tags if tag == "span" and "data-v" in given]
    cells = [given for tag, given in read.tags if tag == "td"]
    assert len(spans) == 2 * 4 and len(cells) == 2 * 2 * 4
    assert "-1.50, cosine -0.002, token 1" in str(spans[1]["data-v"])
    assert "-0.50 (was -1.50), cosine" in str(spans[5]["data-v"])
    assert [given["class"] for given in spans[:4]] == ["g", "n", "p", "p"]
    # layer 9 is drawn above layer 7; 2.0 is at the end of the scale or near it
    assert "layer 9: +1.00" in str(cells[3]["data-v"]) and "layer 7: +2.00" in str(cells[7]["data-v"])
    assert cells[7]["class"] == "p" and cells[7]["style"] == f"--a:{STRONGEST * 2 / found.limit:.2f}"
    assert "class" not in cells[6] and "cheerful" in read.text and "reply" in read.text
    assert "<table" not in to_html(found, heatmap=False)


def test_html_breaks_lines_after_newlines() -> None:
    assert "\u23ce\n</span>" in to_html(sample())


# ---- terminal ----


def _printed(found: Inspection, colour: bool, width: int = 80) -> str:
    screen = Console(force_terminal=colour, color_system="truecolor" if colour else None, width=width, record=True)
    with screen.capture() as captured:
        screen.print(to_terminal(found, colour=colour, width=width))
    return captured.get()


def test_terminal_without_colours_is_a_table() -> None:
    text = _printed(sample(after=sample().before, steering="mood:1"), False)
    rows = [line.split() for line in text.splitlines()]
    assert ["<s>", "sink", "sink"] in rows and ["<b>\u23ce", "-1.50", "-1.50"] in rows and "\x1b" not in text
    assert ["token", "before", "after", "mood:1"] in rows


def test_terminal_with_colours() -> None:
    r, g, b = mixed(1.5, sample().limit)
    text = _printed(sample(), True)
    assert f"48;2;{r};{g};{b}" in text and "sombre" in text
    plain = Console(width=80, color_system=None)
    with plain.capture() as captured:
        plain.print(to_terminal(sample(), width=80))
    lines = captured.get().splitlines()
    # the sign is there without colours, too; the last layer is on top
    assert lines.index("   9 :- +") < lines.index("   7 :- +")


def test_terminal_folds_long_texts() -> None:
    values = np.ones((1, 130), np.float32)
    found = sample(texts=["x"] * 130, tokens=[1] * 130, n_prompt=130, layers=[3], before=Reading(values, values))
    text = _printed(found, False, 60) + _printed(found, True, 60)
    heat = [line for line in _printed(found, True, 60).splitlines() if line.startswith("   3 ")]
    assert len(heat) == 3 and max(len(line) for line in text.splitlines() if "\x1b" not in line) <= 60


# ---- PNG ----


def test_png_is_drawn_again_the_same() -> None:
    pytest.importorskip("matplotlib")
    found = sample(
        after=sample().before, steering="mood:$1$ \u65e5", texts=["<s>", " $x_1$\u23ce", "\u65e5\U0001f331", "y" * 300]
    )
    data = to_png(found)
    assert data.startswith(b"\x89PNG") and to_png(found) == data
    assert int.from_bytes(data[16:20], "big") == 1200
    assert to_png(sample()) != data


def test_png_of_long_texts_is_cut() -> None:
    pytest.importorskip("matplotlib")
    values = np.ones((1, 900), np.float32)
    data = to_png(sample(texts=["x "] * 900, tokens=[1] * 900, n_prompt=10, layers=[3], before=Reading(values, values)))
    assert int.from_bytes(data[20:24], "big") < 1200


def test_png_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **more)

    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert to_page(sample())
    with pytest.raises(SteerError, match="need matplotlib: install it with"):
        to_png(sample())


# ---- command ----


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Steered:
    made = Steered()
    monkeypatch.setattr("steer_plugins.cli.common.EngineOptions.open", lambda self, **more: made)
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.chdir(tmp_path)
    write_vector(mood(), tmp_path / "mood.safetensors")
    return made


def test_command(engine: Steered, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    assert main(["inspect", "joy", "--vector", "mood.safetensors", "--layers", "3"]) == 0
    assert "+2.00" in capsys.readouterr().out and engine.generated == []
    assert main(["inspect", "joy", "--vector", "mood.safetensors", "--steer", "mood.safetensors:-0.5", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["steering"] == "mood:-0.5" and data["layers"] == [3, 4] and len(data["tokens"]) > data["n_prompt"]
    assert np.allclose(np.subtract(data["after"]["projections"], data["before"]["projections"])[:, 1:], -0.5, atol=1e-3)
    assert engine.generated[-1].max_tokens == 40
    assert main(["inspect", "joy", "--vector", "mood.safetensors", "-o", "a.html"]) == 0
    assert (tmp_path / "a.html").read_text("utf-8").startswith("<!doctype html>")
    assert main(["inspect", "joy", "--vector", "mood.safetensors", "-o", "a.html", "--overwrite"]) == 0


def test_command_png(engine: Steered, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    assert main(["inspect", "joy", "--vector", "mood.safetensors", "-o", "a.PNG"]) == 0
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--vector", "mood"], "no vector 'mood' for this model"),
        (["--vector", "mood.safetensors", "--out", "a.jpg"], "ends in .html or .png"),
        (["--vector", "mood.safetensors", "--out", "no/a.html"], "no folder no"),
        (["--vector", "mood.safetensors", "--out", "mood.html"], "mood.html exists"),
        (["--vector", "mood.safetensors", "--layers", "x"], "--layers 'x' cannot be read"),
        (["--vector", "mood.safetensors", "--steer", "mood:"], "steer: "),
    ],
)
def test_command_refuses(
    engine: Steered, capsys: pytest.CaptureFixture[str], tmp_path: Any, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "mood.html").write_text("")
    assert main(["inspect", "joy", *arguments]) == 1
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and captured.out == ""
