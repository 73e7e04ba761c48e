"""One wish by every door: whatever a user writes it in, the same JSON arrives at the server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from steer_plugins_ollama import expression, modelfile
from steer_plugins_ollama.desk import Desk
from steer_plugins_textgen import wishes
from steer_plugins_textgen.link import Link
from steer_plugins_textgen.settings import Settings

from steer_plugins.cli import serve
from steer_plugins.cli.main import cli
from steer_plugins.client.engine import ServerEngine
from steer_plugins.steering.grammar import format_terms, parse
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store import identity
from steer_plugins.store.library import Library
from steer_plugins.store.vectorfile import read_vector
from tests.unit.steering_server import IDENTITY, N_EMBD, FakeServer

WISHES = [
    "mood:0.8",
    "mood:0.8 + !hedge:0.5@1-?answer + mood:-0.2[linear:16]",
    "-hedge:0.25%renorm@2 + hedge:1e-3%renorm@2?thinking",
    "mood?0-[cosine:9:0.5] - mood:0.5?3-5#0",
    "hold:2%clamp + hold:0",
    "",
]


class Doors:
    """Every way in, as a function from a text to the fields that the server gets."""

    def __init__(self, server: FakeServer, library: Library, folder: Path) -> None:
        self._server, self._library, self._folder = server, library, folder
        self._engine = ServerEngine(server.url, library=library)
        self._link = Link(server.url, library)
        process = SimpleNamespace(url=server.url, api_key=None)
        self._desk = Desk(process, library)  # type: ignore[arg-type]
        self._model = SimpleNamespace(vectors={}, name="m")

    def close(self) -> None:
        self._engine.close()
        self._link.engine.close()

    def python(self, text: str) -> dict[str, Any]:
        return self._engine.request_fields(self._engine.steering(text))

    def json_terms(self, text: str) -> dict[str, Any]:
        return self._engine.request_fields(self._engine.steering([term.to_json() for term in parse(text)], names_only=True))

    def command_line(self, text: str) -> dict[str, Any]:
        steer = ["--steer", text] if text else []
        done = CliRunner().invoke(
            cli, ["generate", "--server", self._server.url, "-n", "1", *steer, "Hi"], catch_exceptions=False
        )
        assert done.exit_code == 0, done.output
        return fields_of(self._server.bodies("/completion")[-1])

    def webui_slider(self, text: str) -> dict[str, Any]:
        page = Settings(None)
        page.set_terms([term for term in parse(text)])
        for i, term in enumerate(parse(text)):
            page.change_term(i, strength=term.strength / 2)
            page.change_term(i, strength=term.strength)  # as a hand moves it
        return self._link.fields(page.terms)

    def webui_api(self, text: str) -> dict[str, Any]:
        return self._link.fields(
            wishes.terms_of(json.loads(json.dumps([term.to_json() for term in parse(text)])), Settings(None))
        )

    def webui_preset(self, text: str) -> dict[str, Any]:
        page = Settings(None)
        page.presets["mine"] = parse(text)
        return self._link.fields(wishes.terms_of({"preset": "mine"}, page))

    def ollama_modelfile(self, text: str) -> dict[str, Any]:
        lines = modelfile.parse(f'FROM m\nPARAMETER steering """{text}"""\n').steering
        return next(self._desk.attempts(self._model, expression.combine_lines(None, lines) or ()))  # type: ignore[arg-type]

    def ollama_request(self, text: str) -> dict[str, Any]:
        said = expression.of_request([term.to_json() for term in parse(text)], tuple(parse("mood:3")))
        return next(self._desk.attempts(self._model, said or ()))  # type: ignore[arg-type]


DOORS = [name for name, door in vars(Doors).items() if callable(door) and not name.startswith("_") and name != "close"]


def fields_of(body: dict[str, Any]) -> dict[str, Any]:
    return {key: body[key] for key in ("steering", "steering_tags") if key in body}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    library = Library()
    for seed, (name, options) in enumerate(
        {"mood": {"default_scope": "response"}, "hedge": {}, "hold": {"op": "clamp", "default_scope": "thinking"}}.items()
    ):
        rng = np.random.default_rng(seed)
        places = {(il, "resid_post"): rng.standard_normal(N_EMBD) for il in (1, 2)}
        library.put(SteeringVector(name, places, identity=IDENTITY, calibration={}, **options), IDENTITY)  # type: ignore[arg-type]
    return library


@pytest.fixture
def doors(library: Library, tmp_path: Path) -> Iterator[Doors]:
    with FakeServer() as server:
        found = Doors(server, library, tmp_path)
        yield found
        found.close()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("text", WISHES)
def test_one_wish_by_every_door(doors: Doors, door: str, text: str) -> None:
    given: Callable[[str], dict[str, Any]] = getattr(doors, door)
    assert given(text) == doors.python(text)
    assert given(format_terms(parse(text))) == doors.python(text)


@pytest.mark.parametrize("text", [wish for wish in WISHES if wish])
def test_a_servers_default_is_the_same_wish(
    doors: Doors, library: Library, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``steer serve --steering`` keeps the users' names, and leaves to the server what the vectors say for themselves."""
    monkeypatch.setattr(identity, "identity_of_gguf", lambda model: IDENTITY)
    staged = serve.Staged(tmp_path, library, Path("model.gguf"))
    staged.add_library()
    flags = staged.flags(text)
    said = json.loads(flags[flags.index("--steering") + 1])
    filled = []
    for term in said:
        vector = read_vector(tmp_path / f"{term['vector']}.safetensors")
        if "layers" in term:
            term["layers"] = [edge if edge is not None else vector.layers[-1] for edge in term["layers"]]
        filled.append({"op": vector.op, "scope": vector.default_scope, **term, "vector": f"c-{vector.content_hash[:24]}"})
    assert filled == [{k: v for k, v in term.items() if v is not None} for term in doors.python(text)["steering"]]
