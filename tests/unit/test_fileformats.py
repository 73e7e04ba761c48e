"""Other programs' vector files: what is read, where it acts, what is written, what is refused."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from steer_plugins.errors import VectorError
from steer_plugins.steering.vector import ModelIdentity, SteeringVector
from steer_plugins.store.foreign import builtin_formats
from steer_plugins.store.foreign.common import losses, vector_name
from steer_plugins.store.formats import NO_FACTS, Facts, Format, format_of, read_any
from tests.unit.fileformat_samples import (
    CONTROL,
    DS4,
    DS41,
    GLP,
    NEURONPEDIA,
    ROWS,
    SAE,
    SAE_CONFIG,
    SAMPLES,
    SVEC,
    UNIT,
    N,
    archive,
    directions,
    gguf,
    npz,
    pt,
    put,
    safetensors,
    tensor,
    text,
)

MODEL = ModelIdentity("llama", 30, N, "a" * 64, "b" * 64, name="Tiny")
FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in builtin_formats()}


def refused(path: Path, match: str, facts: Facts = NO_FACTS, name: str | None = None) -> str:
    """The sentence of the refusal, which names the file."""
    with pytest.raises(VectorError, match=match) as caught:
        if name is None:
            read_any(path, facts)
        else:
            read_with = FORMATS[name].read_with
            assert read_with
            read_with(path, facts)
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence and len(sentence) < 600
    return sentence


def same(vector: SteeringVector, rows: dict[tuple[int, str], np.ndarray], atol: float = 1e-6) -> None:
    assert list(vector.directions) == sorted(rows)
    for key, row in rows.items():
        length = np.linalg.norm(row) if vector.op != "project" else 1.0
        np.testing.assert_allclose(vector.directions[key] * length, row, atol=atol)
        if vector.op != "project":
            np.testing.assert_allclose(vector.effective(*key), row, atol=atol)


# ---- what the samples mean ----

MEANING = {
    "gguf-control-vector": ("add", "0-", {(il + 1, "resid_post"): row for il, row in enumerate(ROWS)}),
    "glp": ("project", "0-", {(il + 1, "ffn_out"): row for il, row in enumerate(UNIT)}),
    "ds4": ("project", "0-", {(il, "ffn_out"): row for il, row in enumerate(UNIT)}),
    "ds41dir": ("project", "0-", {(il, "ffn_out"): row for il, row in enumerate(UNIT)}),
    "svec": ("add", "all", {(0, "resid_post"): ROWS[0], (7, "resid_post"): ROWS[1]}),
    "npz": ("add", "all", {(0, "resid_post"): ROWS[0], (7, "resid_post"): ROWS[1]}),
    "torch": ("add", "all", {(il, "resid_post"): row for il, row in enumerate(ROWS)}),
    "saelens": ("add", "all", {(4, "resid_post"): ROWS[1]}),
    "gemma-scope": ("add", "all", {(20, "resid_post"): ROWS[1]}),
    "neuronpedia": ("add", "all", {(4, "resid_post"): ROWS[1]}),
}


def test_every_format_has_a_sample() -> None:
    assert set(SAMPLES) == set(FORMATS) == set(MEANING)


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_found_by_content_and_mean_what_they_say(tmp_path: Path, name: str) -> None:
    path, facts = put(tmp_path, name)
    assert format_of(path).name == name
    vector = read_any(path, facts)
    op, scope, rows = MEANING[name]
    assert (vector.op, vector.default_scope, vector.calibration, vector.identity) == (op, scope, None, None)
    same(vector, rows)
    assert vector.provenance and vector.provenance["format"] == name and vector.provenance["file"] == path.name
    if facts == Facts():
        assert read_any(path) == vector


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.write])
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    path, facts = put(tmp_path, name)
    vector = read_any(path, facts).replace(identity=ModelIdentity("llama", 9, N, "a" * 64, "b" * 64))
    out = tmp_path / ("out" + path.suffix)
    write = FORMATS[name].write
    assert write
    write(vector, out)
    first = out.read_bytes()
    again = read_any(out, facts if name == "ds41dir" else None)
    assert format_of(out).name == name and (again.op, again.default_scope) == (vector.op, vector.default_scope)
    same(again, MEANING[name][2])
    write(vector, out)
    assert out.read_bytes() == first
    if name == "ds4":  # a row for each layer of the model
        assert out.stat().st_size == 9 * N * 4 and json.loads(out.with_suffix(".json").read_text())["shape"] == [9, N]


@pytest.mark.parametrize("op", ["add", "project", "clamp"])
def test_npz_holds_every_op_site_and_scope(tmp_path: Path, op: str) -> None:
    rows = {(0, "attn_out"): ROWS[0], (0, "ffn_out"): ROWS[1], (3, "resid_post"): ROWS[2]}
    vector = SteeringVector("v", rows, op=op, default_scope="5-20")
    assert losses(vector, FORMATS["npz"].limits) == []
    FORMATS["npz"].write(vector, tmp_path / "v.npz")  # type: ignore[misc]
    again = read_any(tmp_path / "v.npz")
    assert (again.op, again.default_scope) == (op, "5-20")
    same(again, {key: row / np.linalg.norm(row) for key, row in rows.items()} if op == "project" else rows)
    with np.load(tmp_path / "v.npz", allow_pickle=False) as data:  # numpy reads it too
        assert data["direction.3.resid_post"].dtype == np.float32


# ---- refusing to write ----


@pytest.mark.parametrize(
    ("name", "vector", "match"),
    [
        ("gguf-control-vector", SteeringVector("v", {(2, "resid_post"): ROWS[0]}, op="project"), "the op project"),
        ("gguf-control-vector", SteeringVector("v", {(2, "ffn_out"): ROWS[0]}, default_scope="0-"), "the site ffn_out"),
        ("gguf-control-vector", SteeringVector("v", {(0, "resid_post"): ROWS[0]}, default_scope="0-"), "layer 0"),
        ("gguf-control-vector", SteeringVector("v", {(1, "resid_post"): ROWS[0]}), "the scope all"),
        ("svec", SteeringVector("v", {(1, "resid_post"): ROWS[0]}, calibration={}), "the calibration"),
        ("glp", SteeringVector("v", {(1, "resid_post"): ROWS[0]}, op="clamp", default_scope="0-"), "the op clamp"),
        ("ds4", SteeringVector("v", {(1, "ffn_out"): ROWS[0]}, op="project", default_scope="0-"), "names no model"),
        ("ds4", SteeringVector("v", {(1, "resid_post"): ROWS[0]}, op="project", default_scope="0-"), "the site resid_post"),
        ("npz", SteeringVector("v", {(1, "ffn_out"): ROWS[0]}, {(1, "ffn_out"): 0.0}, op="clamp"), "clamps to 0"),
        ("npz", SteeringVector("v", {(1, "ffn_out"): ROWS[0]}, {(1, "ffn_out"): 1e300}), "too large for float32"),
        ("svec", SteeringVector("v", {(1, "resid_post"): ROWS[0]}, {(1, "resid_post"): 0.0}), "adds nothing"),
        ("neuronpedia", SteeringVector("v", {(il, "resid_post"): ROWS[0] for il in (1, 2)}), "for one layer"),
        (
            "glp",
            SteeringVector("v", {(1, s): ROWS[0] for s in ("ffn_out", "attn_out")}, op="project", default_scope="0-"),
            "for one site",
        ),
    ],
)
def test_a_writer_refuses_what_its_format_cannot_hold(tmp_path: Path, name: str, vector: SteeringVector, match: str) -> None:
    write = FORMATS[name].write
    assert write
    with pytest.raises(VectorError, match=match):
        write(vector, tmp_path / "out.f32")
    assert not list(tmp_path.iterdir())


def test_ds4_leaves_a_strangers_json_alone(tmp_path: Path) -> None:
    vector = SteeringVector("v", {(1, "ffn_out"): ROWS[0]}, op="project", default_scope="0-", identity=MODEL)
    (tmp_path / "v.json").write_text('{"mine": 1}')
    with pytest.raises(VectorError, match="in the way"):
        FORMATS["ds4"].write(vector, tmp_path / "v.f32")  # type: ignore[misc]
    assert [p.name for p in tmp_path.iterdir()] == ["v.json"] and (tmp_path / "v.json").read_text() == '{"mine": 1}'


# ---- layers ----


def test_control_vectors_of_writers_that_count_from_one(tmp_path: Path) -> None:
    path, _ = put(tmp_path, "gguf-control-vector")
    assert read_any(path, Facts(gguf_layers="block")).layers == [1, 2, 3]
    assert read_any(path, Facts(gguf_layers="plus-one")).layers == [0, 1, 2]
    beyond = ModelIdentity("llama", 3, N, "a" * 64, "b" * 64)
    refused(path, "one beyond the last block .* --gguf-layers plus-one", Facts(identity=beyond))
    assert read_any(path, Facts(gguf_layers="plus-one", identity=beyond)).layers == [0, 1, 2]
    assert read_any(path, Facts(identity=replace(beyond, n_layer=4))).layers == [1, 2, 3]


@pytest.mark.parametrize("name", ["npz", "torch"])
def test_rows_of_a_bare_array(tmp_path: Path, name: str) -> None:
    path, _ = put(tmp_path, name, npz(anything=ROWS) if name == "npz" else None)
    sentence = refused(path, "3 rows and does not say for which layers")
    assert "--at blocks" in sentence and "--at embedding" in sentence
    for facts, layers in [
        (Facts(at="blocks"), [0, 1, 2]),
        (Facts(at="embedding"), [0, 1]),
        (Facts(at=(12, 10, 30)), [10, 12, 30]),
        (Facts(identity=replace(MODEL, n_layer=3)), [0, 1, 2]),
        (Facts(identity=replace(MODEL, n_layer=2)), [0, 1]),
    ]:
        vector = read_any(path, facts)
        assert vector.layers == layers
        first = {"embedding": 1}.get(str(facts.at), 1 if facts.identity and facts.identity.n_layer == 2 else 0)
        key = (12 if facts.at == (12, 10, 30) else 0, "resid_post")
        np.testing.assert_allclose(vector.effective(*key), ROWS[first], atol=1e-6)
    refused(path, "3 rows, and the model .* 30 layers", Facts(identity=MODEL))
    for at in ((1, 2), (1, 1, 2), "rows"):
        refused(path, "3 different layers", Facts(at=at))  # type: ignore[arg-type]


def test_one_row_needs_its_layer(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    path.write_bytes(npz(v=ROWS[0]))
    refused(path, "a single row .* --at 12")
    assert read_any(path, Facts(at=(12,), op="clamp", site="ffn_out", scope="response")).sites == ["ffn_out"]


def test_neuronpedia_counts_inputs_and_we_outputs(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    for fields, layer, site in [
        ({"layerNumber": 5, "hookType": "hook_resid_pre"}, 4, "resid_post"),
        ({"layer_num": 5, "hook_type": "resid_post", "layerNumber": None, "hookType": None}, 5, "resid_post"),
        ({"layerNumber": None, "hookType": None, "hookName": "blocks.9.hook_resid_pre", "source": "8-x"}, 8, "resid_post"),
        ({"hookType": "hook_mlp_out"}, 5, "ffn_out"),
        ({"hookType": "hook_attn_out"}, 5, "attn_out"),
    ]:
        path.write_text(json.dumps({**NEURONPEDIA, **fields}))
        vector = read_any(path)
        assert vector.directions.keys() == {(layer, site)} and vector.name == "cats"
    FORMATS["neuronpedia"].write(SteeringVector("v", {(8, "resid_post"): ROWS[0]}), path)  # type: ignore[misc]
    assert json.loads(path.read_text())["layerNumber"] == 9


@pytest.mark.parametrize(
    ("metadata", "place"),
    [
        ({"metadata": {"hook_name": "blocks.7.hook_resid_pre"}}, (6, "resid_post")),
        ({"metadata": {"hook_name": "blocks.7.hook_mlp_out"}}, (7, "ffn_out")),
        ({"metadata": None, "hook_name": "blocks.7.hook_resid_post", "hook_layer": 7}, (7, "resid_post")),
        ({"metadata": None, "hook_point": "blocks.0.hook_resid_post", "hook_point_layer": 0}, (0, "resid_post")),
    ],
)
def test_saelens_hooks_of_old_and_new_configurations(tmp_path: Path, metadata: dict, place: tuple[int, str]) -> None:
    path, facts = put(tmp_path, "saelens")
    (tmp_path / "cfg.json").write_text(json.dumps({**SAE_CONFIG, **metadata}))
    assert list(read_any(path, facts).directions) == [place]


# ---- strengths are never folded in ----


def test_a_recommended_strength_is_kept_beside_the_directions(tmp_path: Path) -> None:
    path, _ = put(tmp_path, "glp", gguf(directions(UNIT), {**GLP, "glp.alpha_default": 4.0}))
    vector = read_any(path)
    assert vector.provenance and vector.provenance["recommended_strength"] == 4.0
    assert set(vector.scales.values()) == {1.0}
    FORMATS["glp"].write(vector, tmp_path / "again.gguf")  # type: ignore[misc]
    again = read_any(tmp_path / "again.gguf").provenance
    assert again and again["recommended_strength"] == 4.0
    path, _ = put(tmp_path, "neuronpedia", json.dumps({**NEURONPEDIA, "vectorDefaultSteerStrength": 44}).encode())
    vector = read_any(path)
    assert vector.provenance and vector.provenance["recommended_strength"] == 44.0
    same(vector, MEANING["neuronpedia"][2])


def test_older_glp_files(tmp_path: Path) -> None:
    old = {key.replace("glp.", "dspark."): value for key, value in GLP.items()}
    old["dspark.hook_point"] = "residual_stream_post_layer"
    path, _ = put(tmp_path, "glp", gguf(directions(UNIT), old))
    assert (read_any(path).op, read_any(path).sites) == ("project", ["resid_post"])
    without = {key: value for key, value in old.items() if not key.endswith((".mode", ".hook_point"))}
    path.write_bytes(gguf(directions(ROWS), without))
    assert (read_any(path).op, read_any(path).sites) == ("add", ["resid_post"])


# ---- refusals ----

BROKEN = {
    "gguf-control-vector": [
        (gguf(directions(ROWS, 0), CONTROL), "'direction.0'"),
        (gguf([("direction.-1", ROWS[0])], CONTROL), "'direction.-1'"),
        (gguf([("direction.1", ROWS[0]), ("direction.1", ROWS[1])], CONTROL), "two tensors named"),
        (gguf([("direction.01", ROWS[0])], CONTROL), "'direction.01'"),
        (gguf([("weight", ROWS[0])], CONTROL), "'weight'"),
        (gguf([("direction.1", ROWS)], CONTROL), "not a float32 array"),
        (gguf([("direction.1", ROWS[0].astype(np.float16))], CONTROL, kind=1), "not a float32 array"),
        (gguf([("direction.1", ROWS[0]), ("direction.2", ROWS[0][:4])], CONTROL), "another length"),
        (gguf([("direction.1", ROWS[0] * np.nan)], CONTROL), "NaN or Inf"),
        (gguf([("direction.1", ROWS[0])], CONTROL, dims=(2**40,)), "truncated"),
        (gguf([], CONTROL), "no direction"),
        (gguf([("direction.1", ROWS[0] * 0)], CONTROL), "not zero"),
        (gguf(directions(ROWS), {**CONTROL, "general.architecture": "llama"}), "'llama', no control vector"),
        (gguf(directions(ROWS), GLP), "read it as glp"),
    ],
    "glp": [
        (gguf(directions(UNIT), {**GLP, "glp.mode": "ablate"}), "mode is 'ablate'"),
        (gguf(directions(UNIT), {**GLP, "glp.mode": 1}), "mode is 1"),
        (gguf(directions(UNIT), {**GLP, "glp.hook_point": "attn.wo_b"}), "hook point is 'attn.wo_b'"),
        (gguf(directions(UNIT), {**GLP, "glp.hook_point": 3}), "hook point is 3"),
        (gguf(directions(UNIT), {**GLP, "glp.spec_version": 2}), "spec_version is 2"),
        (gguf(directions(UNIT), {**GLP, "glp.rank": 2}), "rank is 2"),
        (gguf(directions(UNIT), {**GLP, "glp.structure": "per-execution-step"}), "per-execution-step"),
        (gguf(directions(UNIT), {**GLP, "glp.layer_ids_zero_based": "0,1,2"}), "different layers"),
        (gguf(directions(UNIT), {**GLP, "glp.content_sha256": "0" * 64}), "content_sha256"),
        (gguf(directions(UNIT), {**GLP, "glp.alpha_default": float("nan")}), "alpha_default"),
        (gguf(directions(UNIT), {**GLP, "dspark.mode": "project"}), "both glp. and dspark."),
        (gguf(directions(UNIT, 0), GLP), "'direction.0'"),
        (gguf(directions(2 * UNIT), GLP), "length 2: a projection needs unit"),
        (gguf(directions(UNIT), CONTROL), "no GLP metadata"),
    ],
    "ds4": [
        (UNIT.tobytes()[:-4], "92 bytes"),
        (UNIT.tobytes() + b"\0" * 4, "100 bytes"),
        ((2 * UNIT).tobytes(), "length 2"),
        ((UNIT * np.nan).tobytes(), "NaN or Inf"),
        ((UNIT * 0).tobytes(), "not zero"),
    ],
    "svec": [
        (json.dumps({**SVEC, "directions": {"-1": [1.0]}}).encode(), "'-1' is not a layer"),
        (json.dumps({**SVEC, "directions": {"1e3": [1.0]}}).encode(), "is not a layer"),
        (b'{"model_type": "x", "directions": {"1": [1], "1": [2]}}', "twice"),
        (b'{"model_type": "x", "directions": {"1": [NaN]}}', "NaN"),
        (b'{"model_type": "x", "directions": {"1": [1e999, 1]}}', "NaN or Inf"),
        (b'{"model_type": "x", "directions": {"1": [1' + b"0" * 400 + b"]}}", "too large"),
        (json.dumps({**SVEC, "directions": {"1": ["a"]}}).encode(), "not a number"),
        (json.dumps({**SVEC, "directions": {"1": [True]}}).encode(), "not a number"),
        (json.dumps({**SVEC, "directions": {"1": []}}).encode(), "not a list of numbers"),
        (json.dumps({**SVEC, "directions": {"1": [[1.0], [2.0]]}}).encode(), "2 directions, one for each position"),
        (json.dumps({**SVEC, "directions": {"1": [1.0], "2": [1.0, 2.0]}}).encode(), "mixes directions"),
        (json.dumps({**SVEC, "directions": {}}).encode(), "'directions'"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"model_type": ' + b"[" * 100_000, "not valid JSON"),
    ],
    "npz": [
        (npz(a=np.array([object()], object)), "not a plain array"),
        (npz(a=np.array(["text"])), "not a plain array"),
        (npz(a=ROWS.astype(np.complex64)), "not a plain array"),
        (npz(a=np.zeros(3, [("x", "<f4")])), "not a plain array"),
        (npz(**{"layer.1": ROWS}), r"shape \[3, 8\]"),
        (npz(**{"1": ROWS[0], "layer_1": ROWS[1]}), "two arrays for layer 1"),
        (npz(**{"-1": ROWS[0]}), "a single row"),
        (npz(a=ROWS, b=ROWS), "arrays 'a' and 'b': choose one with steer convert --key"),
        (npz(**{"1": ROWS[0] * np.inf}), "NaN or Inf"),
        (npz(a=np.float32(1)), r"shape \[\]"),
        (npz(**{"1": ROWS[0], "op.add": ROWS[0][:0], "op.project": ROWS[0][:0]}), "two entries for its op"),
        (npz(**{"1": ROWS[0], "op.ablate": ROWS[0][:0]}), "unknown op 'ablate'"),
        (npz(**{"1": ROWS[0], "scope.never": ROWS[0][:0]}), "unknown scope"),
        (npz(**{"1": ROWS[0], "op.project": ROWS[0][:0], "scope.all": ROWS[0][:0]})[:-30], "not a zip archive, or is truncated"),
        (archive({"a.npy": b"\x93NUMPY\x01\x00\x10\x00" + b"__import__('os')"}), "not a plain array"),
        (archive({"a.npy": b"nonsense"}), "not a .npy array"),
        (
            archive({"a.npy": b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (10, 4), }\n"}),
            "arr",
        ),
        (archive({"a.npy": npz(x=ROWS)[44:], "evil.pkl": b"\x80"}), "'evil.pkl'"),
    ],
    "saelens": [
        (safetensors({"W_enc": ROWS}), "no W_dec"),
        (safetensors({"W_dec": ROWS.astype(np.int32)}), "dtype 'I32'"),
        (safetensors({"W_dec": ROWS[0]}), "whose shape is [8]"),
        (safetensors(SAE)[:-200], "truncated"),
        (safetensors({"W_dec": ROWS[:, :4].copy()}), "another shape than its cfg.json"),
        (safetensors({**SAE, "W_dec": ROWS * np.nan}), "NaN or Inf"),
        (b"\x01", "not a safetensors"),
    ],
    "gemma-scope": [
        (npz(W_enc=ROWS), "no W_dec"),
        (npz(W_dec=ROWS[0]), r"shape \[8\]"),
        (npz(W_dec=np.asfortranarray(ROWS)), "by columns"),
        (npz(W_dec=np.array([[None]])), "not a plain array"),
        (npz(W_dec=ROWS * np.nan), "NaN or Inf"),
    ],
    "neuronpedia": [
        (json.dumps({**NEURONPEDIA, "hookType": "hook_z"}).encode(), "hook is 'hook_z'"),
        (json.dumps({**NEURONPEDIA, "layerNumber": 0}).encode(), "the embedding"),
        (json.dumps({**NEURONPEDIA, "layerNumber": -3}).encode(), "-3"),
        (json.dumps({**NEURONPEDIA, "layerNumber": None}).encode(), "for which layer"),
        (json.dumps({**NEURONPEDIA, "vector": "abc"}).encode(), "not a list of numbers"),
        (json.dumps({**NEURONPEDIA, "vector": [[1.0]]}).encode(), "not a number"),
    ],
}
CASES = [(name, data, match) for name, cases in BROKEN.items() for data, match in cases]


@pytest.mark.parametrize(("name", "data", "match"), CASES, ids=[f"{name}-{match[:30]}" for name, _, match in CASES])
def test_refusals(tmp_path: Path, name: str, data: bytes, match: str) -> None:
    path, facts = put(tmp_path, name, data)
    refused(path, match if "\\" in match else re.escape(match), facts, name)


def test_signalling_nans(tmp_path: Path) -> None:
    """They make numpy warn when they are cast, which is one sentence too many."""
    bad = UNIT.copy()
    bad.view(np.uint32)[1, 0] = 0x7FA00001
    by_layer = b"}(" + b"".join(text(str(il)) + tensor((N,), n=3 * N, offset=il * N) for il in range(3)) + b"u"
    for name, data in {
        "gguf-control-vector": gguf(directions(bad), CONTROL),
        "glp": gguf(directions(bad), GLP),
        "ds4": bad.tobytes(),
        "ds41dir": DS41 + bad.tobytes(),
        "npz": npz(**{"layer.1": bad[1]}),
        "torch": pt(by_layer, {"0": bad.tobytes()}),
        "saelens": safetensors({**SAE, "W_dec": bad}),
        "gemma-scope": npz(W_dec=bad),
    }.items():
        path, facts = put(tmp_path, name, data)
        refused(path, "NaN or Inf", replace(facts, at=None) if name == "torch" else facts, name)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "ds4-directional-steering-v2"}, "v2"),
        ({"shape": [3]}, "not \\[n_layer, n_embd\\]"),
        ({"shape": [-3, -8]}, "-3"),
        ({"shape": [3, 2**62]}, "not a whole number"),
        ({"shape": [3, 9]}, "96 bytes, not those of 3 x 9"),
        ({"shape": [3, 0]}, "96 bytes, not those of 3 x 0"),
        ({"shape": [3.0, 8]}, "3.0"),
        ({"component": "resid"}, "component is 'resid'"),
        ({"component": None}, "--site ffn_out"),
        ({"shape": None}, "--model FILE"),
    ],
)
def test_ds4_needs_what_its_json_says(tmp_path: Path, changes: dict, match: str) -> None:
    path, _ = put(tmp_path, "ds4")
    (tmp_path / "v.json").write_text(json.dumps({**DS4, **changes}))
    refused(path, match)


def test_ds4_without_json(tmp_path: Path) -> None:
    path, _ = put(tmp_path, "ds4")
    (tmp_path / "v.json").unlink()
    model = replace(MODEL, n_layer=3)
    refused(path, "--model FILE", Facts(site="attn_out"))
    refused(path, "--site", Facts(identity=model))
    assert read_any(path, Facts(site="attn_out", identity=model)).sites == ["attn_out"]
    put(tmp_path, "ds4")
    refused(path, "its site is ffn_out, and --site says attn_out", Facts(site="attn_out"))


def test_saelens_needs_its_configuration(tmp_path: Path) -> None:
    path, facts = put(tmp_path, "saelens")
    refused(path, "3 features: choose one with steer convert --feature N")
    refused(path, "there is no feature 3: they are 0 to 2", Facts(feature=3))
    for change, match in [
        ({"architecture": "transcoder"}, "architecture is 'transcoder'"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "embedding"),
        ({"metadata": {"hook_name": "blocks.3.attn.hook_z"}}, "hook_z"),
        ({"metadata": {}}, "hook is None"),
        ({"d_in": 99}, "another shape"),
    ]:
        (tmp_path / "cfg.json").write_text(json.dumps({**SAE_CONFIG, **change}))
        refused(path, match, facts)
    (tmp_path / "cfg.json").unlink()
    refused(path, "no cfg.json beside it", facts)


def test_gemma_scope_needs_its_layer(tmp_path: Path) -> None:
    path, _ = put(tmp_path, "gemma-scope")
    refused(path, "choose one with steer convert --feature N", Facts(at=(3,)))
    refused(path, "--at 12", Facts(feature=1))
    refused(path, "--at takes the layer", Facts(feature=1, at="embedding"))
    refused(path, "--at 12", Facts(feature=1, identity=replace(MODEL, n_layer=1)))


def test_only_the_row_of_a_large_sae_is_read(tmp_path: Path) -> None:
    """A sparse file of 4 GiB, of which one row is there."""
    header = json.dumps({"W_dec": {"dtype": "BF16", "shape": [1 << 28, N], "data_offsets": [0, 1 << 32]}}).encode()
    path, _ = put(tmp_path, "saelens", len(header).to_bytes(8, "little") + header)
    (tmp_path / "cfg.json").write_text(json.dumps({**SAE_CONFIG, "d_sae": 1 << 28}))
    with open(path, "r+b") as file:
        file.truncate(8 + len(header) + (1 << 32))
        file.seek(8 + len(header) + 5_000_000 * N * 2)
        file.write((ROWS[0].view(np.uint32) >> 16).astype("<u2").tobytes())
    vector = read_any(path, Facts(feature=5_000_000))
    np.testing.assert_allclose(vector.effective(4, "resid_post"), ROWS[0], rtol=1e-2)


@pytest.mark.parametrize("name", ["npz", "torch", "gemma-scope"])
def test_zip_bombs(tmp_path: Path, name: str) -> None:
    path, facts = put(tmp_path, name)
    member = {"npz": "layer.1.npy", "torch": "v/data.pkl", "gemma-scope": "W_dec.npy"}[name]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file, file.open(member, "w") as out:
        for _ in range(257):
            out.write(b"\0" * (1 << 20))
    assert path.stat().st_size < 2 << 20
    refused(path, "unpacks to 269484032 bytes", facts, name)


def test_zip_archives_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    good = bytearray(npz(**{"layer.1": ROWS[0]}))
    at = good.index(ROWS[0].tobytes())
    good[at] ^= 1
    path.write_bytes(good)
    refused(path, "damaged")  # the checksum
    with pytest.warns(UserWarning, match="Duplicate"):
        path.write_bytes(_twice(npz(**{"layer.1": ROWS[0]})))
    refused(path, "two of the same name")
    encrypted = bytearray(npz(**{"layer.1": ROWS[0]}))
    for magic, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.index(magic) + flags] |= 1
    path.write_bytes(encrypted)
    refused(path, "encrypted")
    path.write_bytes(archive({"layer.1.npy": b"\0" * 100}, zipfile.ZIP_LZMA))
    refused(path, "another way than deflate")


def _twice(data: bytes) -> bytes:
    import io

    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as file:
        file.writestr("layer.1.npy", b"other")
    return out.getvalue()


def test_a_gguf_model_is_no_vector(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf([("token_embd.weight", ROWS)], {"general.architecture": "llama"}))
    refused(path, "none of the formats")


def test_contradictions_between_file_and_user(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    path.write_bytes(npz(**{"direction.3.ffn_out": ROWS[0], "op.project": ROWS[0][:0]}))
    assert read_any(path).op == "project"
    refused(path, "its op is project, and --op says add", Facts(op="add"))
    refused(path, "its site is ffn_out, and --site says attn_out", Facts(site="attn_out"))
    refused(path, "unknown scope", Facts(scope="sometimes"))
    path = tmp_path / "v.pt"
    path.write_bytes(pt(b"}(" + text("layer") + b"K\x11" + text("bias") + tensor((N,)) + b"u", {"0": ROWS[0].tobytes()}))
    assert read_any(path).layers == [17]
    refused(path, "it is for layer 17", Facts(at=(3,)))


@pytest.mark.parametrize("text", ["Cats & Dogs!", "con", "", "___", "a" * 200, "naïve", "..", "NUL.x"])
def test_names_from_files_are_names(text: str) -> None:
    SteeringVector(vector_name(text), {(0, "resid_post"): [1.0]})


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("name", "beside"), [("svec", ""), ("neuronpedia", ""), ("saelens", "cfg.json"), ("ds4", "v.json")])
def test_json_with_a_byte_order_mark(tmp_path: Path, name: str, beside: str, coding: str) -> None:
    path, facts = put(tmp_path, name)
    plain = read_any(path, facts)
    marked = tmp_path / beside if beside else path
    marked.write_bytes(marked.read_bytes().decode().encode(coding))
    assert format_of(path).name == name and read_any(path, facts) == plain


@pytest.mark.parametrize("name", ["gguf-control-vector", "svec"])
@pytest.mark.parametrize(
    ("hint", "architecture", "other"),
    [
        ("qwen2", "llama", True),
        ("llama", "qwen2", True),
        ("llama", "llama", False),
        ("", "llama", False),
        ("mistral", "llama", False),
        ("qwen2_moe", "qwen2moe", False),
        ("gpt_oss", "gpt-oss", False),
        ("gemma3_text", "gemma3", False),
        ("cohere", "command-r", False),
        ("deepseek_v3", "deepseek2", False),
    ],
)
def test_a_vector_that_was_made_for_another_architecture(
    tmp_path: Path, name: str, hint: str, architecture: str, other: bool
) -> None:
    data = json.dumps({**SVEC, "model_type": hint}).encode()
    if name == "gguf-control-vector":
        data = gguf(directions(ROWS), {**CONTROL, "controlvector.model_hint": hint})
    path, _ = put(tmp_path, name, data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_any(path, Facts(identity=replace(MODEL, architecture=architecture)))
        said = [str(one.message) for one in caught]
        assert said == (
            [f"the file says that its vector was made for {hint!r}, and this model is {architecture}"] if other else []
        )
        read_any(path)  # nobody asks for a model
    assert len(caught) == len(said)


def test_the_way_out_for_a_single_row_names_a_single_layer(tmp_path: Path) -> None:
    path, _ = put(tmp_path, "npz", npz(a=ROWS[:1]))
    assert "--at 12" in refused(path, "single row|1 rows", Facts(identity=MODEL))
