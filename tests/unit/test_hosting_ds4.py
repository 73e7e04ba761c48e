"""`steer ds4`: what DwarfStar 4 can express, its server for each steering (a stand-in), its files, and vectors made for it."""

from __future__ import annotations

import hashlib
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from click.testing import CliRunner

from steer_plugins.cli.main import cli
from steer_plugins.errors import EngineError, SpecError, SteerError, VectorError
from steer_plugins.hosting.ds4 import Ds4Pool, express
from steer_plugins.hosting.running import beside, passing
from steer_plugins.steering.grammar import parse
from steer_plugins.steering.schedule import Schedule
from steer_plugins.steering.terms import Steering, Term
from steer_plugins.steering.vector import ModelIdentity, SteeringVector
from steer_plugins.store.foreign import ds41
from steer_plugins.store.formats import Facts
from steer_plugins.store.library import Library

N_LAYER, N_EMBD = 3, 4
IDENTITY = ModelIdentity("deepseek4", N_LAYER, N_EMBD, "a" * 64, "b" * 64, name="tiny", n_streams=4)
ROWS = np.random.default_rng(5).standard_normal((N_LAYER, N_EMBD))
ROWS = (ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)).astype(np.float32)


def vector(
    name: str = "mood", sites: tuple[str, ...] = ("ffn_out",), layers: tuple[int, ...] = (0, 2), **more: Any
) -> SteeringVector:
    directions = {(il, site): ROWS[il] for il in layers for site in sites}
    return SteeringVector(name, directions, identity=IDENTITY, **{"op": "project", "default_scope": "0-", **more})


# ---- what it can express ----


def test_a_term_becomes_a_file_and_two_strengths() -> None:
    found = express(Steering([Term(vector(), 0.6)]), IDENTITY)
    np.testing.assert_array_equal(found.rows, [ROWS[0], np.zeros(N_EMBD), ROWS[2]])
    assert (found.ffn, found.attn) == (0.6, 0.0)
    both = express(Steering([Term(vector(), 0.6), Term(vector("same", ("attn_out",)), -1.0)]), IDENTITY)
    assert (both.ffn, both.attn) == (0.6, -1.0)
    # v and -v are the same edit
    turned = SteeringVector("t", {(il, "attn_out"): -ROWS[il] for il in (0, 2)}, op="project", default_scope="0-")
    assert express(Steering([Term(vector(), 0.6), Term(turned, 1.0)]), IDENTITY).attn == 1.0
    two = express(Steering([Term(vector(layers=(0,)), 2.0), Term(vector("b", layers=(1,)), 2.0)]), IDENTITY)
    np.testing.assert_array_equal(two.rows, [ROWS[0], ROWS[1], np.zeros(N_EMBD)])
    assert not express(Steering(), IDENTITY) and not express(Steering([Term(vector(), 0.0)]), IDENTITY)
    np.testing.assert_array_equal(express(Steering([Term(vector(), 1.0, layers=(1, 2))]), IDENTITY).rows[0], 0)


def refused() -> Iterator[tuple[list[Term], str]]:
    other = SteeringVector("o", {(0, "attn_out"): ROWS[1], (2, "attn_out"): ROWS[1]}, op="project", default_scope="0-")
    yield [Term(vector(op="add", sites=("resid_post",)))], "would add at resid_post"
    yield [Term(vector(sites=("resid_post",)))], "would project at resid_post"
    yield [Term(vector(op="clamp"))], "would clamp at ffn_out"
    for scope in ("all", "response", "5-9"):
        yield [Term(vector(), scope=scope)], "ds4 steers every token"
    yield [Term(vector(), stream=1)], "has a stream"
    yield [Term(vector(), schedule=Schedule("linear", 8))], "has a schedule"
    yield [Term(vector(), 1.0), Term(vector("b", layers=(1,)), 0.5)], "one strength at ffn_out"
    yield [Term(vector()), Term(vector("b"))], "several terms steer ffn_out"
    yield [Term(vector()), Term(vector("b", ("attn_out",), (0,)))], "the same layers"
    yield [Term(vector()), Term(other)], "one direction at layer 0"


@pytest.mark.parametrize("terms, sentence", list(refused()))
def test_what_it_cannot_do_is_refused(terms: list[Term], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        express(Steering(terms), IDENTITY)


# ---- its server ----


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    path = tmp_path / "ds4-server"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).with_name("ds4_server.py")}" "$@"\n', "utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def library(tmp_path: Path) -> Library:
    library = Library(tmp_path / "vectors")
    library.put(vector(), IDENTITY)
    library.put(vector("calm", layers=(1,)), IDENTITY)
    return library


@pytest.fixture
def pool(binary: Path, library: Library, tmp_path: Path) -> Iterator[Callable[..., Ds4Pool]]:
    made: list[Ds4Pool] = []

    def make(text: str = "", model: str = "model.gguf", **more: Any) -> Ds4Pool:
        (tmp_path / model).touch()
        (tmp_path / "files").mkdir(exist_ok=True)
        options = {"default": parse(text), "flags": ["--ctx", "4096"], "kv": tmp_path / "kv", **more}
        made.append(Ds4Pool(binary, tmp_path / model, IDENTITY, library, tmp_path / "files", **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


windows = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")


def ask(url: str, **body: Any) -> Any:
    return requests.post(f"{url}/v1/chat/completions", json={"messages": [], **body}, timeout=30).json()


@windows
def test_each_steering_has_its_server_and_its_cache(pool: Callable[..., Ds4Pool], tmp_path: Path) -> None:
    servers = pool("mood:0.6")
    servers.start()
    with beside(passing(servers)) as url:
        first = ask(url)
        ones = np.ones(N_EMBD)
        np.testing.assert_allclose(first["state"], ones - 0.6 * ROWS[0] * (ROWS[0] @ ones), atol=1e-6)
        assert (first["dir_steering_ffn"], first["dir_steering_attn"], first["ctx"]) == (0.6, 0.0, 4096)
        assert first["bytes"] == 4 * N_LAYER * N_EMBD and "steering" not in first["body"]
        assert ask(url)["pid"] == first["pid"]
        plain = ask(url, steering="")
        assert plain["pid"] != first["pid"] and plain["state"] == [1.0] * N_EMBD and plain["dir_steering_file"] is None
        again = ask(url, steering=[{"vector": "mood", "strength": 2}])
        np.testing.assert_allclose(again["state"], ones - 2.0 * ROWS[0] * (ROWS[0] @ ones), atol=1e-6)
        caches = {one["kv_disk_dir"] for one in (first, plain, again)}
        assert len(caches) == 3 and all(Path(cache).parent == tmp_path / "kv" for cache in caches)
        assert ask(url, steering="mood:0.6")["kv_disk_dir"] == first["kv_disk_dir"]
        assert requests.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"] == "deepseek-v4-flash"
        for steering, sentence in {
            "mood:1?response": "every token",
            "nobody:1": "no vector 'nobody'",
            '"./x.safetensors":1': "file",
            7: "give a text or a list",
        }.items():
            answer = requests.post(f"{url}/v1/chat/completions", json={"steering": steering}, timeout=30)
            assert answer.status_code == 400 and sentence in answer.json()["error"]["message"]


@windows
def test_a_reply_under_way_keeps_its_server(pool: Callable[..., Ds4Pool]) -> None:
    servers = pool()
    with beside(passing(servers)) as url:
        body = {"stream": True, "pause": 0.3, "steering": "mood:1"}
        with requests.post(f"{url}/v1/chat/completions", json=body, stream=True, timeout=30) as reply:
            lines = reply.iter_lines()
            assert next(lines) == b'data: {"text": "one"}'
            found: list[Any] = []
            other = threading.Thread(target=lambda: found.append(ask(url, steering="calm:1")))
            other.start()
            rest = [line for line in lines if line]
        assert rest == [b'data: {"text": "two"}', b'data: {"text": "three"}', b"data: [DONE]"]
        other.join(30)
        assert found and found[0]["dir_steering_ffn"] == 1.0


@windows
def test_a_pool_keeps_several(pool: Callable[..., Ds4Pool]) -> None:
    servers = pool(most=2)
    with beside(passing(servers)) as url:
        pids = [ask(url, steering=text)["pid"] for text in ("mood:1", "calm:1", "mood:1", "calm:1")]
        assert pids[:2] == pids[2:] and pids[0] != pids[1]
        assert ask(url, steering="")["pid"] not in pids  # in place of mood, which was not used for longest
        assert ask(url, steering="calm:1")["pid"] == pids[1]


@windows
def test_a_server_that_does_not_start_says_why(pool: Callable[..., Ds4Pool]) -> None:
    servers = pool(model="broken.gguf")
    with pytest.raises(EngineError, match="ds4-server ended .* the model cannot be read"):
        servers.start()
    with beside(passing(servers)) as url:
        answer = requests.post(f"{url}/v1/completions", json={}, timeout=30)
        assert answer.status_code == 502 and "cannot be read" in answer.json()["error"]["message"]


# ---- the command line ----


def test_write_and_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: tuple[Path, SteeringVector]) -> None:
    model, kept = tiny_model
    out = tmp_path / "v.f32"
    runner = CliRunner()
    told = runner.invoke(
        cli, ["ds4", "write", f"{kept.name}:0.5", "--model", str(model), "--out", str(out)], catch_exceptions=False
    )
    assert told.exit_code == 0 and f"--dir-steering-file {out} --dir-steering-ffn 0.5 --dir-steering-attn 0" in told.output
    assert "/steer 0.5" in told.output
    assert kept.identity is not None
    rows = np.fromfile(out, "<f4").reshape(kept.identity.n_layer, kept.identity.n_embd)
    np.testing.assert_array_equal(rows[1], kept.directions[1, "ffn_out"])
    assert not rows[0].any()
    again = runner.invoke(cli, ["ds4", "write", f"{kept.name}:0.5", "--model", str(model), "--out", str(out)])
    assert isinstance(again.exception, VectorError) and "--overwrite" in str(again.exception)
    nothing = runner.invoke(cli, ["ds4", "write", f"{kept.name}:0", "--model", str(model), "--out", str(tmp_path / "w.f32")])
    assert isinstance(nothing.exception, VectorError) and not (tmp_path / "w.f32").exists()
    nowhere = runner.invoke(cli, ["ds4", "serve", "--model", str(model), "--binary", str(tmp_path / "none")])
    assert isinstance(nowhere.exception, SteerError) and "--binary" in str(nowhere.exception)


@pytest.fixture
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, SteeringVector]:
    from steer_plugins import testing
    from steer_plugins.store.identity import identity_of_gguf

    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "vectors"))
    model = testing.write("deepseek4", tmp_path / "model.gguf")[0]
    identity = identity_of_gguf(model)
    direction = np.random.default_rng(0).standard_normal(identity.n_embd).astype(np.float32)
    kept = SteeringVector("mood", {(1, "ffn_out"): direction}, op="project", default_scope="0-", identity=identity)
    Library().put(kept, identity)
    return model, Library().get("mood", identity)


# ---- the fork's files ----


def header(**changes: Any) -> bytes:
    values = {
        "magic": ds41.MAGIC,
        "version": 1,
        "layers": N_LAYER,
        "width": N_EMBD,
        "rank": 1,
        "site": 1,
        "mode": 0,
        "mask": 0b101,
    }
    values |= {"digest": bytes(range(32)), **changes}
    return struct.pack("<8s6IQ32s", *values.values())


def file(tmp_path: Path, head: bytes, rows: np.ndarray | None = None) -> Path:
    path = tmp_path / "v.ds41dir"
    body = np.stack([ROWS[0], np.zeros(N_EMBD), ROWS[2]]) if rows is None else rows
    path.write_bytes(head + body.astype("<f4").tobytes())
    return path


def test_a_ds41dir_file_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    path = file(tmp_path, header())
    assert len(header()) == 72
    found = ds41.read(path, Facts(site="ffn_out", identity=IDENTITY))
    assert found.op == "project" and found.default_scope == "0-" and list(found.directions) == [(0, "ffn_out"), (2, "ffn_out")]
    again = tmp_path / "again.ds41dir"
    ds41.write(found.replace(identity=IDENTITY), again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"magic": b"DS41DIX\0"}, "no header"),
        ({"version": 2}, "version"),
        ({"rank": 2}, "rank"),
        ({"mode": 1}, "mode"),
        ({"layers": 0}, "0 layers"),
        ({"layers": 65}, "65 layers"),
        ({"layers": 4}, "bytes"),
        ({"width": 5}, "bytes"),
        ({"width": 2**32 - 1}, "bytes"),
        ({"mask": 0}, "layer mask"),
        ({"mask": 0b1000}, "layer mask"),
        ({"mask": 0b111}, "different layers"),
        ({"site": 2}, "streams' mean"),
        ({"site": 3}, "site is 3"),
    ],
)
def test_a_damaged_ds41dir_file_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(VectorError, match=sentence):
        ds41.read(file(tmp_path, header(**changes)), Facts(site="ffn_out"))


def test_a_ds41dir_file_leaves_a_part_open(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="--site ffn_out or --site attn_out"):
        ds41.read(file(tmp_path, header()))
    with pytest.raises(VectorError, match="length"):
        ds41.read(file(tmp_path, header(), ROWS * 2), Facts(site="ffn_out"))


def test_a_ds41dir_file_is_bound_to_a_model_file(tiny_model: tuple[Path, SteeringVector], tmp_path: Path) -> None:
    model, kept = tiny_model
    with pytest.raises(VectorError, match="--model"):
        ds41.write(kept, tmp_path / "x.ds41dir")
    out = tmp_path / "v.ds41dir"
    source = next(Path(tmp_path / "vectors").rglob("mood.safetensors"))
    told = CliRunner().invoke(cli, ["convert", str(source), str(out), "--model", str(model)], catch_exceptions=False)
    assert told.exit_code == 0, told.output
    assert out.read_bytes()[40:72] == hashlib.sha256(model.read_bytes()).digest()


# ---- vectors for it ----


def test_fitting_for_it_measures_each_strength() -> None:
    from steer_plugins.training.extract import ContrastData, Pair, Side
    from steer_plugins.training.train import Training, TrainOptions
    from tests.unit.fakes import FakeEngine

    class Engine(FakeEngine):
        """Projecting at the feed-forward output changes what the model finds likely: by the strength, towards the second axis."""

        def __init__(self) -> None:
            super().__init__()
            self.info = type(self.info)(**{**self.info.__dict__, "sites": ("resid_post", "ffn_out")})

        def logprobs(self, items: Any, *, steering: Any = None, **more: Any) -> list[np.ndarray]:
            terms = Steering.of(steering).terms
            strength = sum(term.strength for term in terms)
            assert all(term.effective_op == "project" and term.effective_scope == "0-" for term in terms)
            return [np.full(4, -1.0 + (0.1 * strength if "joy" in str(answer) else 0.0)) for _, answer in items]

    pairs = tuple(Pair(Side(f"a joy {i} joy joy"), Side(f"a woe {i} woe woe"), i) for i in range(10))
    engine = Engine()
    options = TrainOptions(op="project", site="ffn_out", remove_neutral=True)
    training = Training(engine, "mood", ContrastData("pairs", pairs, "0" * 64), options)
    made = training.run()
    assert made.op == "project" and made.default_scope == "0-" and made.sites == ["ffn_out"] and made.calibration is None
    measured = (made.provenance or {})["projection"]
    assert [row["strength"] for row in measured["rows"]] == [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
    for what in ({"site": "attn_out"}, {"op": "clamp"}, {"op": "project", "scope": "response"}):
        with pytest.raises(SpecError):
            Training(engine, "mood", ContrastData("pairs", pairs, "0" * 64), TrainOptions(**what))
