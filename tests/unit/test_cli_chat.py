"""steer chat: commands, keys, and what the model is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from steer_plugins.cli import chat
from steer_plugins.cli.common import EngineOptions
from steer_plugins.errors import SteerError
from steer_plugins.steering.grammar import parse
from steer_plugins.steering.terms import Steering, Term
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library
from tests.unit.fakes import IDENTITY, N_EMBD, FakeEngine


def vector(name: str) -> SteeringVector:
    return SteeringVector(name, {(3, "resid_post"): np.ones(N_EMBD, np.float32)}, identity=IDENTITY)


@pytest.fixture
def talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``talk(lines)``: what the command prints for these lines, and the engine it talked to."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("mood", "calm"):
        Library().put(vector(name), IDENTITY)

    def run(*lines: str, options: tuple[str, ...] = (), chat_template: bool = True) -> tuple[str, FakeEngine]:
        engine = FakeEngine(chat=chat_template)
        monkeypatch.setattr(EngineOptions, "open", lambda self: engine)
        result = CliRunner().invoke(chat.chat, list(options), input="\n".join(lines) + "\n", catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output, engine

    return run


def test_a_conversation(talk: Any) -> None:
    output, engine = talk("Hello", "/steer mood:0.5 + calm:-0.25", "And now?", "/steer", "/quit")
    first, second = engine.generated
    assert first.prompt == [{"role": "user", "content": "Hello"}] and not first.steering
    assert [m["role"] for m in second.prompt] == ["user", "assistant", "user"]
    assert [(t.vector.name, t.strength) for t in second.steering.terms] == [("mood", 0.5), ("calm", -0.25)]
    assert [v.name for v in second.probe] == ["mood", "calm"]
    assert output.count("steering: mood:0.5 + calm:-0.25") == 2


def test_commands(talk: Any) -> None:
    output, engine = talk("/vectors", "/system Be brief.", "One", "/reset", "Two", "/help", "/dance", options=("--steer", "mood"))
    assert "calm, mood" in output and "/dance is not a command" in output and output.count("While a reply runs") == 2
    for request in engine.generated:
        assert [m["role"] for m in request.prompt] == ["system", "user"]
        assert request.prompt[0]["content"] == "Be brief."
    assert engine.closed


def test_mistakes_are_one_sentence_and_the_talk_goes_on(talk: Any) -> None:
    output, engine = talk("/steer mood:", "/steer nope", "/steer mood@99", "Hello")
    assert output.count("steer: ") == 3 and "Traceback" not in output
    assert len(engine.generated) == 1 and not engine.generated[0].steering


def test_a_model_without_a_template(talk: Any) -> None:
    _, engine = talk("Once", "more", chat_template=False)
    assert isinstance(engine.generated[0].prompt, str)
    assert engine.generated[1].prompt.startswith("Once") and engine.generated[1].prompt.endswith("more")


def sliders() -> chat.Sliders:
    terms = parse("mood:0.5 + calm:-0.2@3?response")
    return chat.Sliders(terms, Steering([Term(vector("mood"), 0.5), Term(vector("calm"), -0.2)]))


def test_keys_move_the_chosen_term() -> None:
    s = sliders()
    assert s.press("right") and s.press("right") and s.strengths == [0.7, -0.2]
    assert not s.press("down") and s.chosen == 1
    for _ in range(2):
        assert s.press("right")
    assert s.strengths == [0.7, 0.0] and s.text() == "mood:0.7 + calm:0@3?response"
    assert [t.strength for t in s.steering.terms] == [0.7, 0.0]
    assert s.press("0") and not s.steering and s.text().endswith("(off)")
    assert s.press("left") and s.steering.terms[1].strength == pytest.approx(-0.1)
    assert not s.press("x") and not s.press("up") and s.chosen == 0
    assert s.text(mark=True).startswith("[mood:0.7]")
    nothing = chat.Sliders([], Steering([]))
    assert not nothing.press("right") and nothing.text() == "nothing"


def test_what_terminals_send() -> None:
    assert chat.keys_of("\x1b[C\x1b[D\x1bOA+\t0q\x1b") == ["right", "left", "up", "right", "tab", "0", "q", "escape"]
    assert chat.keys_of("") == []


def test_keys_that_mean_nothing_here_are_no_escape() -> None:
    """Page Up, Delete and F5 send a sequence that begins with Esc: it must not stop the reply."""
    assert chat.keys_of("\x1b[5~\x1b[3~\x1b[15~\x1bOP") == []
    assert chat.keys_of("\x1b[1;5C\x1b[1;2D+\x1b[5~q") == ["right", "left", "right", "q"]


def test_keys_change_a_running_reply(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each piece the keys are looked at, and the stream gets the new steering."""
    presses = iter([["right"], ["0", "q"]])
    changes: list[Any] = []
    monkeypatch.setattr(chat.Keys, "pressed", lambda self: next(presses, []))
    original = FakeEngine.stream

    def stream(self: FakeEngine, request: Any) -> Any:
        made = original(self, request)
        made.steer = changes.append  # type: ignore[method-assign]
        made.cancel = lambda: changes.append("cancel")  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(FakeEngine, "stream", stream)
    output, _ = talk("Hello", options=("--steer", "mood:0.5"))
    assert [t.strength for t in changes[0].terms] == [0.6]
    assert not changes[1] and changes[2] == "cancel"
    assert "mood:0.6 (off)" in output


def test_the_meter_tells_the_drift_of_each_reply(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer_plugins.engine.base.GenerationStream.projections", {"calm": 0.25, "other": 9.0})
    output, engine = talk("Hello", "And?", "/reset", "Again", options=("--meter", "calm", "--steer", "mood:0.5"))
    assert [[v.name for v in request.probe] for request in engine.generated] == [["calm", "mood"]] * 3
    assert output.count("[reply 1: calm +0.25]") == 2 and "[reply 2: calm +0.25 (+0.00 since the first reply)]" in output
    meter = chat.Meter([vector("calm")])
    assert meter.turn() == ""
    for values in ((1.0, 2.0), (0.5, 0.5)):
        for value in values:
            meter.take({"calm": value, "mood": 7.0})
        line = meter.turn()
    assert line == "reply 2: calm +0.50 (-1.00 since the first reply)"


def test_a_meter_that_is_not_there(talk: Any) -> None:
    with pytest.raises(SteerError, match="nope"):
        talk("Hello", options=("--meter", "nope"))
