"""``steer convert``: what is written, what is said, and that nothing gets lost silently."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from steer_plugins import testing
from steer_plugins.cli.main import main
from steer_plugins.steering.vector import ModelIdentity, SteeringVector
from steer_plugins.store.foreign import builtin_formats
from steer_plugins.store.formats import read_any
from steer_plugins.store.identity import identity_of_gguf
from steer_plugins.store.library import Library
from steer_plugins.store.vectorfile import write_vector
from tests.unit.fileformat_samples import ROWS, SAMPLES, N, npz, pt, put, tensor

MODEL = ModelIdentity("llama", 9, N, "a" * 64, "b" * 64, name="Tiny")
Run = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    rows = {(il, "resid_post"): ROWS[i] for i, il in enumerate((0, 3, 4))}
    vector = SteeringVector("mood", rows, identity=MODEL, calibration={"dose": 1}, provenance={"method": "x"})
    write_vector(vector, "mood.safetensors")
    return tmp_path


@pytest.fixture
def convert(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*args: object, code: int = 0) -> str:
        before = sorted(os.listdir(folder))
        assert main(["convert", *map(str, args)]) == code
        out, err = capsys.readouterr()
        if code == 0:
            assert err == ""
            return out
        assert out == "" and (code == 2 or err.count("\n") == 1), err
        assert sorted(os.listdir(folder)) == before
        return err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write("llama", tmp_path_factory.mktemp("model") / "tiny.gguf")[0]


def test_a_loss_is_named_and_refused(convert: Run) -> None:
    said = convert("mood.safetensors", "mood.gguf", code=1)
    for lost in ("layer 0", "the scope all", "the calibration", "--lossy"):
        assert lost in said
    said = convert("mood.safetensors", "mood.gguf", "--lossy")
    for lost in (
        "lost: layer 0",
        "lost: the scope all",
        "lost: the calibration",
        'left out: which model it belongs to (llama 9x8 "Tiny")',
    ):
        assert lost in said
    vector = read_any("mood.gguf")
    assert (vector.layers, vector.default_scope, vector.calibration) == ([3, 4], "0-", None)
    np.testing.assert_allclose(vector.effective(3, "resid_post"), ROWS[1], atol=1e-6)


@pytest.mark.parametrize(
    ("op", "site", "out", "options", "lost"),
    [
        ("project", "resid_post", "v.gguf", [], "the op project"),
        ("add", "ffn_out", "v.f32", [], "the op add"),
        ("clamp", "resid_post", "v.gguf", ["--to", "glp"], "the op clamp"),
        ("clamp", "resid_post", "v.svec", [], "the op clamp"),
    ],
)
def test_another_op_is_lossy(convert: Run, op: str, site: str, out: str, options: list[str], lost: str) -> None:
    write_vector(SteeringVector("v", {(3, site): ROWS[0]}, op=op, default_scope="0-", identity=MODEL), "v.safetensors")
    assert lost in convert("v.safetensors", out, *options, code=1)
    assert f"lost: {lost}" in convert("v.safetensors", out, *options, "--lossy")
    assert read_any(out).op != op


def test_a_site_that_has_no_place_is_left_out(convert: Run) -> None:
    write_vector(SteeringVector("v", {(3, s): ROWS[0] for s in ("ffn_out", "resid_post")}, default_scope="0-"), "v.safetensors")
    assert "the site ffn_out" in convert("v.safetensors", "v.gguf", code=1)
    convert("v.safetensors", "v.gguf", "--lossy")
    assert list(read_any("v.gguf").directions) == [(3, "resid_post")]
    write_vector(SteeringVector("w", {(3, "ffn_out"): ROWS[0]}), "w.safetensors")
    assert "no direction that this format can hold" in convert("w.safetensors", "w.gguf", "--lossy", code=1)
    assert "choose one with --site" in convert("v.safetensors", "g.gguf", "--to", "glp", code=1)
    convert("v.safetensors", "g.gguf", "--to", "glp", "--site", "ffn_out")
    assert read_any("g.gguf").sites == ["ffn_out"]


def test_nothing_is_lost_on_the_way_back(convert: Run) -> None:
    """Formats that can hold a vector need no --lossy, and give it back."""
    convert("mood.safetensors", "mood.npz", "--layers", "0,3")
    assert "wrote 'mood'" in convert("mood.npz", "again.safetensors")
    again = read_any("again.safetensors")
    assert again.layers == [0, 3] and again.default_scope == "all"
    np.testing.assert_allclose(again.effective(0, "resid_post"), ROWS[0], atol=1e-6)


def test_choosing_layers_drops_a_calibration_and_says_so(convert: Run) -> None:
    assert "left out: the calibration" in convert("mood.safetensors", "m.json", "--layers", "3")
    for layers in ("3,5", "7"):
        assert "not all that --layers and --site ask for" in convert("mood.safetensors", "x.npz", "--layers", layers, code=1)
    assert "choose one with --layers" in convert("mood.safetensors", "m2.json", "--lossy", code=1)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format_becomes_ours(convert: Run, folder: Path, name: str) -> None:
    (folder / "in").mkdir()
    path, facts = put(folder / "in", name)
    options: list[object] = [] if facts.at is None else ["--at", "blocks" if facts.at == "blocks" else facts.at[0]]
    options += [] if facts.feature is None else ["--feature", facts.feature]
    options += [] if facts.site is None else ["--site", facts.site]
    report = json.loads(convert(path, "out.safetensors", *options, "--name", "mine", "--json"))
    assert report["from"] == name and report["to"] == "steer-vector" and not report["lost"]
    vector = read_any("out.safetensors")
    assert vector.name == "mine" and vector.content_hash == read_any(path, facts).content_hash
    assert main(["show", "out.safetensors"]) == 0
    if name in ("saelens", "gemma-scope"):  # the folder will do
        convert(path.parent, "folder.safetensors", *options)
    else:
        assert main(["show", str(path)]) == (1 if name in ("torch", "ds41dir") else 0)


def test_the_model_settles_what_a_file_leaves_open(convert: Run, folder: Path, model: Path) -> None:
    identity = identity_of_gguf(model)
    rows = np.random.default_rng(0).normal(size=(identity.n_layer, identity.n_embd)).astype(np.float32)
    Path("rows.pt").write_bytes(pt(tensor(rows.shape), {"0": rows.tobytes()}))
    assert "--at blocks" in convert("rows.pt", "rows.safetensors", code=1)
    convert("rows.pt", "rows.safetensors", "--model", model)
    vector = read_any("rows.safetensors")
    assert vector.identity == identity and vector.layers == list(range(identity.n_layer))
    # so does the library, which knows the model when a file is used
    assert Library().resolve("rows.pt", identity).layers == vector.layers
    Path("more.npz").write_bytes(npz(v=np.vstack([rows[:1], rows])))
    assert Library().resolve("more.npz", identity).content_hash == vector.content_hash
    # ds4 needs a row for each layer
    write_vector(SteeringVector("v", {(1, "ffn_out"): rows[1]}, op="project", default_scope="0-"), "v.safetensors")
    assert "give it with --model" in convert("v.safetensors", "v.f32", code=1)
    convert("v.safetensors", "v.f32", "-m", model)
    assert Path("v.f32").stat().st_size == rows.nbytes
    other = json.loads(Path("v.json").read_text())
    assert other["component"] == "ffn_out" and other["shape"] == list(rows.shape)
    assert "does not fit" in convert(put(folder, "svec")[0], "no.safetensors", "-m", model, code=1)
    assert "is for llama 9x8" in convert("mood.safetensors", "no.npz", "-m", model, code=1)


def test_off_by_one_writers(convert: Run, folder: Path) -> None:
    path, _ = put(folder, "gguf-control-vector")
    convert(path, "late.safetensors", "--gguf-layers", "plus-one")
    assert read_any("late.safetensors").layers == [0, 1, 2]
    convert(path, "back.gguf", "--gguf-layers", "plus-one", "--lossy")
    assert read_any("back.gguf").layers == [1, 2]
    assert "--gguf-layers says nothing about a steer-vector file" in convert(
        "mood.safetensors", "m.npz", "--gguf-layers", "plus-one", "--lossy", code=1
    )


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["mood.safetensors", "v.xyz"], "no format that can be written has the suffix of v.xyz"),
        (["mood.safetensors", "v.pt"], "choose with --to "),
        (["mood.safetensors", "v.pt", "--to", "torch"], "the format torch can only be read"),
        (["mood.safetensors", "v.pt", "--to", "onnx"], "there is no format named 'onnx'"),
        (["mood.safetensors", "v.npz", "--from", "onnx"], "there is no format named 'onnx'"),
        (["mood.safetensors", "v.npz", "--from", "npz"], "not a zip archive"),
        (["mood.safetensors", "mood.safetensors"], "exists: choose another file, or replace it with --overwrite"),
        (["nothing.gguf", "v.npz"], "no vector file nothing.gguf"),
        (["nothing.gguf", "v.npz", "--from", "glp"], "no vector file nothing.gguf"),
        ([".", "v.npz"], "it is a folder"),
        (["mood.safetensors", "v.npz", "--at", "blocks"], "--at says nothing about a steer-vector file"),
        (["mood.safetensors", "v.npz", "--feature", "3"], "--feature says nothing"),
        (["mood.safetensors", "v.npz", "--op", "add"], "--op says nothing"),
        (["mood.safetensors", "v.npz", "--layers", "x"], "--layers 'x' cannot be read"),
        (["mood.safetensors", "v.npz", "--lossy", "--name", "No"], "not a vector name"),
        (["mood.safetensors", "no/v.npz", "--lossy"], "cannot write"),
        (["mood.safetensors", "v.npz", "-m", "no.gguf"], "no model file no.gguf"),
    ],
)
def test_one_sentence(convert: Run, args: list[str], match: str) -> None:
    assert match in convert(*args, code=1)


@pytest.mark.parametrize("at", ["3", "x", "2,1", "1-", "blocks,1"])
def test_at(convert: Run, at: str) -> None:
    Path("v.npz").write_bytes(npz(v=ROWS[:2]))
    if at == "2,1":  # in the order of the rows
        convert("v.npz", "out.safetensors", "--at", at)
        np.testing.assert_allclose(read_any("out.safetensors").effective(2, "resid_post"), ROWS[0], atol=1e-6)
    else:
        assert "--at" in convert("v.npz", "out.safetensors", "--at", at, code=1)


def test_overwrite_replaces(convert: Run) -> None:
    Path("m.npz").write_text("old")
    convert("mood.safetensors", "m.npz", "--lossy", "--overwrite")
    assert read_any("m.npz").layers == [0, 3, 4]


def test_help_names_every_format() -> None:
    from click.testing import CliRunner

    from steer_plugins.cli.convert import convert as command

    text = CliRunner().invoke(command, ["--help"]).output
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text("utf-8")
    for fmt in builtin_formats():
        assert fmt.name in text and f"| `{fmt.name}`" in page
    assert "Examples:" in text


def test_the_documentation_runs(folder: Path) -> None:
    import re

    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text("utf-8")
    Path("v_refusal.pt").write_bytes(pt(tensor((3, N)), {"0": ROWS.tobytes()}))
    space: dict = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.S)[0], space)
    assert space["vector"].op == "project" and space["vector"].layers == [0, 1, 2]
