"""The header of a GGUF file, without its weights: metadata, tensors, and what tells one model from another.

Parsed here and not with ``gguf.GGUFReader``: that one makes numpy views of every token of a vocabulary (seconds for 129,000 of
them), and trusts the sizes in the file. Layout: the GGUF specification, versions 2 and 3.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ModelError

GGML_F32 = 0
"""The ggml type of float32 tensors."""

# Far above any real model, far below what would exhaust memory.
MAX_ENTRIES = 1_000_000
_MAX_DIMS = 8
# GGUF value types: struct codes of the scalars; 8 is a string, 9 an array.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file: its ``dims`` (the first one is contiguous), its ggml type, and where in the file its data is."""

    dims: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass
class GGUFHeader:
    """What the header of a GGUF file says.

    ``values``: the metadata; arrays are None. ``tensors``: by name, in the order of the file. ``tokens_sha256``: a hash of the
    token list, if there is one. ``norms``: the float32 data of the norm weights, by name.
    """

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GGUFTensor] = field(default_factory=dict)
    tokens_sha256: str | None = None
    norms: dict[str, bytes] = field(default_factory=dict)

    def integer(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """A count of the metadata. Raises ModelError where it is missing without a ``default``, no count, or above ``most``."""
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            what = f"no {key}" if value is None else f"{key} = {value!r:.40}"
            raise ModelError(f"{self.path} cannot be steered: it has {what}, so it is not a language model or is damaged")
        return value


def read_gguf(path: str | os.PathLike[str]) -> GGUFHeader:
    """The header of a GGUF file, checked: nothing in it lies after the end of the file. Raises ModelError."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file")
            with contextlib.closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data:
                return _Parser(path, data, size).parse()
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the model file {path}: {getattr(error, 'strerror', None) or error}") from None


class _Parser:
    """Walks the header once. Every length is checked against the end of the file before it is used."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.header = GGUFHeader(path)
        self.data, self.size, self.at = data, size, 4

    def parse(self) -> GGUFHeader:
        version = self.unpack(_U32)
        if version & 0xFFFF == 0:
            raise ModelError(f"{self.header.path} is a big-endian GGUF file, which cannot be read: convert it")
        if version not in (2, 3):
            raise ModelError(f"{self.header.path} is GGUF version {version}: versions 2 and 3 can be read")
        n_tensors, n_values = self.unpack(_U64), self.unpack(_U64)
        if n_tensors > MAX_ENTRIES or n_values > MAX_ENTRIES:
            raise self.damaged(f"it claims {n_tensors} tensors and {n_values} values")
        for _ in range(n_values):
            self.value()
        for _ in range(n_tensors):
            self.tensor_info()
        self.tensor_data()
        return self.header

    def damaged(self, why: str) -> ModelError:
        return ModelError(f"{self.header.path} is damaged: {why}")

    def take(self, n_bytes: int) -> int:
        """The offset of the next ``n_bytes``, which are passed over."""
        start = self.at
        if n_bytes > self.size - start:
            raise ModelError(f"{self.header.path} is truncated: its header goes on after its last byte")
        self.at += n_bytes
        return start

    def unpack(self, code: struct.Struct) -> Any:
        return code.unpack_from(self.data, self.take(code.size))[0]

    def string(self) -> str:
        length = self.unpack(_U64)
        start = self.take(length)
        return self.data[start : self.at].decode("utf-8", "replace")

    def strings(self, count: int) -> Iterator[bytes]:
        """The loop that a large vocabulary spends its time in, so without calls for each string."""
        data, size, at, unpack = self.data, self.size, self.at, _U64.unpack_from
        for _ in range(count):
            if size - at < 8:
                self.take(size)
            (length,) = unpack(data, at)
            at += 8
            if length > size - at:
                self.take(size)
            yield data[at : at + length]
            at += length
        self.at = at

    def value(self) -> None:
        key = self.string()
        kind = self.unpack(_U32)
        if key in self.header.values:
            raise self.damaged(f"it has two values for {key!r:.80}")
        if kind == _STRING:
            self.header.values[key] = self.string()
        elif kind in _SCALARS:
            self.header.values[key] = self.unpack(struct.Struct(_SCALARS[kind]))
        elif kind == _ARRAY:
            self.header.values[key] = None
            self.array(key)
        else:
            raise self.damaged(f"{key!r:.80} has the unknown type {kind}")

    def array(self, key: str) -> None:
        kind, count = self.unpack(_U32), self.unpack(_U64)
        if kind in _SCALARS:
            self.take(count * struct.calcsize(_SCALARS[kind]))
        elif kind != _STRING:
            raise self.damaged(f"{key!r:.80} is an array of the unknown type {kind}")
        elif key == "tokenizer.ggml.tokens":
            digest = hashlib.sha256()
            for token in self.strings(count):
                digest.update(_U32.pack(len(token)) + token)
            self.header.tokens_sha256 = digest.hexdigest()
        else:
            for _ in self.strings(count):
                pass

    def tensor_info(self) -> None:
        name = self.string()
        n_dims = self.unpack(_U32)
        if n_dims > _MAX_DIMS:
            raise self.damaged(f"tensor {name!r:.80} has {n_dims} dimensions")
        dims = tuple(self.unpack(_U64) for _ in range(n_dims))
        ggml_type, offset = self.unpack(_U32), self.unpack(_U64)
        if name in self.header.tensors:
            raise self.damaged(f"it has two tensors named {name!r:.80}")
        self.header.tensors[name] = GGUFTensor(dims, ggml_type, offset)

    def tensor_data(self) -> None:
        """Check that the data of every tensor is there, and keep that of the norms."""
        from gguf.constants import GGML_QUANT_SIZES  # here: the import takes a while

        alignment = self.header.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"its alignment is {alignment!r:.40}")
        base = self.at + -self.at % alignment
        blocks = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
        for name, tensor in list(self.header.tensors.items()):
            # A type that is newer than the table is at least not nothing.
            per_block, block_bytes = blocks.get(tensor.ggml_type, (0, 1))
            n_bytes = math.prod(tensor.dims) // per_block * block_bytes if per_block else 1
            start = base + tensor.offset
            self.header.tensors[name] = replace(tensor, offset=start)
            if start + n_bytes > self.size:
                raise ModelError(f"{self.header.path} is truncated: the data of {name!r:.80} lies after its last byte")
            if tensor.ggml_type == GGML_F32 and len(tensor.dims) == 1 and name.endswith("_norm.weight"):
                self.header.norms[name] = self.data[start : start + n_bytes]
