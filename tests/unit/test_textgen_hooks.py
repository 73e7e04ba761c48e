"""Steering through forward hooks, as with the Transformers loader: the same formula, the same scopes as the engines."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from steer_plugins_textgen import extension, hooks, settings

from steer_plugins.errors import SteerError
from steer_plugins.steering.columns import LINEAR, Columns
from steer_plugins.steering.formula import steer
from steer_plugins.steering.grammar import parse
from steer_plugins.steering.terms import Steering, Term
from steer_plugins.steering.vector import ModelIdentity, SteeringVector
from steer_plugins.store.library import Library
from tests.scopes import acts
from tests.unit import numpy_torch
from tests.unit.textgen_webui import StandIn

N_LAYER, N_EMBD = 3, 8


def vector(name: str = "mood", seed: int = 0, op: str = "add", layers: tuple[int, ...] = (0, 1, 2)) -> SteeringVector:
    random = np.random.default_rng(seed)
    directions = {(il, "resid_post"): random.normal(size=N_EMBD).astype(np.float32) for il in layers}
    return SteeringVector(name, directions, {key: 2.0 + key[0] for key in directions}, op=op)


@pytest.mark.parametrize("scope", ["all", "prompt", "response", "0-", "2-4", "1-1"])
@pytest.mark.parametrize("n_prompt", [1, 2, 5])
def test_scopes_are_those_of_the_engines(scope: str, n_prompt: int) -> None:
    term = Term(vector(), scope=scope)
    assert hooks.acts(term, np.arange(8), n_prompt).tolist() == [acts(scope, p, n_prompt) for p in range(8)]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("mood?thinking", "cannot tell"),
        ("mood?answer", "cannot tell"),
        ("mood#1", "stream"),
        ("wide", "'wide'"),
        ("absent", "'absent'.*3 layers"),
    ],
)
def test_what_hooks_cannot_do_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, named: str) -> None:
    stand_in = loaded(monkeypatch, tmp_path)
    Library().put(vector(), identity())
    Library().put(vector("wide"), identity(n_embd=8, n_layer=5))
    with pytest.raises(SteerError, match=named):
        hooks.check(parse(text))
    hooks.check(parse("mood:0.5?response"))
    assert hooks.usable(parse("mood + absent")) == parse("mood")
    assert any("absent" in line for line in stand_in.lines)


def test_a_name_in_two_models_of_a_shape_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded(monkeypatch, tmp_path)
    for token in "ab":
        Library().put(vector(), identity(tokens=token))
    with pytest.raises(SteerError, match="several models"):
        hooks.check(parse("mood"))


def identity(n_layer: int = N_LAYER, n_embd: int = N_EMBD, tokens: str = "a") -> ModelIdentity:
    return ModelIdentity("llama", n_layer, n_embd, tokens * 64, "b" * 64, name="tiny")


def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Any = None) -> StandIn:
    """A webui with a model of the Transformers loader."""
    stand_in = StandIn(monkeypatch, tmp_path)
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setattr(settings, "_settings", settings.Settings(None))
    layers = [object()] * N_LAYER
    config = SimpleNamespace(num_hidden_layers=N_LAYER, hidden_size=N_EMBD)
    stand_in.shared.model = model or SimpleNamespace(model=SimpleNamespace(layers=layers), config=config)
    stand_in.shared.args.loader = "Transformers"
    return stand_in


# ---- with torch, and with a stand-in for it ----


class Kit:
    """A tiny model and its tensors. Blocks have the calling convention of Transformers: hidden states in, and the position of
    the first as a keyword."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, real: bool) -> None:
        self.real = real
        random = np.random.default_rng(1)
        shape = (N_LAYER, N_EMBD, N_EMBD)
        self.weights = (random.normal(size=shape) / N_EMBD).astype(np.float32)
        self.biases = random.normal(size=shape[:2]).astype(np.float32)
        if real:
            self.torch = pytest.importorskip("torch", reason="torch is not installed: its stand-in is used alone")
        else:
            self.torch = numpy_torch.module()
            monkeypatch.setitem(sys.modules, "torch", self.torch)

    def model(self, tuples: bool) -> Any:
        blocks = [self._block(w, b, tuples) for w, b in zip(self.weights, self.biases, strict=True)]
        config = SimpleNamespace(num_hidden_layers=N_LAYER, hidden_size=N_EMBD)
        return SimpleNamespace(model=SimpleNamespace(layers=blocks), config=config)

    def _block(self, weight: np.ndarray, bias: np.ndarray, tuples: bool) -> Any:
        if not self.real:
            return numpy_torch.Block(weight, bias, tuples)
        torch = self.torch

        class Block(torch.nn.Module):  # type: ignore[misc, name-defined]
            def forward(self, hidden: Any, **_: Any) -> Any:
                out = hidden + hidden @ torch.from_numpy(weight).T + torch.from_numpy(bias)
                return (out, None) if tuples else out

        return Block()

    def run(self, model: Any, hidden: np.ndarray, first: int = 0, positions: bool = True) -> np.ndarray:
        """What comes out of the last block: float32 [tokens, n_embd]."""
        at: Any = hidden[None]
        at = self.torch.from_numpy(at) if self.real else numpy_torch.tensor(at)
        where = np.arange(first, first + len(hidden))
        more = {"position_ids": self.torch.as_tensor(where[None])} if positions else {}
        for block in model.model.layers:
            at = block(at, **more)
            at = at[0] if isinstance(at, tuple) else at
        return np.array(at[0].numpy() if self.real else at[0])


@pytest.fixture(params=[False, True], ids=["stand-in", "torch"])
def kit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kit:
    return Kit(monkeypatch, request.param)


def states(n: int = 7) -> np.ndarray:
    return np.random.default_rng(4).normal(size=(n, N_EMBD)).astype(np.float32)


def expected(kit: Kit, hidden: np.ndarray, terms: list[Term], n_prompt: int) -> np.ndarray:
    """The formula in numpy, token by token."""
    for il in range(N_LAYER):
        hidden = hidden + hidden @ kit.weights[il].T + kit.biases[il]
        rows = [steer(hidden[p], [t for t in terms if acts(t.effective_scope, p, n_prompt)], il) for p in range(len(hidden))]
        hidden = np.stack(rows).astype(np.float32)
    return hidden


def responsive(name: str, seed: int) -> SteeringVector:
    """With a column of each kind at every layer."""
    plain = vector(name, seed)
    rows = np.random.default_rng(seed).normal(size=(2, 3, N_EMBD))
    column = Columns(rows[0] / 3, rows[1], [0.3, -0.2, 0.4], [0.1, -0.1, 0.2], [LINEAR, 0.0, 0.3])
    return plain.replace(columns=dict.fromkeys(plain.directions, column))


MIXED = [
    Term(vector("a", 1), 0.7, scope="response"),
    Term(vector("b", 2), -0.4, op="project", scope="all", layers=(1, 2)),
    Term(vector("c", 3), 0.3, op="clamp", scope="2-4"),
]
RESTORED = [Term(vector("a", 1), 0.7, op="renorm", scope="response"), Term(vector("b", 2), -0.4, op="renorm", scope="0-")]

READING = [
    Term(responsive("a", 1), 0.7, scope="response"),
    Term(responsive("b", 2), -0.4, op="clamp", scope="all"),
    Term(vector("c", 3), 0.8, op="floor", level=0.2, scope="2-5"),
    Term(vector("c", 3), op="cap", level=-0.3, scope="0-1"),
]


@pytest.mark.parametrize("terms", [MIXED, RESTORED, READING], ids=["mixed", "renorm", "reading"])
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("tuples", [True, False])
def test_hooks_compute_the_formula(kit: Kit, tuples: bool, positions: bool, terms: list[Term]) -> None:
    model, hidden = kit.model(tuples), states()
    with hooks.hooked(model, Steering(terms)):
        parts = [kit.run(model, hidden[a:b], a, positions) for a, b in ((0, 5), (5, 6), (6, 7))]
    np.testing.assert_allclose(np.concatenate(parts), expected(kit, hidden, terms, 5), rtol=1e-5, atol=1e-5)
    assert all(not block._forward_hooks for block in model.model.layers)


def test_no_steering_is_bit_identical_and_live_changes_act(kit: Kit) -> None:
    model, x = kit.model(True), states(6)
    plain = kit.run(model, x)
    with hooks.hooked(model, Steering([Term(vector(), 0.0)])):
        assert all(not block._forward_hooks for block in model.model.layers)  # nothing to do, nothing hooked
    with hooks.hooked(model, Steering(), follows=True) as active:
        assert np.array_equal(kit.run(model, x), plain)
        active.steering = Steering([Term(vector(), 1.0, scope="0-")])
        assert not np.array_equal(kit.run(model, x), plain)
    assert np.array_equal(kit.run(model, x), plain)


def generating(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kit: Kit) -> StandIn:
    """A webui whose replies are the hidden states of six tokens."""
    model = kit.model(False)
    stand_in = loaded(monkeypatch, tmp_path, model)
    Library().put(vector(), identity())

    def generate(question: Any, original: Any, state: Any) -> Any:
        yield kit.run(model, states(6))
        yield kit.run(model, states(6))

    stand_in.text_generation.generate_reply_HF = generate
    stand_in.logits._get_next_logits = lambda prompt, state, use_samplers, previous: kit.run(model, states(6))
    extension.setup()
    return stand_in


def test_a_reply_of_the_transformers_loader_is_steered_on_its_own(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in = generating(monkeypatch, tmp_path, kit)
    plain, steered, again = (
        next(stand_in.text_generation.generate_reply_HF("", "", state))
        for state in ({"steering": None}, {"steering": "mood:1"}, {"steering": None})
    )
    assert np.array_equal(plain, again) and not np.array_equal(plain, steered)
    assert all(not block._forward_hooks for block in stand_in.shared.model.model.layers)
    logits = [stand_in.logits._get_next_logits("", {"steering": wish}, False, "") for wish in (None, "mood:1")]
    assert np.array_equal(logits[0], plain) and np.array_equal(logits[1], steered)


def test_guesses_behind_a_prompt_are_no_prompt(kit: Kit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in = generating(monkeypatch, tmp_path, kit)
    stand_in.text_generation.get_max_prompt_length = lambda state: 100
    stand_in.text_generation.encode = lambda question, **more: [[1] * 4]  # of the six tokens of the first pass
    state = {"steering": "mood:1?response", "prompt_lookup_num_tokens": 2, "add_bos_token": True}
    found = next(stand_in.text_generation.generate_reply_HF("", "", state))
    wanted = expected(kit, states(6), [Term(vector(), 1.0, scope="response")], 4)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_sliders_move_the_pages_reply_and_no_other(kit: Kit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in = generating(monkeypatch, tmp_path, kit)
    reply = stand_in.text_generation.generate_reply_HF
    plain = next(reply("", "", {"steering": []}))
    page, other = reply("", "", {}), reply("", "", {"steering": "mood:-1"})
    assert np.array_equal(next(page), plain)
    hooks.change_running(parse("mood:1"))
    assert not np.array_equal(next(page), plain)
    page.close()
    begun = next(other)
    hooks.change_running(parse("mood:1"))
    assert np.array_equal(next(other), begun) and not np.array_equal(begun, plain)
    other.close()
    assert hooks._following == []
