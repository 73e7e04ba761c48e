"""SteeredLlama is llama_cpp.Llama, and its cache never hands over states that another steering left behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins import SteeringVector, Term
from steer_plugins.errors import EngineError, VectorError

PROMPT = "The weather in the old town"
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}


def vector(n_embd: int, *, seed: int = 3, scope: str = "all", dose: float = 6.0) -> SteeringVector:
    rng = np.random.default_rng(seed)
    directions = {(il, "resid_post"): rng.standard_normal(n_embd) for il in (1, 2)}
    return SteeringVector("v", directions, dict.fromkeys(directions, dose / np.sqrt(n_embd)), default_scope=scope)


@pytest.fixture(scope="module")
def make(llama_cpp: Any, tiny: Any) -> Iterator[Any]:
    from steer_plugins import SteeredLlama

    made: list[Any] = []

    def build(**kwargs: Any) -> Any:
        made.append(SteeredLlama(str(tiny("llama")), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, **kwargs))
        return made[-1]

    yield build
    for one in made:
        one.close()


def text(llama: Any, prompt: str = PROMPT, **kwargs: Any) -> str:
    return llama(prompt, **{**GREEDY, **kwargs})["choices"][0]["text"]


def test_without_steering_it_is_the_plain_class(llama_cpp: Any, make: Any, tiny: Any) -> None:
    plain = llama_cpp.Llama(str(tiny("llama")), n_ctx=256, n_threads=1, verbose=False)
    assert text(make()) == text(plain)
    plain.close()


def test_strength_changes_the_text_and_zero_does_not(make: Any) -> None:
    llama = make()
    v = vector(llama.n_embd())
    plain = text(llama)
    assert text(llama, steering=Term(v, 0.0)) == plain
    assert text(llama, steering=v) != plain
    assert text(llama, steering=v) != text(llama, steering=-1.0 * v)
    assert text(llama) == plain


def test_a_streamed_call_keeps_its_steering_while_it_is_iterated(make: Any) -> None:
    llama = make()
    v = vector(llama.n_embd(), scope="response")
    whole = text(llama, steering=v)
    pieces = [c["choices"][0]["text"] for c in llama(PROMPT, **GREEDY, steering=v, stream=True)]
    assert "".join(pieces) == whole
    chat = [{"role": "user", "content": "hello"}]
    once = llama.create_chat_completion(chat, **GREEDY, steering=v)["choices"][0]["message"]["content"]
    chunks = llama.create_chat_completion(chat, **GREEDY, steering=v, stream=True)
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == once
    assert once != llama.create_chat_completion(chat, **GREEDY)["choices"][0]["message"]["content"]


def test_no_stale_prefix_whatever_came_before(make: Any) -> None:
    """A random walk over prompts that share prefixes and steerings that differ: always what a fresh model says."""
    llama = make()
    n_embd = llama.n_embd()
    wishes: list[Any] = [
        None,
        vector(n_embd),
        Term(vector(n_embd), -0.5),
        vector(n_embd, scope="response"),
        vector(n_embd, scope="prompt"),
        Term(vector(n_embd, seed=9), 1.0, scope="2-4"),
    ]
    prompts = [PROMPT, PROMPT + " is", PROMPT + " is cold and", "The weather"]
    fresh: dict[tuple[str, int], str] = {}
    for prompt in prompts:
        for i, wish in enumerate(wishes):
            llama.reset()
            llama._ctx.kv_cache_clear()
            llama._edits.clear()
            fresh[prompt, i] = text(llama, prompt, steering=wish)
    assert len(set(fresh.values())) > len(prompts) * 3, "the steerings must tell themselves apart"
    rng = random.Random(1)
    for _ in range(60):
        prompt, i = rng.choice(prompts), rng.randrange(len(wishes))
        assert text(llama, prompt, steering=wishes[i]) == fresh[prompt, i], (prompt, i)


def test_a_live_change_takes_effect_at_the_next_token(make: Any) -> None:
    llama = make()
    v = vector(llama.n_embd(), scope="response")
    plain, steered = text(llama, max_tokens=16), text(llama, max_tokens=16, steering=v)
    changed = ""
    for i, chunk in enumerate(llama(PROMPT, max_tokens=16, temperature=0.0, stream=True)):
        changed += chunk["choices"][0]["text"]
        if i == 4:
            llama.steer(v)
    assert changed not in (plain, steered)
    assert changed[:4] == plain[:4]
    assert text(llama, max_tokens=16) == plain, "what the change left in the cache is not reused"


def test_saved_states_remember_their_edits(make: Any) -> None:
    llama = make()
    v = vector(llama.n_embd())
    plain, steered = text(llama), text(llama, steering=v)
    state = llama.save_state()
    text(llama)
    llama.load_state(state)
    assert text(llama) == plain
    llama.load_state(state)
    assert text(llama, steering=v) == steered


def test_refusals(make: Any, llama_cpp: Any) -> None:
    llama = make()
    with pytest.raises(VectorError, match="n_embd"):
        text(llama, steering=vector(llama.n_embd() * 2))
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    drafting = make(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=2), logits_all=True)
    with pytest.raises(EngineError, match="draft"):
        text(drafting, steering=vector(llama.n_embd()))


def test_closed_loop_example(llama_cpp: Any, tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The example reads a projection and sets the next token's strength from it, exactly as its rule says."""
    import importlib.util

    from steer_plugins import LocalEngine

    path = Path(__file__).parents[2] / "examples" / "closed_loop.py"
    spec = importlib.util.spec_from_file_location("closed_loop", path)
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with LocalEngine(tiny("llama"), n_threads=1, n_ctx=256) as engine:
        v = vector(engine.info.n_embd, dose=1.0)
        thermostat = example.run(engine, v, 1.5, "hello there", max_tokens=24)
        low = example.run(engine, v, -1.5, "hello there", max_tokens=24)
        plain = engine.generate([{"role": "user", "content": "hello there"}], max_tokens=24).text
        again = engine.generate([{"role": "user", "content": "hello there"}], max_tokens=24).text
    assert plain == again, "the callbacks are gone"
    strength = 0.0
    for projection, was_set in thermostat.history:
        strength = float(np.clip(strength + 0.2 * (1.5 - projection), -1.0, 1.0))
        assert was_set == pytest.approx(strength)
    tail = slice(8, None)
    assert np.mean([p for p, _ in thermostat.history[tail]]) > np.mean([p for p, _ in low.history[tail]]) + 0.5
    assert capsys.readouterr().out.strip()
