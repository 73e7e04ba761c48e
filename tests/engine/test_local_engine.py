"""What LocalEngine alone has: callbacks, a cache that one can look into, files. What all engines do: test_engines.py."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins import native
from steer_plugins.engine import GenerateRequest, batching
from steer_plugins.engine.local import LocalEngine
from steer_plugins.engine.session import Session
from steer_plugins.errors import EngineError, ModelError
from steer_plugins.steering.schedule import Schedule
from steer_plugins.steering.terms import Term
from tests.engine import harness as H
from tests.engine.engines import BOTH, LONG, MORE_NOISE, NOISE, PROMPT, moved, near, open_engine, vector

pytestmark = pytest.mark.usefixtures("float32_cache")


@pytest.fixture(scope="module")
def engines(float32_cache: None, tiny: Callable[..., Path]) -> Iterator[Callable[..., LocalEngine]]:
    """Engines shared by this module's tests: ``engines("llama")``."""
    made: dict[Any, LocalEngine] = {}

    def get(arch: str, **options: Any) -> LocalEngine:
        key = (arch, *sorted(options.items()))
        if key not in made:
            made[key] = open_engine(tiny(arch), **options)
        return made[key]

    yield get
    for engine in made.values():
        engine.close()


# ---- scoring ----


@pytest.mark.parametrize("arch", BOTH)
def test_distributions_hold_what_logprobs_tells(engines: Any, arch: str) -> None:
    """Each row is a distribution over the vocabulary, of the unsteered or the steered model."""
    engine = engines(arch)
    items = [(PROMPT, " and then it rained"), (LONG, [60, 61, 62]), (PROMPT, [])]
    term = Term(vector(engine), 1.0)
    for steering in (None, term):
        found = engine.distributions(items, steering=steering)
        for (_, answer), rows, told in zip(items, found, engine.logprobs(items, steering=steering), strict=True):
            tokens = engine._model.continuation(answer)
            assert rows.shape == (len(tokens), engine.info.n_vocab) and rows.dtype == np.float32
            assert np.allclose(np.logaddexp.reduce(rows.astype(np.float64), axis=1), 0.0, atol=1e-5)
            assert np.allclose(rows[np.arange(len(tokens)), tokens], told, atol=1e-5)
    plain, moved_ = (engine.distributions(items[:1], steering=s)[0] for s in (None, term))
    assert np.abs(plain - moved_).max() > 0.1


# ---- reading ----


@pytest.mark.parametrize("arch", [*BOTH, "gemma3", "qwen3next"])
def test_shared_prefixes_change_nothing(engines: Any, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts with common beginnings are computed once and copied; each reads as it does alone, and as in a bare context."""
    engine = engines(arch)
    endings = ["", "Then", "Then rain came", "Nobody spoke of the war.", "Then rain came down on the quay", "x"]
    prompts = [LONG + e for e in endings] + [LONG * 2 + e for e in endings[1:3]] + ["x y z", "something else entirely"]
    computed = 0
    original = Session.decode

    def counted(self: Session, entries: Any) -> None:
        nonlocal computed
        computed += len(entries)
        original(self, entries)

    monkeypatch.setattr(Session, "decode", counted)
    total = sum(len(engine.tokenize(prompt)) for prompt in prompts)
    for positions in ("last", "all", [1, -1]):
        computed = 0
        together = engine.read(prompts, positions=positions)
        assert computed < 0.6 * total, "nothing was shared"
        for prompt, one in zip(prompts, together, strict=True):
            alone = engine.read([prompt], positions=positions)[0]
            assert (alone.tokens, alone.positions, alone.n_prompt) == (one.tokens, one.positions, one.n_prompt)
            for il in range(engine.info.n_layer):
                near(one.values[il], alone.values[il], MORE_NOISE.get(arch, NOISE))
    raw = H.Raw(Path(engine.info.path))
    for one in engine.read(prompts, positions="all"):
        raw.clear()
        rows = raw.read([H.Tok(t, p) for p, t in enumerate(one.tokens)], list(range(engine.info.n_layer)))
        for il, want in rows.items():
            near(one.values[il], want, MORE_NOISE.get(arch, NOISE))
    raw.close()


# ---- generating ----


class Witness:
    """Keeps the logits that every sampled token was drawn from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from steer_plugins.engine.sampler import Sampler

        self.logits: list[np.ndarray] = []
        original = Sampler.sample

        def sample(sampler: Any, context: Any, index: int) -> int:
            pointer = sampler._c.llama_get_logits_ith(context, index)
            self.logits.append(np.ctypeslib.as_array(pointer, (700,)).copy())
            return original(sampler, context, index)

        monkeypatch.setattr(Sampler, "sample", sample)

    def take(self) -> list[np.ndarray]:
        taken, self.logits = self.logits, []
        return taken


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3next", "deepseek4"])
def test_cached_tokens_are_never_stale(
    tiny: Callable[..., Path], llama_cpp: Any, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long random conversation with one engine against a fresh engine for each call: the same tokens, the same logits.

    Prompts share prefixes with what was said before; steering, scope, strength and live changes vary. A token that was cached
    under one edit and is reused under another shows in the logits at once, as the doses are large.
    """
    witness = Witness(monkeypatch)
    reused: list[int] = []
    original = Session.reuse

    def reuse(self: Session, sequence: int, wanted: Any) -> int:
        n = original(self, sequence, wanted)
        reused.append(n)
        return n

    monkeypatch.setattr(Session, "reuse", reuse)
    rng = random.Random(arch)
    path = tiny(arch)
    engine = open_engine(path, n_ctx=384)
    a, b = vector(engine, (0, 2), dose=5.0), vector(engine, (1,), seed=9, dose=5.0, op="clamp", name="b")
    scopes = [None, "all", "prompt", "response", "answer", "2-6", "0-", "5-", "12-30", "0-0"]

    def wish() -> Any:
        if rng.random() < 0.25:
            return None
        v = rng.choice([a, a, b])
        terms = [Term(v, rng.choice([-1.0, 0.5, 1.0, 1.0, 0.0]), scope=rng.choice(scopes))]
        if rng.random() < 0.3:
            terms.append(Term(rng.choice([a, b]), rng.choice([1.0, -0.5]), scope=rng.choice(scopes)))
        return terms

    history = [engine.tokenize(PROMPT), engine.tokenize(LONG)]
    steering: Any = None
    wishes = [wish() for _ in range(8)]
    extra = engine.tokenize(" and then it rained on the way home")[1:]
    steps = 150 if arch == "llama" else 45
    for step in range(steps):
        base = rng.choice(history[-4:])
        kind = rng.random()
        if kind < 0.35:  # the next turn
            prompt = list(history[-1]) + extra[: rng.randint(1, len(extra))]
        elif kind < 0.5:
            prompt = list(base)
        elif kind < 0.75:
            prompt = list(base) + extra[: rng.randint(1, len(extra))]
        else:
            prompt = list(base[: rng.randint(1, len(base))])
        prompt = prompt[:300]
        n = rng.randint(1, 9)
        if rng.random() < 0.6:
            steering = rng.choice(wishes) if rng.random() < 0.8 else wish()
        change_at, change_to = (rng.randint(1, 4), rng.choice(wishes)) if rng.random() < 0.4 else (0, None)
        many = rng.random() < 0.2

        def run(e: LocalEngine) -> tuple[list[list[int]], list[np.ndarray]]:
            witness.take()
            if many:  # noqa: B023
                requests = [GenerateRequest(prompt, s, max_tokens=n) for s in (steering, None, change_to)]  # noqa: B023
                return [g.tokens for g in e.generate_many(requests)], witness.take()
            stream = e.stream(GenerateRequest(prompt, steering, max_tokens=n))  # noqa: B023
            for i, _ in enumerate(stream, start=1):
                if i == change_at:  # noqa: B023
                    stream.steer(change_to)  # noqa: B023
            return [stream.result.tokens], witness.take()

        got, got_logits = run(engine)
        with open_engine(path, n_ctx=384) as other:
            want, want_logits = run(other)
        assert got == want, step
        assert len(got_logits) == len(want_logits)
        for x, y in zip(got_logits, want_logits, strict=True):
            assert float(np.abs(x - y).max()) < 5 * MORE_NOISE.get(arch, NOISE), (step, prompt, steering, change_at, change_to)
        history.append(prompt + got[0])
    used = [n for n in reused if n > 0]
    # some caches cannot be cut, so they are reused only where a prompt goes on from the very end of what was there
    assert len(used) > (3 if arch in ("deepseek4", "qwen3next") else 12), (
        "the cache was hardly ever used, so this test proves nothing"
    )
    engine.close()


def test_a_reply_steered_live_is_history_of_its_own(engines: Any, tiny: Callable[..., Path]) -> None:
    """The next turn repeats a reply that was steered in its second half only: half of it may be kept, half may not."""
    engine = open_engine(tiny("llama"))
    v = vector(engine, scope="response")
    stream = engine.stream(GenerateRequest(PROMPT, None, max_tokens=12))
    for i, _ in enumerate(stream, start=1):
        if i == 6:
            stream.steer(v)
    reply = stream.result
    plain = engine.generate(PROMPT, max_tokens=12)
    assert reply.tokens[:6] == plain.tokens[:6] and reply.tokens != plain.tokens
    turn = reply.prompt_tokens + reply.tokens + engine.tokenize(" so we")[1:]
    for steering in (None, v, Term(v, 1.0, scope="all")):
        with open_engine(tiny("llama")) as other:
            assert (
                engine.generate(turn, steering=steering, max_tokens=10).tokens
                == other.generate(turn, steering=steering, max_tokens=10).tokens
            )
    engine.close()


def test_live_steering_counts_from_the_next_token(engines: Any) -> None:
    """The token at which steer() was called is computed under the new steering when it is fed; nothing before it is."""
    engine = engines("llama")
    layer = 1
    v = vector(engine, (layer,), dose=5.0)
    rows: dict[int, np.ndarray] = {}
    engine.on_read(lambda r: rows.update({int(p): x for p, x in zip(r.positions, r.values, strict=True)}), layers=[layer])
    engine.generate(PROMPT, max_tokens=8, steering=vector(engine, (3,), seed=77))  # so that nothing below comes from the cache
    stream = engine.stream(GenerateRequest(PROMPT, None, max_tokens=8))
    rows.clear()
    for i, _ in enumerate(stream, start=1):
        if i == 3:
            stream.steer(v)
        if i == 5:
            engine.steer_running(None)
    steered = dict(rows)
    engine.on_read(None)
    n = len(stream.result.prompt_tokens)
    tokens = stream.result.prompt_tokens + stream.result.tokens
    plain = engine.read([tokens], positions="all", layers=[layer])[0].values[layer].astype(np.float64)
    for p, row in steered.items():
        inside = n + 2 <= p < n + 4  # tokens 3 and 4 of the reply
        near(row, plain[p] + inside * moved(engine, v, layer))
    assert set(range(n, n + 7)) <= set(steered)


def test_more_context_than_the_model_has(tiny: Callable[..., Path], llama_cpp: Any) -> None:
    """The context is bounded by the model's own, and by 4096 when nothing is asked."""
    with LocalEngine(tiny("llama", n_ctx=96), n_ctx=100_000, n_threads=1) as engine:
        assert engine.info.n_ctx == 96
    with LocalEngine(tiny("llama", n_ctx=1_000_000), n_threads=1) as engine:
        assert engine.info.n_ctx == 4096


# ---- thinking and answer ----


class Script:
    """Makes the sampler say given tokens, so that a random model thinks and answers where the test wants it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from steer_plugins.engine.sampler import Sampler

        self.tokens: list[int] = []
        monkeypatch.setattr(Sampler, "sample", lambda sampler, context, index: self.tokens.pop(0))


@pytest.mark.parametrize("thinking", [True, False, None])
@pytest.mark.parametrize("scope", ["thinking", "answer", "response", "prompt", "all"])
def test_scopes_of_a_thinking_model(engines: Any, scope: str, thinking: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek V4's chat format, thinking on and off: which tokens of prompt and reply are steered."""
    engine = engines("deepseek4")
    layer = 2
    chat = [{"role": "user", "content": "Is it cold?"}]
    prompt = engine.tokenize(chat, thinking=thinking)
    open_tag, close_tag = engine.tokenize("<think>")[-1], engine.tokenize("</think>")[-1]
    assert prompt[-1] == (open_tag if thinking else close_tag)
    reply = [100, 101, 102, close_tag, 110, 111] if thinking else [110, 111, 112, 113]
    script = Script(monkeypatch)
    v = vector(engine, (layer,), scope=scope, dose=5.0)
    rows: dict[int, np.ndarray] = {}
    engine.on_read(lambda r: rows.update({int(p): x for p, x in zip(r.positions, r.values, strict=True)}), layers=[layer])
    got = {}
    for steering in (None, v):
        engine._sessions["one"].reset()
        rows.clear()
        script.tokens = list(reply)
        assert engine.generate(chat, thinking=thinking, steering=steering, max_tokens=len(reply)).tokens == reply
        got[steering is v] = dict(rows)
    engine.on_read(None)
    n = len(prompt)
    total = n + len(reply) - 1  # the last token is sampled and never computed
    close_at = n + reply.index(close_tag) if thinking else n - 1
    expected = {
        "thinking": set(range(n - 1, close_at)) if thinking else set(),
        "answer": set(range(close_at, total)),
        "response": set(range(n - 1, total)),
        "prompt": set(range(1, n - 1)),
        "all": set(range(1, total)),
    }[scope]
    assert set(got[False]) == set(got[True]) == set(range(total))
    shift = {p for p in range(total) if np.abs(got[True][p] - got[False][p]).max() > 0.05}
    assert shift == expected
    for p in expected:
        near(got[True][p], got[False][p] + moved(engine, v, layer))
    # forcing the same reply gives the same picture
    pair = engine.read_pairs([(prompt, reply)], positions="all", layers=[layer], steering=v)[0].values[layer]
    plain = engine.read_pairs([(prompt, reply)], positions="all", layers=[layer])[0].values[layer]
    assert {p for p in range(total) if np.abs(pair[p] - plain[p]).max() > 0.05} == expected


# ---- callbacks ----


def test_on_add_and_on_read(engines: Any) -> None:
    """A closed loop through the engine: project what was read, and push against it."""
    engine = engines("llama")
    layer = 1
    v, w = vector(engine, (layer,), dose=1.0), vector(engine, (layer,), seed=6, dose=1.0, op="project", name="w")
    unit = v.directions[layer, "resid_post"].astype(np.float64)
    read: dict[int, np.ndarray] = {}
    pushed: dict[int, float] = {}
    engine.generate("something else", max_tokens=2)

    def on_read(rows: native.ReadRows) -> None:
        read.update({int(p): x for p, x in zip(rows.positions, rows.values, strict=True)})

    def on_add(tokens: native.AddTokens) -> None:
        assert tokens.c.shape == (len(tokens.positions), 2)
        for i, p in enumerate(tokens.positions):
            before = read.get(int(p) - 1)
            pushed[int(p)] = 0.0 if before is None else float(np.float32(-0.3 * (before @ unit)))
            tokens.c[i, 0] = pushed[int(p)]
            tokens.g[i, 1] = -1.0 if p == 3 else 0.0

    engine.on_read(on_read, layers=[layer])
    engine.on_add(on_add, [v, w])
    result = engine.generate(PROMPT, max_tokens=8)
    n = len(result.prompt_tokens)
    again = engine.generate(PROMPT, max_tokens=1)
    assert set(pushed) == set(range(n + 7)), "each token was computed, none came from the cache"
    assert again.tokens[0] == result.tokens[0]
    engine.on_add(None)
    engine.on_read(None)
    assert sum(abs(x) > 0.05 for x in pushed.values()) > 3
    tokens = result.prompt_tokens + result.tokens
    plain = engine.read([tokens], positions="all", layers=[layer])[0].values[layer].astype(np.float64)
    other = w.directions[layer, "resid_post"].astype(np.float64)
    for p in range(4, n + 7):
        near(read[p], plain[p] + pushed[p] * moved(engine, v, layer))
    near(read[3], plain[3] + pushed[3] * moved(engine, v, layer) - (plain[3] @ other) * other)
    assert engine.generate(PROMPT, max_tokens=8).tokens == engine.generate(PROMPT, max_tokens=8, steering=Term(v, 0.0)).tokens


def test_nothing_computed_under_a_callback_is_reused(engines: Any) -> None:
    engine = engines("llama")
    want = engine.generate(PROMPT, max_tokens=8).tokens
    v = vector(engine, dose=8.0)
    engine.on_add(lambda tokens: tokens.c.fill(1.0), [v])
    steered = engine.generate(PROMPT, max_tokens=8).tokens
    assert steered != want
    engine.on_add(None)
    assert engine.generate(PROMPT, max_tokens=8).tokens == want


def test_a_failing_callback_surfaces(engines: Any) -> None:
    engine = engines("llama")
    want = engine.generate(PROMPT, max_tokens=8).tokens

    class Mine(Exception):
        pass

    def fail(_: object) -> None:
        raise Mine("from the callback")

    for install, remove in (
        (lambda: engine.on_read(fail), lambda: engine.on_read(None)),
        (lambda: engine.on_add(fail, [vector(engine)]), lambda: engine.on_add(None)),
    ):
        install()
        with pytest.raises(Mine, match="from the callback"):
            engine.generate(PROMPT + " never", max_tokens=8)
        with pytest.raises(EngineError, match="no reply is being generated"):
            engine.steer_running(None)
        remove()
        assert engine.generate(PROMPT, max_tokens=8).tokens == want


# ---- files, models, errors ----


@pytest.mark.parametrize("arch", BOTH)
def test_split_files(engines: Any, tiny: Callable[..., Path], arch: str) -> None:
    """A model in three files, by any of its names, gives the same logits as in one."""
    whole = engines(arch)
    items = [(PROMPT, " cold and wet again")]
    v = vector(whole)
    first = tiny(arch, split=3)
    assert first.name.endswith("-00001-of-00003.gguf")
    for shard in (first, first.with_name(first.name.replace("-00001-", "-00003-"))):
        with open_engine(shard) as engine:
            assert engine.info.identity == whole.info.identity
            for steering in (None, v):
                assert np.array_equal(engine.logprobs(items, steering=steering)[0], whole.logprobs(items, steering=steering)[0])
                assert (
                    engine.generate(PROMPT, steering=steering, max_tokens=9).tokens
                    == whole.generate(PROMPT, steering=steering, max_tokens=9).tokens
                )


def test_bad_models(tmp_path: Path, tiny: Callable[..., Path], untested: Path, llama_cpp: Any) -> None:
    good = tiny("llama")
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(good.read_bytes()[:-1000])
    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    split = tiny("llama", split=3)
    lonely = tmp_path / split.name
    lonely.write_bytes(split.read_bytes())
    for path in (tmp_path / "none.gguf", torn, text, lonely, tmp_path):
        with pytest.raises(ModelError) as caught:
            LocalEngine(path, n_threads=1)
        assert "\n" not in str(caught.value) and str(path.name) in str(caught.value)
    with pytest.raises(ModelError, match="'llama-embed' has not been tested with steering"):
        LocalEngine(untested, n_threads=1)
    for option in ("n_ctx", "n_threads", "n_batch", "n_parallel"):
        with pytest.raises(EngineError, match=f"{option} is 0"):
            LocalEngine(good, **{option: 0})


def test_a_layer_that_never_fires_is_an_error(engines: Any, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the native side says after a decode ends the call, and the next one is as if nothing had been."""
    engine = open_engine(tiny("llama"))
    said: list[str | None] = ["steering was asked for at layer 2 (resid_post), but this model never passed through that hook"]
    monkeypatch.setattr(native.SteerContext, "sequence_error", lambda self, sequence=-1: said.pop() if said else None)
    with pytest.raises(EngineError, match=r"layer 2 \(resid_post\), but this model never passed through that hook"):
        engine.generate(PROMPT, steering=vector(engine, (0, 2)), max_tokens=4)
    said += ["layer 2"]
    with pytest.raises(EngineError, match="layer 2"):
        engine.read([PROMPT], steering=vector(engine, (2,), seed=3))
    engine.generate(PROMPT, steering=vector(engine, (0, 1)), max_tokens=4)
    engine.close()


def test_a_scope_that_begins_late_is_proved_late(engines: Any, tiny: Callable[..., Path]) -> None:
    """The last layer of llama holds outputs only, and a range may begin in the middle of a reply: no false alarm."""
    with open_engine(tiny("llama"), n_batch=8) as engine:
        v = vector(engine, (0, 3))
        for scope in ("all", "prompt", "response", "40-", "2-3"):
            engine.generate(LONG + PROMPT, steering=Term(v, 1.0, scope=scope), max_tokens=12)
            engine.read([LONG + PROMPT], steering=Term(v, 0.9, scope=scope))


def test_a_long_schedule_takes_few_rows_and_gives_them_back(tiny: Callable[..., Path], llama_cpp: Any) -> None:
    """A row on the device for each of at most 64 steps, not for each token; an idle context keeps none of them."""
    with open_engine(tiny("llama"), n_ctx=1024) as engine:
        v = vector(engine, (1,), scope="response")
        response = [60 + i % 40 for i in range(520)]
        engine.read_pairs([(PROMPT, response)], layers=[1])
        engine.read_pairs([(PROMPT, response)], layers=[1], steering=v)
        stats = engine._session("texts").steer.stats
        idle = stats().n_device_bytes
        seen = []
        original = native.SteerContext.sequence_error

        def look(self: native.SteerContext, sequence: int = -1) -> str | None:
            seen.append(self.stats().n_rows_capacity)
            return original(self, sequence)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native.SteerContext, "sequence_error", look)
            engine.read_pairs([(PROMPT, response)], layers=[1], steering=Term(v, schedule=Schedule("linear", 520)))
        assert max(seen) == 64, "59 strengths and the row of zeros"
        assert stats().n_rows_capacity == 8 and stats().n_device_bytes == idle


def test_a_closed_engine_says_so(tiny: Callable[..., Path], runtime: Any) -> None:
    """Using it again is a sentence, not a crash; in a process of its own, in case it is one."""
    code = (
        "import sys\n"
        "from steer_plugins.engine.local import LocalEngine\n"
        "from steer_plugins.errors import SteerError\n"
        "engine = LocalEngine(sys.argv[1], n_threads=1)\n"
        "engine.generate('hello', max_tokens=2)\n"
        "engine.close()\n"
        "engine.close()\n"
        "for call in (lambda: engine.generate('hello'), lambda: engine.read(['hello']), lambda: engine.tokenize('hello'),\n"
        "             lambda: engine.generate_many([]) or engine.detokenize([60]), lambda: engine.logprobs([('a', 'b')])):\n"
        "    try:\n"
        "        call()\n"
        "        sys.exit('nothing was raised')\n"
        "    except SteerError as error:\n"
        "        assert 'closed' in str(error), error\n"
    )
    environment = {**H.child_environment(runtime), "STEER_RUNTIME": str(runtime.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny("llama"))], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-800:])


# ---- many vectors ----


def test_more_vectors_than_are_kept(tiny: Callable[..., Path], llama_cpp: Any) -> None:
    """Idle vectors and configs make room for others, and every steering is still the one that was asked for."""
    rng = random.Random(7)
    layer = 1
    with open_engine(tiny("llama")) as engine:
        vectors = [vector(engine, (layer,), seed=100 + i, dose=3.0) for i in range(66)]
        plain = engine.read([PROMPT], positions="all", layers=[layer])[0].values[layer].astype(np.float64)
        for step in range(60):
            n = rng.randint(1, 8)
            terms = [
                Term(v, rng.choice([-1.0, 0.5, 1.0]), scope=rng.choice(["all", "prompt", "response", "2-3"]))
                for v in rng.sample(vectors, n)
            ]
            got = engine.read([PROMPT], positions="all", layers=[layer], steering=terms)[0].values[layer]
            want = plain.copy()
            n_tokens = len(want)
            for t in terms:
                where = {"all": range(1, n_tokens), "prompt": range(1, n_tokens - 1), "response": [n_tokens - 1], "2-3": [2, 3]}
                want[list(where[t.effective_scope])] += t.strength * moved(engine, t.vector, layer)
            error = float(np.abs(got - want).max())
            assert error < NOISE, (step, n, error)
        with pytest.raises(EngineError, match="more than 64 directions and columns"):
            engine.read([PROMPT], steering=[Term(v, op="clamp") for v in vectors])
        vectors = vectors[:20]
        requests = [GenerateRequest(PROMPT, v, max_tokens=4) for v in vectors]
        many = engine.generate_many(requests)
        for v, got in zip(vectors, many, strict=True):
            assert engine.generate(PROMPT, steering=v, max_tokens=4).tokens == got.tokens


def test_a_slider_moved_at_every_token(tiny: Callable[..., Path], llama_cpp: Any) -> None:
    """More live changes in one reply than there is room for rows."""
    with open_engine(tiny("llama")) as engine:
        v = vector(engine)
        for _ in range(2):
            stream = engine.stream(GenerateRequest(PROMPT, v, max_tokens=60))
            for i, _ in enumerate(stream):
                stream.steer([Term(v, 0.01 * (i + 1), scope="all"), Term(vector(engine, seed=5), 0.5, scope="response")])
            assert len(stream.result.tokens) == 60
        builds = engine.stats().n_graph_builds
        stream = engine.stream(GenerateRequest(PROMPT, v, max_tokens=100))
        for i, _ in enumerate(stream):
            stream.steer(Term(v, 0.01 * (i + 1)))
        assert engine.stats().n_graph_builds - builds <= 4, "prefill, first token, and the cache's growth; not each strength"


def test_minimum_of_sharing_is_not_a_matter_of_results(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines("llama")
    prompts = [PROMPT + e for e in (" a", " b", " c", "")]
    default = engine.read(prompts, positions="all")
    for minimum in (1, 10_000):
        monkeypatch.setattr(batching, "MIN_SHARED", minimum)
        for one, other in zip(default, engine.read(prompts, positions="all"), strict=True):
            for il in one.values:
                near(one.values[il], other.values[il])
