"""How a control vector's layers are numbered, asked of a model in which each block writes into a space of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from steer_plugins.cli.main import main
from steer_plugins.engine import local
from steer_plugins.errors import VectorError
from steer_plugins.store.foreign.gguftensors import write_directions
from steer_plugins.store.foreign.numbering import TEXTS, Numbering, probe_numbering
from steer_plugins.store.formats import read_any

N_LAYER, N_EMBD, OWN = 14, 64, 4


class Blocks:
    """Block L writes into axes 4 L to 4 L + 3, and a little noise everywhere."""

    info = SimpleNamespace(n_layer=N_LAYER, n_embd=N_EMBD)

    def __init__(self, own: bool = True) -> None:
        self.own = own
        self.rng = np.random.default_rng(1)

    def write(self, block: int, n: int) -> np.ndarray:
        rows = 0.05 * self.rng.normal(size=(n, N_EMBD))
        if self.own:
            rows[:, OWN * block : OWN * block + OWN] += self.rng.normal(size=(n, OWN)) + 0.5
        return rows

    def states(self, n: int) -> np.ndarray:
        """[n_layer, n, n_embd]: what all blocks so far have written, and a sink at position 0 that would drown the rest."""
        found = np.cumsum([self.write(block, n) for block in range(N_LAYER)], axis=0)
        found[:, 0] = 1e4 * self.rng.normal(size=found[:, 0].shape)
        return found

    def read(self, prompts: Any, *, layers: Any, positions: str) -> list[Any]:
        assert positions == "all" and max(layers) < N_LAYER - 1 and tuple(prompts) == TEXTS
        states = self.states(30)
        return [SimpleNamespace(values={il: states[il].astype(np.float32) for il in layers}) for _ in prompts]

    def __enter__(self) -> Blocks:
        return self

    def __exit__(self, *exc_info: object) -> None: ...


def directions(model: Blocks, shift: int = 0) -> dict[int, np.ndarray]:
    """A mean difference at each block's output, under the numbers of a writer."""
    made = np.cumsum([model.write(block, 1)[0] for block in range(N_LAYER)], axis=0)
    lengths = np.linalg.norm(made, axis=1, keepdims=True)
    return {il + shift: row.astype(np.float32) for il, row in enumerate(made / lengths) if il + shift in range(1, N_LAYER)}


@pytest.mark.parametrize(("shift", "answer"), [(0, "block"), (1, "plus-one")])
def test_the_blocks_say_where_a_direction_was_made(shift: int, answer: str) -> None:
    model = Blocks()
    found = probe_numbering(model, N_LAYER, directions(model, shift))
    assert found.answer == answer and found.of == 11 and f"of {found.of} layers say so" in found.sentence


def test_nothing_is_said_where_the_blocks_are_alike() -> None:
    found = Numbering(6, 11)
    assert found.answer is None and "does not tell" in found.sentence
    model = Blocks(own=False)
    assert probe_numbering(model, N_LAYER, directions(model)).chance > 0.05
    assert Numbering(4, 4).answer is None  # four votes are too few to be sure of


def test_layers_without_neighbours_cannot_vote() -> None:
    model = Blocks()
    few = {n: row for n, row in directions(model).items() if n in (3, 6, 9)}
    with pytest.raises(VectorError, match="no two neighbouring layers"):
        probe_numbering(model, N_LAYER, few)


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = Blocks()
    monkeypatch.setattr(local, "LocalEngine", lambda *args, **more: model)
    monkeypatch.setattr("steer_plugins.store.identity.identity_of_gguf", lambda path: None)
    write_directions(Path("late.gguf"), {"controlvector.model_hint": "x"}, directions(model, 1))
    write_directions(Path("alone.gguf"), {"controlvector.model_hint": "x"}, {5: np.ones(N_EMBD, np.float32)})
    write_directions(Path("narrow.gguf"), {"controlvector.model_hint": "x"}, {n: np.ones(9, np.float32) for n in (5, 6)})
    return tmp_path


def test_convert_asks_the_model(late: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "late.gguf", "v.safetensors", "--model", "m.gguf", "--gguf-layers", "probe"]) == 0
    assert "probe: direction.N was made at block N-1" in capsys.readouterr().out
    assert read_any("v.safetensors").layers == list(range(N_LAYER - 1))


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["late.gguf"], 2, "name it with --model"),
        (["alone.gguf", "--model", "m.gguf"], 1, "no two neighbouring layers"),
        (["narrow.gguf", "--model", "m.gguf"], 1, "9 numbers, and the model's hidden states 64"),
    ],
)
def test_what_cannot_be_asked(late: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, said: str) -> None:
    assert main(["convert", *options, "out.safetensors", "--gguf-layers", "probe"]) == code
    assert said in capsys.readouterr().err and not Path("out.safetensors").exists()
