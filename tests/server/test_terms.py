"""What a request's terms do to the hidden states: read back layer by layer and compared with the formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins.steering import formula
from steer_plugins.steering.schedule import Schedule
from steer_plugins.steering.terms import Term
from tests.scopes import factor
from tests.server.conftest import PROMPT, Server, direction, make_responsive, make_vector

BOTH = ("llama", "deepseek4")


def coefficients(server: Server, prompt: Any, terms: list[dict[str, Any]], layer: int, seed: int, **body: Any) -> np.ndarray:
    """What was added along a direction at a layer: float64 [n_tokens]. Exact where nothing below the layer is steered."""
    fields = {"prompts": [prompt], "positions": "all", "layers": [layer], **body}
    _, plain = server.read(**fields)
    _, steered = server.read(**fields, steering=terms)
    delta = steered["0.values"][0].astype(np.float64) - plain["0.values"][0]
    v = direction(server, seed * 1000 + layer).astype(np.float64)
    along = delta @ v
    assert np.abs(delta - np.outer(along, v)).max() < 1e-3  # nothing but the direction
    return along


@pytest.mark.parametrize("arch", BOTH)
@pytest.mark.parametrize(
    ("scope", "acts"),
    [
        ("all", lambda p, n: p >= 1),
        ("prompt", lambda p, n: 1 <= p < n - 1),
        ("response", lambda p, n: p >= n - 1),
        ("2-4", lambda p, n: 2 <= p <= 4),
        ("0-", lambda p, n: True),
        ("3-", lambda p, n: p >= 3),
    ],
)
def test_scopes(exact: Any, tmp_path: Path, arch: str, scope: str, acts: Callable[[int, int], bool]) -> None:
    server = exact(arch)
    server.put("one", make_vector(server, 1, dose=3.0), tmp_path)
    n = len(server.tokens(PROMPT))
    response = server.ok("/tokenize", {"content": " mild and dry"})["tokens"]
    item = {"prompt": PROMPT, "response": response}
    along = coefficients(server, item, [{"vector": "one", "strength": 0.5, "scope": scope}], 1, 0)
    expected = [1.5 if acts(p, n) else 0.0 for p in range(n + len(response))]
    assert np.allclose(along, expected, atol=2e-3)


@pytest.mark.parametrize("arch", BOTH)
def test_ops_and_sums(exact: Any, tmp_path: Path, arch: str) -> None:
    server = exact(arch)
    server.put("one", make_vector(server, 1, dose=3.0), tmp_path)
    v = direction(server, 1).astype(np.float64)
    fields: dict[str, Any] = {"prompts": [PROMPT], "positions": "all", "layers": [1], "stream": "all"}
    plain = server.read(**fields)[1]["0.values"][0].astype(np.float64)
    for terms, c, g in (
        ([{"vector": "one", "op": "project"}], 0.0, -1.0),
        ([{"vector": "one", "op": "project", "strength": 0.5}], 0.0, -0.5),
        ([{"vector": "one", "op": "clamp", "strength": 2.0}], 6.0, -1.0),
        ([{"vector": "one"}, {"vector": "one", "strength": -0.25}], 2.25, 0.0),
        ([{"vector": "one"}, {"vector": "one", "strength": -1.0}], 0.0, 0.0),
    ):
        steered = server.read(**fields, steering=terms)[1]["0.values"][0].astype(np.float64)
        expected = plain + (c + g * (plain @ v))[..., None] * v
        expected[0] = plain[0]
        assert np.abs(steered - expected).max() < 2e-3, terms


@pytest.mark.parametrize("arch", BOTH)
def test_what_reads_the_state(exact: Any, tmp_path: Path, arch: str) -> None:
    """Columns, floors and caps: each stream of a token by the formula; a file that was uploaded does what it says."""
    server = exact(arch)
    responsive, plain_vector = make_responsive(server, 1, dose=1.5), make_vector(server, 1, dose=2.0)
    server.put("r", responsive, tmp_path)
    server.put("one", plain_vector, tmp_path)
    fields: dict[str, Any] = {"prompts": [PROMPT], "positions": "all", "layers": [1], "stream": "all"}
    plain = server.read(**fields)[1]["0.values"][0].astype(np.float64)
    along = plain @ direction(server, 1).astype(np.float64)
    level = float(np.median(along)) / 2.0
    for terms, wanted in (
        ([{"vector": "r"}], [Term(responsive)]),
        ([{"vector": "r", "strength": -0.5, "op": "renorm"}], [Term(responsive, -0.5, op="renorm")]),
        ([{"vector": "r", "strength": 2.0, "op": "clamp"}], [Term(responsive, 2.0, op="clamp")]),
        ([{"vector": "r", "op": "project"}], [Term(responsive, op="project")]),
        ([{"vector": "one", "op": "floor", "level": level}], [Term(plain_vector, op="floor", level=level)]),
        (
            [{"vector": "one", "op": "cap", "level": level, "strength": 0.5}, {"vector": "r"}],
            [Term(plain_vector, 0.5, op="cap", level=level), Term(responsive)],
        ),
    ):
        steered = server.read(**fields, steering=terms)[1]["0.values"][0].astype(np.float64)
        expected = formula.steer(plain, wanted, 1)
        expected[0] = plain[0]
        assert np.abs(steered - expected).max() < 2e-3, terms
        assert np.abs(expected - plain).max() > 0.05


def test_levels_are_asked_for(exact: Any, tmp_path: Path) -> None:
    server = exact()
    server.put("one", make_vector(server, 1), tmp_path)
    server.put("r", make_responsive(server, 1), tmp_path)
    for term, sentence in (
        ({"vector": "one", "op": "floor"}, "floor needs a level"),
        ({"vector": "one", "level": 0.5}, "op add takes no level"),
        ({"vector": "one", "op": "cap", "level": "high"}, "not a finite number"),
        ({"vector": "one", "op": "cap", "level": 0.5, "strength": 2}, "cap takes 0 to 1"),
        ({"vector": "r", "op": "floor", "level": 0.5}, "has columns"),
    ):
        assert sentence in server.error("/completion", {"prompt": PROMPT, "n_predict": 1, "steering": [term]})


@pytest.mark.parametrize("arch", BOTH)
def test_renorm_keeps_the_length(exact: Any, tmp_path: Path, arch: str) -> None:
    server = exact(arch)
    server.put("one", make_vector(server, 1, dose=3.0, op="renorm"), tmp_path)
    fields: dict[str, Any] = {"prompts": [PROMPT], "positions": "all", "layers": [1], "stream": "all"}
    plain = server.read(**fields)[1]["0.values"][0].astype(np.float64)
    steered = server.read(**fields, steering=[{"vector": "one", "strength": 2}])[1]["0.values"][0].astype(np.float64)
    moved = plain + 6.0 * direction(server, 1).astype(np.float64)
    expected = moved * np.linalg.norm(plain, axis=-1, keepdims=True) / np.linalg.norm(moved, axis=-1, keepdims=True)
    expected[0] = plain[0]
    assert np.abs(steered - expected).max() < 2e-3
    assert np.abs(steered - plain).max() > 0.05


def test_layer_window(exact: Any, tmp_path: Path) -> None:
    server = exact()
    server.put("two", make_vector(server, 0, 1), tmp_path)
    fields: dict[str, Any] = {"prompts": [PROMPT], "positions": "all", "layers": [0, 1]}
    plain = server.read(**fields)[1]["0.values"]
    upper = server.read(**fields, steering=[{"vector": "two", "layers": [1, 1]}])[1]["0.values"]
    lower = server.read(**fields, steering=[{"vector": "two", "layers": [0, 0]}])[1]["0.values"]
    assert np.array_equal(upper[0], plain[0])
    assert not np.allclose(upper[1], plain[1], atol=0.1)
    assert not np.allclose(lower[0], plain[0], atol=0.1)


def test_one_stream(exact: Any, tmp_path: Path) -> None:
    server = exact("deepseek4")
    server.put("one", make_vector(server, 1, dose=3.0), tmp_path)
    fields: dict[str, Any] = {"prompts": [PROMPT], "positions": "all", "layers": [1], "stream": "all"}
    plain = server.read(**fields)[1]["0.values"][0]
    steered = server.read(**fields, steering=[{"vector": "one", "stream": 2}])[1]["0.values"][0]
    along = (steered.astype(np.float64) - plain) @ direction(server, 1)
    assert np.allclose(along[1:, 2], 3.0, atol=2e-3)
    assert np.abs(along[:, [0, 1, 3]]).max() == 0


@pytest.mark.parametrize("arch", BOTH)
def test_identities(exact: Any, tmp_path: Path, arch: str) -> None:
    """Strength 0 and v - v are nothing; half the strength twice is the strength."""
    server = exact(arch)
    server.put("v", make_vector(server), tmp_path)

    def run(terms: list[dict[str, Any]]) -> Any:
        answer = server.complete(steering=terms, n_probs=3, cache_prompt=False)
        return answer["tokens"], answer["completion_probabilities"]

    plain = run([])
    assert run([{"vector": "v", "strength": 0}]) == plain
    assert run([{"vector": "v"}, {"vector": "v", "strength": -1}]) == plain
    once = run([{"vector": "v", "strength": 0.75}])
    assert once != plain
    assert run([{"vector": "v", "strength": 0.5}, {"vector": "v", "strength": 0.25}]) == once


def test_tags_part_a_response(exact: Any, tmp_path: Path) -> None:
    """Thinking begins with the token that opens it; the token that closes it belongs to the answer."""
    server = exact()
    server.put("one", make_vector(server, 1, dose=3.0), tmp_path)
    prompt = server.tokens("Say: <A>")
    response = [
        t for piece in (" one", "<A>", " two", "</A>", " three") for t in server.ok("/tokenize", {"content": piece})["tokens"]
    ]
    text = ""
    thinking = [True]  # the prompt has opened it: its last token is the first of the response
    state = True
    for token in response:
        text += server.ok("/detokenize", {"tokens": [token]})["content"]
        state = True if text.endswith("<A>") else False if text.endswith("</A>") else state
        thinking.append(state)
    assert True in thinking and False in thinking
    item = {"prompt": prompt, "response": response}
    tags = {"open": "<A>", "close": "</A>"}
    n = len(prompt)
    for scope, value in (("thinking", True), ("answer", False)):
        along = coefficients(server, item, [{"vector": "one", "scope": scope}], 1, 0, steering_tags=tags)
        expected = [0.0] * (n - 1) + [3.0 if t is value else 0.0 for t in thinking]
        assert np.allclose(along, expected, atol=2e-3), scope


def test_answer_leaves_tool_calls_alone(exact: Any, tmp_path: Path) -> None:
    server = exact()
    server.put("one", make_vector(server, 1, dose=3.0), tmp_path)
    prompt = server.tokens("Say:")
    pieces = (" one", "<T>", "{f}", "</T>", " two", "<U>", " rest")
    response = [t for piece in pieces for t in server.ok("/tokenize", {"content": piece})["tokens"]]
    text, call, calls = "", False, [False]
    for token in response:
        text += server.ok("/detokenize", {"tokens": [token]})["content"]
        call = True if text.endswith(("<T>", "<U>")) else False if text.endswith("</T>") else call
        calls.append(call)
    assert calls.count(True) > 5 and calls.count(False) > 5
    tags = {"tool_open": ["<T>", "<U>"], "tool_close": "</T>"}
    item = {"prompt": prompt, "response": response}
    along = coefficients(server, item, [{"vector": "one", "scope": "answer"}], 1, 0, steering_tags=tags)
    expected = [0.0] * (len(prompt) - 1) + [0.0 if c else 3.0 for c in calls]
    assert np.allclose(along, expected, atol=2e-3)
    for bad in ({"tool": "x"}, {"open": ["a"] * 17}, {"open": 3}, {"close": ""}, {"close": "x" * 257}, [1]):
        server.error("/steering/read", {"prompts": [PROMPT], "steering_tags": bad})


def test_a_demanded_tool_call_is_no_answer(exact: Any, tmp_path: Path) -> None:
    """On a chat route the tags come from the template and the tools."""
    server = exact()
    server.put("v", make_vector(server, dose=40.0), tmp_path)
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
    }
    body = {"messages": [{"role": "user", "content": "Call f"}], "max_tokens": 24, "temperature": 0, "tools": [tool]}

    def run(scope: str | None, **more: Any) -> Any:
        terms = [] if scope is None else [{"vector": "v", "scope": scope}]
        answer = server.post("/v1/chat/completions", {**body, **more, "steering": terms, "logprobs": True, "top_logprobs": 1})
        if answer.status_code == 500:
            return answer.json()["error"]["message"]  # what a random model wrote is no call the server can parse
        assert answer.status_code == 200, answer.text
        return [p["token"] for p in answer.json()["choices"][0]["logprobs"]["content"]]

    demanded = {"tool_choice": "required"}
    assert run("answer", **demanded) == run(None, **demanded) != run("response", **demanded)
    assert run("answer") == run("response") != run(None)


def test_scored_text_is_steered_as_generated_text(exact: Any, tmp_path: Path) -> None:
    """The log-probabilities of a reply under its steering are those it was generated with."""
    server = exact()
    server.put("v", make_vector(server, scope="response"), tmp_path)
    terms = [{"vector": "v", "strength": 0.4}]
    reply = server.complete(steering=terms, n=12, n_probs=1, cache_prompt=False)
    body = {"items": [{"prompt": PROMPT, "response": reply["tokens"]}], "steering": terms}
    scored = server.ok("/steering/logprobs", body)["logprobs"][0]
    generated = [p["logprob"] for p in reply["completion_probabilities"]]
    assert np.allclose(scored, generated, atol=1e-3)
    plain = server.ok("/steering/logprobs", {**body, "steering": []})["logprobs"][0]
    assert np.abs(np.array(plain) - scored).max() > 0.1


def test_probe_is_the_projection(exact: Any, tmp_path: Path) -> None:
    server = exact()
    server.put("p", make_vector(server, 1, 2, dose=2.0), tmp_path)
    reply = server.complete(n=6, steering_probe=["p"])
    tokens = server.tokens(PROMPT) + reply["tokens"]
    n = len(tokens) - len(reply["tokens"])
    _, read = server.read(prompts=[tokens], layers=[1, 2], positions=list(range(n - 1, len(tokens) - 1)))
    rows = read["0.values"].astype(np.float64)
    expected = np.mean([rows[i] @ direction(server, il) / 2.0 for i, il in enumerate((1, 2))], axis=0)
    assert np.allclose(reply["steering_probe"]["p"], expected, atol=2e-3)


@pytest.mark.parametrize("arch", BOTH)
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_schedule_counts_tokens_of_the_response(exact: Any, tmp_path: Path, arch: str, kind: str) -> None:
    server = exact(arch)
    server.put("one", make_vector(server, 1, dose=3.0), tmp_path)
    response = server.tokens(" mild and dry in the morning")
    n = len(server.tokens(PROMPT))
    over = len(response) - 3
    assert over > 4
    item = {"prompt": PROMPT, "response": response}
    shape = Schedule(kind, over, 0.25)
    for scope in ("response", "all", "3-"):
        term = {"vector": "one", "strength": 2.0, "scope": scope, "schedule": shape.to_json()}
        along = coefficients(server, item, [term], 1, 0)
        first = {"response": n - 1, "all": 1, "3-": 3}[scope]
        expected = [6.0 * factor(kind, over, 0.25, p - n + 1) if p >= first else 0.0 for p in range(n + len(response))]
        assert expected[-1] == 1.5 and expected[n] < 6.0
        assert np.allclose(along, expected, atol=2e-3), scope
    both = [
        {"vector": "one", "schedule": {"kind": "linear", "over": 1}, "scope": "response"},
        {"vector": "one", "scope": "prompt"},
        {"vector": "one", "schedule": {"kind": "constant"}, "scope": "all"},
    ]
    expected = [0.0] + [6.0] * (n - 1) + [3.0] * len(response)
    assert np.allclose(coefficients(server, item, both, 1, 0), expected, atol=2e-3)


def test_generated_text_follows_the_schedule(exact: Any, tmp_path: Path) -> None:
    """The log-probabilities of a reply are those of the same text scored, and its cached tokens are not taken for a prompt."""
    server = exact()
    server.put("v", make_vector(server, dose=3.0), tmp_path)
    terms = [{"vector": "v", "scope": "response", "schedule": {"kind": "cosine", "over": 9, "floor": 0.1}}]
    reply = server.complete(steering=terms, n=14, n_probs=1)
    generated = [p["logprob"] for p in reply["completion_probabilities"]]
    body = {"items": [{"prompt": PROMPT, "response": reply["tokens"]}]}
    scored = server.ok("/steering/logprobs", {**body, "steering": terms})["logprobs"][0]
    assert np.allclose(scored, generated, atol=1e-3)
    constant = [{**terms[0], "schedule": {"kind": "constant"}}]
    assert not np.allclose(server.ok("/steering/logprobs", {**body, "steering": constant})["logprobs"][0], generated, atol=1e-2)
    history = server.tokens(PROMPT) + reply["tokens"] + server.tokens(" Then")
    again = server.complete(history, terms, n=4, n_probs=1)
    fresh = server.complete(history, terms, n=4, n_probs=1, cache_prompt=False)
    found, want = ([p["logprob"] for p in answer["completion_probabilities"]] for answer in (again, fresh))
    assert again["tokens"] == fresh["tokens"] and np.allclose(found, want, atol=1e-3)


REFUSED: list[tuple[Any, str]] = [
    ("mood:0.5", "not a list of terms"),
    ({"vector": "v"}, "not a list of terms"),
    ([1], "term 1 of steering is no JSON object"),
    ([{}], "names no vector"),
    ([{"vector": 3}], "not a text"),
    ([{"vector": "nope"}], "no vector 'nope'"),
    ([{"vector": "../v"}], "no vector '../v'"),
    ([{"vector": "v", "strenght": 1}], "unknown key 'strenght'"),
    ([{"vector": "v", "strength": "1"}], "not a finite number"),
    ([{"vector": "v", "strength": True}], "not a finite number"),
    ([{"vector": "v", "layers": [2]}], "the layers are"),
    ([{"vector": "v", "layers": [2, 1]}], "ends before it starts"),
    ([{"vector": "v", "layers": [-1, 1]}], "not a whole number from 0"),
    ([{"vector": "v", "layers": [3, None]}], "hold none of the layers"),
    ([{"vector": "v", "op": "rotate"}], "unknown op 'rotate'"),
    ([{"vector": "v", "scope": "reply"}], "unknown scope 'reply'"),
    ([{"vector": "v", "scope": "5-3"}], "ends before it starts"),
    ([{"vector": "v", "scope": "99999999999-"}], "unknown scope"),
    ([{"vector": "v", "stream": 1}], "there is no stream 1"),
    ([{"vector": "v", "gate": {}}], "not a text"),
    ([{"vector": "v", "gate": "nope"}], "no gate 'nope' is loaded"),
    ([{"vector": "v", "gate": "v"}], "'v' is a vector, not a gate"),
    ([{"vector": "v", "schedule": 3}], "the schedule is '3'"),
    ([{"vector": "v", "schedule": {}}], "unknown schedule 'null'"),
    ([{"vector": "v", "schedule": {"kind": "log", "over": 3}}], "unknown schedule"),
    ([{"vector": "v", "schedule": {"kind": "linear"}}], "needs 'over'"),
    ([{"vector": "v", "schedule": {"kind": "linear", "over": 0}}], "from 1 to 4096"),
    ([{"vector": "v", "schedule": {"kind": "linear", "over": 4097}}], "from 1 to 4096"),
    ([{"vector": "v", "schedule": {"kind": "linear", "over": 2.5}}], "from 1 to 4096"),
    ([{"vector": "v", "schedule": {"kind": "linear", "over": 9, "floor": -0.1}}], "from 0 to 1"),
    ([{"vector": "v", "schedule": {"kind": "constant", "over": 9}}], "neither"),
    ([{"vector": "v", "schedule": {"kind": "linear", "over": 9, "from": 1}}], "unknown key 'from'"),
    ([{"vector": "v", "scope": "prompt", "schedule": {"kind": "linear", "over": 9}}], "with scope prompt"),
    ([{"vector": "v", "op": "renorm"}, {"vector": "v"}], "'v' restores the length at layer 1, where 'v' acts with another op"),
    ([{"vector": "v"}] * 65, "65 terms"),
    ([{"vector": "v", "scope": "answer"}], "needs steering_tags"),
]


@pytest.mark.parametrize(("steering", "sentence"), REFUSED)
def test_bad_terms(exact: Any, tmp_path: Path, steering: Any, sentence: str) -> None:
    server = exact()
    server.put("v", make_vector(server), tmp_path)
    for path in ("/completion", "/v1/completions", "/infill"):
        body = {"prompt": PROMPT, "n_predict": 1, "steering": steering, "input_prefix": "a", "input_suffix": "b"}
        if path == "/infill":
            continue  # needs a model with fill-in-the-middle tokens
        assert sentence in server.error(path, body)
    for path in ("/steering/read", "/steering/logprobs"):
        key = "prompts" if path.endswith("read") else "items"
        items = [PROMPT] if key == "prompts" else [{"prompt": PROMPT, "response": " a"}]
        assert sentence in server.error(path, {key: items, "steering": steering})


def test_every_route_takes_terms(exact: Any, tmp_path: Path) -> None:
    server = exact()
    server.put("v", make_vector(server, dose=40.0), tmp_path)
    messages = [{"role": "user", "content": "Hello there"}]
    for path, body, text in (
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 8}, lambda a: a["choices"][0]["text"]),
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 8}, lambda a: a["choices"][0]["message"]["content"]),
        ("/v1/messages", {"messages": messages, "max_tokens": 8}, lambda a: a["content"][0]["text"]),
        ("/v1/responses", {"input": "Hello there", "max_output_tokens": 8}, lambda a: a["output"][0]["content"][0]["text"]),
    ):
        fields = {**body, "temperature": 0, "ignore_eos": True}
        plain = text(server.ok(path, fields))
        assert text(server.ok(path, {**fields, "steering": []})) == plain, path
        assert text(server.ok(path, {**fields, "steering": [{"vector": "v"}]})) != plain, path
        assert "no vector 'w'" in server.error(path, {**fields, "steering": [{"vector": "w"}]})


def test_tags_part_generated_text(exact: Any, tmp_path: Path) -> None:
    """What is sampled is followed as given text is: the numbers of a probe are those of the same text read."""
    server = exact()
    server.put("one", make_vector(server, 1, dose=3.0), tmp_path)
    terms = [{"vector": "one", "scope": "thinking"}]
    tags = {"open": "<A>", "close": "</A>"}
    more = {"grammar": 'root ::= " one<A> two</A> three"', "ignore_eos": False, "steering_tags": tags, "steering_probe": ["one"]}
    reply = server.complete("Say:", terms, 40, **more)
    assert reply["content"] == " one<A> two</A> three"
    prompt = server.tokens("Say:")
    given = reply["tokens"][: len(reply["steering_probe"]["one"])]
    where = list(range(len(prompt) - 1, len(prompt) + len(given) - 1))
    fields: dict[str, Any] = {"prompts": [{"prompt": prompt, "response": given}], "layers": [1], "positions": where}
    v = direction(server, 1).astype(np.float64)
    read, plain = (
        server.read(**fields, steering=t, steering_tags=tags)[1]["0.values"][0].astype(np.float64) @ v / 3.0 for t in (terms, [])
    )
    steered = np.abs(read - plain - 1.0) < 2e-3
    assert steered.any() and not steered.all()
    assert np.allclose(reply["steering_probe"]["one"][: len(where)], read, atol=2e-3)
