"""Every architecture in the patch's table, checked the same way: a tiny model of it, the formula, the graph's own values,
and the unpatched library. The other files go deeper on a few of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins import native
from steer_plugins.runtime import Runtime
from steer_plugins.runtime.patching import load_patch
from steer_plugins.testing import ARCHITECTURES
from tests.engine import harness as H
from tests.engine import test_every_architecture
from tests.engine.harness import ADD, ALL, CLAMP, MEAN, PROJECT, RESID, NativeTerm, Raw, Tok
from tests.engine.stock_runner import run_steps

MakeRaw = Callable[..., Raw]

SMALL: dict[str, Any] = {"n_ctx": 64, "n_batch": 32, "n_seq_max": 2}
STEPS_UBATCH = 7
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


def test_the_table_holds_what_is_tested_here(llama_cpp: Any) -> None:
    """An architecture without a tiny model must not be listed as tested, and each tiny model is there to be steered."""
    listed = native.tested_architectures(H.steer_library())
    assert len(listed) == len(set(listed))
    assert listed == load_patch().architectures()
    assert set(ARCHITECTURES) | set(test_every_architecture.OTHERS) == set(listed)


def stream_of(r: Raw) -> int:
    return ALL if r.info.n_streams > 1 else MEAN


def some_layers(r: Raw) -> tuple[int, int, int]:
    return 0, r.n_layer // 2, r.n_layer - 1


def two_sequences() -> list[Tok]:
    """Interleaved, of different lengths: llama.cpp splits and reorders them in its own ways (recurrent models in equal parts)."""
    a, b = H.prompt(9, 0, seed=1), H.prompt(5, 1, seed=2)
    return [t for i in range(9) for t in (a[i : i + 1] + b[i : i + 1])]


@pytest.mark.parametrize("n_ubatch", [1, 3, 5, 32])
@every_architecture
def test_formula(fresh: MakeRaw, arch: str, n_ubatch: int) -> None:
    """First, middle and last layer; each op; one of two sequences is steered and the other is not."""
    r = fresh(arch, n_ubatch=n_ubatch, **SMALL)
    assert r.info.n_streams == (4 if arch == "deepseek4" else 1)
    assert r.info.sites == (("resid_post", "attn_out", "ffn_out") if arch == "deepseek4" else ("resid_post",))
    toks, layers, stream = two_sequences(), some_layers(r), stream_of(r)
    mine = np.array([t.seq == 0 for t in toks])
    plain = r.read(toks, layers, RESID, stream)
    for layer in layers:
        vectors = {0: H.vector(r.n_embd, [(layer, RESID)])}
        for op, strength in ((ADD, -1.2), (PROJECT, 1.0), (CLAMP, 0.6)):
            terms = [NativeTerm(0, op, strength)]
            r.clear()
            r.steer_with(vectors, terms)
            before = r.steer.fired(layer, RESID)
            got = r.read(toks, [layer], RESID, stream)[layer]
            want = H.edited(plain[layer], (layer, RESID), vectors, terms)
            H.close(got[mine], want[mine], H.tolerance(plain[layer], vectors, terms))
            assert np.abs(want - plain[layer])[mine].max() > 0.05, "the edit was too small to be missed"
            assert np.array_equal(got[~mine], plain[layer][~mine]), "the other sequence changed"
            assert r.steer.fired(layer, RESID) > before


@every_architecture
def test_rows_are_what_the_graph_computes(fresh: MakeRaw, arch: str) -> None:
    """Bit for bit llama.cpp's own nodes, at tokens that are outputs and, where the table says so, at others."""
    reader = fresh(arch, n_ubatch=5, **SMALL)
    node = "l_last" if arch == "deepseek4" else "l_out"
    nodes = H.Nodes(H.llama_cpp.llama_cpp._lib, [node])
    watched = fresh(arch, n_ubatch=5, cb_eval=nodes.callback, **SMALL)
    layers, top = list(range(reader.n_layer)), reader.n_layer - 1
    toks = [Tok(t.token, t.pos, 0, t.pos in (3, 8, 12)) for t in H.prompt(13)]
    outputs = [3, 8, 12]
    n_rows = {il: len(outputs) if il == top and reader.info.last_layer_outputs_only else len(toks) for il in layers}
    nodes.values.clear()
    logits = watched.decode(toks)
    want = {il: nodes.rows(f"{node}-{il}", reader.info.n_streams, reader.n_embd) for il in layers}
    assert {il: len(rows) for il, rows in want.items()} == n_rows, "which rows the last block holds"

    def read(layers: list[int], positions: list[int]) -> None:
        reader.clear()
        reader.steer.set_captures(layers, [RESID] * len(layers), stream=stream_of(reader))
        for p in positions:
            reader.steer.want(0, p, p + 1)
        assert np.array_equal(reader.decode(toks), logits)
        assert [int(p) for p in reader.steer.kept()[1]] == positions
        for il in layers:
            got = reader.steer.rows(il, RESID, reader.info.n_streams).reshape(len(positions), -1, reader.n_embd)
            every = n_rows[il] == len(toks)
            assert np.array_equal(got, want[il][positions if every else [outputs.index(p) for p in positions]]), il

    read(layers, outputs)
    read(layers if n_rows[top] == len(toks) else layers[:-1], list(range(13)))
    if reader.info.last_layer_outputs_only:
        reader.clear()
        reader.steer.set_captures([top], [RESID])
        reader.steer.want(0, 5, 6)
        assert reader.try_decode(toks) == 0
        message = reader.steer.sequence_error(0)
        assert f"layer {top} holds output tokens only: position 5 of sequence 0 is no output" in message


@every_architecture
def test_last_layer_with_few_outputs(fresh: MakeRaw, arch: str) -> None:
    """The edit reaches the right rows when the last block holds output rows only, and the logits follow."""
    r = fresh(arch, n_ubatch=5, **SMALL)
    top, outputs, stream = r.n_layer - 1, [4, 7, 12], stream_of(r)
    toks = [Tok(t.token, t.pos, 0, t.pos in outputs) for t in H.prompt(18)]
    vectors = {0: H.vector(r.n_embd, [(top, RESID)]), 1: H.vector(r.n_embd, [(top, RESID)], seed=3)}
    terms = [NativeTerm(0, PROJECT, 1.1), NativeTerm(1, ADD, -0.8)]

    def run(first: int | None) -> tuple[np.ndarray, np.ndarray]:
        r.clear()
        if first is not None:
            r.steer_with(vectors, terms, first=first)
        r.steer.set_captures([top], [RESID], stream=stream)
        for p in outputs:
            r.steer.want(0, p, p + 1)
        logits = r.decode(toks)
        rows = r.rows_of([toks[p] for p in outputs], [top], RESID, stream)[top]
        r.steer.set_captures([], [])
        return logits, rows

    plain_logits, plain = run(None)
    logits, rows = run(0)
    H.close(rows, H.edited(plain, (top, RESID), vectors, terms), H.tolerance(plain, vectors, terms))
    assert (np.abs(logits - plain_logits).max(axis=1) > 0.02).all()
    logits_7, rows_7 = run(5)
    assert np.array_equal(rows_7[0], plain[0]) and np.array_equal(rows_7[1:], rows[1:])
    assert np.array_equal(logits_7[0], plain_logits[0]) and np.array_equal(logits_7[1:], logits[1:])


# ---- against the unpatched library


def steps_of(r: Raw) -> tuple[list[dict[str, Any]], list[dict[str, Any]], H.Vector]:
    """(decodes without steering, the same under llama.cpp's own control vector in three windows, the vector that equals it)."""
    toks = H.prompt(21)
    prefill = [[t.token, t.pos, 0, t.pos % 4 == 2] for t in toks[:18]]
    run: list[dict[str, Any]] = [{"tokens": prefill}, *({"tokens": [[t.token, t.pos, 0, True]]} for t in toks[18:])]
    vector = H.vector(r.n_embd, [(il, RESID) for il in range(1, r.n_layer)], scale=1.7)
    data = [float(x) for v, scale in vector.places.values() for x in np.float32(-0.6 * scale * v.astype(np.float64))]
    windows = ((1, r.n_layer - 1), (2, 2), (r.n_layer - 1, r.n_layer - 1))
    cvecs: list[dict[str, Any]] = [{"cvec": data, "first": first, "last": last} for first, last in windows]
    return run, [step for cvec in cvecs for step in ({"clear": True}, cvec, *run)], vector


@pytest.fixture(scope="module")
def unpatched(
    llama_cpp: Any, runtime: Runtime, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[np.ndarray]]:
    """What the unpatched library computes for ``steps_of`` each architecture: one process does them all."""
    named = os.environ.get("STEER_STOCK_LIB")
    folder = Path(named) if named else runtime.stock_lib_dir
    if folder is None or not folder.is_dir():
        reason = "no unpatched libllama to compare with: run `steer build --stock-twin`, or set STEER_STOCK_LIB"
        if os.environ.get("STEER_REQUIRE_STOCK") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    scratch = tmp_path_factory.mktemp("unpatched")
    for arch in ARCHITECTURES:
        r = Raw(tiny(arch), steer=False, **SMALL)
        run, with_cvec, _ = steps_of(r)
        r.close()
        job = {"path": str(tiny(arch)), "steps": [*run, *with_cvec], "options": {**SMALL, "n_ubatch": STEPS_UBATCH}}
        (scratch / f"{arch}.json").write_text(json.dumps({**job, "out": str(scratch / f"{arch}.npz")}))
    script = "import sys\nfrom tests.engine import stock_runner\nfor sys.argv[1] in sys.argv[1:]: stock_runner.main()"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder), "MTMD_CPP_LIB": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "src"), str(root), environment.get("PYTHONPATH", "")])
    jobs = [str(scratch / f"{arch}.json") for arch in ARCHITECTURES]
    done = subprocess.run([sys.executable, "-c", script, *jobs], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = {}
    for arch in ARCHITECTURES:
        with np.load(scratch / f"{arch}.npz") as data:
            results[arch] = [data[f"step{i}"] for i in range(len(data.files))]
    return results


@every_architecture
def test_same_bits_as_the_unpatched_library(fresh: MakeRaw, unpatched: dict[str, list[np.ndarray]], arch: str) -> None:
    """Unsteered before and after steering, and steered as llama.cpp's own control vector does it at the same dose."""
    r = fresh(arch, n_ubatch=STEPS_UBATCH, **SMALL)
    run, with_cvec, vector = steps_of(r)
    n = len(run)
    plain, controlled = unpatched[arch][:n], unpatched[arch][n:]
    assert len(controlled) == 3 * n

    def same(want: list[np.ndarray], steps: list[dict[str, Any]] = run) -> bool:
        r.forget()
        return all(np.array_equal(a, b) for a, b in zip(run_steps(r, steps), want, strict=True))

    assert same(plain), "before any steering call"
    vector.put(r.steer, 0)
    r.steer.set_config(2, [NativeTerm(0, CLAMP, 1.0)])
    r.steer.set_range(1, 0, -1, 2)
    assert same(plain), "with another sequence steered"
    r.steer.set_config(2, [])
    windows = ((1, r.n_layer - 1), (2, 2), (r.n_layer - 1, r.n_layer - 1))
    for i, (first, last) in enumerate(windows):
        want = controlled[i * n : (i + 1) * n]
        assert np.abs(want[0] - plain[0]).max() > 0.02, "the control vector did nothing"
        r.steer.set_config(1, [NativeTerm(0, ADD, -0.6, first, last)])
        r.steer.set_range(0, 0, -1, 1)
        assert same(want), "unequal to the control vector"
    r.steer.set_range(0, 0, -1, 0)
    assert same(plain), "with the range taken back"
    r.steer.free()
    assert same(plain), "after freeing"
    assert same(controlled, with_cvec), "the patched library's own control vector"
