"""No stale states: whatever the caches hold, an answer is what a fresh server would give.

Each case checks two things: how many prompt tokens came from a cache (so that the case is the one it means to be, and reuse is
not simply off), and that the probabilities are those of the same request with no cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server.conftest import EXACT, PROMPT, Server, make_vector

BOTH = ("llama", "deepseek4")
LONG = "It was a cold morning in the harbour, and the boats lay still. " * 3
ONE_SLOT = ("--parallel", "1", "-c", "2048", "--no-kv-unified", "-fa", "off", "-ctk", "f32", "-ctv", "f32")


def probabilities(answer: dict[str, Any]) -> list[float]:
    return [p["logprob"] for p in answer["completion_probabilities"]]


def check_fresh(server: Server, prompt: Any, terms: Any, n: int = 8, **fields: Any) -> dict[str, Any]:
    """Ask with the caches as they are, then without any; the answers must agree. Returns the first."""
    cached = server.complete(prompt, terms, n, n_probs=1, **fields)
    fresh = server.complete(prompt, terms, n, n_probs=1, cache_prompt=False, **fields)
    assert cached["tokens"] == fresh["tokens"]
    assert np.allclose(probabilities(cached), probabilities(fresh), atol=2e-3)
    return cached


def term(strength: float = 1.0, scope: str = "all", **more: Any) -> list[dict[str, Any]]:
    return [{"vector": "v", "strength": strength, "scope": scope, **more}]


@pytest.fixture
def one(own: Any, tmp_path: Path) -> Server:
    """One slot and no host cache: everything meets everything."""
    server: Server = own("llama", *ONE_SLOT, "--cache-ram", "0")
    server.put("v", make_vector(server), tmp_path)
    return server


def test_unsteered_prompt_is_not_reused_for_a_steered_one(one: Server) -> None:
    n = len(one.tokens(LONG))
    one.complete(LONG)
    assert check_fresh(one, LONG, term())["cached"] == 1  # position 0 is left alone by `all`
    one.complete(LONG)
    assert check_fresh(one, LONG, term(scope="0-"))["cached"] == 0
    one.complete(LONG, term())
    assert check_fresh(one, LONG, [])["cached"] == 1
    one.complete(LONG, term())
    assert check_fresh(one, LONG, term(0.5))["cached"] == 1
    one.complete(LONG, term())
    assert one.complete(LONG, term())["cached"] == n - 1  # the same steering: the whole prompt


def test_unsteered_prompt_is_shared_by_steered_responses(one: Server) -> None:
    n = len(one.tokens(LONG))
    one.complete(LONG)
    for strength in (0.5, 1.0, -1.0):
        assert check_fresh(one, LONG, term(strength, "response"))["cached"] == n - 1
    one.complete(LONG)
    assert check_fresh(one, LONG, term(scope="20-"))["cached"] == 20


def test_a_reply_that_comes_back_is_prompt(one: Server) -> None:
    """Under scope `response` the reply was steered; in the next turn it is prompt, and not."""
    n = len(one.tokens(LONG))
    reply = one.complete(LONG, term(scope="response"), 8)
    turn = one.tokens(LONG) + reply["tokens"] + one.tokens(" And then")[1:]
    assert one.complete(turn, term(scope="response"), 2)["cached"] == n - 1
    check_fresh(one, turn, term(scope="response"))
    # under `all` it was steered and stays so
    one.complete("Something else altogether")
    reply = one.complete(LONG, term(), 8)
    turn = one.tokens(LONG) + reply["tokens"] + one.tokens(" And then")[1:]
    assert one.complete(turn, term(), 2)["cached"] == n + 7  # the last sampled token was never computed
    # and an unsteered turn shares nothing of it
    assert check_fresh(one, turn, [])["cached"] == 1


def test_equal_content_is_equal_steering(one: Server, tmp_path: Path) -> None:
    """The key is what is applied, not what it is called."""
    n = len(one.tokens(LONG))
    one.put("w", make_vector(one), tmp_path)
    one.complete(LONG, term())
    assert one.complete(LONG, [{"vector": "w"}])["cached"] == n - 1
    assert one.complete(LONG, [{"vector": "w", "strength": 0.5}, {"vector": "v", "strength": 0.5}])["cached"] in (1, n - 1)
    one.put("v", make_vector(one, seed=1), tmp_path)
    one.complete(LONG, [{"vector": "w"}])
    assert check_fresh(one, LONG, term())["cached"] == 1  # another vector has the name now


def test_live_change_leaves_its_mark_in_the_cache(one: Server) -> None:
    """Tokens before a change were steered one way, those after it another way."""
    prompt = one.tokens(LONG)
    changed = live(one, LONG, term(1.0), term(-1.0))
    at = changed["from"] - len(prompt)  # reply tokens before the change
    turn = prompt + changed["tokens"][: at + 20]
    # the first steering holds up to the change, so that much is shared
    assert one.complete(turn, term(1.0), 1)["cached"] == len(prompt) + at
    # and nothing with the second, which the prompt did not have
    assert check_fresh(one, turn, term(-1.0), 4)["cached"] == 1


def live(server: Server, prompt: Any, first: Any, second: Any) -> dict[str, Any]:
    """A stream whose steering is replaced after some tokens; ``from`` is the first position under the second.

    A tiny model is quick and a machine may be busy: when the change comes too late the reply is asked for again, longer.
    """
    n_prompt = len(server.tokens(prompt))
    for n in (300, 600, 1200, 1700):
        body = {
            "prompt": prompt,
            "n_predict": n,
            "temperature": 0,
            "ignore_eos": True,
            "return_tokens": True,
            "cache_prompt": False,
        }
        answer = server.stream("/completion", {**body, "steering": first, "request_id": f"live-{n}"})
        assert answer.headers["X-Steering-Request"] == f"live-{n}"
        tokens: list[int] = []
        told = None
        for line in answer.iter_lines():
            if line.startswith(b"data: "):
                tokens += json.loads(line[6:])["tokens"]
            if told is None and len(tokens) >= 4:
                told = server.post(f"/steering/requests/live-{n}", {"steering": second})
        assert told is not None and len(tokens) == n
        if told.status_code == 200 and (at := told.json()["from_position"][0]) < n_prompt + n - 40:
            assert at >= n_prompt + 3  # the last of the tokens seen was yet to be computed
            return {"tokens": tokens, "from": at}
        assert told.status_code in (200, 404), told.text
    pytest.fail("no reply was long enough to be changed")


@pytest.mark.parametrize("arch", BOTH)
def test_host_prompt_cache(own: Any, tmp_path: Path, arch: str) -> None:
    """Prompts that were moved to host memory come back only for the steering they were computed with."""
    server = own(arch, *ONE_SLOT, "--cache-ram", "256")
    server.put("v", make_vector(server), tmp_path)
    other = "Seven green parrots argued about the price of a small brass telescope. " * 3
    n = len(server.tokens(LONG))
    server.complete(LONG, [])
    server.complete(other, [])  # LONG goes to the host cache
    assert check_fresh(server, LONG, term())["cached"] <= 1
    server.complete(other, [])
    back = server.complete(LONG, term(), n_probs=1)
    assert back["cached"] > n - 8 if arch == "llama" else back["cached"] >= 0
    check_fresh(server, LONG, term())
    server.complete(other, [])
    check_fresh(server, LONG, [])


def test_a_steered_prompt_chooses_the_slot_that_holds_it(own: Any, tmp_path: Path) -> None:
    server = own("llama", *EXACT, "--cache-ram", "0")
    server.put("v", make_vector(server), tmp_path)
    n = len(server.tokens(LONG))
    server.complete(LONG, [])
    server.complete(LONG, term())
    server.complete(LONG, term(-1.0))
    for terms in (term(), [], term(-1.0), [], term()):
        assert server.complete(LONG, terms)["cached"] == n - 1
        check_fresh(server, LONG, terms, 4)


def test_checkpoints(own: Any, tmp_path: Path) -> None:
    """deepseek4 cannot cut its cache at will: it goes back to a checkpoint, which must not know what comes after it."""
    server = own("deepseek4", *ONE_SLOT, "--cache-ram", "0")
    server.put("v", make_vector(server), tmp_path)
    for text in (LONG, PROMPT, "One two three"):
        for terms in ([], term(), term(scope="response"), [], term(scope="prompt"), term(-1.0), term(-1.0), term(scope="3-"), []):
            check_fresh(server, text, terms, 6)
    n = len(server.tokens(LONG))
    for k in range(n - 7, n):  # a checkpoint lies a few tokens before the end: differ at every place around it
        server.complete(LONG, [], 3)
        check_fresh(server, LONG, term(scope=f"{k}-"), 3)
        server.complete(LONG, term(scope=f"{k}-"), 3)
        check_fresh(server, LONG, [], 3)
    # not simply off: an unsteered prompt with a steered response comes back from a checkpoint
    server.complete(LONG, [], 4)
    assert server.complete(LONG, term(scope="response"), 4)["cached"] > 0


def test_a_checkpoint_beyond_the_shared_prefix_is_forgotten(own: Any, tmp_path: Path) -> None:
    """A checkpoint whose last token is the first that differs must not come back for a later prompt."""
    server = own("deepseek4", *ONE_SLOT, "--cache-ram", "0")
    server.put("v", make_vector(server), tmp_path)
    start = server.tokens(LONG)
    first, second = server.tokens(" and so the men went home" * 3)[1:], server.tokens(" but nobody had seen the lamp" * 3)[1:]
    for k in range(len(start) - 7, len(start)):
        terms = term(scope=f"{k}-")
        server.complete("Nothing of this")
        server.complete(start, [], 2)  # leaves a checkpoint a few tokens before its end
        server.complete(start + first, terms, 2)
        check_fresh(server, start + second, terms, 2)


def test_slot_files(own: Any, tmp_path: Path) -> None:
    server = own("llama", *ONE_SLOT, "--slot-save-path", str(tmp_path))
    server.put("v", make_vector(server), tmp_path)
    server.complete(LONG, term())
    assert "steered tokens" in server.error("/slots/0?action=save", {"filename": "a.bin"})
    assert not (tmp_path / "a.bin").exists()
    server.complete("Another text, to be saved", [])
    server.ok("/slots/0?action=save", {"filename": "b.bin"})
    server.complete(LONG, term())
    server.ok("/slots/0?action=restore", {"filename": "b.bin"})
    n = len(server.tokens("Another text, to be saved"))
    assert server.complete("Another text, to be saved", [])["cached"] == n - 1
    server.ok("/slots/0?action=restore", {"filename": "b.bin"})
    assert check_fresh(server, "Another text, to be saved", term())["cached"] == 1


def test_cache_reuse_moves_nothing_steered(own: Any, tmp_path: Path) -> None:
    """--cache-reuse moves states to other positions; between unsteered texts it still does."""
    server = own("llama", *ONE_SLOT, "--cache-reuse", "8", "--cache-ram", "0")
    server.put("v", make_vector(server), tmp_path)
    whole = server.tokens(LONG)
    without_start = [whole[0], *whole[6:]]
    server.complete(whole, [])
    assert server.complete(without_start, [])["cached"] > 8
    server.complete(whole, term())
    assert check_fresh(server, without_start, term())["cached"] <= 2
    server.complete(whole, [])
    assert check_fresh(server, without_start, term(scope="response"))["cached"] <= 2


def test_context_shift_is_refused_while_steered(own: Any, tmp_path: Path) -> None:
    server = own("llama", "--parallel", "1", "-c", "256", "--context-shift")
    server.put("v", make_vector(server), tmp_path)
    assert len(server.complete(PROMPT, [], 300)["tokens"]) == 300
    assert "cannot be shifted" in server.error(
        "/completion", {"prompt": PROMPT, "n_predict": 300, "ignore_eos": True, "steering": term()}
    )
    assert len(server.complete(PROMPT, [], 300)["tokens"]) == 300


def test_several_completions_of_one_prompt(own: Any, tmp_path: Path) -> None:
    """Children share the parent's prompt, and its steering; the cache keeps the parent's."""
    server = own("llama", *EXACT)
    server.put("v", make_vector(server), tmp_path)
    body = {"prompt": PROMPT, "n_predict": 6, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    alone = server.complete(PROMPT, term(), 6)["tokens"]
    both = server.ok("/completion", {**body, "n_cmpl": 3, "steering": term()})
    assert [a["tokens"] for a in both] == [alone] * 3
    check_fresh(server, PROMPT, [])


@pytest.mark.parametrize("arch", ["qwen3next", "deepseek4"])
def test_a_checkpoint_that_holds_the_first_token_that_differs(own: Any, tmp_path: Path, arch: str) -> None:
    """It stays out of sight of the prompt it does not fit, and must not be found by the next one."""
    server = own(arch, *ONE_SLOT, "--cache-ram", "0")
    server.put("v", make_vector(server), tmp_path)
    tokens = server.tokens(LONG)[1:6]  # a checkpoint is made four tokens before the end: of the first token alone
    other = server.tokens("Something else, and rather long")[2:]
    server.complete(tokens, term(0.5, "0-"), 1)
    server.complete(other, [], 1)
    check_fresh(server, [*tokens, 70], term(0.5), 4)
    for k in range(6, 12):  # and of more
        tokens = server.tokens(LONG)[1 : k + 1]
        server.complete(tokens, term(0.5, f"{k - 5}-"), 1)
        server.complete(tokens, term(-0.5, f"{k - 5}-"), 1)
        check_fresh(server, [*tokens, 70], term(-0.5, f"{k - 5}-"), 4)
