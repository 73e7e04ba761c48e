"""Drives the C API straight through llama-cpp-python's low-level functions, so that a test sees every token and position.

Also the formula itself, written a second time in numpy from the header's words: :func:`edited`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from steer_plugins import native
from steer_plugins.engine.model import steering_of
from steer_plugins.native import NativeTerm
from steer_plugins.runtime import has_steering, stock_library
from steer_plugins.runtime.waiting import with_short_waits
from steer_plugins.store.identity import identity_of_gguf

CORE = ("llama", "qwen2", "qwen3", "gemma3", "deepseek2", "deepseek4")
"""Architectures for the tests with many cases; test_architectures.py runs its shorter list over all of them."""

llama_cpp: Any = None  # set by the fixture in conftest.py, after a runtime was activated

RESID, ATTN, FFN = 0, 1, 2
ADD, PROJECT, CLAMP, RENORM, FLOOR, CAP = 0, 1, 2, 3, 4, 5
ALL, MEAN = native.STREAM_ALL, native.STREAM_MEAN

Place = tuple[int, int]
"""(layer, site)"""


@dataclass(frozen=True)
class Tok:
    """One token of a batch."""

    token: int
    pos: int
    seq: int = 0
    output: bool = True


@dataclass(frozen=True)
class Vector:
    """A steering vector: place -> (unit direction float32 [n_embd], scale).

    ``columns``: place -> (read, write, gain, bias, knee), float32 [k, n_embd] unit rows and [k] numbers.
    """

    places: Mapping[Place, tuple[np.ndarray, float]]
    columns: Mapping[Place, tuple[Any, ...]] = field(default_factory=dict)

    def put(self, steer: native.SteerContext, index: int) -> None:
        steer.set_vector(
            index,
            [il for il, _ in self.places],
            [site for _, site in self.places],
            np.stack([v for v, _ in self.places.values()]),
            [scale for _, scale in self.places.values()],
            {list(self.places).index(place): columns for place, columns in self.columns.items()},
        )


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
        flash: bool | None = None,
        steer: bool = True,
        cb_eval: Any = None,
    ) -> None:
        c = llama_cpp
        self.path = path
        params = c.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = c.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, path
        cp = c.llama_context_default_params()
        cp.n_ctx, cp.n_batch, cp.n_ubatch, cp.n_seq_max = n_ctx * n_seq_max, n_batch, n_ubatch, n_seq_max
        cp.n_threads = cp.n_threads_batch = 1
        cp.kv_unified = kv_unified
        if flash is not None:
            cp.flash_attn_type = int(flash)
        self._params = cp
        self.steering: Any = None
        prepared = None
        if steer:
            self.steering = steering_of(c, self.model, identity_of_gguf(path).architecture)
            prepared = self.steering.prepare(cp)
        if cb_eval is not None:
            cp.cb_eval = cb_eval
        self.ctx = c.llama_init_from_model(self.model, cp)
        assert self.ctx
        self.n_embd = c.llama_model_n_embd(self.model)
        self.n_layer = c.llama_model_n_layer(self.model)
        self.n_vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.memory = c.llama_get_memory(self.ctx)
        self.library = c.llama_cpp._lib if self.steering is None else self.steering.library
        self.steer: Any = None
        if steer:
            self.info = self.steering.info
            self.sites = [native.SITES[name] for name in self.info.sites]
            self.steer = self.steering.attach(prepared, self.ctx)

    def second_context(self) -> Raw:
        """Another context on the same weights."""
        other = object.__new__(Raw)
        other.__dict__.update(self.__dict__)
        other.model = None  # the first one frees it
        prepared = self.steering.prepare(self._params)
        other.ctx = llama_cpp.llama_init_from_model(self.model, self._params)
        other.memory = llama_cpp.llama_get_memory(other.ctx)
        other.steer = self.steering.attach(prepared, other.ctx)
        return other

    @property
    def handle(self) -> Any:
        """What calls of the steering API take for this context."""
        return self.steer._context if self.steer else self.ctx

    # ---- decoding ----

    def try_decode(self, toks: Sequence[Tok | tuple[int, int, tuple[int, ...], bool]]) -> int:
        """Result of llama_decode(); an entry with a tuple of sequences is one token that they share."""
        c = llama_cpp
        batch = c.llama_batch_init(len(toks), 0, 8)
        try:
            batch.n_tokens = len(toks)
            for i, t in enumerate(toks):
                token, pos, seqs, output = (t.token, t.pos, (t.seq,), t.output) if isinstance(t, Tok) else t
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, pos, len(seqs)
                for j, seq in enumerate(seqs):
                    batch.seq_id[i][j] = seq
                batch.logits[i] = output
            return self.steer.decode(c, batch) if self.steer else int(c.llama_decode(self.ctx, batch))
        finally:
            c.llama_batch_free(batch)

    def logits(self, index: int) -> np.ndarray:
        """Logits of batch entry ``index`` of the last decode: float32 [n_vocab], a copy."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, index), (self.n_vocab,)).copy()

    def decode(self, toks: Sequence[Tok]) -> np.ndarray:
        """Logits, float32 [n_outputs, n_vocab], in batch order. One sequence after another where batches can hold but one."""
        seqs = list(dict.fromkeys(t.seq for t in toks))
        if self.steering is not None and self.steering.one_sequence and len(seqs) > 1:
            rows_of: dict[tuple[int, int], np.ndarray] = {}
            for seq in seqs:
                part = [t for t in toks if t.seq == seq]
                rows_of.update(zip([(t.seq, t.pos) for t in part if t.output], self.decode(part), strict=True))
            return np.stack([rows_of[t.seq, t.pos] for t in toks if t.output])
        code = self.try_decode(toks)
        assert code == 0, (code, self.steer and self.steer.error())
        if self.steer:
            assert (error := self.steer.sequence_error()) is None, error
        rows = [self.logits(i) for i, t in enumerate(toks) if t.output]
        return np.stack(rows) if rows else np.empty((0, self.n_vocab), np.float32)

    def forget(self) -> None:
        """Empty the KV cache; the steering stays."""
        llama_cpp.llama_memory_clear(self.memory, True)

    def clear(self) -> None:
        """Empty the KV cache and drop ranges, read wishes and rows; vectors and configs stay."""
        self.forget()
        if self.steer:
            self.steer.clear_sequence(-1)
            self.steer.clear_rows()

    def reset(self) -> None:
        """As a new context."""
        self.forget()
        self.set_cvec(None)
        self.steer.free()
        self.steer.callback_error = None

    def set_cvec(self, data: Iterable[float] | None, first: int = -1, last: int = -1) -> None:
        """llama.cpp's own control vector; ``data`` starts at layer 1."""
        array = None if data is None else np.ascontiguousarray(list(data), np.float32)
        pointer = None if array is None else array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        size = 0 if array is None else array.size
        assert llama_cpp.llama_set_adapter_cvec(self.ctx, pointer, size, self.n_embd, first, last) == 0

    # ---- steering and reading ----

    def steer_with(
        self,
        vectors: Mapping[int, Vector],
        terms: Sequence[NativeTerm],
        *,
        config: int = 1,
        seq: int = 0,
        first: int = 0,
        end: int = -1,
    ) -> None:
        """Set vectors and one config, and give it to a range."""
        for index, vector in vectors.items():
            vector.put(self.steer, index)
        self.steer.set_config(config, terms)
        self.steer.set_range(seq, first, end, config)

    def read(
        self,
        toks: Sequence[Tok] | Sequence[Sequence[Tok]],
        layers: Sequence[int],
        site: int = RESID,
        stream: int = MEAN,
    ) -> dict[int, np.ndarray]:
        """Decode (one batch, or several) and return layer -> rows in the order of the tokens, all of them wanted."""
        batches: Any = [toks] if isinstance(toks[0], Tok) else toks
        self.steer.set_captures(layers, [site] * len(layers), stream=stream)
        for seq in {t.seq for batch in batches for t in batch}:
            self.steer.want(seq, 0, -1)
        for batch in batches:
            self.decode(batch)
        result = self.rows_of([t for batch in batches for t in batch], layers, site, stream)
        self.steer.set_captures([], [])
        return result

    def rows_of(self, toks: Sequence[Tok], layers: Sequence[int], site: int = RESID, stream: int = MEAN) -> Any:
        """Rows kept so far of these tokens, by layer."""
        seqs, poss = self.steer.kept()
        order = {(int(a), int(b)): i for i, (a, b) in enumerate(zip(seqs, poss, strict=True))}
        assert len(order) == len(seqs), "a token was read twice"
        index = [order[(t.seq, t.pos)] for t in toks]
        n_streams = self.info.n_streams if stream == ALL and site == RESID else 1
        return {il: self.steer.rows(il, site, n_streams)[index] for il in layers}

    def close(self) -> None:
        llama_cpp.llama_free(self.ctx)
        if self.steer:
            self.steer.close()
        if self.model:
            if self.steering:
                self.steering.close()
            llama_cpp.llama_model_free(self.model)


def steer_library() -> ctypes.CDLL:
    """The library that holds the steering API: the loaded one, or the one that steers beside it."""
    library = llama_cpp.llama_cpp._lib
    return native.load(library) if has_steering(library) else native.stock.open_library(stock_library())


# ---- llama.cpp's own view of its graph ----


class Nodes:
    """Values of named graph nodes, through llama.cpp's evaluation callback: nothing of the steering code is involved.

    Args:
        library: libllama; ggml's functions are found through it.
        names: names without layer, such as ``l_out``.
    """

    def __init__(self, library: ctypes.CDLL, names: Sequence[str]) -> None:
        self.values: dict[str, list[np.ndarray]] = {}
        get_name, nbytes, get = library.ggml_get_name, library.ggml_nbytes, library.ggml_backend_tensor_get
        get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        nbytes.restype, nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        get.restype, get.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]

        def seen(tensor: int, ask: bool, _: Any) -> bool:
            name = get_name(tensor).decode()
            if name.split("-")[0] not in names:
                return not ask
            if not ask:
                out = np.empty(nbytes(tensor) // 4, np.float32)
                get(tensor, out.ctypes.data, 0, out.nbytes)
                self.values.setdefault(name, []).append(out)
            return True

        self.callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(seen)

    def rows(self, name: str, *shape: int) -> np.ndarray:
        """All values of a node over the ubatches, as [n_rows, *shape]."""
        return np.concatenate(self.values[name]).reshape(-1, *shape)


# ---- the formula ----


def edited(
    h: np.ndarray, place: Place, vectors: Mapping[int, Vector], terms: Iterable[NativeTerm], stream: int | None = None
) -> np.ndarray:
    """``h + V(c + g * (V^T h))`` in float64, from the header's words, for what was read at ``place`` without an edit there.

    ``h``: [n, n_embd], or [n, n_streams, n_embd], whose streams are edited one by one. ``stream``: which one a
    two-dimensional ``h`` is; None when no term names one.
    """
    h = h.astype(np.float64)
    if h.ndim == 3:
        return np.stack([edited(h[:, s], place, vectors, terms, s) for s in range(h.shape[1])], axis=1)
    out = h.copy()
    keep = False
    for t in terms:
        if t.strength == 0 or place not in vectors[t.vector].places:
            continue
        if (t.il_first >= 0 and place[0] < t.il_first) or (t.il_last >= 0 and place[0] > t.il_last):
            continue
        if t.stream >= 0 and stream is not None and t.stream != stream:
            continue
        v32, scale = vectors[t.vector].places[place]
        v = v32.astype(np.float64)
        along = h @ v
        keep = keep or t.op == RENORM
        reads = responses(h, vectors[t.vector].columns.get(place))
        if t.op in (ADD, RENORM):
            out += t.strength * scale * v + t.strength * (0.0 if reads is None else reads)
        elif t.op == PROJECT:
            out += t.strength * (np.outer(-along, v) if reads is None else reads)
        elif t.op == CLAMP:
            out += t.strength * scale * v + (np.outer(-along, v) if reads is None else reads)
        else:
            out += np.outer(t.strength * (held(along, t, scale) - along), v)
    if keep:
        out *= np.linalg.norm(h, axis=1, keepdims=True) / np.linalg.norm(out, axis=1, keepdims=True)
    return out


def responses(h: np.ndarray, columns: tuple[Any, ...] | None) -> np.ndarray | None:
    """What columns add at strength 1, [n, n_embd]; None without any."""
    if columns is None:
        return None
    total = np.zeros_like(h)
    for read, write, gain, bias, knee in zip(*columns, strict=True):
        z = h @ read.astype(np.float64) + bias
        total += np.outer(gain * np.where(z > knee, z, 0.0), write.astype(np.float64))
    return total


def held(along: np.ndarray, t: NativeTerm, scale: float) -> np.ndarray:
    """A component under a floor or a cap: in units of the scale it is the level at least, or at most."""
    keep = np.maximum if (t.op == FLOOR) == (scale >= 0) else np.minimum
    return keep(along, t.level * scale)


def tolerance(h: np.ndarray, vectors: Mapping[int, Vector], terms: Iterable[NativeTerm]) -> float:
    """How far float32 arithmetic may be from :func:`edited`.

    Each element is a sum of numbers no larger than |h| + sum of doses, rounded a few times; V^T h is a dot product whose
    error grows with sqrt(n_embd) at most, and comes in once for each projecting term.
    """
    terms = list(terms)
    size = float(np.abs(h).max())
    dyn = 0.0
    for t in terms:
        doses = [abs(t.strength * scale) for _, scale in vectors[t.vector].places.values()]
        size += max(doses) if t.op != PROJECT else 0.0
        norm = float(np.linalg.norm(h.reshape(-1, h.shape[-1]), axis=1).max())
        if t.op in (PROJECT, CLAMP, FLOOR, CAP):
            dyn += max(1.0, abs(t.strength)) * norm
        for _, _, gain, bias, _ in vectors[t.vector].columns.values():
            dyn += max(1.0, abs(t.strength)) * float((np.abs(gain) * (norm + np.abs(bias))).sum())
    eps = float(np.finfo(np.float32).eps)
    norms = 8.0 * size if any(t.op == RENORM for t in terms) else 0.0  # two sums of squares, and what is made of them
    return eps * (4.0 * size + 4.0 * dyn + norms)


def close(got: np.ndarray, want: np.ndarray, atol: float) -> None:
    """Assert that two arrays are equal within ``atol``, and that ``want`` could have been missed."""
    assert got.shape == want.shape
    error = float(np.abs(got.astype(np.float64) - want).max())
    assert error <= atol, f"off by {error:.3g}, allowed is {atol:.3g}"


def child_environment(runtime: Any, lib_dir: Path | None = None) -> dict[str, str]:
    """Environment of a process that imports these tests and llama_cpp on a runtime's libraries (or on ``lib_dir``)."""
    root = Path(__file__).parents[2]
    folder = str(lib_dir or runtime.lib_dir)
    paths = [str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")]
    return {
        **with_short_waits(os.environ),
        "LLAMA_CPP_LIB_PATH": folder,
        "MTMD_CPP_LIB": folder,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    }


# ---- inputs ----


def prompt(n: int, seq: int = 0, *, start: int = 0, seed: int = 1, low: int = 40, high: int = 200) -> list[Tok]:
    """n fixed pseudo-random tokens, the same for the same seed, all of them outputs."""
    ids = np.random.default_rng(seed).integers(low, high, start + n)[start:]
    return [Tok(int(t), start + i, seq) for i, t in enumerate(ids)]


def directions(n: int, n_embd: int, seed: int = 7) -> np.ndarray:
    """n random unit directions, float32 [n, n_embd]."""
    v = np.random.default_rng(seed).standard_normal((n, n_embd))
    return (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)


def vector(n_embd: int, places: Sequence[Place], *, seed: int = 7, scale: float = 2.5) -> Vector:
    """A vector with a random direction at each place; the scales differ from place to place."""
    v = directions(len(places), n_embd, seed)
    return Vector({at: (v[i], scale * (1 + 0.1 * i)) for i, at in enumerate(places)})


def silence() -> None:
    """Keep llama.cpp's log out of the test output."""
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
    silence.keep = callback  # type: ignore[attr-defined]
    llama_cpp.llama_log_set(callback, None)
