"""Steering beside an unmodified llama.cpp: ``cpp_patch/stock/llama-steer-stock.h`` behind the interface of :mod:`.binding`.

The library that this binds holds the whole steering API, and is handed the calls of whatever llama.cpp is loaded. What it needs
to know of a model is found out in a small context that decodes a few tokens; so is whether rows stand where they are looked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_int8, c_int32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError, RuntimeMissing
from . import binding
from .binding import STREAM_MEAN, NativeTerm, SteerContext

LOOK_TOKENS = 11
LOOK_OUTPUTS = 3
_SMALL = 256  # tokens of a context that is looked at
_FAILED = -3  # what llama_decode() returns when the patch stops it

_CALLS = ("get_name", "nbytes", "get_data", "is_contiguous", "tensor_get", "tensor_set", "synchronize", "set_cvec")
_NAMES: dict[str, tuple[str, ...]] = {
    "get_name": ("ggml_get_name",),
    "nbytes": ("ggml_nbytes",),
    "get_data": ("ggml_get_data",),
    "is_contiguous": ("ggml_is_contiguous",),
    "tensor_get": ("ggml_backend_tensor_get",),
    "tensor_set": ("ggml_backend_tensor_set",),
    "synchronize": ("llama_synchronize",),
    "set_cvec": ("llama_set_adapter_cvec", "llama_apply_adapter_cvec"),  # new name, old name
}
_OPTIONAL = ("set_cvec",)


class _Calls(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in _CALLS]


class _Stats(ctypes.Structure):
    _fields_ = [("n_batches", c_uint64), ("n_cvec", c_uint64), ("n_edits", c_uint64), ("n_cvec_set", c_uint64)]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_steer_stock_model_new": (c_void_p, [POINTER(_Calls), c_char_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_steer_stock_model_free": (None, [c_void_p]),
    "llama_steer_stock_mark": (None, [c_void_p, c_void_p]),
    "llama_steer_stock_new": (c_void_p, [c_void_p, c_int32, c_int32, c_bool]),
    "llama_steer_stock_bind": (None, [c_void_p, c_void_p]),
    "llama_steer_stock_free": (None, [c_void_p]),
    "llama_steer_stock_begin": (
        c_int32,
        [c_void_p, c_int32, POINTER(c_int32), POINTER(c_int32), POINTER(POINTER(c_int32)), POINTER(c_int8)],
    ),
    "llama_steer_stock_end": (c_int32, [c_void_p, c_bool]),
    "llama_steer_stock_get_stats": (None, [c_void_p, POINTER(_Stats)]),
}

_opened: dict[Path, ctypes.CDLL] = {}


def open_library(path: Path) -> ctypes.CDLL:
    """The library at ``path`` with its signatures declared; opened once.

    Raises:
        RuntimeMissing: it cannot be loaded.
    """
    if path not in _opened:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise RuntimeMissing(f"{path} cannot be loaded ({str(error).splitlines()[0]}): delete it and try again") from None
        binding.load(library)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        _opened[path] = library
    return _opened[path]


def _calls_of(llama: ctypes.CDLL) -> _Calls:
    """Addresses of the calls that are needed, by whatever name this version has for them."""
    libraries = [llama]
    folder = Path(getattr(llama, "_name", None) or ".").parent
    for stem in ("ggml-base", "ggml"):  # where a library does not offer what those behind it do
        for path in sorted(folder.glob(f"*{stem}.*")):
            if path.name.split(".")[0] in (stem, f"lib{stem}"):
                try:
                    libraries.append(ctypes.CDLL(str(path)))
                    break
                except OSError:
                    continue
    found = _Calls()
    for field, names in _NAMES.items():
        function = next((getattr(lib, name) for name in names for lib in libraries if hasattr(lib, name)), None)
        if function is not None:
            setattr(found, field, ctypes.cast(function, c_void_p).value)
        elif field not in _OPTIONAL:
            raise RuntimeMissing(
                f"the llama.cpp that this process loaded offers no {names[0]}, which steering beside it needs: "
                "install llama-cpp-python 0.3.16 or newer, or run `steer build`"
            )
    return found


def _with_callback(params: Any, function: Any, data: int) -> None:
    """Set the evaluation callback of a context's parameters, in the type that these bindings have for it."""
    kinds = dict(type(params)._fields_)
    if "cb_eval" not in kinds or "kv_unified" not in kinds:
        raise RuntimeMissing(
            "these bindings of llama.cpp are too old to steer an unmodified library: install llama-cpp-python 0.3.16 or newer, "
            "or run `steer build`"
        )
    params.cb_eval = ctypes.cast(function, kinds["cb_eval"])
    params.cb_eval_user_data = data


class StockContext(SteerContext):
    """The steering of one context of an unmodified library. ``handle``: of the native side, which this frees."""

    def __init__(self, library: ctypes.CDLL, handle: int, context: Any, n_embd: int) -> None:
        super().__init__(library, handle, n_embd)
        self._real = context
        library.llama_steer_stock_bind(handle, ctypes.cast(context, c_void_p))

    def decode(self, llama_cpp: Any, batch: Any) -> int:
        ids = ctypes.cast(batch.seq_id, POINTER(POINTER(c_int32)))
        pos, n_ids, out = (ctypes.cast(one, POINTER(kind)) for one, kind in _columns(batch))
        if self.library.llama_steer_stock_begin(self._context, batch.n_tokens, pos, n_ids, ids, out) != 0:
            return _FAILED
        code = int(llama_cpp.llama_decode(self._real, batch))
        if self.library.llama_steer_stock_end(self._context, code == 0) != 0:
            return _FAILED
        return code

    def how(self) -> dict[str, int]:
        """How batches were steered: ``n_batches`` in all, ``n_cvec`` by the control vector, ``n_edits`` outputs of layers by the
        callback; ``n_cvec_set``: times the library was told a control vector."""
        raw = _Stats()
        self.library.llama_steer_stock_get_stats(self._context, ctypes.byref(raw))
        return {name: getattr(raw, name) for name in (field[0] for field in _Stats._fields_)}

    def close(self) -> None:
        """Free the native side: the context that it was for is gone."""
        if self._context:
            self.library.llama_steer_stock_free(self._context)
            self._context = None


def _columns(batch: Any) -> Sequence[tuple[Any, Any]]:
    return ((batch.pos, c_int32), (batch.n_seq_id, c_int32), (batch.logits, c_int8))


class StockSteering:
    """How the contexts of one model are steered that an unmodified library has loaded; see :class:`~.binding.Steering`.

    Args:
        llama_cpp: the bindings, any version whose names are understood.
        path: the library that steers, of :func:`steer_plugins.runtime.stock.stock_library`.
        model: the ``llama_model`` pointer.
        architecture: ``general.architecture`` of its file.
        n_embd: width of a hidden state.

    Raises:
        RuntimeMissing: the bindings or the library behind them are too old.
        ModelError: the architecture is not in the tested list, or its layers' outputs were not found.
        EngineError: there is no memory for a small context, or rows are not where they were looked for.
    """

    unified = True

    def __init__(self, llama_cpp: Any, path: Path, model: Any, architecture: str) -> None:
        self.library = open_library(path)
        self._c = llama_cpp
        self._model = model
        low = llama_cpp.llama_cpp
        calls = _calls_of(low._lib)
        n_layer, n_embd = int(low.llama_model_n_layer(model)), int(low.llama_model_n_embd(model))
        # A cache that holds states parts batches by sequence, whatever it is told.
        states = [low.llama_model_is_recurrent, getattr(low, "llama_model_is_hybrid", lambda _: False)]
        self.one_sequence = any(call(model) for call in states)
        self._handle = self.library.llama_steer_stock_model_new(
            ctypes.byref(calls), architecture.encode(), n_layer, n_embd, LOOK_TOKENS, LOOK_OUTPUTS
        )
        if not self._handle:
            raise binding.untested(self.library)
        try:
            self._look()
            probe = self.library.llama_steer_stock_new(self._handle, 1, 1, False)
            try:
                self.info = binding.context_info(self.library, probe)
            finally:
                self.library.llama_steer_stock_free(probe)
            self.one_sequence = self.one_sequence or self.info.n_streams > 1
            self._check_rows()
        except BaseException:
            self.close()
            raise

    # ---- what the engines use ----

    def prepare(self, params: Any) -> Any:
        if params.embeddings:
            raise EngineError(
                "a context for embeddings cannot be steered beside an unmodified llama.cpp: "
                "use the patched runtime (`steer build`)"
            )
        params.n_ubatch = params.n_batch  # a batch is computed in one piece
        params.kv_unified = True  # and in its order
        handle = self.library.llama_steer_stock_new(self._handle, params.n_batch, params.n_seq_max, self.one_sequence)
        _with_callback(params, self.library.llama_steer_stock_eval, handle)
        return handle

    def attach(self, prepared: Any, context: Any) -> StockContext:
        return StockContext(self.library, prepared, context, self.info.n_embd)

    def close(self) -> None:
        if self._handle:
            self.library.llama_steer_stock_model_free(self._handle)
            self._handle = None

    # ---- what is found out first ----

    def _small(self, n_seq: int) -> Any:
        params = self._c.llama_context_default_params()
        params.n_ctx = _SMALL * n_seq
        params.n_batch = params.n_ubatch = 4 * LOOK_TOKENS
        params.n_seq_max = n_seq
        params.kv_unified = True
        return params

    def _made(self, params: Any) -> Any:
        context = self._c.llama_init_from_model(self._model, params)
        if not context:
            raise EngineError("not enough memory for a small context, in which to look at the model's layers")
        return context

    def _look(self) -> None:
        """Let the library decode a few tokens, and take note of the outputs of layers that pass."""
        params = self._small(1)
        _with_callback(params, self.library.llama_steer_stock_look, self._handle)
        context = self._made(params)
        try:
            tokens = [(0, p, LOOK_TOKENS - p <= LOOK_OUTPUTS) for p in range(LOOK_TOKENS)]
            self._decode(context, tokens)
            self.library.llama_steer_stock_mark(self._handle, ctypes.cast(context, c_void_p))
            self._c.llama_memory_clear(self._c.llama_get_memory(context), True)
            self._decode(context, tokens)
        finally:
            self._c.llama_free(context)

    def _decode(self, context: Any, tokens: Sequence[tuple[int, int, bool]], steer: SteerContext | None = None) -> None:
        """Decode (sequence, position, output) entries; their tokens are 1, 2, 3, ..."""
        batch = self._c.llama_batch_init(len(tokens), 0, 4)
        try:
            batch.n_tokens = len(tokens)
            for i, (sequence, position, output) in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = i + 1, position, 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = output
            code = steer.decode(self._c, batch) if steer else self._c.llama_decode(context, batch)
            if code != 0:
                reason = f": {steer.error()}" if steer else ""
                raise EngineError(f"llama.cpp failed to compute {len(tokens)} tokens to look at (code {code}){reason}")
        finally:
            self._c.llama_batch_free(batch)

    def _check_rows(self) -> None:
        """Add something to one token at layer 0: at the last layer, it and those after it in its sequence have moved alone.

        Raises:
            EngineError: it is not so.
        """
        if self.info.n_layer < 2:
            return
        n_seq = 1 if self.one_sequence else 3
        order = [(0, p) for p in range(LOOK_TOKENS)]
        if n_seq > 1:
            order = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2), (2, 1), (1, 2), (1, 3), (2, 2), (0, 3)]
        sequence, first = (0, 5) if n_seq == 1 else (1, 2)
        params = self._small(n_seq)
        prepared = self.prepare(params)
        context = self._made(params)
        steer = self.attach(prepared, context)
        try:
            last = self.info.n_layer - 1
            steer.set_captures([last], [0], stream=STREAM_MEAN)
            rows: list[npt.NDArray[np.float32]] = []
            for marked in (False, True):
                self._c.llama_memory_clear(self._c.llama_get_memory(context), True)
                for one in range(n_seq):
                    steer.want(one, 0, -1)
                if marked:
                    size = float(np.linalg.norm(rows[0], axis=1).mean())
                    unit = np.random.default_rng(0).standard_normal((1, self.info.n_embd))
                    steer.set_vector(0, [0], [0], (unit / np.linalg.norm(unit)).astype(np.float32), [max(size, 1.0)])
                    steer.set_config(1, [NativeTerm(0)])
                    steer.set_range(sequence, first, first + 1, 1)
                self._decode(context, [(s, p, True) for s, p in order], steer)
                if (message := steer.sequence_error()) is not None:
                    raise EngineError(message)
                rows.append(steer.rows(last, 0))
                if list(zip(*(column.tolist() for column in steer.kept()), strict=True)) != order:
                    raise EngineError("the hidden states of a batch came in another order")
                steer.clear_rows()
        finally:
            self._c.llama_free(context)
            steer.close()
        moved = np.abs(rows[1] - rows[0]).max(axis=1)
        least = 1e-3 * float(np.abs(rows[0]).max())
        expected = [s == sequence and p >= first for s, p in order]
        if [bool(m > least) for m in moved] != expected:
            raise EngineError(
                "this llama.cpp computes the tokens of a batch in another order than they are given, so none can be steered "
                "for itself: use the patched runtime (`steer build`)"
            )
