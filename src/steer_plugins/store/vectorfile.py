"""The package's own vector file: safetensors with one JSON object beside the directions. See docs/vector-format.md.

The reader trusts nothing: sizes are bounded before anything is parsed, every field is checked, and a content hash is
compared, so that a damaged file is an error and never another direction.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..atomic import write_atomically
from ..errors import VectorError
from ..steering.columns import LINEAR, MAX_COLUMNS, Columns, column_content
from ..steering.vector import SITES, Key, ModelIdentity, SteeringVector, content_sha256

#: Of vectors of plain directions, and of those that have columns.
FORMATS = ("steer-vector-v1", "steer-vector-v2")
#: Larger files and headers are refused unread.
MAX_FILE_BYTES = 1 << 30
MAX_HEADER_BYTES = 16 << 20
#: How far from 1 the length of a stored direction may be.
UNIT_TOLERANCE = 1e-3

_FIELDS = (
    "format",
    "name",
    "op",
    "default_scope",
    "n_embd",
    "scales",
    "identity",
    "provenance",
    "calibration",
    "content_sha256",
)
_PLACE = re.compile(rf"(0|[1-9][0-9]{{0,8}})\.({'|'.join(SITES)})")
_TENSOR = re.compile(rf"(direction|read|write)\.{_PLACE.pattern}")


def write_vector(vector: SteeringVector, path: str | os.PathLike[str]) -> None:
    """Write ``vector`` to ``path``, atomically. The same vector gives the same bytes. Raises VectorError."""
    path = Path(path)
    from safetensors.numpy import save  # here: reading needs no safetensors, and starting stays quick

    metadata = {
        "format": FORMATS[1] if vector.columns else FORMATS[0],
        "name": vector.name,
        "op": vector.op,
        "default_scope": vector.default_scope,
        "n_embd": vector.n_embd,
        "scales": {_tensor_name(key): scale for key, scale in vector.scales.items()},
        "identity": None if vector.identity is None else vector.identity.to_dict(),
        "provenance": vector.provenance,
        "calibration": vector.calibration,
        "content_sha256": vector.content_hash,
    }
    tensors = {_tensor_name(key): np.ascontiguousarray(array) for key, array in vector.directions.items()}
    if vector.columns:
        metadata["columns"] = {f"{layer}.{site}": columns.to_json() for (layer, site), columns in vector.columns.items()}
        for (layer, site), columns in vector.columns.items():
            tensors[f"read.{layer}.{site}"], tensors[f"write.{layer}.{site}"] = columns.read, columns.write
    text = json.dumps(metadata, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    data = save(tensors, {"steer": text})
    header_bytes = int.from_bytes(data[:8], "little")
    if len(data) > MAX_FILE_BYTES or header_bytes > MAX_HEADER_BYTES:
        raise VectorError(f"vector {vector.name!r} is too large for a vector file ({len(data)} bytes)")
    try:
        write_atomically(path, data)
    except OSError as error:
        raise VectorError(f"cannot write {path}: {error.strerror or error}") from None


def read_vector(path: str | os.PathLike[str]) -> SteeringVector:
    """The vector in ``path``, bit for bit as it was written. Raises VectorError for anything else."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            header, data = _read_safetensors(file)
        return _decode(header, data)
    except VectorError as error:
        raise VectorError(f"{path}: {error}") from None
    except OSError as error:
        raise VectorError(f"cannot read the vector file {path}: {error.strerror or error}") from None


def sniff(path: str | os.PathLike[str]) -> bool:
    """True if the file begins like a vector file of this or of a later version."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return 2 <= size <= MAX_HEADER_BYTES and b"steer-vector-" in file.read(size)
    except OSError:
        return False


def _read_safetensors(file: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """(header object, the bytes after it), with the layout checked by :func:`_decode`."""
    total = os.fstat(file.fileno()).st_size
    if total > MAX_FILE_BYTES:
        raise VectorError(f"too large for a vector file ({total} bytes, at most {MAX_FILE_BYTES})")
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length < 2:
        raise VectorError("not a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise VectorError(f"not a vector file: its header claims {length} bytes (at most {MAX_HEADER_BYTES})")
    if length > total - 8:
        raise VectorError("not a safetensors file, or truncated: its header does not fit into it")
    header = json_object(file.read(length), "safetensors header")
    return header, file.read(total - 8 - length)


def json_object(text: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object without duplicate fields, NaN or Infinity. Raises VectorError that calls the text ``what``."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise VectorError(f"the {what} names a field twice")
        return found

    def no_constant(name: str) -> None:
        raise VectorError(f"the {what} contains {name}")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        loaded = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise VectorError(f"the {what} is not valid JSON") from None
    if not isinstance(loaded, dict):
        raise VectorError(f"the {what} is not a JSON object")
    return loaded


def _decode(header: dict[str, Any], data: bytes) -> SteeringVector:
    outer = header.pop("__metadata__", None)
    if not isinstance(outer, dict) or not isinstance(outer.get("steer"), str):
        raise VectorError("a safetensors file without a steering vector (no 'steer' metadata)")
    meta = json_object(outer["steer"], "'steer' metadata")
    if meta.get("format") not in FORMATS:
        raise VectorError(f"unknown format version {_short(meta.get('format'))}: this reader knows {' and '.join(FORMATS)}")
    fields = _FIELDS if meta["format"] == FORMATS[0] else (*_FIELDS, "columns")
    for field in fields:
        if field not in meta:
            raise VectorError(f"the 'steer' metadata lacks {field!r}")
    for field in meta:
        if field not in fields:
            raise VectorError(f"the 'steer' metadata has the unknown field {_short(field)}")
    for field in ("name", "op", "default_scope", "content_sha256"):
        if not isinstance(meta[field], str):
            raise VectorError(f"{field!r} is not a string")
    for field in ("provenance", "calibration"):
        if meta[field] is not None and not isinstance(meta[field], dict):
            raise VectorError(f"{field!r} is neither an object nor null")
    n_embd = meta["n_embd"]
    if not isinstance(n_embd, int) or isinstance(n_embd, bool) or n_embd < 1:
        raise VectorError("'n_embd' is not a positive whole number")
    identity = None if meta["identity"] is None else ModelIdentity.from_dict(meta["identity"])
    numbers = _column_numbers(meta["columns"]) if "columns" in fields else {}
    tensors = _tensors(header, data, n_embd, numbers)
    directions = tensors["direction"]
    scales = _scales(meta["scales"], directions)
    columns = _columns(numbers, tensors["read"], tensors["write"])
    vector = SteeringVector(
        meta["name"],
        directions,
        scales,
        columns=columns,
        op=meta["op"],
        default_scope=meta["default_scope"],
        identity=identity,
        provenance=meta["provenance"],
        calibration=meta["calibration"],
    )
    # Of what is stored: another writer's rounding may have been normalised in the vector.
    stored = {key: _Stored(tensors["read"][key], tensors["write"][key], given) for key, given in numbers.items()}
    if content_sha256(vector.op, directions, scales, stored) != meta["content_sha256"]:
        raise VectorError("damaged: the directions and scales do not match their content_sha256")
    return vector


def _column_numbers(stored: object) -> dict[Key, list[list[float]]]:
    """Gain, bias and knee of the columns at each place, checked."""
    if not isinstance(stored, dict) or not stored:
        raise VectorError("'columns' is not an object that says what is read where")
    found: dict[Key, list[list[float]]] = {}
    for place, items in stored.items():
        match = _PLACE.fullmatch(place)
        if not match:
            raise VectorError(f"the columns at {_short(place)} stand at no place: one is <layer>.<site>")
        if not isinstance(items, list) or not 0 < len(items) <= MAX_COLUMNS:
            raise VectorError(f"the columns at {place} are not a list of 1 to {MAX_COLUMNS}")
        found[int(match[1]), match[2]] = [_three(place, item) for item in items]
    return dict(sorted(found.items()))


def _three(place: str, item: object) -> list[float]:
    if not isinstance(item, dict) or item.keys() != {"gain", "bias", "knee"}:
        raise VectorError(f"the columns at {place} do not have just gain, bias and knee")
    values = {**item, "knee": LINEAR} if item["knee"] is None else item
    for what, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise VectorError(f"the columns at {place}: {what} is {_short(value)}, not a number")
        if not (abs(value) < 1e300 or (what == "knee" and value == LINEAR)):
            raise VectorError(f"the columns at {place}: {what} is not finite")
    return [float(values[what]) for what in ("gain", "bias", "knee")]


def _columns(
    numbers: dict[Key, list[list[float]]], reads: dict[Key, np.ndarray], writes: dict[Key, np.ndarray]
) -> dict[Key, Columns]:
    """The columns of each place; none may lack its rows."""
    for key in numbers.keys() ^ reads.keys() | numbers.keys() ^ writes.keys():
        raise VectorError(f"layer {key[0]} {key[1]} has columns without rows, or rows without columns")
    return {key: Columns(reads[key], writes[key], *np.array(given).T) for key, given in numbers.items()}


class _Stored:
    """Columns as they stand in a file, for its hash: another writer's rounding may have been normalised in the vector."""

    def __init__(self, read: np.ndarray, write: np.ndarray, numbers: list[list[float]]) -> None:
        self.read, self.write, self.numbers = read, write, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def content(self) -> bytes:
        return column_content(self.read, self.write, np.array(self.numbers))


def _tensors(
    header: dict[str, Any], data: bytes, n_embd: int, numbers: dict[Key, list[list[float]]]
) -> dict[str, dict[Key, np.ndarray]]:
    """By kind, the tensors sorted by key: float32 [n_embd], or [k, n_embd] for the columns; unit rows that fill ``data``."""
    spans: list[tuple[int, int]] = []
    found: dict[str, dict[Key, np.ndarray]] = {"direction": {}, "read": {}, "write": {}}
    if not header:
        raise VectorError("it holds no direction")
    for name, entry in header.items():
        match = _TENSOR.fullmatch(name)
        if not match:
            raise VectorError(f"unknown tensor {_short(name)}: directions are named direction.<layer>.<site>")
        kind, key = match[1], (int(match[2]), match[3])
        if kind != "direction" and key not in numbers:
            raise VectorError(f"tensor {name} belongs to no column")
        want = [n_embd] if kind == "direction" else [len(numbers[key]), n_embd]
        found[kind][key] = _tensor(name, entry, data, want, spans)
    edge = 0
    for begin, end in sorted(spans):
        if begin != edge:
            raise VectorError("its tensors overlap or leave gaps")
        edge = end
    if edge != len(data):
        raise VectorError(f"{len(data) - edge} bytes follow the last tensor")
    return {kind: dict(sorted(arrays.items())) for kind, arrays in found.items()}


def _tensor(name: str, entry: Any, data: bytes, want: list[int], spans: list[tuple[int, int]]) -> np.ndarray:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise VectorError(f"the entry of tensor {name} is malformed")
    if entry["dtype"] != "F32":
        raise VectorError(f"tensor {name} has dtype {_short(entry['dtype'])}, not F32")
    shape = entry["shape"]
    if not isinstance(shape, list) or any(type(n) is not int for n in shape) or shape != want:
        raise VectorError(f"tensor {name} has shape {_short(shape)}, not {want}")
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise VectorError(f"tensor {name} has malformed data_offsets")
    begin, end = offsets
    if not 0 <= begin <= end <= len(data):
        raise VectorError(f"truncated: the data of tensor {name} does not fit into the file")
    size = 4 * math.prod(want)
    if end - begin != size:
        raise VectorError(f"tensor {name} has {end - begin} bytes of data, not {size}")
    spans.append((begin, end))
    array = np.frombuffer(data, "<f4", size // 4, begin).astype(np.float32).reshape(want)
    if not np.isfinite(array).all():
        raise VectorError(f"tensor {name} contains NaN or Inf")
    for length in np.linalg.norm(array.astype(np.float64).reshape(-1, want[-1]), axis=1):
        if abs(length - 1.0) > UNIT_TOLERANCE:
            raise VectorError(f"tensor {name} has length {length:.6g}: stored directions have length 1")
    return array


def _scales(stored: object, directions: dict[Key, np.ndarray]) -> dict[Key, float]:
    if not isinstance(stored, dict):
        raise VectorError("'scales' is not an object")
    names = {_tensor_name(key): key for key in directions}
    if stored.keys() != names.keys():
        odd = sorted(stored.keys() ^ names.keys())[0]
        raise VectorError(f"scale {_short(odd)} has no tensor" if odd in stored else f"tensor {odd} has no scale")
    scales = {}
    for name, key in names.items():
        value = stored[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise VectorError(f"the scale of {name} is not a number")
        try:
            scales[key] = float(value)
        except OverflowError:
            scales[key] = math.inf
        if not math.isfinite(scales[key]):
            raise VectorError(f"the scale of {name} is not finite")
    return scales


def _tensor_name(key: Key) -> str:
    return f"direction.{key[0]}.{key[1]}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
