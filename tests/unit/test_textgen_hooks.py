"""Steering through forward hooks, as with the Transformers loader: the same formula, the same scopes as the engines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from steer_plugins_textgen import extension, hooks, settings

from steer_plugins.engine.scopes import ScopeMap
from steer_plugins.errors import SteerError
from steer_plugins.formula import steer
from steer_plugins.grammar import parse
from steer_plugins.library import Library
from steer_plugins.steering import Steering, Term
from steer_plugins.vector import ModelIdentity, SteeringVector
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
    engine = ScopeMap(Steering([term]), n_prompt, has_thinking=False)
    wanted = [engine.active(p, False) == (0,) for p in range(8)]
    assert hooks.acts(term, np.arange(8), n_prompt).tolist() == wanted


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


# ---- with torch ----


def tiny_model(torch: Any, tuples: bool) -> Any:
    """Blocks with the calling convention of Transformers: hidden states in, and the position of the first as a keyword."""

    class Block(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(N_EMBD, N_EMBD)

        def forward(self, hidden: Any, *, cache_position: Any = None) -> Any:
            out = hidden + self.linear(hidden)
            return (out, None) if tuples else out

    class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Module()
            self.model.layers = torch.nn.ModuleList(Block() for _ in range(N_LAYER))
            self.config = SimpleNamespace(num_hidden_layers=N_LAYER, hidden_size=N_EMBD)

        def forward(self, hidden: Any, first: int = 0, positions: bool = True) -> Any:
            more = {"cache_position": torch.arange(first, first + hidden.shape[1])} if positions else {}
            for block in self.model.layers:
                hidden = block(hidden, **more)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            return hidden

    torch.manual_seed(1)
    return Model().eval()


def expected(torch: Any, model: Any, hidden: np.ndarray, terms: list[Term], n_prompt: int) -> np.ndarray:
    """The formula in numpy, token by token."""
    scopes = ScopeMap(Steering(terms), n_prompt, has_thinking=False)
    for il, block in enumerate(model.model.layers):
        weight, bias = block.linear.weight.detach().numpy(), block.linear.bias.detach().numpy()
        hidden = hidden + hidden @ weight.T + bias
        rows = [steer(hidden[p], [terms[i] for i in scopes.active(p, False)], il) for p in range(len(hidden))]
        hidden = np.stack(rows).astype(np.float32)
    return hidden


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("tuples", [True, False])
def test_hooks_compute_the_formula(tuples: bool, positions: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: hooks are for the webui's Transformers loader")
    model = tiny_model(torch, tuples)
    terms = [
        Term(vector("a", 1), 0.7, scope="response"),
        Term(vector("b", 2), -0.4, op="project", scope="all", layers=(1, 2)),
        Term(vector("c", 3), 0.3, op="clamp", scope="2-4"),
    ]
    hidden = np.random.default_rng(4).normal(size=(7, N_EMBD)).astype(np.float32)
    wanted = expected(torch, model, hidden, terms, n_prompt=5)
    with torch.no_grad(), hooks.hooked(model, Steering(terms)):
        parts = [torch.from_numpy(hidden[None, a:b]) for a, b in ((0, 5), (5, 6), (6, 7))]
        found = torch.cat([model(part, first, positions) for part, first in zip(parts, (0, 5, 6), strict=True)], dim=1)
    np.testing.assert_allclose(found[0].numpy(), wanted, rtol=1e-5, atol=1e-5)
    assert all(not block._forward_hooks for block in model.model.layers)


def test_no_steering_is_bit_identical_and_live_changes_act() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: hooks are for the webui's Transformers loader")
    model = tiny_model(torch, True)
    x = torch.randn(1, 6, N_EMBD)
    with torch.no_grad():
        plain = model(x)
        with hooks.hooked(model, Steering([Term(vector(), 0.0)])) as active:
            assert torch.equal(model(x), plain)
            active.steering = Steering([Term(vector(), 1.0, scope="0-")])
            assert not torch.equal(model(x), plain)
        assert torch.equal(model(x), plain)


def test_a_reply_of_the_transformers_loader_is_steered_on_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: hooks are for the webui's Transformers loader")
    model = tiny_model(torch, False)
    stand_in = loaded(monkeypatch, tmp_path, model)
    Library().put(vector(), identity())
    x = torch.randn(1, 6, N_EMBD)

    def generate(question: Any, original: Any, state: Any) -> Any:
        with torch.no_grad():
            yield model(x)

    stand_in.text_generation.generate_reply_HF = generate
    extension.setup()
    replies = [
        next(stand_in.text_generation.generate_reply_HF("", "", state))
        for state in ({"steering": None}, {"steering": "mood:1"}, {"steering": None})
    ]
    assert torch.equal(replies[0], replies[2]) and not torch.equal(replies[0], replies[1])
    assert all(not block._forward_hooks for block in model.model.layers)
