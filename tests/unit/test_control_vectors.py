"""Control vectors among llama-server's flags: what it would leave out without a word stops the start with a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steer_plugins import testing
from steer_plugins.client import ServerProcess
from steer_plugins.client.controlvectors import check_control_vectors
from steer_plugins.errors import EngineError
from steer_plugins.store.foreign.gguftensors import write_directions
from tests.unit.test_cli_serve import binary, posix  # noqa: F401

N_LAYER = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write("llama", tmp_path_factory.mktemp("model") / "tiny.gguf", n_layer=N_LAYER)[0]


@pytest.fixture
def width(model: Path) -> int:
    from steer_plugins.store.identity import identity_of_gguf

    return identity_of_gguf(model).n_embd


def control_vector(path: Path, n_embd: int, *layers: int) -> Path:
    write_directions(path, {}, {layer: np.ones(n_embd, np.float32) for layer in layers or (1, 2)})
    return path


def test_what_fits_is_left_to_llama_server(model: Path, width: int, tmp_path: Path) -> None:
    good = str(control_vector(tmp_path / "good.gguf", width))
    other = str(control_vector(tmp_path / "other, too.gguf", width, 3))
    for args in (
        [],
        ["-c", "512"],
        ["--control-vector", good],
        ["--control-vector", f'{good},"{other}"'],
        ["--control-vector-scaled", f"{good}:-0.5", "--control-vector-layer-range", "2", "9"],
        ["--control-vector-scaled", f"{good}:x:y"],  # which llama-server refuses by itself
        ["--control-vector"],
    ):
        check_control_vectors(args, model)
        check_control_vectors(args, None)


@pytest.mark.parametrize("flag", ["--control-vector", "--control-vector-scaled", "--control_vector"])
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("nope.gguf", "cannot be read: No such file"),
        ("empty.gguf", "is not one"),
        ("text.gguf", "is not a GGUF file"),
        ("tiny.gguf", "is not one"),
        ("wide.gguf", "directions of 8 numbers, the states of the model have"),
        ("deep.gguf", "names layer 4, and the model has 0 to 3"),
        (".", "is not one"),
    ],
)
def test_what_would_be_left_out_is_refused(model: Path, width: int, tmp_path: Path, flag: str, file: str, words: str) -> None:
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "text.gguf").write_text("a control vector")
    (tmp_path / "tiny.gguf").write_bytes(model.read_bytes())
    control_vector(tmp_path / "wide.gguf", 8)
    control_vector(tmp_path / "deep.gguf", width, 2, 4)
    good = control_vector(tmp_path / "good.gguf", width)
    scale = ":0.5" if flag.endswith("scaled") else ""
    for value in (f"{tmp_path / file}{scale}", f"{good}{scale},{tmp_path / file}{scale}"):
        with pytest.raises(EngineError, match=words) as caught:
            check_control_vectors([flag, value, "-c", "512"], model)
        assert str(tmp_path / file) in str(caught.value) and "\n" not in str(caught.value)


def test_layers_and_scales(model: Path, width: int, tmp_path: Path) -> None:
    good = control_vector(tmp_path / "good.gguf", width)
    with pytest.raises(EngineError, match="--control-vector-layer-range holds none of the layers"):
        check_control_vectors(["--control-vector", str(good), "--control-vector-layer-range", "3", "3"], model)
    for scale in ("nan", "inf"):
        with pytest.raises(EngineError, match=f"is {scale}: give a finite number"):
            check_control_vectors(["--control-vector-scaled", f"{good}:{scale}"], model)
    wide = control_vector(tmp_path / "wide.gguf", 8)
    with pytest.raises(EngineError, match="those before it have 8"):
        check_control_vectors(["--control-vector", f"{wide},{good}"], None)


@posix
def test_nothing_is_started(binary: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    with ServerProcess(binary) as server, pytest.raises(EngineError, match="cannot be read"):
        server.start(model, ["--control-vector", str(tmp_path / "nope.gguf")])
    assert not (tmp_path / "said.json").exists()


@posix
def test_what_only_the_log_says_ends_the_server(
    binary: Path,  # noqa: F811
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_MODE", "left out")
    with ServerProcess(binary) as server:
        server.start(model)
        with pytest.raises(EngineError, match="without a control vector, so it was ended: .*failed to load control vector file"):
            server.wait_ready(30)
        assert not server.running
