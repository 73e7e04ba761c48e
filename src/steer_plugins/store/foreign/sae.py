"""Features of sparse autoencoders: a row of the decoder is the direction that the feature writes.

SAELens: ``sae_weights.safetensors`` with ``cfg.json`` beside it. Gemma Scope: ``params.npz``, whose layer is only in the name of
its folder, so the user says it. Files may be gigabytes: only the row is read.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import VectorError
from ...steering.vector import SteeringVector
from ..formats import NO_FACTS, Facts, Format
from ..vectorfile import MAX_HEADER_BYTES, json_object
from .archive import Archive, NpyArray
from .common import MAX_BYTES, clip, head, imported, layers_of_rows, load_json, reading, stated
from .neuronpedia import place_of_hook

_ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")
_MAX_UNPACKED = 16 << 30
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_saelens(path: Path, facts: Facts = NO_FACTS) -> SteeringVector:
    """Feature ``facts.feature`` of a SAELens folder, whose weights are ``path``. Raises VectorError."""
    with reading(path):
        beside = path.with_name("cfg.json")
        if not beside.is_file():
            raise VectorError("there is no cfg.json beside it, which says at which layer and site it acts")
        config = load_json(beside)
        architecture = config.get("architecture", "standard")
        if architecture not in _ARCHITECTURES:
            raise VectorError(f"its architecture is {clip(architecture)}: {', '.join(_ARCHITECTURES)} can be read")
        metadata = config.get("metadata")
        inner = metadata if isinstance(metadata, dict) else {}
        # Before 6.0 the fields of the metadata stood in the configuration itself.
        hook = inner.get("hook_name", config.get("hook_name", config.get("hook_point")))
        layer, site = place_of_hook(hook, inner.get("hook_layer", config.get("hook_layer", config.get("hook_point_layer"))))
        row, n_features = _safetensors_row(path, facts.feature)
        if any(config.get(key, n) != n for key, n in (("d_sae", n_features), ("d_in", len(row)))):
            raise VectorError("its weights have another shape than its cfg.json says")
        return _feature(path, "saelens", row, (layer, stated("site", site, facts.site, site)), facts, config)


def read_gemma_scope(path: Path, facts: Facts = NO_FACTS) -> SteeringVector:
    """Feature ``facts.feature`` of a ``params.npz``, for the one layer in ``facts.at``. Raises VectorError."""
    with reading(path), Archive(path, _MAX_UNPACKED) as archive:
        if "W_dec.npy" not in archive.sizes:
            raise VectorError("it holds no W_dec, the decoder of an SAE")
        array = NpyArray(archive, "W_dec.npy")
        if len(array.shape) != 2 or 0 in array.shape or array.fortran:
            raise VectorError(f"its W_dec has shape {list(array.shape)}, not [d_sae, d_in], or is stored by columns")
        feature = _checked(facts.feature, array.shape[0])
        at = Facts(at=facts.at)  # a decoder of one row would not be settled by the number of a model's layers
        (layer,) = layers_of_rows(1, at)
        if layer is None:
            raise VectorError("an SAE of the embedding cannot be used: --at takes the layer, such as --at 12")
        row = array.row(feature)
        return _feature(path, "gemma-scope", row, (layer, stated("site", None, facts.site, "resid_post")), facts, {})


def _feature(
    path: Path, format_name: str, row: np.ndarray, place: tuple[int, str], facts: Facts, config: dict[str, Any]
) -> SteeringVector:
    return imported(
        path,
        format_name,
        {place: row},
        op=stated("op", None, facts.op, "add"),
        scope=stated("scope", None, facts.scope, "all"),
        name=f"{path.parent.name}-feature-{facts.feature}"[-60:],
        notes={
            "feature": facts.feature,
            "folder": path.parent.name[:200],
            **{k: config[k][:200] for k in ("architecture", "normalize_activations") if isinstance(config.get(k), str)},
        },
    )


def _checked(feature: int | None, n_features: int) -> int:
    if feature is None:
        raise VectorError(f"it holds {n_features} features: choose one with steer convert --feature N")
    if not 0 <= feature < n_features:
        raise VectorError(f"there is no feature {feature}: they are 0 to {n_features - 1}")
    return feature


def _safetensors_row(path: Path, feature: int | None) -> tuple[np.ndarray, int]:
    """(row ``feature`` of W_dec, number of rows)."""
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length < 2 or length > min(MAX_HEADER_BYTES, total - 8):
            raise VectorError("it is not a safetensors file, or is truncated")
        header = json_object(file.read(length), "safetensors header")
        entry = header.get("W_dec")
        if not isinstance(entry, dict):
            raise VectorError("it holds no W_dec, the decoder of an SAE")
        if (
            max(_pair(tensor, "data_offsets")[1] for name, tensor in header.items() if name != "__metadata__")
            != total - 8 - length
        ):
            raise VectorError("it is truncated, or goes on after its last tensor")
        dtype = entry.get("dtype")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise VectorError(f"its W_dec has dtype {clip(dtype)}: {', '.join(_DTYPES)} can be read")
        shape, offsets = _pair(entry, "shape"), _pair(entry, "data_offsets")
        item = np.dtype(_DTYPES[dtype])
        if 0 in shape or offsets[1] - offsets[0] != math.prod(shape) * item.itemsize or offsets[1] > total - 8 - length:
            raise VectorError("it is truncated: its W_dec does not fit into the file")
        n_bytes = shape[1] * item.itemsize
        if n_bytes > MAX_BYTES:
            raise VectorError("its W_dec has rows that are too long for a vector")
        file.seek(8 + length + offsets[0] + _checked(feature, shape[0]) * n_bytes)
        row = np.frombuffer(file.read(n_bytes), item)
    if dtype == "BF16":
        row = (row.astype(np.uint32) << 16).view(np.float32)
    return row, shape[0]


def _pair(entry: object, what: str) -> list[int]:
    value = entry.get(what) if isinstance(entry, dict) else None
    if not isinstance(value, list) or [type(n) for n in value] != [int, int] or value[0] < 0 or value[1] < 1:
        raise VectorError(f"it has a tensor whose {what} is {clip(value)}, not two positive numbers")
    return value


def sniff_saelens(path: Path) -> bool:
    """True for a safetensors file with a ``W_dec`` among its first tensors."""
    start = head(path)
    return start[8:9] == b"{" and b'"W_dec"' in start


def sniff_gemma_scope(path: Path) -> bool:
    """True for ``params.npz``, or any .npz whose first member is a weight of an SAE."""
    start = head(path, 128)
    first = start[30 : 30 + int.from_bytes(start[26:28], "little")]
    names = (b"W_dec.npy", b"W_enc.npy", b"b_dec.npy", b"b_enc.npy", b"threshold.npy")
    return start.startswith(b"PK\x03\x04") and first in names


_FACTS = ("feature", "op", "site", "scope")
SAELENS = Format("saelens", (".safetensors",), read_saelens, None, sniff_saelens, read_saelens, _FACTS)
GEMMA_SCOPE = Format("gemma-scope", (".npz",), read_gemma_scope, None, sniff_gemma_scope, read_gemma_scope, ("at", *_FACTS))
