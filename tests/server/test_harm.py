"""One request must never harm another: bounds, states that outgrow their numbers, work for the sake of one client."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.gguf import read_gguf
from tests.server.conftest import PROMPT, Server, direction, make_vector
from tests.server.test_cache import LONG

SETUPS = [(fa, kv) for fa in ("on", "off") for kv in ("--kv-unified", "--no-kv-unified")]


def wide(server: Server, dose: float = 1.0) -> SteeringVector:
    """The same direction at every layer."""
    v = direction(server, 3)
    places = {(il, "resid_post"): v for il in range(server.n_layer)}
    return SteeringVector("w", places, {key: dose for key in places})


@pytest.mark.parametrize(("fa", "kv"), SETUPS)
def test_the_largest_doses_harm_nobody(own: Any, tmp_path: Path, fa: str, kv: str) -> None:
    """A victim beside and after requests at and beyond their bounds: its replies are its own, to the last token."""
    server = own("llama", "-np", "2", "-c", "2048", "-fa", fa, kv, weights="q8_0", n_layer=24)
    server.put("w", wide(server), tmp_path)
    bad = [
        {"op": "project", "strength": 100}, {"op": "project", "strength": -1e30}, {"op": "project", "strength": 3.0001},
        {"strength": 8e37}, {"strength": -3.4028234663852886e38}, {"strength": 1.1e15}, {"op": "clamp", "strength": 1e300},
        {"op": "renorm", "strength": 1e16},
    ]  # fmt: skip
    edge = [
        {"op": "project", "strength": 3},
        {"op": "project", "strength": -1},
        {"strength": 1e13},
        {"op": "clamp", "strength": -1e15},
    ]
    ids = server.tokens(LONG)[:70]
    want = server.complete(ids, [], 24, cache_prompt=False, id_slot=0)["tokens"]
    for terms in bad:
        sentence = server.error(
            "/completion", {"prompt": ids, "n_predict": 4, "steering": [{"vector": "w", "scope": "all", **terms}]}
        )
        assert "w" in sentence and ("limit" in sentence or "takes" in sentence or "large" in sentence), sentence
    for terms in edge:
        wish = [{"vector": "w", "scope": "all", **terms}]
        beside, _ = server.many([
            lambda: server.complete(ids, [], 24, cache_prompt=False, id_slot=0)["tokens"],
            lambda wish=wish: server.post("/completion", {"prompt": ids, "n_predict": 24, "steering": wish, "id_slot": 1}),
        ])  # fmt: skip
        after = [server.complete(ids, [], 24, cache_prompt=False, id_slot=i)["tokens"] for i in (0, 1)]
        if kv == "--no-kv-unified":
            assert after == [want, want], terms
        if kv == "--no-kv-unified" and fa == "off":
            assert beside == want, terms
        # elsewhere the shape of a batch moves sums a little, and a near tie may fall the other way: but nothing is spoiled
        assert all(len(set(reply)) > 1 for reply in (beside, *after)), terms


def test_many_terms_that_add_up(own: Any, tmp_path: Path) -> None:
    """Each within its bounds, together beyond them: what would overflow is refused, and nobody else notices."""
    server = own("llama", "-np", "2", "-c", "1024", n_layer=24)
    server.put("w", wide(server), tmp_path)
    want = server.complete(PROMPT, [], 8)["tokens"]
    for one in ({"strength": 9e14}, {"op": "project", "strength": 3}, {"op": "project", "strength": -1}):
        steering = [{"vector": "w", "scope": "all", **one}] * 64
        answer = server.post("/completion", {"prompt": PROMPT, "n_predict": 4, "steering": steering})
        assert answer.status_code == 400 and "together" in answer.json()["error"]["message"], answer.text
        assert server.complete(PROMPT, [], 8, cache_prompt=False)["tokens"] == want


def fragile(tiny_model: Callable[..., Path], folder: Path) -> Path:
    """A model whose keys overflow once its last dimension, which nothing ever writes to, is steered."""
    path = folder / "fragile.gguf"
    shutil.copy(tiny_model("llama"), path)
    header = read_gguf(path)
    data = np.memmap(path, np.uint8, "r+")
    for name, tensor in header.tensors.items():
        if len(tensor.dims) != 2:
            continue
        n_in, n_out = tensor.dims
        assert tensor.ggml_type == 0
        values = data[tensor.offset : tensor.offset + 4 * n_in * n_out].view(np.float32).reshape(n_out, n_in)
        if name == "token_embd.weight":
            values[:, -1] = 0.0
        elif name.endswith(("attn_output.weight", "ffn_down.weight")):
            values[-1] = 0.0
        elif name.endswith(("attn_k.weight", "attn_q.weight")):
            values[:, -1] = 3e38
    data.flush()
    return path


@pytest.mark.parametrize(("fa", "kv"), SETUPS)
def test_a_spoiled_cache_is_wiped(server_binary: Path, tiny_model: Any, tmp_path: Path, fa: str, kv: str) -> None:
    """A state beyond its numbers ends its own request; whoever comes after finds no trace of it."""
    server = Server(
        server_binary, fragile(tiny_model, tmp_path), "-np", "2", "-c", "1024", "-fa", fa, kv, "-ctk", "f32", "-ctv", "f32"
    )
    try:
        last = np.zeros(server.n_embd, np.float32)
        last[-1] = 1.0
        server.put("v", SteeringVector("v", {(0, "resid_post"): last}, {(0, "resid_post"): 50.0}), tmp_path)
        ids = server.tokens(LONG)[:70]
        want = [server.complete(ids, [], 16, cache_prompt=False, id_slot=i)["tokens"] for i in (0, 1)]
        for scope in ("all", "response"):
            steering = [{"vector": "v", "scope": scope}]
            body = {"prompt": ids, "n_predict": 8, "steering": steering, "id_slot": 1}
            assert "grew beyond" in server.error("/completion", body, 500)
            assert "grew beyond" in server.error("/steering/read", {"prompts": [ids], "steering": steering}, 500)
            for i in (0, 1, 0):
                assert server.complete(ids, [], 16, id_slot=i)["tokens"] == want[i]
        answer = server.stream(
            "/completion", {"prompt": ids, "n_predict": 800, "temperature": 0, "ignore_eos": True, "id_slot": 0}
        )
        lines = answer.iter_lines()
        next(lines)
        server.error("/completion", {"prompt": ids, "n_predict": 8, "steering": [{"vector": "v"}], "id_slot": 1}, 500)
        answer.close()
        assert server.complete(ids, [], 16, id_slot=0)["tokens"] == want[0]
    finally:
        server.process.stop()


def test_a_long_schedule_keeps_nobody_waiting(own: Any, tmp_path: Path) -> None:
    """64 terms over 4096 tokens: at most 64 steps each, and the device holds no more rows than there are steps."""
    server = own("llama", "-np", "2", "-c", "8192", "--override-kv", "llama.context_length=int:8192")
    server.put("v", make_vector(server), tmp_path)
    one = {"vector": "v", "scope": "response", "strength": 0.01, "schedule": {"kind": "linear", "over": 4096}}
    assert server.post("/completion", {"prompt": PROMPT, "n_predict": 2, "steering": [one] * 64}).status_code == 200
    before = server.get("/steering").json()["memory"]["device_bytes"]
    body = {"items": [{"prompt": [5], "response": [7] * 520}], "steering": [{**one, "schedule": {"kind": "linear", "over": 520}}]}
    server.ok("/steering/logprobs", body)
    grown = server.get("/steering").json()["memory"]["device_bytes"] - before
    assert grown < 1 << 20, grown


def test_positions_are_bounded_and_counted_once(exact: Any) -> None:
    server = exact()
    many = server.read(prompts=[PROMPT], positions=[1, 1, 2, -1] * 20000)[1]["0.positions"].tolist()
    assert many == [1, 2, len(server.tokens(PROMPT)) - 1]
    for bad in (10**6, -(10**6), 2**63, 2**64 - 1, -(2**63)):
        assert "lies in no text" in server.error("/steering/read", {"prompts": [PROMPT], "positions": [bad]})


# ---- reads and scores of true states ----

SHIFTY = ("-np", "1", "-c", "256", "-fa", "off", "-ctk", "f32", "-ctv", "f32", "--cache-ram", "0")


def test_scores_and_reads_with_cache_reuse(own: Any) -> None:
    """Chunks that were shifted to another place hold states of other positions."""
    server = own("llama", *SHIFTY, "--cache-reuse", "8")
    words = server.tokens(LONG)
    first, other = words[:48], words[12:48]
    item = {"prompt": other[:24], "response": other[24:]}
    truth = server.ok("/steering/logprobs", {"items": [item]})["logprobs"][0]
    states = server.read(prompts=[other], positions="last")[1]["0.values"]
    for ask in ("score", "read"):
        server.complete([9, 8, 7], n=1)
        server.complete(first, n=1)
        if ask == "score":
            got = server.ok("/steering/logprobs", {"items": [item]})["logprobs"][0]
            assert np.allclose(got, truth, atol=1e-3)
        else:
            server.complete(other[:-1], n=1)  # an ordinary request, whose chunks may be shifted
            got = server.read(prompts=[other], positions="last")[1]["0.values"]
            assert np.allclose(got, states, atol=1e-3)


def test_reads_after_a_context_shift(own: Any) -> None:
    server = own("llama", *SHIFTY, "--context-shift")
    reply = server.complete(PROMPT, n=300, n_keep=4)
    assert reply["truncated"]
    for n in (60, 120):  # what the slot holds now begins with the kept tokens, then those of after the shift
        kept = server.tokens(PROMPT)[:4]
        for tail in (reply["tokens"][-n:], reply["tokens"][100 : 100 + n]):
            text = kept + tail
            got = server.read(prompts=[text], positions="last")[1]["0.values"]
            server.complete([9, 8, 7], n=1)
            fresh = server.read(prompts=[text], positions="last")[1]["0.values"]
            assert np.allclose(got, fresh, atol=1e-3)
            server.complete(PROMPT, n=300, n_keep=4)


def test_a_restored_slot_is_not_read(own: Any, tmp_path: Path) -> None:
    """A slot file does not say how its states came about."""
    server = own("llama", *SHIFTY, "--context-shift", "--slot-save-path", str(tmp_path))
    reply = server.complete(PROMPT, n=300, n_keep=4, id_slot=0)
    assert reply["truncated"]
    assert server.post("/slots/0?action=save", {"filename": "a"}).status_code == 200
    shown = server.get("/slots").json()
    assert shown
    assert server.post("/slots/0?action=restore", {"filename": "a"}).status_code == 200
    text = server.tokens(PROMPT)[:4] + reply["tokens"][-80:]
    got = server.read(prompts=[text], positions="last")[1]["0.values"]
    server.complete([9, 8, 7], n=1)
    assert np.allclose(got, server.read(prompts=[text], positions="last")[1]["0.values"], atol=1e-3)


def test_reads_that_cannot_be_captured_together(own: Any, tmp_path: Path) -> None:
    """The last layer holds output tokens only: who reads it waits for who reads others, and a chat beside them runs on."""
    server = own("llama", "-np", "4", "-c", "4096", "--no-kv-unified", "-fa", "off", "-ctk", "f32", "-ctv", "f32")
    server.put("v", make_vector(server), tmp_path)
    last = server.n_layer - 1
    texts = [LONG + str(i) for i in range(4)]
    chat = server.complete(PROMPT, [], 400, id_slot=0)["tokens"]
    want = [server.read(prompts=[t], layers=[0, last], positions="last")[1]["0.values"] for t in texts]
    rows = [server.read(prompts=[t], layers=[0], positions="all")[1]["0.values"] for t in texts]

    def read(i: int) -> bool:
        if i % 2:
            got = server.read(prompts=[texts[i // 2]], layers=[0, last], positions="last")[1]["0.values"]
            return np.allclose(got, want[i // 2], atol=1e-3)
        got = server.read(prompts=[texts[i // 2]], layers=[0], positions="all")[1]["0.values"]
        return np.allclose(got, rows[i // 2], atol=1e-3)

    calls = [lambda i=i: read(i) for i in range(8)] * 3
    results = server.many([lambda: server.complete(PROMPT, [], 400, id_slot=0)["tokens"] == chat, *calls])
    assert all(results), results


# ---- smaller ones ----


def test_scores_do_not_inherit_what_ends_replies(own: Any) -> None:
    """``-r``, a grammar and ``-n`` of the command line are for replies."""
    plain = own("llama", *SHIFTY)
    item = {"prompt": PROMPT, "response": plain.tokens(" mild in the town and dry")}
    want = plain.ok("/steering/logprobs", {"items": [item]})["logprobs"]
    other = own("llama", *SHIFTY, "-r", "town", "-n", "2", "--grammar", 'root ::= "a"')
    assert np.allclose(other.ok("/steering/logprobs", {"items": [item]})["logprobs"], want, atol=1e-3)


def test_messages_with_images_are_not_read_as_text(exact: Any) -> None:
    content = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]
    server = exact()
    assert "more than text" in server.error("/steering/read", {"messages": [{"role": "user", "content": content}]})
    assert server.read(messages=[{"role": "user", "content": content[:1]}])
