"""Tiny models with random weights, as GGUF files, for tests that need exact arithmetic and no download.

Each file is complete: weights, a byte-level BPE tokenizer that can encode any text, special tokens and a chat
template. The same arguments give the same bytes on every machine. The text such a model writes means nothing.

>>> from steer_plugins import testing
>>> testing.write("llama", "llama.gguf")                 # doctest: +SKIP
[PosixPath('llama.gguf')]
>>> testing.write("deepseek4", "v4.gguf", split=3)       # doctest: +SKIP
[PosixPath('v4-00001-of-00003.gguf'), PosixPath('v4-00002-of-00003.gguf'), PosixPath('v4-00003-of-00003.gguf')]
"""

from __future__ import annotations

from .architectures import ARCHITECTURES
from .writer import WEIGHTS, write

__all__ = ["ARCHITECTURES", "WEIGHTS", "write"]
