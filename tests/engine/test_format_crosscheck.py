"""Files of other programs do here what they do there: an unpatched llama.cpp's control vector, and ds4's formula."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins.engine.local import LocalEngine
from steer_plugins.native import NativeTerm
from steer_plugins.steering.terms import Term
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.foreign import controlvector
from steer_plugins.store.formats import Facts, read_any
from tests.engine import harness as H
from tests.engine.harness import ADD, RESID, Raw, Vector
from tests.engine.stock_runner import run_steps

PREFILL, DECODE = 17, 3
PROMPT = "The weather in the old town is"


def steps() -> list[dict[str, Any]]:
    """A prefill with all outputs and some tokens one by one, position 0 included: range ``0-``."""
    toks = H.prompt(PREFILL + DECODE)
    batches = [toks[:PREFILL], *([t] for t in toks[PREFILL:])]
    return [{"tokens": [[t.token, t.pos, t.seq, t.output] for t in batch]} for batch in batches]


def as_llama_cpp_loads(path: Path, n_layer: int, strength: float) -> list[float]:
    """What ``--control-vector-scaled path:strength`` hands to the library (common_control_vector_load): float32 products,
    direction.N at (N - 1) * n_embd. Read with the gguf package, not with the reader under test."""
    from gguf import GGUFReader

    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    assert all(name.startswith("direction.") for name in tensors) and "direction.0" not in tensors
    n_embd = len(next(iter(tensors.values())))
    flat = np.zeros((n_layer - 1, n_embd), np.float32)
    for name, data in tensors.items():
        flat[int(name.removeprefix("direction.")) - 1] += np.float32(strength) * data
    return [float(x) for x in flat.ravel()]


def vectors(vector: SteeringVector) -> dict[int, Vector]:
    places = {(il, RESID): (vector.directions[il, site], vector.scales[il, site]) for il, site in vector.directions}
    return {0: Vector(places)}


def random_vector(n_embd: int, layers: range | list[int], seed: int = 3) -> SteeringVector:
    """Directions of different lengths, none of them 1."""
    rng = np.random.default_rng(seed)
    rows = {(il, "resid_post"): rng.normal(size=n_embd) * (0.1 + 0.02 * il) for il in layers}
    return SteeringVector("v", rows, default_scope="0-")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "deepseek4"])
def test_a_written_control_vector_in_stock_llama_cpp(
    raw: Callable[..., Raw], stock: Any, tiny: Any, tmp_path: Path, arch: str
) -> None:
    """Bit-equal logits at strength 1: the file holds the very doses that the engine adds."""
    r = raw(arch)
    vector = random_vector(r.n_embd, range(1, r.n_layer))
    path = tmp_path / "v.gguf"
    controlvector.write(vector, path)
    again = read_any(path)
    assert again.default_scope == "0-" and again.layers == vector.layers
    strengths = (1.0, -0.6)
    jobs = [
        step
        for s in strengths
        for step in (
            {"clear": True},
            {"cvec": as_llama_cpp_loads(path, r.n_layer, s), "first": 1, "last": r.n_layer - 1},
            *steps(),
        )
    ]
    wanted = stock(tiny(arch), jobs)
    plain = run_steps(r, steps())
    for i, strength in enumerate(strengths):
        want = wanted[i * len(steps()) : (i + 1) * len(steps())]
        for ours in (vector, again):
            r.reset()
            r.steer_with(vectors(ours), [NativeTerm(0, ADD, strength)])
            got = run_steps(r, steps())
            assert np.abs(got[0] - plain[0]).max() > 0.05
            for a, b, p in zip(got, want, plain, strict=True):
                if strength == 1.0 and ours is vector:
                    assert np.array_equal(a, b)
                else:
                    # One rounding to float32 more, which a float16 cache passes on in steps: 0.2 % of the effect was seen.
                    assert np.abs(a - b).max() < 5e-3 * np.abs(b - p).max()


def test_one_layer_reacts_and_it_is_the_same_one(raw: Callable[..., Raw], stock: Any, tiny: Any, tmp_path: Path) -> None:
    """The one-hot probe: a vector of one layer, in a file, acts in stock llama.cpp where it acts here, and nowhere else."""
    r = raw("llama")
    paths = []
    for il in range(1, r.n_layer):
        one_hot = np.zeros(r.n_embd)
        one_hot[7] = 3.0
        paths.append(tmp_path / f"{il}.gguf")
        controlvector.write(SteeringVector("v", {(il, "resid_post"): one_hot}, default_scope="0-"), paths[-1])
    jobs = [
        step
        for path in paths
        for step in (
            {"clear": True},
            {"cvec": as_llama_cpp_loads(path, r.n_layer, 1.0), "first": 1, "last": r.n_layer - 1},
            steps()[0],
        )
    ]
    stocks = stock(tiny("llama"), jobs)
    ours = []
    for path in paths:
        r.reset()
        r.steer_with(vectors(read_any(path)), [NativeTerm(0, ADD, 1.0)])
        ours.append(run_steps(r, steps()[:1])[0])
    off = np.array([[float(np.abs(a - b).max()) for b in stocks] for a in ours])
    assert off.diagonal().max() < 1e-4
    assert off[~np.eye(len(off), dtype=bool)].min() > 0.02, "layers cannot be told apart: the test would not see a shift"
    # The same file from a writer that counts from 1 was made one block earlier.
    assert read_any(paths[1], Facts(gguf_layers="plus-one")).layers == read_any(paths[0]).layers


@pytest.fixture(scope="module")
def deepseek4(llama_cpp: Any, tiny: Any) -> Iterator[LocalEngine]:
    original = llama_cpp.llama_context_default_params

    def exact() -> Any:
        params = original()
        params.type_k = params.type_v = 0  # float32: float16 would turn noise in the last bit into thousandths
        params.flash_attn_type = 0
        return params

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "llama_context_default_params", exact)
        engine = LocalEngine(tiny("deepseek4"), n_ctx=256, n_threads=1, n_parallel=1)
        yield engine
        engine.close()


@pytest.fixture
def ds4_file(deepseek4: LocalEngine, tmp_path: Path) -> Callable[..., tuple[Path, np.ndarray]]:
    """A file as ds4's own builder writes it: unit rows, zeros where nothing is steered, and the JSON."""

    def write(layers: list[int], component: str = "ffn_out") -> tuple[Path, np.ndarray]:
        info = deepseek4.info
        rows = np.zeros((info.n_layer, info.n_embd), np.float32)
        rows[layers] = H.directions(len(layers), info.n_embd)
        path = tmp_path / "v.f32"
        path.write_bytes(rows.astype("<f4").tobytes())
        meta = {"format": "ds4-directional-steering-v1", "shape": list(rows.shape), "component": component}
        path.with_suffix(".json").write_text(json.dumps(meta))
        return path, rows

    return write


@pytest.mark.parametrize("component", ["ffn_out", "attn_out"])
@pytest.mark.parametrize("layer", [0, 2, 5])
def test_a_ds4_file_is_ds4s_formula(deepseek4: LocalEngine, ds4_file: Any, component: str, layer: int) -> None:
    """y - S v (v.y) at every position, the first included, on a model with hyper-connection streams."""
    path, rows = ds4_file([layer], component)
    vector = read_any(path)
    where: dict[str, Any] = {"positions": "all", "site": component, "layers": [layer]}
    plain = deepseek4.read([PROMPT], **where)[0].values[layer].astype(np.float64)
    v = rows[layer].astype(np.float64)
    for scale in (1.0, 2.0, -1.0, 0.5):
        got = deepseek4.read([PROMPT], steering=Term(vector, scale), **where)[0].values[layer]
        want = plain - scale * np.outer(plain @ v, v)
        np.testing.assert_allclose(got, want, atol=1e-4 * float(np.abs(plain).max()))
        assert np.abs(got[0] - plain[0]).max() > 1e-3 * np.abs(plain[0]).max(), "position 0 is steered, too"


def test_a_ds4_file_for_every_layer(deepseek4: LocalEngine, ds4_file: Any) -> None:
    """At scale 1 nothing along the direction of any layer is left; at scale 2 it is turned round."""
    path, rows = ds4_file(list(range(deepseek4.info.n_layer)))
    vector = read_any(path)
    for scale in (1.0, 2.0):
        got = deepseek4.read([PROMPT], positions="all", site="ffn_out", steering=Term(vector, scale))[0]
        first = deepseek4.read([PROMPT], positions="all", site="ffn_out", layers=[0])[0].values[0]
        for layer, y in got.values.items():
            along = y.astype(np.float64) @ rows[layer]
            before = first.astype(np.float64) @ rows[0]
            if scale == 1.0:
                assert np.abs(along).max() < 1e-5 * np.linalg.norm(y, axis=1).max()
            elif layer == 0:
                np.testing.assert_allclose(along, -before, atol=1e-4 * np.abs(before).max())
