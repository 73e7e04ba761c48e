"""What Ollama's API tells of a GGUF file: its metadata, its size in parameters, its quantisation. Weights are not read."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_plugins.errors import ModelError
from steer_plugins.store.gguf import read_gguf
from steer_plugins.store.identity import shards_of

# general.file_type, as llama.cpp numbers them
_FILE_TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M"},
    **{13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS"},
    **{21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S"},
    **{29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4"},
}


@dataclass(frozen=True)
class GGUFFacts:
    """``values``: the metadata's scalars and texts, arrays as None; ``parameters``: how many weights it has; ``size``: bytes."""

    values: dict[str, Any]
    parameters: int
    size: int

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


def facts_of(path: Path) -> GGUFFacts:
    """The facts of the model in a GGUF file, of which there may be several shards. Raises ModelError with one sentence."""
    try:
        stamps = tuple((shard, stat.st_size, stat.st_mtime_ns) for shard in shards_of(path) for stat in (shard.stat(),))
    except OSError as error:
        raise ModelError(f"cannot read the model file {path}: {error.strerror or error}") from None
    return _facts(stamps)


@functools.lru_cache(maxsize=256)
def _facts(shards: tuple[tuple[Path, int, int], ...]) -> GGUFFacts:
    headers = [read_gguf(path) for path, _, _ in shards]
    weights = sum(math.prod(tensor.dims) for header in headers for tensor in header.tensors.values())
    return GGUFFacts(headers[0].values, weights, sum(size for _, size, _ in shards))


_OTHERS = {"controlvector": "a control vector", "clip": "a projector", "adapter": "an adapter", "imatrix": "an importance matrix"}


def check_answers(path: Path) -> None:
    """Raise ModelError for a GGUF file that is damaged, or is something else than a language model."""
    facts = facts_of(path)
    kind = str(facts.values.get("general.type"))
    other = _OTHERS.get(facts.architecture) or _OTHERS.get(kind) or ("" if facts.parameters else "a header without weights")
    if not other and not (facts.number("block_count") and "tokenizer.ggml.tokens" in facts.values):
        other = "something else"
    if other:
        raise ModelError(f"{path.name} is {other}, not a language model")
