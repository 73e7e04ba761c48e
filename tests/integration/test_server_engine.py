"""ServerEngine and `steer serve` on a real llama-server with tiny models, beside an in-process engine on the same file."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from steer_plugins import testing
from steer_plugins.client import ServerProcess
from steer_plugins.client.engine import ServerEngine
from steer_plugins.engine import GenerateRequest
from steer_plugins.engine.local import LocalEngine
from steer_plugins.errors import EngineError, SteerError
from steer_plugins.runtime import Runtime, activate, find_runtime
from steer_plugins.steering.terms import Term
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library
from steer_plugins.store.vectorfile import read_vector
from tests.engine import harness
from tests.unit.steering_server import eventually

PROMPT = "The weather in the old town is"
LONG = "It was a cold morning in the harbour, and the boats lay still. "
# as exact as it gets: one thread, no float16 anywhere
EXACT = "--no-kv-unified --threads 1 --threads-batch 1 --no-warmup -ctk f32 -ctv f32 -fa off".split()


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if folder and not os.environ.get("STEER_RUNTIME"):
        os.environ["STEER_RUNTIME"] = folder
    try:
        found = find_runtime(need_server=True)
    except SteerError as error:
        pytest.skip(str(error))
    if found is None:
        pytest.skip("no runtime with a llama-server: build one with `steer build`")
    return found


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def get(arch: str) -> Path:
        if arch not in made:
            made[arch] = testing.write(arch, folder / f"{arch}.gguf")[0]
        return made[arch]

    return get


@pytest.fixture(scope="module")
def served(runtime: Runtime, models: Callable[[str], Path]) -> Iterator[Callable[..., ServerProcess]]:
    """A running server: ``served("llama")``."""
    made: dict[Any, ServerProcess] = {}

    def get(arch: str, n_ctx: int = 512, n_parallel: int = 4) -> ServerProcess:
        key = (arch, n_ctx, n_parallel)
        if key not in made:
            made[key] = ServerProcess(runtime.server)
            made[key].start(models(arch), ["-c", str(n_ctx * n_parallel), "--parallel", str(n_parallel), *EXACT])
            made[key].wait_ready(120)
        return made[key]

    yield get
    for process in made.values():
        process.stop()


@pytest.fixture
def exact_local(runtime: Runtime) -> Iterator[Callable[..., LocalEngine]]:
    """In-process engines with a float32 cache."""
    llama_cpp = harness.llama_cpp = activate(runtime)
    harness.silence()
    original = llama_cpp.llama_context_default_params

    def exact() -> Any:
        params = original()
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0
        return params

    made = []

    def get(path: Path, **options: Any) -> LocalEngine:
        made.append(LocalEngine(path, **{"n_ctx": 512, "n_threads": 1, **options}))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "llama_context_default_params", exact)
        yield get
    for engine in made:
        engine.close()


def vector(engine: Any, layers: tuple[int, ...] = (1, 2), *, seed: int = 0, dose: float = 4.0, **more: Any) -> SteeringVector:
    rng = np.random.default_rng(seed)
    directions = {(il, "resid_post"): rng.standard_normal(engine.info.n_embd).astype(np.float32) for il in layers}
    scales = dict.fromkeys(directions, dose / np.sqrt(engine.info.n_embd))
    return SteeringVector("v", directions, scales, **{"default_scope": "all", **more})


@pytest.mark.parametrize("arch", ["llama", "deepseek4", "gemma3", "qwen3"])
def test_the_same_text_and_facts(arch: str, served: Any, models: Any, exact_local: Any) -> None:
    local = exact_local(models(arch))
    with ServerEngine(served(arch).url) as engine:
        for name in ("identity", "n_layer", "n_embd", "n_streams", "n_vocab", "n_ctx", "sites", "last_layer_outputs_only"):
            assert getattr(engine.info, name) == getattr(local.info, name), name
        assert engine.info.name == local.info.name and engine.info.has_chat_template == local.info.has_chat_template
        user = {"role": "user", "content": "Is it cold?"}
        chats: list[Any] = [[user], [{"role": "system", "content": "Be brief."}, user]]
        chats += [[user, {"role": "assistant", "content": "<think>no"}], [user, {"role": "assistant", "content": "yes"}, user]]
        texts: list[Any] = ["x", "  two\n\nlines ", "日本 naïve \U0001f600", "<think>a</think><s>b", PROMPT * 3]
        for prompt in texts + (chats if engine.info.has_chat_template else []):
            for thinking in (None, True, False):
                for generation in (True, False):
                    options: dict[str, Any] = {"thinking": thinking, "add_generation_prompt": generation}
                    assert engine.tokenize(prompt, **options) == local.tokenize(prompt, **options), (prompt, options)
        everything = list(range(engine.info.n_vocab))
        assert [engine.detokenize([t]) for t in everything[:300]] == [local.detokenize([t]) for t in everything[:300]]
        assert engine.detokenize(everything) == local.detokenize(everything)


@pytest.mark.parametrize("arch", ["llama", "deepseek4", "qwen3next"])
def test_a_long_conversation(arch: str, served: Any, models: Any, exact_local: Any) -> None:
    """Turns that repeat and go on from one another, steered in all sorts of ways, get what an engine without a past gets."""
    rng = random.Random(arch)
    with ServerEngine(served(arch).url) as engine:
        a, b = vector(engine, (0, 2), dose=5.0), vector(engine, (1,), seed=9, dose=5.0, op="clamp")
        scopes = [None, "all", "prompt", "response", "answer", "2-6", "0-", "12-30"]
        if arch == "qwen3next":  # its tiny template does not say where thinking ends, so answers are refused there
            scopes.remove("answer")
        history = [engine.tokenize(PROMPT), engine.tokenize(LONG)]
        extra = engine.tokenize(" and then it rained on the way home")[1:]
        jobs: list[tuple[list[int], Any, int]] = []
        found = []
        for _ in range(60 if arch == "llama" else 25):
            base = history[-1] if rng.random() < 0.4 else rng.choice(history[-4:])
            goes_on = rng.random() < 0.8
            prompt = (base + extra[: rng.randint(0, len(extra))] if goes_on else base[: rng.randint(1, len(base))])[:300]
            terms = [
                Term(rng.choice([a, b]), rng.choice([-1.0, 0.5, 1.0, 0.0]), scope=rng.choice(scopes))
                for _ in range(rng.randint(0, 2))
            ]
            jobs.append((prompt, terms, rng.randint(1, 9)))
            found.append(engine.generate(prompt, steering=terms, max_tokens=jobs[-1][2]).tokens)
            history.append(prompt + found[-1])
    local = exact_local(models(arch), n_parallel=1)
    for (prompt, terms, n), tokens in zip(jobs, found, strict=True):
        local._session("one").reset()
        assert local.generate(prompt, steering=terms, max_tokens=n).tokens == tokens, (prompt, terms)
    assert len({tuple(t) for t in found}) > 12


def test_eight_at_once(served: Any, models: Any, exact_local: Any) -> None:
    """Different steerings in one batch, each as alone; reading and scoring at the same time."""
    local = exact_local(models("llama"))
    with ServerEngine(served("llama").url) as engine:
        wishes = [None] + [Term(vector(engine, (i % 4,), seed=i, dose=5.0), (-1.0) ** i) for i in range(7)]
        requests = [GenerateRequest(LONG + PROMPT, w, max_tokens=12) for w in wishes] * 3
        want = [local.generate(r.prompt, steering=r.steering, max_tokens=12).tokens for r in requests[:8]]
        states = local.read([LONG], positions="all", layers=[1], steering=wishes[2])[0].values[1]
        wrong: list[str] = []

        def read() -> None:
            for _ in range(5):
                got = engine.read([LONG], positions="all", layers=[1], steering=wishes[2])[0].values[1]
                if np.abs(got - states).max() > 4e-4:
                    wrong.append("a read")

        reader = threading.Thread(target=read)
        reader.start()
        found = engine.generate_many(requests)
        reader.join()
        assert not wrong and [g.tokens for g in found] == want * 3 and len({tuple(t) for t in want}) >= 7


def test_a_live_change_acts_from_where_it_says(served: Any) -> None:
    """Generating on, with the steering on the positions that were named and on no others, gives the same tokens."""
    with ServerEngine(served("llama", n_ctx=2048, n_parallel=1).url) as engine:
        layer = 1
        v = vector(engine, (layer,), dose=6.0)
        plain = engine.generate(PROMPT, max_tokens=600).tokens
        for _ in range(50):
            stream = engine.stream(GenerateRequest(PROMPT, max_tokens=600))
            for i, _ in enumerate(stream):
                if i == 2:
                    stream.steer(v)
            reply = stream.result
            if stream.changed_from and stream.changed_from[0] < len(reply.prompt_tokens) + 500:
                break
        assert len(stream.changed_from) == 1, "the change never came while the reply was running"
        first, n = stream.changed_from[0], len(reply.prompt_tokens)
        assert n <= first < n + 500 and reply.tokens[: first - n + 1] == plain[: first - n + 1] != reply.tokens
        tokens = reply.prompt_tokens + reply.tokens
        again = engine.generate(tokens[: first + 1], steering=Term(v, scope=f"{first}-"), max_tokens=40)
        assert again.tokens == tokens[first + 1 : first + 41]


def test_slots_are_free_after_cancelling(served: Any) -> None:
    with ServerEngine(served("llama", n_ctx=2048, n_parallel=1).url) as engine:
        want = engine.generate(PROMPT, max_tokens=5).tokens
        for _ in range(5):
            stream = engine.stream(GenerateRequest(PROMPT, vector(engine), max_tokens=1900))
            for _ in stream:
                stream.cancel()
            assert stream.result.finish_reason == "cancelled" and len(stream.result.tokens) < 1900
        eventually(lambda: not engine.status()["n_requests"])
        assert engine.generate(PROMPT, max_tokens=5).tokens == want


def test_vectors_come_and_go(runtime: Runtime, models: Any) -> None:
    """They are gone from the server after close, and there again after it was restarted."""
    process = ServerProcess(runtime.server)
    with process:
        process.start(models("llama"), ["-c", "512", "--parallel", "1", *EXACT])
        process.wait_ready(120)
        engine = ServerEngine(process.url)
        v = vector(engine)
        steered = engine.generate(PROMPT, steering=v, max_tokens=8).tokens
        scores = engine.logprobs([(PROMPT, " cold")], steering=v)[0]
        assert [entry["content_sha256"] for entry in engine.status()["vectors"]] == [v.content_hash]
        assert process.stop() == 0
        with pytest.raises(EngineError, match="no server answers at"):
            engine.generate(PROMPT)
        process.start(models("llama"), ["-c", "512", "--parallel", "1", *EXACT])
        process.wait_ready(120)
        assert engine.status()["vectors"] == []
        probed = engine.stream(GenerateRequest(PROMPT, max_tokens=3, probe=(v,)))  # nothing steers, and still it is missed
        probed.run()
        assert v.name in probed.projections
        [entry] = engine.status()["vectors"]
        requests.delete(f"{process.url}/steering/vectors/{entry['name']}", timeout=30)
        assert engine.logprobs([(PROMPT, " cold")], steering=v)[0] == pytest.approx(scores, abs=1e-4)
        assert engine.generate(PROMPT, steering=v, max_tokens=8).tokens == steered
        engine.close()
        with ServerEngine(process.url) as other:
            assert other.status()["vectors"] == []


def test_the_server_ends_in_the_middle(runtime: Runtime, models: Any) -> None:
    with ServerProcess(runtime.server) as process:
        process.start(models("llama"), ["-c", "8192", "--parallel", "1", *EXACT])
        process.wait_ready(120)
        engine = ServerEngine(process.url)
        with pytest.raises(EngineError, match="was lost|ended a reply without saying so"):
            for i, _ in enumerate(engine.stream(GenerateRequest(PROMPT, max_tokens=8000))):
                if i == 1:
                    # left to itself llama-server waits for the client, who waits for the reply
                    assert process.stop() < 128, "it had to be killed"
        engine.close()


# ---- the command line ----


def steer(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "steer_plugins", *args],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@contextlib.contextmanager
def serving(*args: str, notes: str = "", **environment: str) -> Iterator[dict[str, Any]]:
    """`steer serve` until the block ends; ``notes`` is all that it may have said on standard error by then."""
    command = [sys.executable, "-m", "steer_plugins", "serve", *args, "--json", "--port", "0", "--threads", "1", "--no-warmup"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield json.loads(line)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (128 + signal.SIGTERM, notes)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_train_generate_and_read_on_a_server(runtime: Runtime, models: Any, tmp_path: Path) -> None:
    """The whole way with one copy of the weights: fit, serve with what was fitted, use it by name."""
    model = models("deepseek4")
    environment = {"STEER_LIBRARY": str(tmp_path / "library"), "STEER_RUNTIME": str(runtime.path)}
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as out:
        for i in range(6):
            sides = {s: [{"role": "user", "content": f"{w} on day {i}"}] for s, w in (("positive", "Joy"), ("negative", "Woe"))}
            out.write(json.dumps(sides) + "\n")
    flags = ["--pairs", str(pairs), "--calibrate", "none", "--positions", "last", "--layers", "1-3"]
    with serving(str(model), "-c", "4096", "--parallel", "4", **environment) as facts:
        assert facts["vectors"] == [] and facts["device"] == "CPU"
        there = {**environment, "STEER_SERVER": facts["url"]}
        done = steer("train", "calm", *flags, **there)
        assert done.returncode == 0, done.stderr
        text = steer("generate", "hello", "-n", "8", **there)
        assert text.returncode == 0, text.stderr
        steered = steer("generate", "hello", "-n", "8", "-s", "calm:9?all", **there)
        assert steered.returncode == 0 and steered.stdout != text.stdout, steered.stderr
        file = tmp_path / "states.safetensors"
        done = steer("read", "hello", "-o", str(file), "-s", "calm", **there)
        assert done.returncode == 0 and file.stat().st_size > 1000, done.stderr
        assert requests.get(facts["url"] + "/steering", timeout=30).json()["vectors"] == [], "nothing is left behind"
    # the same fit in process
    done = steer(
        "train", "calm2", *flags, "-m", str(model), "-t", "1", "--out", str(tmp_path / "calm2.safetensors"), **environment
    )
    assert done.returncode == 0, done.stderr
    [entry] = Library(tmp_path / "library").list()
    ours, theirs = entry.read(), read_vector(tmp_path / "calm2.safetensors")
    assert list(ours.directions) == list(theirs.directions)
    for key, direction in ours.directions.items():
        # the two hold their cache in float16, which rounds differences of states by a few thousandths
        assert float(direction @ theirs.directions[key]) > 0.98
        assert ours.scales[key] == pytest.approx(theirs.scales[key], rel=0.02)
    # and in the next server by its name, as its default too
    guess = "steer: note: 'calm' is not calibrated, so strength 1.0 is a guess\n"  # it was fitted with --calibrate none
    with serving(str(model), "-c", "1024", "--steering", "calm:9?all", notes=guess, **environment) as facts:
        assert facts["vectors"] == ["calm"]
        body: dict[str, Any] = {"prompt": "hello", "n_predict": 8, "temperature": 0}
        said = []
        for steering in (None, [], [{"vector": "calm", "strength": 9, "scope": "all"}]):
            extra = {} if steering is None else {"steering": steering}
            answer = requests.post(facts["url"] + "/completion", json={**body, **extra}, timeout=60)
            assert answer.status_code == 200, answer.text
            said.append(answer.json()["content"])
        assert said[0] == said[2] != said[1]
