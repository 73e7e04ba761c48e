"""Damaged files of every format: each reader answers with a vector or with one sentence, and with nothing else."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_plugins.errors import VectorError
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.foreign import builtin_formats
from steer_plugins.store.formats import Facts, read_any
from tests.unit.fileformat_samples import SAMPLES, put

FORMATS = {fmt.name: fmt for fmt in builtin_formats()}
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
names = st.sampled_from(sorted(SAMPLES))


def attempt(name: str, path: Path, facts: Facts) -> SteeringVector | None:
    """The vector, or None after one sentence. Read through the format itself, as ``--from`` does, and as ``steer show`` does."""
    found = None
    for read in (FORMATS[name].read_with, read_any):
        assert read
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = read(path, facts)
        except VectorError as error:
            sentence = str(error)
            assert "\n" not in sentence and str(path) in sentence and len(sentence) < 800, sentence
            found = None
        else:
            assert all(np.isfinite(row).all() for row in found.directions.values()) and all(k[0] >= 0 for k in found.directions)
    return found


@pytest.mark.parametrize("name", SAMPLES)
def test_truncation(tmp_path: Path, name: str) -> None:
    """What is cut off is missed, except the padding at a GGUF file's end."""
    sample = SAMPLES[name][1]
    whole = attempt(name, *put(tmp_path, name))
    assert whole
    n = len(sample)
    for length in sorted({*range(min(n, 40)), *range(0, n, 7), *range(max(n - 70, 0), n)}):
        path, facts = put(tmp_path, name, sample[:length])
        vector = attempt(name, path, facts)
        assert vector is None or (vector == whole and sample.startswith(b"GGUF") and length >= len(sample) - 32), length


@pytest.mark.parametrize("more", [b"\0", b"\0" * 4, b"x" * 999])
@pytest.mark.parametrize("name", SAMPLES)
def test_trailing_bytes(tmp_path: Path, name: str, more: bytes) -> None:
    """Formats that know their end refuse more, or read what was there before."""
    whole = attempt(name, *put(tmp_path, name))
    vector = attempt(name, *put(tmp_path, name, SAMPLES[name][1] + more))
    assert vector in (None, whole)


@quick
@given(names, st.data())
def test_changed_bytes(tmp_path: Path, name: str, data: st.DataObject) -> None:
    sample = bytearray(SAMPLES[name][1])
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(sample) - 1), st.integers(0, 255)), min_size=1, max_size=6)):
        sample[at] = value
    attempt(name, *put(tmp_path, name, bytes(sample)))


@quick
@given(names, st.data())
def test_moved_pieces(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Pieces left out, repeated, or put elsewhere: lengths and offsets that no longer fit."""
    sample = SAMPLES[name][1]
    a, b, c = sorted(data.draw(st.lists(st.integers(0, len(sample)), min_size=3, max_size=3)))
    for changed in (sample[:a] + sample[b:], sample[:b] + sample[a:], sample[:a] + sample[b:c] + sample[a:b] + sample[c:]):
        attempt(name, *put(tmp_path, name, changed))


@quick
@given(names, st.integers(0, 2**16), st.sampled_from([1, 2, 4, 8]), st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**63, 2**64 - 1]))
def test_numbers_at_their_limits(tmp_path: Path, name: str, at: int, width: int, value: int) -> None:
    """Sizes, counts and offsets that would allocate everything there is, or point behind the file."""
    sample = bytearray(SAMPLES[name][1])
    at %= max(len(sample) - width, 1)
    sample[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    attempt(name, *put(tmp_path, name, bytes(sample)))


@quick
@given(names, st.sampled_from(sorted(SAMPLES)) | st.binary(max_size=300))
def test_files_of_another_kind(tmp_path: Path, name: str, other: str | bytes) -> None:
    content = other if isinstance(other, bytes) else SAMPLES[other][1]
    vector = attempt(name, *put(tmp_path, name, content))
    assert vector is None or isinstance(other, str)


@pytest.mark.parametrize("name", SAMPLES)
def test_files_that_are_too_large_are_refused_unread(tmp_path: Path, name: str) -> None:
    path, facts = put(tmp_path, name)
    with open(path, "r+b") as file:
        file.truncate(300 << 20)  # sparse: it takes no room
    assert attempt(name, path, facts) is None


def test_json_that_would_fill_the_memory_is_refused_unparsed(tmp_path: Path) -> None:
    """Millions of empty lists are small in a file and large in memory."""
    path = tmp_path / "many.svec"
    path.write_text('{"model_type": "llama", "directions": {"1": [' + ",".join(["[]"] * 500_000) + "]}}")
    with pytest.raises(VectorError, match="more lists and objects"):
        FORMATS["svec"].read(path)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_folder_and_a_missing_file(tmp_path: Path, name: str) -> None:
    facts = SAMPLES[name][3]
    (tmp_path / "folder.pt").mkdir()
    for path in (tmp_path / "folder.pt", tmp_path / "nothing.pt"):
        assert attempt(name, path, facts) is None


@quick
@given(
    st.sampled_from(["v.json", "cfg.json"]),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-5, 40)
        | st.floats()
        | st.sampled_from(["ffn_out", "blocks.3.hook_resid_pre", "topk", ""]),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=4,
    ),
    st.sampled_from(
        ["format", "shape", "component", "architecture", "metadata", "hook_name", "d_in", "d_sae", "thinking", "model"]
    ),
)
def test_what_stands_beside_a_file(tmp_path: Path, beside: str, value: object, field: str) -> None:
    name = "ds4" if beside == "v.json" else "saelens"
    path, facts = put(tmp_path, name)
    content = json.loads((tmp_path / beside).read_bytes())
    target = content.setdefault("metadata", {}) if field == "hook_name" else content
    target[field] = value
    (tmp_path / beside).write_text(json.dumps(content))
    attempt(name, path, facts)
