"""A model file opened through llama-cpp-python's low-level functions: weights, vocabulary and chat template."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import native
from ..errors import DataError, ModelError
from ..runtime import has_steering, stock_library
from ..store.identity import identity_of_gguf
from .base import Prompt
from .chat import ChatTemplate, check_messages, utf8
from .thinking import tags_of

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_LEVEL_ERROR = 4


class LlamaLog:
    """Takes llama.cpp's log: silent unless ``verbose``, but the last error lines are kept for messages."""

    def __init__(self, llama_cpp: Any) -> None:
        self.verbose = False
        self.errors: list[str] = []

        @llama_cpp.llama_log_callback
        def callback(level: int, text: bytes, _: Any) -> None:
            line = text.decode(errors="replace").rstrip()
            if level == _LEVEL_ERROR and line:
                self.errors = [*self.errors[-4:], line]
            if self.verbose and line:
                print(line, flush=True)

        self._callback = callback  # must outlive the library's use of it
        llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))


_log: LlamaLog | None = None


def shared_log(llama_cpp: Any) -> LlamaLog:
    """The one log of the process; llama.cpp has a single global callback."""
    global _log
    if _log is None:
        _log = LlamaLog(llama_cpp)
    return _log


def steering_of(llama_cpp: Any, model: Any, architecture: str) -> native.Steering:
    """How contexts of a ``llama_model`` are steered by the library that is loaded: one with the patch does it itself.

    Raises:
        RuntimeMissing: it cannot, or what is needed for it is not there.
        ModelError: steering was not tested on this architecture.
    """
    library = llama_cpp.llama_cpp._lib
    if has_steering(library):
        return native.PatchedSteering(library, model)
    return native.StockSteering(llama_cpp, stock_library(), model, architecture)


class LoadedModel:
    """Weights and vocabulary of a GGUF file; any shard of a split one may be named.

    Args:
        llama_cpp: the ``llama_cpp`` module, on a patched library or an unmodified one.
        path: the GGUF file.
        n_gpu_layers: layers to offload; -1 is all.

    Raises:
        ModelError: missing, truncated or unsupported file, or an architecture that steering was not tested on.
    """

    def __init__(self, llama_cpp: Any, path: Path, *, n_gpu_layers: int = 0, use_mmap: bool = True) -> None:
        self.c = llama_cpp
        self.path = Path(path)
        self.identity = identity_of_gguf(self.path)  # also finds what is missing or cut off, in a sentence
        log = shared_log(llama_cpp)
        log.errors = []
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers if n_gpu_layers >= 0 else 0x7FFFFFFF
        params.use_mmap = use_mmap
        llama_cpp.llama_backend_init()
        self.steering: Any = None
        self.pointer = llama_cpp.llama_model_load_from_file(os.fsencode(first_shard(self.path)), params)
        if not self.pointer:
            reason = log.errors[-1] if log.errors else "no reason given"
            raise ModelError(f"llama.cpp cannot load {self.path}: {_last_clause(reason)}")
        try:
            self.steering = steering_of(llama_cpp, self.pointer, self.identity.architecture)
            self.library = self.steering.library
            self.steer = self.steering.info
        except BaseException:
            self.close()
            raise
        self.vocab = llama_cpp.llama_model_get_vocab(self.pointer)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self.vocab))
        self.n_ctx_train = int(llama_cpp.llama_model_n_ctx_train(self.pointer))
        # whether a token can belong to several sequences: a cache that holds states instead of cells cannot say so
        states = llama_cpp.llama_model_is_recurrent(self.pointer) or llama_cpp.llama_model_is_hybrid(self.pointer)
        self.shares_tokens = not states and self.steer.n_streams == 1
        self.bos = self._special(llama_cpp.llama_vocab_bos(self.vocab))
        template = llama_cpp.llama_model_chat_template(self.pointer, None)
        self.template: ChatTemplate | None = None
        if template:
            eos = self._special(llama_cpp.llama_vocab_eos(self.vocab))
            self.template = ChatTemplate(template.decode(errors="replace"), bos=self.bos, eos=eos)
        self.tags = tags_of(template.decode(errors="replace") if template else None)

    def _special(self, token: int) -> str:
        return self.c.llama_vocab_get_text(self.vocab, token).decode(errors="replace") if token >= 0 else ""

    def _tokenize(self, text: str, *, add_special: bool) -> list[int]:
        data = utf8(text)
        room = len(data) + 8
        while True:
            out = (ctypes.c_int32 * room)()
            n = self.c.llama_tokenize(self.vocab, data, len(data), out, room, add_special, True)
            if n >= 0:
                return list(out[:n])
            room = -n

    def tokenize(self, prompt: Prompt, *, thinking: bool | None = None, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a prompt.

        Raises:
            DataError: an empty prompt, a token id outside the vocabulary, chat messages without a template.
        """
        if isinstance(prompt, str):
            tokens = self._tokenize(prompt, add_special=True)
        elif prompt and isinstance(prompt[0], dict):
            if self.template is None:
                raise DataError(f"{self.path.name} carries no chat template: give a raw text prompt")
            messages = check_messages(prompt)
            text = self.template.render(messages, add_generation_prompt=add_generation_prompt, thinking=thinking)
            tokens = self._tokenize(text, add_special=not (self.bos and text.startswith(self.bos)))
        else:
            tokens = self._checked(prompt)  # type: ignore[arg-type]
        if not tokens:
            raise DataError("the prompt is empty")
        return tokens

    def continuation(self, text: str | Sequence[int]) -> list[int]:
        """Token ids of text that follows a prompt: no BOS, special tokens parsed.

        Raises:
            DataError: a token id outside the vocabulary.
        """
        return self._tokenize(text, add_special=False) if isinstance(text, str) else self._checked(text)

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        for t in tokens:
            if not 0 <= int(t) < self.n_vocab:
                raise DataError(f"token id {t} is outside the vocabulary of {self.n_vocab}")
        return [int(t) for t in tokens]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes that a token prints; empty for special tokens unless ``special``."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = self.c.llama_token_to_piece(self.vocab, token, buffer, room, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            room = -n

    def token_text(self, token: int) -> bytes:
        """Bytes that a token prints, special ones included."""
        return self.piece(token, special=True)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return b"".join(self.piece(t) for t in tokens).decode(errors="replace")

    def is_end(self, token: int) -> bool:
        """True for tokens that end a reply."""
        return bool(self.c.llama_vocab_is_eog(self.vocab, token))

    def close(self) -> None:
        """Free the weights."""
        if self.steering is not None:
            self.steering.close()
            self.steering = None
        if self.pointer:
            self.c.llama_model_free(self.pointer)
            self.pointer = None


def first_shard(path: Path) -> Path:
    """The file llama.cpp wants to be given for a split model: its first shard."""
    match = _SHARD.search(path.name)
    return path.with_name(f"{path.name[: match.start()]}-00001-of-{match[2]}.gguf") if match else path


def _last_clause(line: str) -> str:
    return line.split(": ", 1)[-1].rstrip(".")
