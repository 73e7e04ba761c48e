"""What Ollama's API tells of a GGUF file: its metadata, its size in parameters, its quantisation. Weights are not read."""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from steer_plugins.errors import ModelError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX = 1_000_000
_MAX_STRING = 64 << 20

# general.file_type, as llama.cpp numbers them
_FILE_TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M"},
    **{13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS"},
    **{21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S"},
    **{29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4"},
}


@dataclass(frozen=True)
class Facts:
    """``values``: the metadata's scalars and texts, arrays as None; ``parameters``: how many weights it has."""

    values: dict[str, Any]
    parameters: int

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture") or "unknown")

    @property
    def quantization(self) -> str:
        return _FILE_TYPES.get(self.values.get("general.file_type", -1), "unknown")

    @property
    def chat_template(self) -> str:
        """The Jinja chat template, or an empty text."""
        value = self.values.get("tokenizer.chat_template")
        return value if isinstance(value, str) else ""

    @property
    def parameter_size(self) -> str:
        """As Ollama writes it: 134.52M, 8.0B."""
        for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
            if self.parameters >= scale:
                return f"{self.parameters / scale:.{2 if letter in 'MK' else 1}f}{letter}"
        return str(self.parameters)

    def number(self, key: str) -> int:
        """A count under the architecture's prefix, 0 where it has none."""
        value = self.values.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int) else 0


def facts_of(path: Path) -> Facts:
    """The facts of a GGUF file. Raises ModelError with one sentence."""
    try:
        stat = path.stat()
        return _facts(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise ModelError(f"cannot read the model file {path}: {error.strerror or error}") from None


@functools.lru_cache(maxsize=64)
def _facts(path: Path, size: int, mtime: int) -> Facts:
    with open(path, "rb", buffering=1 << 20) as file:
        try:
            return _Reader(path, file, size).read()
        except (struct.error, UnicodeDecodeError, EOFError):
            raise ModelError(f"{path} is truncated or damaged: its header goes on after its last byte") from None


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def read(self) -> Facts:
        if self.file.read(4) != b"GGUF":
            raise ModelError(f"{self.path} is no GGUF file")
        version = self.number("<I")
        if version not in (2, 3):
            raise ModelError(f"{self.path} is GGUF version {version}: versions 2 and 3 can be read")
        n_tensors, n_values = self.number("<Q"), self.number("<Q")
        if max(n_tensors, n_values) > _MAX:
            raise EOFError
        values: dict[str, Any] = {}
        for _ in range(n_values):
            key = self.text()
            values[key] = self.value(self.number("<I"))
        total = 0
        for _ in range(n_tensors):
            self.text()
            n_dims = self.number("<I")
            if n_dims > 8:
                raise EOFError
            total += math.prod(self.number("<Q") for _ in range(n_dims))
            self.number("<I")
            self.number("<Q")
        return Facts(values, total)

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise EOFError
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        if length > min(_MAX_STRING, self.size):
            raise EOFError
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise EOFError
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            skip = count * struct.calcsize(_SCALARS[inner])
            if skip > self.size:
                raise EOFError
            self.file.seek(skip, 1)
        elif inner == _STRING and count <= 16 * _MAX:
            for _ in range(count):
                length = self.number("<Q")
                if length > self.size:
                    raise EOFError
                self.file.seek(length, 1)
        else:
            raise EOFError
        return None
