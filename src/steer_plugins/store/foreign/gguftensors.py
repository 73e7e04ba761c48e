"""GGUF files that hold directions: a bounded reader for ``direction.N`` tensors, and the writer."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import VectorError
from ...steering.vector import ModelIdentity
from ..gguf import GGML_F32, read_gguf
from .common import MAX_BYTES, check_finite, clip, head, save

_DIRECTION = re.compile(r"direction\.([1-9][0-9]{0,4})")
_ARCHITECTURE = b"general.architecture" + (8).to_bytes(4, "little")


@dataclass(frozen=True)
class DirectionFile:
    """Metadata (scalars and strings; arrays as None) and float32 [n_embd] arrays by N, sorted."""

    values: dict[str, Any]
    directions: dict[int, np.ndarray]

    def text(self, key: str) -> str | None:
        """A string value, printable and of bounded length, or None."""
        value = self.values.get(key)
        return "".join(c for c in value if c.isprintable())[:1000] if isinstance(value, str) else None


def architecture(path: Path) -> str | None:
    """``general.architecture`` if it stands in the first 64 KiB of a GGUF file, else None. For sniffing."""
    data = head(path)
    at = data.find(_ARCHITECTURE)
    if not data.startswith(b"GGUF") or at < 0:
        return None
    at += len(_ARCHITECTURE)
    length = int.from_bytes(data[at : at + 8], "little")
    return data[at + 8 : at + 8 + length].decode("utf-8", "replace") if length <= 64 else None


def read_directions(path: Path) -> DirectionFile:
    """The ``direction.N`` tensors of a GGUF file; other tensors, types and shapes are refused. Raises VectorError, OSError."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise VectorError(f"it is larger than a vector file can be ({MAX_BYTES} bytes)")
    header = read_gguf(path)
    found: dict[int, np.ndarray] = {}
    spans = []
    with open(path, "rb") as file:
        for name, tensor in header.tensors.items():
            match = _DIRECTION.fullmatch(name)
            if not match:
                raise VectorError(f"it has a tensor {clip(name)}: directions are named direction.N, with N from 1")
            if tensor.ggml_type != GGML_F32 or len(tensor.dims) != 1 or tensor.dims[0] < 1:
                raise VectorError(f"tensor {name} is not a float32 array of n_embd numbers")
            spans.append((tensor.offset, tensor.offset + 4 * tensor.dims[0]))
            file.seek(tensor.offset)
            found[int(match[1])] = np.frombuffer(file.read(4 * tensor.dims[0]), "<f4").astype(np.float32)
    if not found:
        raise VectorError("it holds no direction")
    spans.sort()
    if any(end > start for (_, end), (start, _) in zip(spans, spans[1:], strict=False)):
        raise VectorError("its tensors overlap")
    for n, array in found.items():
        check_finite(array, f"tensor direction.{n}")
        if len(array) != len(next(iter(found.values()))):
            raise VectorError(f"tensor direction.{n} has {len(array)} numbers, others have another length")
    return DirectionFile(header.values, dict(sorted(found.items())))


def write_directions(path: Path, values: dict[str, Any], directions: dict[int, np.ndarray]) -> None:
    """Write a GGUF file of ``general.architecture = controlvector``: str, int (u32), float (f32), bool values, and
    ``direction.N`` tensors, float32 [n_embd]. Atomic; the same input gives the same bytes. Raises VectorError."""
    from gguf import GGUFWriter  # here: the import takes a while

    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder) / "out.gguf"
        writer = GGUFWriter(str(beside), "controlvector")
        try:
            for key, value in values.items():
                if isinstance(value, bool):
                    writer.add_bool(key, value)
                elif isinstance(value, int):
                    writer.add_uint32(key, value)
                elif isinstance(value, float):
                    writer.add_float32(key, value)
                else:
                    writer.add_string(key, value)
            for n, array in sorted(directions.items()):
                writer.add_tensor(f"direction.{n}", np.ascontiguousarray(array, "<f4"))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        except OSError as error:
            raise VectorError(f"cannot write {path}: {error.strerror or error}") from None
        finally:
            writer.close()
        save(path, beside.read_bytes())


def check_layers(file: DirectionFile, identity: ModelIdentity | None) -> None:
    """Raises VectorError when ``direction.N`` names a block that the model has not, saying what that usually means."""
    last = max(file.directions)
    if identity is not None and last == identity.n_layer:
        raise VectorError(
            f"direction.{last} is one beyond the last block of the model ({identity.label}), so its writer counts "
            "from 1: convert it with --gguf-layers plus-one"
        )
