"""Fills a blueprint with numbers and writes it as one GGUF file, or as several the way llama.cpp splits models."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from .architectures import blueprint
from .parts import Blueprint, KeyValue, TensorSpec

WEIGHTS: tuple[str, ...] = ("f32", "f16", "q8_0")
"""Types the big matrices can have. Norms, biases, routers and hyper-connection tensors are always float32."""

_QUANTS = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_MUTED_GAIN = 0.02


def write(
    arch: str,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    weights: str = "f32",
    n_layer: int | None = None,
    n_ctx: int = 2048,
    split: int = 1,
    chat_template: str | None = None,
) -> list[Path]:
    """Write a tiny random model and return its file, or its files in order.

    ``arch`` is one of :data:`~steer_plugins.testing.ARCHITECTURES` and ``weights`` one of :data:`WEIGHTS`.
    ``n_layer`` replaces the architecture's default depth; ``n_ctx`` is the trained context length, in tokens, that
    the file states; ``chat_template`` (Jinja) replaces the architecture's own. With ``split`` > 1 the tensors are
    spread over that many files, named like ``path`` without ``.gguf`` followed by ``-00001-of-0000N.gguf``; the first
    holds the metadata and is the one to load. Equal arguments give equal bytes; another ``seed`` gives other weights.
    Files are written beside and then renamed, so no half-written model is ever seen.

    Raises :class:`~steer_plugins.errors.ModelError` for an unknown architecture or option, or when the folder
    cannot be written.
    """
    if weights not in WEIGHTS:
        raise ModelError(f"unknown weight type {weights!r} for a tiny model; choose one of {', '.join(WEIGHTS)}")
    plan = blueprint(arch, n_layer=n_layer, n_ctx=n_ctx)
    if chat_template is not None:
        plan = replace(plan, chat_template=chat_template)
    if not 1 <= split <= len(plan.tensors):
        raise ModelError(f"{len(plan.tensors)} tensors cannot be split into {split} files; choose a number in between")

    target = Path(path)
    name = target.name if split == 1 else target.name.removesuffix(".gguf") + ".gguf"
    try:
        with tempfile.TemporaryDirectory(prefix=".tinygguf-", dir=target.parent) as folder:
            _write_files(plan, Path(folder) / name, seed=seed, weights=weights, split=split)
            made = sorted(Path(folder).iterdir())
            finished = [target.with_name(file.name) for file in made]
            # Last file first: once the first file is there, the model is complete.
            for file, final in reversed(list(zip(made, finished, strict=True))):
                os.replace(file, final)
    except OSError as error:
        raise ModelError(f"cannot write the tiny model {str(target)!r}: {error.strerror or error}") from error
    return finished


def _write_files(plan: Blueprint, path: Path, *, seed: int, weights: str, split: int) -> None:
    quant, file_type = _QUANTS[weights]
    out = gguf.GGUFWriter(path, plan.architecture)
    try:
        _put(out, "general.type", "model")
        _put(out, "general.name", f"tiny random {plan.architecture}, seed {seed}")
        _put(out, "general.file_type", int(file_type))
        _put(out, "general.quantization_version", gguf.GGML_QUANT_VERSION)
        for key, value in plan.keys.items():
            _put(out, plan.architecture + key if key.startswith(".") else key, value)
        _put_tokenizer(out, plan)

        starts = {index * len(plan.tensors) // split for index in range(1, split)}
        for index, spec in enumerate(plan.tensors):
            if index in starts:
                out.tensors.append({})  # the writer starts another file here
            values = _values(spec, f"{plan.architecture}/{seed}", plan.vocab.muted)
            if spec.big and quant is not gguf.GGMLQuantizationType.F32:
                out.add_tensor(spec.name, gguf.quants.quantize(values, quant), raw_dtype=quant)
            else:
                out.add_tensor(spec.name, values)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
    finally:
        out.close()


def _put(out: gguf.GGUFWriter, key: str, value: KeyValue) -> None:
    if isinstance(value, bool):
        out.add_bool(key, value)
    elif isinstance(value, int):
        out.add_uint32(key, value)
    elif isinstance(value, float):
        out.add_float32(key, value)
    elif isinstance(value, str):
        out.add_string(key, value)
    else:
        out.add_array(key, list(value))


def _put_tokenizer(out: gguf.GGUFWriter, plan: Blueprint) -> None:
    vocab = plan.vocab
    _put(out, "tokenizer.ggml.model", "gpt2")
    _put(out, "tokenizer.ggml.pre", plan.pre_tokenizer)
    out.add_array("tokenizer.ggml.tokens", list(vocab.tokens))
    out.add_array("tokenizer.ggml.token_type", list(vocab.types))
    out.add_array("tokenizer.ggml.merges", list(vocab.merges))
    _put(out, "tokenizer.ggml.bos_token_id", vocab.id_of(plan.bos))
    _put(out, "tokenizer.ggml.eos_token_id", vocab.id_of(plan.eos))
    if plan.pad:
        _put(out, "tokenizer.ggml.padding_token_id", vocab.id_of(plan.pad))
    _put(out, "tokenizer.ggml.add_bos_token", plan.add_bos)
    _put(out, "tokenizer.chat_template", plan.chat_template)


def _values(spec: TensorSpec, stream: str, muted: tuple[int, ...]) -> npt.NDArray[np.float32] | npt.NDArray[np.int32]:
    """The numbers of one tensor, in numpy order (the reverse of ``spec.shape``).

    Each tensor has its own random stream, named after it, so that a tensor does not change when others are added.
    Only raw bits of PCG64 are used: numpy guarantees those, not the distributions, to stay the same over versions.
    """
    digest = hashlib.sha256(f"{stream}/{spec.name}".encode()).digest()
    bits = np.random.PCG64(int.from_bytes(digest[:16], "little"))
    shape = spec.shape[::-1]
    size = int(np.prod(shape))
    if spec.choices:
        keys = bits.random_raw(shape[0] * spec.choices).reshape(shape[0], spec.choices)
        return np.argsort(keys, axis=1, kind="stable")[:, : shape[1]].astype(np.int32)

    raw = bits.random_raw((size + 1) // 2).astype("<u8").view("<u4")[:size]
    uniform = ((raw >> 8).astype(np.float64) + 0.5) / 2**23 - 1.0  # in (-1, 1), standard deviation 1/sqrt(3)
    values = (spec.mean + spec.std * math.sqrt(3) * uniform).astype(np.float32).reshape(shape)
    if spec.per_token:
        values[list(muted)] *= np.float32(_MUTED_GAIN)
    return values
