"""Drives the C API straight through llama-cpp-python's low-level functions, so that a test sees every token and position."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steer_plugins import native

llama_cpp: Any = None  # set by the fixture in conftest.py, after a runtime was activated


@dataclass(frozen=True)
class Tok:
    """One token of a batch."""

    token: int
    pos: int
    seq: int = 0
    output: bool = True


class Raw:
    """A model and one context. ``steer`` is the :class:`native.SteerContext`, or None with a stock library."""

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_seq_max: int = 4,
        kv_unified: bool = False,
        steer: bool = True,
    ) -> None:
        c = llama_cpp
        params = c.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = c.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, path
        cp = c.llama_context_default_params()
        cp.n_ctx, cp.n_batch, cp.n_ubatch, cp.n_seq_max = n_ctx * n_seq_max, n_batch, n_ubatch, n_seq_max
        cp.n_threads = cp.n_threads_batch = 1
        cp.kv_unified = kv_unified
        self.ctx = c.llama_init_from_model(self.model, cp)
        assert self.ctx
        self.n_embd = c.llama_model_n_embd(self.model)
        self.n_vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.memory = c.llama_get_memory(self.ctx)
        self.library = c.llama_cpp._lib
        self.steer: Any = None
        if steer:
            self.info = native.model_info(native.load(self.library), self.model)
            self.steer = native.SteerContext(self.library, self.ctx, self.n_embd)

    def try_decode(self, toks: list[Tok]) -> int:
        c = llama_cpp
        batch = c.llama_batch_init(len(toks), 0, 1)
        try:
            batch.n_tokens = len(toks)
            for i, t in enumerate(toks):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = t.token, t.pos, 1
                batch.seq_id[i][0], batch.logits[i] = t.seq, t.output
            return c.llama_decode(self.ctx, batch)
        finally:
            c.llama_batch_free(batch)

    def decode(self, toks: list[Tok]) -> np.ndarray:
        """Logits, float32 [n_outputs, n_vocab], in batch order."""
        code = self.try_decode(toks)
        assert code == 0, (code, self.steer and self.steer.error())
        rows = []
        for i, t in enumerate(toks):
            if t.output:
                rows.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, i), (self.n_vocab,)).copy())
        return np.stack(rows)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)
        if self.steer:
            self.steer.clear_sequence(-1)
            self.steer.clear_rows()

    def read(self, toks: list[Tok], layers: list[int], site: str = "resid_post", stream: int = native.STREAM_MEAN) -> dict[int, np.ndarray]:
        """Decode and return layer -> rows in the order of ``toks`` (all of them are wanted)."""
        s = native.SITES[site]
        self.steer.set_taps(layers, [s] * len(layers), stream=stream)
        for seq in {t.seq for t in toks}:
            self.steer.want(seq, 0, -1)
        self.decode(toks)
        seqs, poss = self.steer.kept()
        order = {(int(a), int(b)): i for i, (a, b) in enumerate(zip(seqs, poss, strict=True))}
        index = [order[(t.seq, t.pos)] for t in toks]
        n_streams = self.info.n_streams if stream == native.STREAM_ALL and site == "resid_post" else 1
        result = {il: self.steer.rows(il, s, n_streams)[index] for il in layers}
        self.steer.set_taps([], [])
        return result

    def close(self) -> None:
        llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self.model)


def prompt(n: int, seq: int = 0, *, start: int = 0, seed: int = 1, low: int = 40, high: int = 200) -> list[Tok]:
    """n fixed pseudo-random tokens, the same for the same seed, all of them outputs."""
    ids = np.random.default_rng(seed).integers(low, high, n)
    return [Tok(int(t), start + i, seq) for i, t in enumerate(ids)]


def directions(n: int, n_embd: int, seed: int = 7) -> np.ndarray:
    """n random unit directions, float32 [n, n_embd]."""
    v = np.random.default_rng(seed).standard_normal((n, n_embd))
    return (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)


def silence() -> None:
    """Keep llama.cpp's log out of the test output."""
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
    silence.keep = callback  # type: ignore[attr-defined]
    llama_cpp.llama_log_set(callback, None)
