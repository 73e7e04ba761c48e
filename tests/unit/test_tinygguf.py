"""Tiny random models: what is in the files, read back without llama.cpp."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from steer_plugins import testing
from steer_plugins.errors import ModelError
from steer_plugins.testing import __main__ as command
from steer_plugins.testing import writer
from steer_plugins.testing.vocab import byte_alphabet

F32, I32 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.I32


class Model:
    """A GGUF file read into memory: ``meta`` (key -> value), ``types`` (key -> GGUF value types), ``tensors``."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.meta: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        self.types = {key: field.types for key, field in reader.fields.items()}
        self.shapes = {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors}
        self.quants = {t.name: t.tensor_type for t in reader.tensors}
        self.data = {t.name: np.array(t.data) for t in reader.tensors}

    def __getitem__(self, key: str) -> Any:
        return self.meta[f"{self.meta['general.architecture']}.{key}"]

    def token(self, text: str) -> int:
        return int(self.meta["tokenizer.ggml.tokens"].index(text))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    cache: dict[tuple[Any, ...], Model] = {}

    def get(arch: str, **options: Any) -> Model:
        key = (arch, *sorted(options.items()))
        if key not in cache:
            path = tmp_path_factory.mktemp("tiny") / "model.gguf"
            assert testing.write(arch, path, **options) == [path]
            cache[key] = Model(path)
        return cache[key]

    return get


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


every_architecture = pytest.mark.parametrize("arch", testing.ARCHITECTURES)
# What is written how does not depend on the architecture; these have every kind of tensor.
several = pytest.mark.parametrize("arch", ["llama", "gpt-oss", "qwen35moe", "gemma", "gemma3", "deepseek2", "deepseek4"])


def test_the_promised_architectures() -> None:
    assert set(testing.ARCHITECTURES) == set(
        "llama llama4 mistral3 mistral4 qwen2 qwen2moe qwen3 qwen3moe qwen3next qwen35 qwen35moe gemma gemma2 gemma3 "
        "deepseek2 deepseek4 phi3 glm4 gpt-oss granite granitemoe olmo2 smollm3 command-r cohere2 starcoder2 exaone "
        "exaone4 stablelm".split()
    )


# ---- bytes


@several
def test_equal_arguments_give_equal_bytes_and_another_seed_other_weights(arch: str, tmp_path: Path) -> None:
    first, again, other = tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "c.gguf"
    testing.write(arch, first, seed=7)
    testing.write(arch, again, seed=7)
    testing.write(arch, other, seed=8)
    assert digest(first) == digest(again)
    assert first.stat().st_size < 15e6
    a, c = Model(first), Model(other)
    assert a.shapes == c.shapes
    assert [name for name in a.data if np.array_equal(a.data[name], c.data[name])] == []


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    digests = set()
    for hash_seed in ("1", "2"):
        path = tmp_path / f"{hash_seed}.gguf"
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        arguments = ["llama", str(path), "--layers", "1", "--weights", "q8_0"]
        subprocess.run([sys.executable, "-m", "steer_plugins.testing", *arguments], env=environment, check=True)
        digests.add(digest(path))
    assert len(digests) == 1


def test_numbers_are_the_same_on_every_machine(model: Callable[..., Model]) -> None:
    # Update these when the recipe changes on purpose; a difference between machines or numpy versions is a bug.
    def fingerprint(loaded: Model, *names: str) -> str:
        return hashlib.sha256(b"".join(loaded.data[name].tobytes() for name in names)).hexdigest()[:16]

    v4 = model("deepseek4")
    assert fingerprint(v4, "blk.2.attn_q_b.weight", "blk.2.hc_ffn_base.weight") == "969ce20f0e7cb4fb"
    assert fingerprint(v4, "blk.0.ffn_gate_tid2eid.weight") == "7c74abbb084ab2ff"
    words = "\n".join(v4.meta["tokenizer.ggml.tokens"]).encode()
    assert hashlib.sha256(words).hexdigest()[:16] == "83236e7c84bacb10"


def test_layers_do_not_change_when_others_are_added(model: Callable[..., Model]) -> None:
    deep, shallow = model("llama"), model("llama", n_layer=2)
    assert shallow["block_count"] == 2
    assert set(shallow.data) == {name for name in deep.data if not name.startswith(("blk.2.", "blk.3."))}
    for name, values in shallow.data.items():
        assert np.array_equal(values, deep.data[name]), name


# ---- tensors


def llama_like(n_layer: int, q: int, kv: int, extra: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    block = {
        "attn_norm.weight": (128,),
        "attn_q.weight": (128, q),
        "attn_k.weight": (128, kv),
        "attn_v.weight": (128, kv),
        "attn_output.weight": (q, 128),
        "ffn_norm.weight": (128,),
        "ffn_gate.weight": (128, 256),
        "ffn_up.weight": (128, 256),
        "ffn_down.weight": (256, 128),
        **extra,
    }
    return {f"blk.{il}.{name}": shape for il in range(n_layer) for name, shape in block.items()}


def experts(n_expert: int, shared: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "ffn_gate_inp.weight": (128, n_expert),
        "ffn_gate_exps.weight": (128, 64, n_expert),
        "ffn_up_exps.weight": (128, 64, n_expert),
        "ffn_down_exps.weight": (64, 128, n_expert),
    }
    if shared:
        shapes |= {f"ffn_{part}_shexp.weight": (128, 64) for part in ("gate", "up")}
        shapes["ffn_down_shexp.weight"] = (64, 128)
    return shapes


def changed(blocks: dict[str, tuple[int, ...]], without: str, **extra: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """``blocks`` without the tensors whose names hold one of the words, and with others in each block."""
    layers = {name.split(".")[1] for name in blocks}
    kept = {name: shape for name, shape in blocks.items() if not any(word in name for word in without.split())}
    return kept | {f"blk.{il}.{name}": shape for il in layers for name, shape in extra.items()}


BIASES: dict[str, tuple[int, ...]] = {"attn_q.bias": (128,), "attn_k.bias": (64,), "attn_v.bias": (64,)}
HEAD_NORMS: dict[str, tuple[int, ...]] = {"attn_q_norm.weight": (64,), "attn_k_norm.weight": (64,)}
POST_NORMS: dict[str, tuple[int, ...]] = {"post_attention_norm.weight": (128,), "post_ffw_norm.weight": (128,)}
SHARED_GATE: dict[str, tuple[int, ...]] = {"ffn_gate_inp_shexp.weight": (128,)}
DENSE = "ffn_gate ffn_up ffn_down"
FUSED_FFN: dict[str, tuple[int, ...]] = {"ffn_up.weight": (128, 512), "ffn_down.weight": (256, 128)}
PLAIN = llama_like(4, 128, 64, {})
WIDE = llama_like(4, 256, 128, {})
NORM_BIASES: dict[str, tuple[int, ...]] = {"attn_norm.bias": (128,), "ffn_norm.bias": (128,)}
GPT_OSS: dict[str, tuple[int, ...]] = {
    **experts(8, shared=False),
    "post_attention_norm.weight": (128,),
    "attn_q.bias": (256,),
    "attn_k.bias": (128,),
    "attn_v.bias": (128,),
    "attn_output.bias": (128,),
    "attn_sinks.weight": (4,),
    "ffn_gate_inp.bias": (8,),
    "ffn_gate_exps.bias": (64, 8),
    "ffn_up_exps.bias": (64, 8),
    "ffn_down_exps.bias": (128, 8),
}


@pytest.mark.parametrize(
    ("arch", "blocks"),
    [
        ("llama", PLAIN),
        ("smollm3", PLAIN),
        ("exaone", PLAIN),
        ("granite", PLAIN),
        ("mistral3", PLAIN),
        ("qwen2", changed(PLAIN, "-", **BIASES)),
        ("qwen2moe", changed(PLAIN, DENSE, **BIASES, **experts(8, shared=True), **SHARED_GATE)),
        ("qwen3", changed(WIDE, "-", **HEAD_NORMS)),
        ("qwen3moe", changed(WIDE, DENSE, **HEAD_NORMS, **experts(8, shared=False))),
        ("gemma", WIDE),
        ("gemma2", changed(WIDE, "-", **POST_NORMS)),
        ("gemma3", llama_like(6, 256, 64, {**HEAD_NORMS, **POST_NORMS})),
        ("phi3", changed(PLAIN, f"attn_q attn_k attn_v {DENSE}", **{"attn_qkv.weight": (128, 256)}, **FUSED_FFN)),
        ("glm4", changed(PLAIN, DENSE, **BIASES, **POST_NORMS, **FUSED_FFN)),
        ("gpt-oss", changed(WIDE, f"ffn_norm {DENSE}", **GPT_OSS)),
        ("granitemoe", changed(PLAIN, DENSE, **experts(8, shared=True))),
        (
            "olmo2",
            changed(
                PLAIN,
                "attn_norm ffn_norm",
                **POST_NORMS,
                **{"attn_q_norm.weight": (128,), "attn_k_norm.weight": (64,)},
            ),
        ),
        ("command-r", changed(PLAIN, "ffn_norm")),
        ("cohere2", changed(PLAIN, "ffn_norm")),
        (
            "starcoder2",
            changed(
                PLAIN,
                "ffn_gate",
                **NORM_BIASES,
                **BIASES,
                **{"attn_output.bias": (128,), "ffn_up.bias": (256,), "ffn_down.bias": (128,)},
            ),
        ),
        ("exaone4", changed(PLAIN, "attn_norm ffn_norm", **POST_NORMS, **{name: (32,) for name in HEAD_NORMS})),
        ("stablelm", changed(PLAIN, "-", **NORM_BIASES, **BIASES)),
    ],
)
def test_block_tensors(model: Callable[..., Model], arch: str, blocks: dict[str, tuple[int, ...]]) -> None:
    loaded = model(arch)
    n_vocab = len(loaded.meta["tokenizer.ggml.tokens"])
    ends: dict[str, tuple[int, ...]] = {"token_embd.weight": (128, n_vocab), "output_norm.weight": (128,)}
    if arch not in ("gemma", "gemma2", "command-r", "cohere2"):
        ends["output.weight"] = (128, n_vocab)
    if arch in ("starcoder2", "stablelm"):
        ends["output_norm.bias"] = (128,)
    assert loaded.shapes == {**ends, **blocks}
    assert set(loaded.quants.values()) == {F32}
    epsilon = "" if arch in ("command-r", "cohere2", "starcoder2", "stablelm") else "_rms"
    assert f"{arch}.attention.layer_norm{epsilon}_epsilon" in loaded.meta


def test_llama4_has_experts_in_every_second_layer(model: Callable[..., Model]) -> None:
    loaded = model("llama4")
    assert loaded["interleave_moe_layer_step"] == 2
    for il in range(4):
        block = {name.split(".", 2)[2]: s for name, s in loaded.shapes.items() if name.startswith(f"blk.{il}.ffn_")}
        dense = {"ffn_gate.weight": (128, 256), "ffn_up.weight": (128, 256), "ffn_down.weight": (256, 128)}
        assert block == {"ffn_norm.weight": (128,), **(experts(8, shared=True) if il % 2 else dense)}


@pytest.mark.parametrize("arch", ["qwen3next", "qwen35", "qwen35moe"])
def test_hybrid_layers(model: Callable[..., Model], arch: str) -> None:
    """Three recurrent layers, then one with attention and a gate as wide as its queries."""
    loaded = model(arch)
    heads, state, conv = loaded["ssm.time_step_rank"], loaded["ssm.state_size"], loaded["ssm.conv_kernel"]
    width = 2 * loaded["ssm.group_count"] * state + heads * state
    assert loaded["ssm.inner_size"] == heads * state
    for il in range(4):
        block = {name.split(".", 2)[2]: s for name, s in loaded.shapes.items() if name.startswith(f"blk.{il}.")}
        assert ("ssm_a" in block) == ("attn_q.weight" not in block) == (il < 3)
        assert ("ffn_gate_exps.weight" in block) == (arch != "qwen35")
        if il < 3:
            assert block["ssm_conv1d.weight"] == (conv, width) and block["attn_qkv.weight"] == (128, width)
            assert (loaded.data[f"blk.{il}.ssm_a"] < 0).all(), "the state must fade"
            fused = {"ssm_ba.weight": (128, 2 * heads)}
            parts = {"ssm_beta.weight": (128, heads), "ssm_alpha.weight": (128, heads)}
            expected = fused if arch == "qwen3next" else parts
            assert {name: s for name, s in block.items() if name[4:7] in ("ba.", "bet", "alp")} == expected
        else:
            assert block["attn_q.weight"] == (128, 2 * 4 * 64) and block["attn_output.weight"] == (4 * 64, 128)
    if arch != "qwen3next":
        assert sum(loaded["rope.dimension_sections"]) == loaded["rope.dimension_count"] // 2


def test_mistral4_is_deepseek2_with_a_temperature(model: Callable[..., Model]) -> None:
    mistral, deepseek = model("mistral4"), model("deepseek2")
    assert mistral.shapes == deepseek.shapes
    own = {k.split(".", 1)[1] for k in mistral.meta if k.startswith("mistral4.")}
    other = {k.split(".", 1)[1] for k in deepseek.meta if k.startswith("deepseek2.")}
    assert own - other == {"attention.temperature_scale", "attention.temperature_length"} and other <= own


def test_deepseek2_tensors(model: Callable[..., Model]) -> None:
    loaded = model("deepseek2")
    latent, rope, heads = loaded["attention.kv_lora_rank"], loaded["rope.dimension_count"], 4
    assert loaded["attention.key_length"] == latent + rope
    assert loaded["attention.value_length"] == latent
    nope = loaded["attention.key_length_mla"] - rope
    assert loaded.shapes["blk.1.attn_kv_a_mqa.weight"] == (128, latent + rope)
    assert loaded.shapes["blk.1.attn_k_b.weight"] == (nope, latent, heads)
    assert loaded.shapes["blk.1.attn_v_b.weight"] == (latent, loaded["attention.value_length_mla"], heads)
    assert loaded["leading_dense_block_count"] == 1
    assert "blk.0.ffn_gate.weight" in loaded.shapes and "blk.0.ffn_gate_exps.weight" not in loaded.shapes
    assert "blk.1.ffn_gate.weight" not in loaded.shapes
    assert loaded.shapes["blk.1.ffn_gate_exps.weight"] == (128, 64, 8)
    assert loaded.shapes["blk.1.ffn_down_exps.weight"] == (64, 128, 8)


def deepseek4_shapes(n_vocab: int) -> dict[str, tuple[int, ...]]:
    d, streams, mix, head, heads, q_lora, groups, o_lora, experts, used, ff = 256, 4, 24, 64, 4, 64, 2, 64, 8, 2, 32
    index_heads, index = 4, 128
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (d, n_vocab),
        "output_norm.weight": (d,),
        "output.weight": (d, n_vocab),
        "output_hc_fn.weight": (streams * d, streams),
        "output_hc_base.weight": (streams,),
        "output_hc_scale.weight": (1,),
    }
    for il, ratio in enumerate([0, 0, 4, 128, 4, 128]):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (d,),
            "attn_sinks.weight": (heads,),
            "attn_q_a.weight": (d, q_lora),
            "attn_q_a_norm.weight": (q_lora,),
            "attn_q_b.weight": (q_lora, heads * head),
            "attn_kv.weight": (d, head),
            "attn_kv_a_norm.weight": (head,),
            "attn_output_a.weight": (heads * head // groups, o_lora * groups),
            "attn_output_b.weight": (groups * o_lora, d),
            "ffn_norm.weight": (d,),
            "ffn_gate_inp.weight": (d, experts),
            "ffn_gate_exps.weight": (d, ff, experts),
            "ffn_up_exps.weight": (d, ff, experts),
            "ffn_down_exps.weight": (ff, d, experts),
            "ffn_gate_shexp.weight": (d, ff),
            "ffn_up_shexp.weight": (d, ff),
            "ffn_down_shexp.weight": (ff, d),
        }
        for part in ("attn", "ffn"):
            block[f"hc_{part}_fn.weight"] = (streams * d, mix)
            block[f"hc_{part}_base.weight"] = (mix,)
            block[f"hc_{part}_scale.weight"] = (3,)
        if il < 3:
            block["ffn_gate_tid2eid.weight"] = (used, n_vocab)
        else:
            block["exp_probs_b.bias"] = (experts,)
        if ratio:
            wide = (2 if ratio == 4 else 1) * head
            block["attn_compressor_kv.weight"] = block["attn_compressor_gate.weight"] = (d, wide)
            block["attn_compressor_ape.weight"] = (wide, ratio)
            block["attn_compressor_norm.weight"] = (head,)
        if ratio == 4:
            block["indexer.proj.weight"] = (d, index_heads)
            block["indexer.attn_q_b.weight"] = (q_lora, index_heads * index)
            block["indexer_compressor_kv.weight"] = block["indexer_compressor_gate.weight"] = (d, 2 * index)
            block["indexer_compressor_ape.weight"] = (2 * index, 4)
            block["indexer_compressor_norm.weight"] = (index,)
        shapes |= {f"blk.{il}.{name}": shape for name, shape in block.items()}
    return shapes


def test_deepseek4_tensors_and_keys(model: Callable[..., Model]) -> None:
    loaded = model("deepseek4")
    expected = deepseek4_shapes(len(loaded.meta["tokenizer.ggml.tokens"]))
    assert len(expected) == 178
    assert loaded.shapes == expected
    assert {name for name, quant in loaded.quants.items() if quant == I32} == {
        f"blk.{il}.ffn_gate_tid2eid.weight" for il in range(3)
    }
    assert loaded["attention.compress_ratios"] == [0, 0, 4, 128, 4, 128]
    assert loaded["hyper_connection.count"] == 4
    assert loaded["embedding_length"] == 256
    assert loaded["expert_gating_func"] == 4
    assert loaded["hash_layer_count"] == 3
    assert loaded["attention.indexer.key_length"] % 64 == 0
    assert loaded["attention.indexer.key_length"] != loaded["attention.key_length"]


def test_hash_routing_names_different_experts_that_exist(model: Callable[..., Model]) -> None:
    table = model("deepseek4").data["blk.1.ffn_gate_tid2eid.weight"]
    assert table.min() == 0 and table.max() == 7
    assert (table[:, 0] != table[:, 1]).all()
    assert len({tuple(row) for row in table.tolist()}) == 8 * 7


@every_architecture
def test_weights_are_scaled_to_their_inputs(model: Callable[..., Model], arch: str) -> None:
    loaded = model(arch)
    assert all(np.isfinite(values).all() for values in loaded.data.values())
    for name, values in loaded.data.items():
        if name.endswith("_norm.weight"):
            assert 0.4 < values.min() and values.max() < 2.5 and values.std() > 0, name
        elif (
            len(loaded.shapes[name]) > 1 and name.startswith("blk.") and not any(w in name for w in ("_ape", "tid2eid", ".bias"))
        ):
            inputs = loaded.shapes[name][1 if "attn_k_b" in name else 0]
            assert 0.8 < values.std() * np.sqrt(inputs) < 2.2, name


@every_architecture
def test_header_describes_the_tensors(model: Callable[..., Model], arch: str) -> None:
    loaded = model(arch, n_layer=5, n_ctx=777)
    assert loaded.meta["general.architecture"] == arch
    assert loaded["block_count"] == 5 == 1 + max(int(name.split(".")[1]) for name in loaded.shapes if "blk." in name)
    assert loaded["context_length"] == 777
    assert loaded["embedding_length"] == loaded.shapes["token_embd.weight"][0]


@pytest.mark.parametrize(("weights", "quant", "file_type"), [("f16", "F16", 1), ("q8_0", "Q8_0", 7)])
@several
def test_weight_types(model: Callable[..., Model], arch: str, weights: str, quant: str, file_type: int) -> None:
    full, small = model(arch), model(arch, weights=weights)
    assert small.shapes == full.shapes
    assert small.meta["general.file_type"] == file_type
    for name, kind in small.quants.items():
        words = ("hc_", "_ape", "gate_inp", "tid2eid", "conv1d", ".bias")
        exact = len(small.shapes[name]) == 1 or any(word in name for word in words)
        if exact:
            assert kind == full.quants[name], name
            assert np.array_equal(small.data[name], full.data[name]), name
        else:
            assert kind.name == quant, name
            near = gguf.quants.dequantize(small.data[name], kind)
            assert np.abs(near - full.data[name]).max() < np.abs(full.data[name]).max() / 200, name


# ---- split files


@several
def test_split_files_hold_the_same_model(model: Callable[..., Model], arch: str, tmp_path: Path) -> None:
    whole = model(arch)
    files = testing.write(arch, tmp_path / "part.gguf", split=3)
    assert [file.name for file in files] == [f"part-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert sorted(tmp_path.iterdir()) == files
    parts = [Model(file) for file in files]
    for number, part in enumerate(parts):
        assert part.meta["split.no"] == number
        assert part.meta["split.count"] == 3
        assert part.meta["split.tensors.count"] == len(whole.data)
        assert part.types["split.no"] == part.types["split.count"] == [gguf.GGUFValueType.UINT16]
        assert part.types["split.tensors.count"] == [gguf.GGUFValueType.INT32]
        assert part.data
    names = [name for part in parts for name in part.data]
    assert names == list(whole.data)
    assert all(np.array_equal(part.data[name], whole.data[name]) for part in parts for name in part.data)

    own = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    splitting = {"split.no", "split.count", "split.tensors.count"}
    assert {k: v for k, v in parts[0].meta.items() if k not in own | splitting} == {
        k: v for k, v in whole.meta.items() if k not in own
    }
    assert all(set(part.meta) == own | splitting for part in parts[1:])


def test_split_name_keeps_other_dots(tmp_path: Path) -> None:
    files = testing.write("llama", tmp_path / "v4.1", n_layer=1, split=2)
    assert [file.name for file in files] == ["v4.1-00001-of-00002.gguf", "v4.1-00002-of-00002.gguf"]


# ---- vocabulary and templates


def test_byte_alphabet_is_gpt2s() -> None:
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert [alphabet[ord(c)] for c in "Az~!"] == list("Az~!")
    assert (alphabet[0x20], alphabet[0x0A], alphabet[0x00], alphabet[0xAD]) == ("Ġ", "Ċ", "Ā", "Ń")
    assert alphabet[0xE9] == "é"


def encode(word: str, loaded: Model) -> list[int]:
    """The tokens of one word by plain BPE: the best merge first, as a tokenizer does."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(loaded.meta["tokenizer.ggml.merges"])}
    symbols = [byte_alphabet()[byte] for byte in word.encode()]
    while True:
        found = [(ranks[pair], at) for at, pair in enumerate(zip(symbols, symbols[1:], strict=False)) if pair in ranks]
        if not found:
            return [loaded.token(symbol) for symbol in symbols]
        at = min(found)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]


@every_architecture
def test_vocabulary(model: Callable[..., Model], arch: str) -> None:
    loaded = model(arch)
    tokens, types = loaded.meta["tokenizer.ggml.tokens"], loaded.meta["tokenizer.ggml.token_type"]
    assert len(tokens) == len(set(tokens)) == len(types) == loaded.shapes["token_embd.weight"][1]
    assert tokens[:256] == byte_alphabet()
    assert loaded.meta["tokenizer.ggml.model"] == "gpt2"
    for merge in loaded.meta["tokenizer.ggml.merges"]:
        left, right = merge.split(" ")
        assert {left, right, left + right} <= set(tokens)

    for word in (" the", " question", "The", "xylophone", "naïve", "東京", "🙂", "\n\t "):
        ids = encode(word, loaded)
        back = bytes(byte_alphabet().index(character) for token in ids for character in tokens[token])
        assert back.decode() == word
    assert len(encode(" the", loaded)) == len(encode(" question", loaded)) == 1

    for key in ("bos", "eos"):
        assert types[loaded.meta[f"tokenizer.ggml.{key}_token_id"]] == gguf.TokenType.CONTROL
    assert types[loaded.token("</think>")] == gguf.TokenType.USER_DEFINED


@every_architecture
def test_control_tokens_and_odd_bytes_are_never_likely(model: Callable[..., Model], arch: str) -> None:
    loaded = model(arch)
    head = loaded.data.get("output.weight", loaded.data["token_embd.weight"])
    size = np.sqrt((head**2).sum(axis=1))
    quiet = {index for index, value in enumerate(size) if value < np.median(size) / 10}
    tokens = loaded.meta["tokenizer.ggml.tokens"]
    assert {loaded.meta["tokenizer.ggml.eos_token_id"], loaded.token("</think>"), 0x00, 0x80, 0xFF} <= quiet
    assert {ord("A"), ord(" "), ord("\n"), loaded.token("Ġthe")}.isdisjoint(quiet)
    assert all(kind == gguf.TokenType.NORMAL or i in quiet for i, kind in enumerate(loaded.meta["tokenizer.ggml.token_type"]))
    assert len(quiet) < len(tokens) / 4


def render(loaded: Model, messages: list[dict[str, str]], **variables: Any) -> str:
    jinja2 = pytest.importorskip("jinja2")
    tokens = loaded.meta["tokenizer.ggml.tokens"]
    bos = tokens[loaded.meta["tokenizer.ggml.bos_token_id"]]
    # As chat front ends set it up.
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(loaded.meta["tokenizer.chat_template"])
    return str(template.render(messages=messages, bos_token=bos, **variables))


ASK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi\nthere"}]
V4_ASK = "<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi\nthere"


@pytest.mark.parametrize(
    ("variables", "end"),
    [
        ({}, "</think>"),
        ({"thinking": True}, "<think>"),
        ({"thinking": False}, "</think>"),
        ({"enable_thinking": True}, "<think>"),
        ({"enable_thinking": False}, "</think>"),
        ({"thinking": False, "enable_thinking": True}, "</think>"),
        ({"thinking": None, "enable_thinking": True}, "<think>"),
    ],
)
def test_deepseek4_template_thinking(model: Callable[..., Model], variables: dict[str, Any], end: str) -> None:
    text = render(model("deepseek4"), ASK, add_generation_prompt=True, **variables)
    assert text == f"{V4_ASK}<｜Assistant｜>{end}"


def test_deepseek4_template_turns(model: Callable[..., Model]) -> None:
    reply = {"role": "assistant", "content": "Hello.", "reasoning_content": "A greeting."}
    loaded = model("deepseek4")
    assert render(loaded, ASK, add_generation_prompt=False) == V4_ASK
    talk = [*ASK, reply, {"role": "user", "content": "More"}]
    plain = f"{V4_ASK}<｜Assistant｜></think>Hello.<｜end▁of▁sentence｜>"
    # Thoughts of earlier turns are dropped, the latest are kept.
    assert render(loaded, talk, add_generation_prompt=True, thinking=True) == (f"{plain}<｜User｜>More<｜Assistant｜><think>")
    assert render(loaded, talk[:3], thinking=False) == plain
    assert render(loaded, talk[:3], thinking=True) == plain.replace("</think>", "<think>A greeting.</think>")


def test_deepseek4_template_tokens_exist(model: Callable[..., Model]) -> None:
    loaded = model("deepseek4")
    for token in ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>"):
        assert token in loaded.meta["tokenizer.ggml.tokens"]
    assert loaded.meta["tokenizer.ggml.pre"] == "joyai-llm"


@pytest.mark.parametrize("arch", [arch for arch in testing.ARCHITECTURES if arch != "deepseek4"])
def test_chatml_templates(model: Callable[..., Model], arch: str) -> None:
    loaded = model(arch)
    start = "<|endoftext|>" if loaded.meta["tokenizer.ggml.add_bos_token"] else ""
    body = f"{start}<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi\nthere<|im_end|>\n"
    assert render(loaded, ASK, add_generation_prompt=False) == body
    assert render(loaded, ASK, add_generation_prompt=True) == f"{body}<|im_start|>assistant\n"
    shut = "<think>\n\n</think>\n\n" if arch in ("qwen3", "qwen3moe", "qwen3next", "qwen35", "qwen35moe") else ""
    text = render(loaded, ASK, add_generation_prompt=True, enable_thinking=False)
    assert text == f"{body}<|im_start|>assistant\n{shut}"


# ---- mistakes


@pytest.mark.parametrize(
    ("arch", "options", "named"),
    [
        ("gpt5", {}, "'gpt5'"),
        ("llama", {"weights": "q4"}, "'q4'"),
        ("llama", {"n_layer": 0}, "0 layers"),
        ("llama", {"n_layer": 65}, "65 layers"),
        ("deepseek4", {"n_layer": 2}, "2 layers"),
        ("qwen35", {"n_layer": 3}, "3 layers"),
        ("llama", {"n_ctx": 0}, "0 tokens"),
        ("llama", {"split": 0}, "0 files"),
        ("llama", {"split": 1000}, "1000 files"),
    ],
)
def test_mistakes_are_named(arch: str, options: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=named):
        testing.write(arch, tmp_path / "x.gguf", **options)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        testing.write("llama", tmp_path / "nowhere" / "x.gguf")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    testing.write("llama", path, n_layer=1)
    before = digest(path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(ModelError, match="No space left on device"):
        testing.write("llama", path, seed=1)
    assert digest(path) == before
    assert list(tmp_path.iterdir()) == [path]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.gguf"
    assert command.main(["qwen2", str(path), "--seed", "3", "--layers", "2", "--ctx", "99", "--split", "2"]) == 0
    files = sorted(tmp_path.iterdir())
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    assert (Model(files[0])["block_count"], Model(files[0])["context_length"]) == (2, 99)
    assert command.main(["gpt5", str(path)]) == 1
    assert capsys.readouterr().err.startswith("error: there is no tiny model of architecture 'gpt5'")
