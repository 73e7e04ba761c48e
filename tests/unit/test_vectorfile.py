"""The vector file: exact round trips, and a refusal with a sentence for everything else."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_plugins import atomic as files
from steer_plugins.errors import VectorError
from steer_plugins.steering.vector import OPS, SCOPES, SITES, ModelIdentity, SteeringVector
from steer_plugins.store import vectorfile
from steer_plugins.store.formats import read_any
from steer_plugins.store.vectorfile import read_vector, write_vector

N = 8
MODEL = ModelIdentity("llama", 30, N, "a" * 64, "b" * 64, name='Tïny "quoted" \u0000 模型', n_streams=1)

notes = st.none() | st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)
keys = st.tuples(st.integers(0, 29), st.sampled_from(SITES))


@st.composite
def vectors(draw) -> SteeringVector:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    places = draw(st.lists(keys, min_size=1, max_size=5, unique=True))
    scale = st.floats(-1e300, 1e300) | st.sampled_from([0.0, 5e-324, 0.1, 1 / 3])
    return SteeringVector(
        draw(st.from_regex(r"v[a-z0-9._-]{0,30}", fullmatch=True)),
        {key: rng.normal(size=N) for key in places},
        {key: draw(scale) for key in places},
        op=draw(st.sampled_from(OPS)),
        default_scope=draw(st.sampled_from([*SCOPES, "0-", "5-20"])),
        identity=draw(st.sampled_from([None, MODEL])),
        provenance=draw(notes),
        calibration=draw(notes),
    )


def make() -> SteeringVector:
    rng = np.random.default_rng(0)
    places = [(3, "resid_post"), (12, "resid_post"), (3, "ffn_out")]
    return SteeringVector(
        "mood", {key: rng.normal(size=N) for key in places}, identity=MODEL, provenance={"method": "x"}, calibration={"y": 1}
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mood.safetensors"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(vectors())
def test_round_trip_is_exact(path, vector):
    write_vector(vector, path)
    first = path.read_bytes()
    again = read_vector(path)
    assert again == vector and again.content_hash == vector.content_hash
    assert list(again.scales.items()) == list(vector.scales.items())
    for key, row in vector.directions.items():
        assert again.directions[key].tobytes() == row.tobytes()
    write_vector(again, path)
    assert path.read_bytes() == first
    assert read_any(path) == vector


def test_arithmetic_survives_the_file(path):
    vector = make()
    for result in (2.5 * vector, vector - vector, vector + 0.1 * vector, vector.with_layers(12, 12)):
        write_vector(result, path)
        assert read_vector(path) == result


def test_any_safetensors_reader_sees_the_directions(path):
    from safetensors.numpy import load_file

    write_vector(make(), path)
    tensors = load_file(path)
    assert set(tensors) == {"direction.3.resid_post", "direction.12.resid_post", "direction.3.ffn_out"}
    assert tensors["direction.3.ffn_out"].tobytes() == make().directions[3, "ffn_out"].tobytes()


def test_the_documentation_names_every_field_and_word():
    page = (Path(__file__).parents[2] / "docs" / "vector-format.md").read_text("utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.M) == list(vectorfile._FIELDS)
    assert "# The vector file, " + " and ".join(f"`{name}`" for name in vectorfile.FORMATS) in page
    for word in (*OPS, *SCOPES):
        assert f'`"{word}"`' in page
    for site in SITES:
        assert f"`{site}`" in page
    for field in MODEL.to_dict():
        assert f"`{field}`" in page


# --- writing


def test_writing_replaces_the_file_and_leaves_nothing_beside_it(path):
    path.write_text("old")
    write_vector(make(), path)
    assert os.listdir(path.parent) == [path.name]
    assert read_vector(path) == make()


def test_an_interrupted_write_leaves_the_old_file(path, monkeypatch):
    write_vector(make(), path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, function, full)
            with pytest.raises(VectorError, match="cannot write .*No space left on device"):
                write_vector(2 * make(), path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(VectorError, match="cannot write"):
        write_vector(make(), tmp_path / "nowhere" / "v.safetensors")


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_permissions_are_those_of_any_new_file(path):
    path.with_name("plain").touch()
    write_vector(make(), path)
    assert path.stat().st_mode == path.with_name("plain").stat().st_mode


# --- reading what someone else wrote


def parts(path) -> tuple[dict, dict, bytes]:
    """(safetensors header, the 'steer' object, tensor bytes) of a good file."""
    write_vector(make(), path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["steer"]), data[8 + length :]


def assemble(path, header, steer, data) -> None:
    if steer is not None:
        header["__metadata__"]["steer"] = steer if isinstance(steer, str) else json.dumps(steer)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refuse(path, words: str) -> None:
    with pytest.raises(VectorError) as caught:
        read_vector(path)
    message = str(caught.value)
    assert words in message and str(path) in message and "\n" not in message


def test_the_harness_makes_readable_files(path):
    assemble(path, *parts(path))
    assert read_vector(path) == make()


A = "direction.3.resid_post"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "steer-vector-v3"}, "unknown format version 'steer-vector-v3'"),
        ({"format": None}, "unknown format version None"),
        ({"op": "multiply"}, "unknown op 'multiply'"),
        ({"op": ["add"]}, "'op' is not a string"),
        ({"default_scope": "everywhere"}, "unknown scope"),
        ({"default_scope": "9-1"}, "ends before it starts"),
        ({"name": "../mood"}, "is not a vector name"),
        ({"name": "con"}, "Windows"),
        ({"n_embd": 9}, "has shape [8], not [9]"),
        ({"n_embd": 8.0}, "'n_embd' is not a positive whole number"),
        ({"n_embd": True}, "'n_embd' is not a positive whole number"),
        ({"scales": []}, "'scales' is not an object"),
        ({"scales": {}}, "has no scale"),
        ({"provenance": []}, "'provenance' is neither"),
        ({"calibration": 1}, "'calibration' is neither"),
        ({"identity": "llama"}, "not a JSON object"),
        ({"identity": {**MODEL.to_dict(), "n_embd": 9}}, "n_embd"),
        ({"identity": {**MODEL.to_dict(), "n_layer": 12}}, "names layer 12"),
        ({"identity": {**MODEL.to_dict(), "extra": 1}}, "unknown field 'extra'"),
        ({"identity": {**MODEL.to_dict(), "architecture": "\ud800"}}, "'architecture' is not a text"),
        ({"op": "\ud800"}, "unknown op"),
        ({"name": "\ud800"}, "is not a vector name"),
        ({"content_sha256": "0" * 64}, "damaged"),
        ({"content_sha256": None}, "'content_sha256' is not a string"),
        ({"extra": 1}, "unknown field 'extra'"),
    ],
)
def test_every_field_is_checked(path, change, words):
    header, steer, data = parts(path)
    assemble(path, header, {**steer, **change}, data)
    refuse(path, words)


@pytest.mark.parametrize("field", vectorfile._FIELDS)
def test_every_field_is_required(path, field):
    header, steer, data = parts(path)
    del steer[field]
    assemble(path, header, steer, data)
    refuse(path, "unknown format version None" if field == "format" else f"lacks '{field}'")


@pytest.mark.parametrize("value", ["1", True, None, [], 10**400])
def test_scales_are_finite_numbers(path, value):
    header, steer, data = parts(path)
    steer["scales"][A] = value
    assemble(path, header, steer, data)
    refuse(path, "the scale of direction.3.resid_post is not")


def test_scales_and_tensors_are_the_same(path):
    header, steer, data = parts(path)
    steer["scales"]["direction.4.resid_post"] = 1.0
    assemble(path, header, steer, data)
    refuse(path, "scale 'direction.4.resid_post' has no tensor")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"format":"steer-vector-v1","format":"steer-vector-v1"}', "names a field twice"),
        ('{"format":NaN}', "contains NaN"),
        ('{"format":-Infinity}', "contains -Infinity"),
        ("[" * 100_000, "not valid JSON"),
        ('{"format":' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_bad_json_inside(path, text, words):
    header, _, data = parts(path)
    assemble(path, header, text, data)
    refuse(path, words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("direction.03.resid_post", "unknown tensor"),
        ("direction.-1.resid_post", "unknown tensor"),
        ("direction.3.mlp", "unknown tensor"),
        ("direction.3", "unknown tensor"),
        ("direction.3.resid_post\n", "unknown tensor"),
        ("direction.٣.resid_post", "unknown tensor"),
        ("weight", "unknown tensor"),
    ],
)
def test_tensor_names(path, name, words):
    header, steer, data = parts(path)
    header[name] = header.pop(A)
    steer["scales"][name] = steer["scales"].pop(A)
    assemble(path, header, steer, data)
    refuse(path, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "F16"}, "dtype 'F16', not F32"),
        ({"shape": [N, 1]}, "shape [8, 1]"),
        ({"shape": [2 * N]}, "shape [16]"),
        ({"shape": [True]}, "shape [True]"),
        ({"shape": "8"}, "shape '8'"),
        ({"data_offsets": [0]}, "malformed data_offsets"),
        ({"data_offsets": [0, 4.0]}, "malformed data_offsets"),
        ({"data_offsets": [-4, 28]}, "does not fit"),
        ({"data_offsets": [2**62, 2**62 + 32]}, "does not fit"),
        ({"data_offsets": [0, 28]}, "28 bytes of data, not 32"),
        ({"data_offsets": [32, 64]}, "overlap or leave gaps"),
        ({"extra": 1}, "malformed"),
    ],
)
def test_tensor_entries(path, change, words):
    header, steer, data = parts(path)
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    name = next(n for n in header if n != "__metadata__" and n != last and header[n]["data_offsets"][0] != 32)
    header[name] = {**header[name], **change}
    assemble(path, header, steer, data)
    refuse(path, words)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (np.full(N, np.nan), "NaN or Inf"),
        (np.full(N, np.inf), "NaN or Inf"),
        (np.zeros(N), "has length 0"),
        (np.ones(N), "has length 2.82843"),
        (1.002 * np.eye(N)[0], "has length 1.002"),
        (np.eye(N)[0], "damaged"),
    ],
)
def test_directions_are_unit_and_undamaged(path, row, words):
    header, steer, data = parts(path)
    begin, end = header[A]["data_offsets"]
    assemble(path, header, steer, data[:begin] + row.astype("<f4").tobytes() + data[end:])
    refuse(path, words)


def test_a_length_of_nearly_one_is_accepted_and_normalised(path):
    """Another writer may round differently: what is applied, scale times direction, stays what the file says."""
    header, steer, data = parts(path)
    begin, end = header[A]["data_offsets"]
    row = (1.0005 * np.eye(N)[0]).astype(np.float32)
    directions = {**make().directions, (3, "resid_post"): row}
    steer["content_sha256"] = vectorfile.content_sha256("add", directions, make().scales)
    assemble(path, header, steer, data[:begin] + row.tobytes() + data[end:])
    vector = read_vector(path)
    assert np.linalg.norm(vector.directions[3, "resid_post"]) == pytest.approx(1, abs=1e-7)
    assert vector.scales[3, "resid_post"] == pytest.approx(1.0005 * make().scales[3, "resid_post"], rel=1e-6)


def test_layout_of_the_file(path):
    header, steer, data = parts(path)
    good = path.read_bytes()
    for content, words in [
        (b"", "not a safetensors file"),
        (b"GGUF", "not a safetensors file"),
        (b"\0" * 8, "not a safetensors file"),
        (struct.pack("<Q", 10**12) + b"{}", "header claims"),
        (struct.pack("<Q", 100) + b"{}", "does not fit"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 2) + b"\xff\xff", "not valid JSON"),
        (struct.pack("<Q", 2) + b"{}", "without a steering vector"),
        (good + b"\0", "1 bytes follow the last tensor"),
        (good[:-1], "truncated"),
    ]:
        path.write_bytes(content)
        refuse(path, words)
    text = json.dumps({"__metadata__": {"steer": json.dumps(steer)}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    refuse(path, "holds no direction")
    text = b'{"a":1,"a":2}'
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    refuse(path, "names a field twice")


def test_sizes_are_bounded_before_anything_is_parsed(path, monkeypatch):
    write_vector(make(), path)
    monkeypatch.setattr(vectorfile, "json_object", lambda *a: pytest.fail("parsed"))
    with monkeypatch.context() as patch:
        patch.setattr(vectorfile, "MAX_FILE_BYTES", 100)
        refuse(path, "too large")
    monkeypatch.setattr(vectorfile, "MAX_HEADER_BYTES", 100)
    refuse(path, "at most 100")


def test_a_vector_that_could_not_be_read_back_is_not_written(path, monkeypatch):
    monkeypatch.setattr(vectorfile, "MAX_HEADER_BYTES", 100)
    with pytest.raises(VectorError, match="too large"):
        write_vector(make(), path)
    assert not path.exists()


def test_missing_files_and_folders(tmp_path):
    for what in (tmp_path / "none.safetensors", tmp_path):
        refuse(what, "cannot read the vector file")
        with pytest.raises(VectorError, match="no vector file"):
            read_any(what)


def test_files_of_no_known_format(path):
    for content in (b"", b"GGUF", os.urandom(100)):
        path.write_bytes(content)
        with pytest.raises(VectorError, match="none of the formats that can be read: .*steer-vector"):
            read_any(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_give_a_vector_error_or_the_same_steering(path, data):
    write_vector(make(), path)
    good = path.read_bytes()
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        bad = bytearray(good)
        for bit in data.draw(st.lists(st.integers(0, 8 * len(good) - 1), min_size=1, max_size=3, unique=True)):
            bad[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bad)
    try:
        vector = read_vector(path)
    except VectorError as error:
        assert "\n" not in str(error)
    else:
        # The flipped bit was in a name or a note: what is applied is still what was written.
        assert len(bad) == len(good) and vector.content_hash == make().content_hash
    try:
        read_any(path)
    except VectorError:
        pass


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.booleans())
def test_noise_gives_a_vector_error(path, noise, with_length):
    path.write_bytes(struct.pack("<Q", len(noise)) + noise if with_length else noise)
    with pytest.raises(VectorError):
        read_vector(path)


def test_every_single_bit_flip_of_the_directions_is_seen(path):
    write_vector(make(), path)
    good = path.read_bytes()
    start = 8 + struct.unpack("<Q", good[:8])[0]
    for bit in range(8 * start, 8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(VectorError):
            read_vector(path)
