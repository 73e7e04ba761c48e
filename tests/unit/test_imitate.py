"""Imitating a system prompt: on a little world where it is known what the prompt does to a state, and what is refused."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from steer_plugins.cli import train as cli_train
from steer_plugins.engine.base import Activations, Engine, Generation, ModelInfo
from steer_plugins.errors import DataError, SpecError, SteerError
from steer_plugins.steering import formula
from steer_plugins.steering.terms import Steering
from steer_plugins.steering.vector import ModelIdentity
from steer_plugins.store.vectorfile import read_vector, write_vector
from steer_plugins.training.imitate import ImitateOptions, Imitation, Share, load_prompt
from steer_plugins.training.imitate.columns import fit_layer

N_LAYER, N_EMBD, N_VOCAB = 8, 24, 60
IDENTITY = ModelIdentity("llama", N_LAYER, N_EMBD, "a" * 64, "b" * 64, name="world")
SMALL = ImitateOptions(rank=2, n_fit=20, n_tune=4, n_held=8, tokens=12)
MARKS = {"warm": 1, "cold": 2}


class World(Engine):
    """States come from the token and its place; a system prompt adds, at two layers, a constant and what it reads of the state.

    The first token says which prompt there is (0: none). What is steered is steered by the formula.
    """

    def __init__(self, effect: float = 1.0, *, chat: bool = True, n_ctx: int = 256, drops: bool = False) -> None:
        self.info = ModelInfo(
            "world.gguf", IDENTITY, "llama", N_LAYER, N_EMBD, 1, n_ctx, N_VOCAB, ("resid_post",), True, chat, "world"
        )
        rng = np.random.default_rng(5)
        self.embedding, self.output = rng.standard_normal((N_VOCAB, N_EMBD)), rng.standard_normal((N_EMBD, N_VOCAB)) * 0.5
        self.read_row = rng.standard_normal(N_EMBD) / 3
        self.write_row, self.constant = rng.standard_normal((2, N_EMBD)) * effect
        self.drops = drops
        self.closed = False

    def tokenize(self, prompt: Any, *, thinking: bool | None = None, add_generation_prompt: bool = True) -> list[int]:
        system = [m["content"] for m in prompt if m["role"] == "system"]
        mark = MARKS.get(system[0].split()[0], 1) if system and not self.drops else 0
        body = [5 + ord(c) % 50 for m in prompt for c in m["content"][:200] if m["role"] == "user" or mark]
        return [mark, *body]

    def detokenize(self, tokens: Any) -> str:
        return " ".join(map(str, tokens))

    def states(self, tokens: list[int], n_prompt: int, steering: Any) -> dict[int, np.ndarray]:
        """After each layer, float64 [n, n_embd]; a prompt and a steering act from the last prompt token on."""
        wanted = Steering.of(steering)
        h = self.embedding[tokens] + 0.1 * np.cos(np.arange(len(tokens)) - n_prompt)[:, None]
        start, pole, out = n_prompt - 1, {0: 0.0, 1: 1.0, 2: -1.0}[tokens[0]], {}
        for il in range(N_LAYER):
            if il in (2, 5):
                z = h[start:] @ self.read_row
                h[start:] += pole * (self.constant + np.outer(z, self.write_row))
            h[start:] = formula.steer(h[start:], wanted, il)
            out[il] = h.copy()
        return out

    def read(self, prompts: Any, **more: Any) -> Any:
        raise NotImplementedError

    def read_pairs(self, items: Any, *, layers: Any = None, positions: Any = "all", steering: Any = None, **more: Any) -> Any:
        assert positions == "all"
        found = []
        for prompt, reply in items:
            tokens = [*prompt, *reply]
            states = self.states(tokens, len(prompt), steering)
            values = {il: states[il].astype(np.float32) for il in layers}
            found.append(Activations(tokens, len(prompt), list(range(len(tokens))), values, "resid_post"))
        return found

    def _logs(self, tokens: list[int], n_prompt: int, steering: Any) -> np.ndarray:
        logits = self.states(tokens, n_prompt, steering)[N_LAYER - 1] @ self.output
        logs: np.ndarray = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return logs

    def generate_many(self, requests: Any, *, progress: Any = None) -> list[Generation]:
        out = []
        for request in requests:
            rng, tokens = np.random.default_rng(request.seed), list(request.prompt)
            for _ in range(request.max_tokens):
                odds = np.exp(self._logs(tokens, len(request.prompt), None)[-1])
                tokens.append(int(rng.choice(N_VOCAB, p=odds / odds.sum())))
            out.append(Generation("", tokens[len(request.prompt) :], list(request.prompt), "length"))
        return out

    def logprobs(self, items: Any, *, steering: Any = None, **more: Any) -> Any:
        out = []
        for prompt, reply in items:
            logs = self._logs([*prompt, *reply], len(prompt), steering)
            out.append(np.array([logs[len(prompt) - 1 + i, token] for i, token in enumerate(reply)]))
        return out

    def stream(self, request: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True


def shares(vector: Any) -> dict[str, Share]:
    return {s["arm"]: Share(**s) for s in vector.calibration["shares"]}


def test_what_a_prompt_does_is_found() -> None:
    """It depends on the state, so columns find it where a constant does not; random rows do nothing of the kind."""
    vector = Imitation(World(), "warm", "warm as toast", None, SMALL).run()
    found = shares(vector)
    responsive, constant, random = (found[arm] for arm in ("responsive", "constant", "random"))
    assert responsive.share > 0.9 and responsive.low > 0.8 and responsive.low <= responsive.share <= responsive.high
    assert constant.share < responsive.share - 0.1
    assert random.share < 0.1
    assert vector.default_scope == "response" and vector.op == "add" and vector.columns
    assert vector.calibration["gap"] > 0.1 and vector.calibration["n"] == 8
    assert vector.provenance["prompt"] == "warm as toast"


def test_the_other_pole() -> None:
    """Strength -1 imitates the prompt that it is set against."""
    vector = Imitation(World(), "warm", "warm as toast", "cold as ice", SMALL).run()
    assert shares(vector)["responsive"].share > 0.8
    assert vector.calibration["n"] == 16 and vector.provenance["against"] == "cold as ice"


def test_rank_0_is_the_constant_alone() -> None:
    vector = Imitation(World(), "warm", "warm as toast", None, ImitateOptions(**{**vars(SMALL), "rank": 0})).run()
    assert not vector.columns
    found = shares(vector)
    assert found["responsive"].share == found["constant"].share


def test_the_same_run_gives_the_same_vector(tmp_path: Path) -> None:
    small = ImitateOptions(**{**vars(SMALL), "n_fit": 8, "layers": (2, 5)})
    one, other = (Imitation(World(), "warm", "warm", None, small).run() for _ in range(2))
    assert one == other and one.layers == [2, 5]
    write_vector(one, tmp_path / "v.safetensors")
    assert read_vector(tmp_path / "v.safetensors") == one


def test_a_fit_at_one_layer() -> None:
    """A difference of rank 2 is found, on tokens that were left out too; noise gets no columns."""
    rng = np.random.default_rng(0)
    for n, d in ((600, 30), (80, 200)):  # more tokens than numbers, and fewer
        states = rng.standard_normal((n, d)) * np.exp(-np.arange(d) / 10) + 1.0
        wanted = states @ rng.standard_normal((d, 2)) @ rng.standard_normal((2, d)) + 0.5
        groups, weights = np.arange(n) // 10, np.ones(n)
        fit = fit_layer(states, wanted, groups, weights, 4)
        assert fit.columns is not None and len(fit.columns) == 2 and fit.explained > 0.9
        got = fit.constant + (fit.columns.response(states) * fit.columns.gain) @ fit.columns.write.astype(float)
        assert ((wanted - got) ** 2).sum() < 0.05 * (wanted**2).sum()
        noise = fit_layer(states, 1.0 + 0.1 * rng.standard_normal((n, d)), groups, weights, 4)
        assert noise.columns is None and np.abs(noise.constant - 1.0).max() < 0.1


@pytest.mark.parametrize(
    ("world", "prompt", "options", "sentence"),
    [
        (lambda: World(chat=False), "warm", {}, "has no chat template"),
        (lambda: World(drops=True), "warm", {}, "drops system prompts"),
        (World, "  \n", {}, "the prompt is empty"),
        (lambda: World(n_ctx=64), "warm " * 40, {}, "the context has 64: shorten it"),
        (lambda: World(effect=0.0), "warm", {}, "nothing to imitate"),
        (World, "warm", {"layers": (3, 9)}, "layers 3, 9 do not all lie where"),
        (World, "warm", {"layers": (7,)}, "it has 0 to 6"),  # the last one holds output tokens only
        (World, "warm", {"rank": 17}, "a rank of 17"),
        (World, "warm", {"tokens": 1}, "longer than one token"),
    ],
)
def test_what_is_refused(world: Callable[[], World], prompt: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((DataError, SpecError), match=sentence):
        Imitation(world(), "v", prompt, None, ImitateOptions(**{**vars(SMALL), **options})).run()


# --- where a prompt comes from


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", b"\0" * 13), *chunks, (b"IEND", b"")):
        data += len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    return data


CARD = {
    "spec": "chara_card_v2",
    "data": {
        "name": "Mara",
        "description": "{{char}} is a smith who talks to <USER> gruffly.",
        "personality": "gruff",
        "scenario": "A forge at night.",
        "system_prompt": "{{original}}",
        "first_mes": "Hello",
    },
}
MARA = "You are Mara.\nMara is a smith who talks to the user gruffly.\nMara's personality: gruff\nScenario: A forge at night."


def test_texts_files_and_cards(tmp_path: Path) -> None:
    assert load_prompt("You are kind.") == ("You are kind.", {"kind": "prompt"})
    assert load_prompt("See notes.txt\nand be kind")[0].startswith("See")
    text = tmp_path / "p.txt"
    text.write_text("\ufeffBe kind.\n", encoding="utf-8")
    assert load_prompt(str(text)) == ("Be kind.", {"kind": "prompt", "file": "p.txt"})
    card = json.dumps(CARD).encode()
    old = json.dumps({"char_name": "Mara", "char_persona": "Mara is a smith."}).encode()
    for name, data, wanted in (
        ("c.json", card, MARA),
        ("c.png", png((b"tEXt", b"chara\0" + base64.b64encode(card))), MARA),
        ("d.png", png((b"tEXt", b"chara\0bm8="), (b"tEXt", b"ccv3\0" + base64.b64encode(card))), MARA),
        ("old.json", old, "You are Mara.\nMara is a smith."),
        ("own.json", json.dumps({"name": "M", "system_prompt": "Be {{char}}."}).encode(), "Be M."),
    ):
        (tmp_path / name).write_bytes(data)
        found, source = load_prompt(str(tmp_path / name))
        assert found == wanted and source["file"] == name and source["character"] in ("Mara", "M")


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.txt", b" \n", "is empty"),
        ("b.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("c.txt", b"x" * 300_000, "longer than 200000 bytes"),
        ("d.json", b"[1]", "no character card"),
        ("e.json", b"[" * 100_000, "no character card"),
        ("f.json", b'{"name": "x"}', "nothing to imitate"),
        ("g.json", b'{"description": 5}', "'description' is not text"),
        ("h.png", png(), "picture without a character card"),
        ("i.png", png((b"tEXt", b"chara\0***")), "not base64"),
        ("j.png", png((b"tEXt", b"chara\0" + base64.b64encode(b"{"))), "no character card"),
        ("k.png", png()[:20] + b"\xff\xff\xff\xfftEXtchara\0", "picture without"),
        ("missing.txt", None, "cannot read"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes | None, sentence: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=sentence) as caught:
        load_prompt(str(tmp_path / name))
    assert name in str(caught.value)


# --- the command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    world = World()
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setattr(cli_train.EngineOptions, "open", lambda self, **more: world)
    options = {**vars(SMALL), "n_fit": 10, "n_held": 6}
    monkeypatch.setattr("steer_plugins.training.imitate.ImitateOptions", lambda **given: ImitateOptions(**{**options, **given}))

    def run(*words: str) -> Any:
        return CliRunner().invoke(cli_train.train, list(words), standalone_mode=False)

    run.world = world  # type: ignore[attr-defined]
    return run


def test_the_command(command: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "warm.safetensors"
    result = command("warm", "--from-prompt", "warm as toast", "--out", str(out), "--rank", "1")
    assert result.exception is None, result.output
    assert "share closed" in result.output and "responsive" in result.output and "random" in result.output
    vector = read_vector(out)
    assert vector.provenance["source"] == {"kind": "prompt"} and vector.provenance["rank"] == 1
    facts = command("warm", "--from-prompt", "warm as toast", "--json")
    assert json.loads(facts.output)["calibration"]["shares"][0]["arm"] == "responsive"
    again = command("warm", "--from-prompt", "warm as toast")
    assert isinstance(again.exception, SteerError) and "replace it with --overwrite" in str(again.exception)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("v", "--from-prompt", "warm", "--pairs", __file__), "--from-prompt does not take --pairs"),
        (("v", "--from-prompt", "warm", "--calibrate", "full"), "does not take --calibrate"),
        (("v", "--against", "cold"), "--against belongs to --from-prompt"),
        (("v", "--rank", "2"), "--rank belongs to --from-prompt"),
        (("--again", "mood", "--from-prompt", "warm"), "--again takes --from-prompt from the vector"),
        (("v", "--from-prompt", ""), "the prompt is empty"),
        (("v", "--from-prompt", "nowhere.txt"), "cannot read nowhere.txt"),
    ],
)
def test_bad_commands(command: Callable[..., Any], words: tuple[str, ...], sentence: str) -> None:
    result = command(*words)
    assert result.exception is not None and sentence in str(getattr(result.exception, "message", result.exception))


def test_an_interrupted_fit_writes_nothing(command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(World, "logprobs", interrupted)
    out = tmp_path / "v.safetensors"
    result = command("v", "--from-prompt", "warm", "--out", str(out))
    assert result.exception is not None and not out.exists() and not list(tmp_path.glob("**/*.safetensors"))
    assert command.world.closed  # type: ignore[attr-defined]


# --- a model's own SYSTEM


def test_from_modelfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """`steer ollama train --from-modelfile` hands the model's SYSTEM on, as a text whatever it looks like."""
    import contextlib
    from types import SimpleNamespace

    from steer_plugins_ollama import client, plugin

    systems = {"mario": "You are Mario.", "odd": "rules.txt", "plain": " "}
    store = SimpleNamespace(get=lambda model: SimpleNamespace(system=systems[model]))
    monkeypatch.setattr(client, "OllamaStore", lambda root: store)
    monkeypatch.setattr(client, "engine_of", lambda model, url: contextlib.nullcontext(["--model", "m.gguf"]))
    called: list[list[str]] = []
    monkeypatch.setattr(cli_train.train, "main", lambda words, **more: called.append(list(words)))
    for model, prompt in (("mario", "You are Mario."), ("odd", "rules.txt")):
        CliRunner().invoke(plugin.train, [model, "v", "--from-modelfile", "--rank", "2"], standalone_mode=False)
        words = called.pop()
        assert words[:5] == ["v", "--model", "m.gguf", "--rank", "2"] and words[5] == "--from-prompt"
        assert load_prompt(words[6])[0] == prompt
    refused = CliRunner().invoke(plugin.train, ["plain", "v", "--from-modelfile"], standalone_mode=False)
    assert isinstance(refused.exception, DataError) and "has no SYSTEM" in str(refused.exception) and not called
