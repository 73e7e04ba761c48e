"""What the life of a slot may do to it: refused and forsaken requests, names used again, shifted contexts, copies and drafts."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server.conftest import PROMPT, Server, make_vector
from tests.server.test_cache import LONG, ONE_SLOT, check_fresh, term
from tests.unit.steering_server import eventually

LENGTHY = ("--override-kv", "llama.context_length=int:32768", "--slots", "--cache-ram", "0")


def loaded(server: Server, folder: Path) -> Server:
    server.put("v", make_vector(server), folder)
    return server


@pytest.mark.parametrize("refused", ["too long", "bad token"])
def test_a_refused_prompt_leaves_the_cache_as_it_was(own: Any, tmp_path: Path, refused: str) -> None:
    """It gets a slot and loses it again before anything of the cache was given up: whose tokens those are must stay known."""
    server = loaded(own("llama", *ONE_SLOT, "--cache-ram", "0"), tmp_path)
    start = server.tokens(LONG)
    prompt = start * 100 if refused == "too long" else [*start, 10**6]
    n = len(start)
    for first, second in (([], term()), (term(), []), (term(), term(-1.0)), (term(scope="5-"), [])):
        server.complete(LONG, first)
        server.error("/completion", {"prompt": prompt, "n_predict": 2, "steering": second})
        assert check_fresh(server, LONG, second)["cached"] <= 5
        server.complete(LONG, first)
        server.error("/completion", {"prompt": prompt, "n_predict": 2, "steering": second})
        assert server.complete(LONG, first)["cached"] == n - 1  # and what was right to keep is kept


class Caller:
    """A client that asks for a whole answer, and can hang up before it has it."""

    def __init__(self, server: Server, body: Any) -> None:
        self.connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=120)
        self.connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})

    def answer(self) -> Any:
        with contextlib.closing(self.connection), self.connection.getresponse() as response:
            return json.loads(response.read())

    def hang_up(self) -> None:
        self.connection.close()


def busy(server: Server, slot: int | None = None) -> bool:
    slots = server.get("/slots").json()
    return any(s["is_processing"] for s in slots if slot in (None, s["id"]))


def names(server: Server) -> list[str]:
    """Those of the ids of this file that are in use."""
    return [r["request_id"] for r in server.get("/steering?ids=long,waits,x,gone-0,gone-1").json()["requests"]]


def test_a_request_that_never_began(own: Any, tmp_path: Path) -> None:
    """Without continuous batching a request waits in its slot; its client may go away before it has touched the cache."""
    flags = ("-np", "2", "-c", "65536", "--no-kv-unified", "-fa", "off", "-ctk", "f32", "-ctv", "f32", "--no-cont-batching")
    server = loaded(own("llama", *flags, *LENGTHY), tmp_path)
    for before, waiting in ((term(), []), ([], term())):
        server.complete(LONG, before, id_slot=1)
        long = Caller(server, {"prompt": PROMPT, "n_predict": 32000, "ignore_eos": True, "id_slot": 0, "request_id": "long"})
        eventually(lambda: busy(server, 0))
        forsaken = Caller(server, {"prompt": "x", "n_predict": 5, "id_slot": 1, "steering": waiting, "request_id": "waits"})
        eventually(lambda: busy(server, 1))
        forsaken.hang_up()
        eventually(lambda: "waits" not in names(server))  # the server looks only while no other result comes, for /slots neither
        eventually(lambda: not busy(server, 1))
        began = not busy(server, 0)
        long.hang_up()
        eventually(lambda: names(server) == [])
        eventually(lambda: not busy(server))
        assert server.complete(LONG, before, id_slot=1)["cached"] == len(server.tokens(LONG)) - 1 or began
        server.complete(LONG, before, id_slot=1)
        assert check_fresh(server, LONG, waiting, id_slot=1)["cached"] == 1
        if began:
            pytest.skip("the other reply was over before it could be waited for")


def test_a_live_change_of_a_request_that_waits(own: Any, tmp_path: Path) -> None:
    """It acts on the whole of it, and on what of the cache is right for it."""
    flags = ("-np", "2", "-c", "65536", "--no-kv-unified", "-fa", "off", "-ctk", "f32", "-ctv", "f32", "--no-cont-batching")
    server = loaded(own("llama", *flags, *LENGTHY), tmp_path)
    n = len(server.tokens(LONG))
    for first, second, cached in (([], term(), 1), (term(), [], n - 1), (term(), term(-1.0), 1), ([], term(scope="9-"), 9)):
        server.complete(LONG, [], id_slot=1)
        long = Caller(server, {"prompt": PROMPT, "n_predict": 32000, "ignore_eos": True, "id_slot": 0, "request_id": "long"})
        eventually(lambda: busy(server, 0))
        body = {"prompt": LONG, "n_predict": 12, "temperature": 0, "ignore_eos": True, "return_tokens": True, "id_slot": 1}
        waiting = Caller(server, {**body, "steering": first, "request_id": "waits"})
        eventually(lambda: busy(server, 1))
        told = server.post("/steering/requests/waits", {"steering": second})
        long.hang_up()
        reply = waiting.answer()
        eventually(lambda: names(server) == [])
        eventually(lambda: not busy(server))
        if told.status_code == 404 or told.json()["from_position"] != [0]:
            pytest.skip("the other reply was over before it could be waited for")
        assert reply["tokens"] == server.complete(LONG, second, 12, cache_prompt=False, id_slot=0)["tokens"]
        assert reply["timings"]["cache_n"] == cached


def test_a_name_used_again_while_its_former_request_still_runs(own: Any, tmp_path: Path) -> None:
    """The client of the first went away in a long prompt, and at once asks again under the same name."""
    server = loaded(own("llama", "-np", "2", "-c", "16384", "-b", "8192", "-ub", "8192", "-fa", "on", *LENGTHY), tmp_path)
    ids = [t % 200 + 10 for t in range(6000)]
    first = Caller(server, {"prompt": ids, "request_id": "x", "steering": term(), "n_predict": 2})
    eventually(lambda: names(server) == ["x"] and busy(server))
    first.hang_up()
    eventually(lambda: names(server) == [])
    overlapped = busy(server)
    body = {"prompt": PROMPT, "n_predict": 5000, "ignore_eos": True, "request_id": "x", "steering": [], "return_tokens": True}
    answer = server.stream("/completion", body)
    lines = (line for line in answer.iter_lines() if line.startswith(b"data: "))
    next(lines)
    assert server.post("/steering/requests/x", {"steering": term(0.5)}).status_code == 200
    [entry] = server.get("/steering?ids=x").json()["requests"]
    assert entry["state"] == "running" and entry["steering"] == term(0.5)
    answer.close()
    if not overlapped:
        pytest.skip("the first request had ended: this machine is too quick for the case")


def test_what_is_shifted_cannot_be_steered(own: Any, tmp_path: Path) -> None:
    """After a shift a position no longer says where in a text a token is: scopes and probes would silently miss."""
    server = loaded(own("llama", "--parallel", "1", "-c", "256", "--context-shift", "--cache-ram", "0"), tmp_path)
    tags = {"open": "<never>", "close": "</never>"}
    for fields in (
        {"steering": term()},
        {"steering": term(scope="thinking"), "steering_tags": tags},  # which acts on nothing so far
        {"steering_probe": ["v"]},
    ):
        body = {"prompt": PROMPT, "n_predict": 300, "ignore_eos": True, **fields}
        assert "cannot be shifted" in server.error("/completion", body)
    # an unsteered one may, and then stays unsteered
    body = {"prompt": PROMPT, "n_predict": 10**6, "ignore_eos": True, "request_id": "shifts", "temperature": 0}
    answer = server.stream("/completion", body)
    lines = (line for line in answer.iter_lines() if line.startswith(b"data: "))
    for _ in range(400):
        next(lines)
    assert "was shifted" in server.error("/steering/requests/shifts", {"steering": term(scope="response")})
    assert server.post("/steering/requests/shifts", {"steering": []}).status_code == 200
    answer.close()
    assert len(server.complete(PROMPT, [], 300)["tokens"]) == 300


def test_probes_of_several_completions(exact: Any, tmp_path: Path) -> None:
    """All of them begin with the token that the parent's prompt gave."""
    server = loaded(exact(), tmp_path)
    alone = server.complete(PROMPT, [], 6, steering_probe=["v"])["steering_probe"]["v"]
    body = {"prompt": PROMPT, "n_predict": 6, "temperature": 0, "ignore_eos": True, "n_cmpl": 3, "steering_probe": ["v"]}
    for answer in server.ok("/completion", body):
        assert np.allclose(answer["steering_probe"]["v"], alone, atol=2e-3)


def test_probes_of_drafted_tokens(own: Any, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """A position whose draft was turned down is computed again: its number is that of the token that stayed."""
    flags = ("-np", "1", "-c", "1024", "--no-kv-unified", "-fa", "off", "-ctk", "f32", "-ctv", "f32", "--cache-ram", "0")
    draft = ("-md", str(tiny_model("llama")), "--spec-type", "draft-simple", "--spec-draft-p-min", "0")
    plain, drafted = (loaded(own("llama", *flags, *more), tmp_path) for more in ((), draft))
    for terms in ([], term(0.2), term(0.5)):
        one, two = (s.complete(PROMPT, terms, 40, steering_probe=["v"]) for s in (plain, drafted))
        assert one["tokens"] == two["tokens"]
        assert np.allclose(one["steering_probe"]["v"], two["steering_probe"]["v"], atol=5e-3)
    assert two["timings"]["draft_n"] > two["timings"]["draft_n_accepted"]


def test_a_client_that_goes_away(own: Any, tmp_path: Path) -> None:
    """Its slot is free again, its name too, and its vector is let go."""
    server = loaded(own("llama", "-np", "2", "-c", "4096", "--slots"), tmp_path)
    for i in range(6):
        body = {"prompt": LONG, "n_predict": 1900, "ignore_eos": True, "steering": term(), "request_id": f"gone-{i % 2}"}
        answer = server.stream("/completion", body)
        lines = answer.iter_lines()
        first = json.loads(next(line for line in lines if line.startswith(b"data: "))[6:])
        assert first["request_id"] == f"gone-{i % 2}"
        answer.close()
        eventually(lambda: names(server) == [])
    eventually(lambda: not busy(server))
    assert server.http.delete(server.url + "/steering/vectors/v", timeout=60).status_code == 200


def test_many_prompts_in_one_request(exact: Any, tmp_path: Path) -> None:
    """Each of them is steered as alone; a live change reaches them all."""
    server = loaded(exact(), tmp_path)
    prompts = [PROMPT, LONG, "One two three"]
    body: dict[str, Any] = {"n_predict": 6, "temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}
    for terms in (term(), term(scope="response"), []):
        alone = [server.complete(p, terms, 6, cache_prompt=False)["tokens"] for p in prompts]
        both = server.ok("/completion", {**body, "prompt": prompts, "steering": terms, "request_id": "three"})
        assert [a["tokens"] for a in both] == alone and all(a["request_id"] == "three" for a in both)
    answers: list[Any] = []
    long = {**body, "prompt": prompts, "n_predict": 400, "steering": [], "request_id": "all of them".replace(" ", "-")}
    thread = threading.Thread(target=lambda: answers.extend(server.ok("/completion", long)))
    thread.start()
    changed: list[Any] = []

    def change() -> bool:
        answer = server.post("/steering/requests/all-of-them", {"steering": term()})
        changed.extend(answer.json()["from_position"] if answer.status_code == 200 else [])
        return bool(changed) or not thread.is_alive()

    eventually(change)
    thread.join()
    assert len(answers) == 3 and (not changed or 1 <= len(changed) <= 3)


def test_what_a_reply_uses_stays_however_much_comes_and_goes(own: Any, tmp_path: Path) -> None:
    """Idle configs and vectors leave the device to make room; those of a running request do not."""
    flags = ("-np", "2", "-c", "16384", "--no-kv-unified", "-fa", "off")
    server = loaded(own("llama", *flags, *LENGTHY, weights="q8_0"), tmp_path)
    for i in range(8):
        server.put(f"other{i}", make_vector(server, seed=100 + i), tmp_path)
    body = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": False, "id_slot": 0}
    for n in (2000, 4000, 8000):  # a tiny model is quick: others have to come while it writes
        alone = server.ok("/completion", {**body, "n_predict": n, "steering": term(0.5)})["tokens"]
        answer = server.stream("/completion", {**body, "n_predict": n, "steering": term(0.5), "request_id": "long"})
        lines = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith(b"data: "))
        tokens = list(next(lines)["tokens"])
        passed = 0
        for i in range(24):
            server.complete("Hello", [{"vector": f"other{i % 8}", "strength": 0.1 + i / 100}], 2, id_slot=1)
            passed += "long" in names(server)
        for chunk in lines:
            tokens += chunk["tokens"]
        assert tokens == alone
        if passed > 16:
            return
    pytest.skip("no reply was long enough for the others to pass by")
