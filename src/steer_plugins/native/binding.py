"""ctypes signatures of the steering C API and a thin object around one ``llama_context``.

Every method raises :class:`~steer_plugins.errors.EngineError` with the library's own sentence when a call fails.
The library it binds is the one llama-cpp-python loaded, so contexts made by that package can be steered directly.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import EngineError, ModelError, RuntimeMissing, SpecError
from . import plan as planner
from .plan import Plan, PlanVector, VectorStruct

API_VERSION = 4
SITES: dict[str, int] = {"resid_post": 0, "attn_out": 1, "ffn_out": 2}
OPS: dict[str, int] = {"add": 0, "project": 1, "clamp": 2, "renorm": 3, "floor": 4, "cap": 5}
STREAM_ALL = -1
STREAM_MEAN = -2
_ERR_ARG = -1


class _Info(ctypes.Structure):
    _fields_ = [
        ("n_layer", c_int32),
        ("n_embd", c_int32),
        ("n_streams", c_int32),
        ("sites", c_bool * 3),
        ("last_layer_outputs_only", c_bool),
    ]


class _Term(ctypes.Structure):
    _fields_ = [
        ("vector", c_int32),
        ("op", c_int32),
        ("strength", c_double),
        ("il_first", c_int32),
        ("il_last", c_int32),
        ("stream", c_int32),
        ("level", c_double),
    ]


class _Stats(ctypes.Structure):
    _fields_ = [
        ("n_ubatches", c_uint64),
        ("n_graph_builds", c_uint64),
        ("n_graph_on", c_uint64),
        ("n_edit_nodes", c_uint64),
        ("n_reserves", c_uint64),
        ("n_row_uploads", c_uint64),
        ("n_row_waits", c_uint64),
        ("n_rows_capacity", c_uint64),
        ("n_device_bytes", c_uint64),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("layer", c_int32),
        ("site", c_int32),
        ("n_rows", c_int32),
        ("n_streams", c_int32),
        ("n_embd", c_int32),
        ("seq_id", POINTER(c_int32)),
        ("pos", POINTER(c_int32)),
        ("data", POINTER(c_float)),
    ]


class _Tokens(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("n_vectors", c_int32),
        ("seq_id", POINTER(c_int32)),
        ("pos", POINTER(c_int32)),
    ]


_READ_CB = ctypes.CFUNCTYPE(c_bool, POINTER(_Rows), c_void_p)
_ADD_CB = ctypes.CFUNCTYPE(c_bool, POINTER(_Tokens), POINTER(c_float), POINTER(c_float), c_void_p)

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_steer_version": (c_char_p, []),
    "llama_steer_error": (c_char_p, [c_void_p]),
    "llama_steer_model_info": (c_int32, [c_void_p, POINTER(_Info)]),
    "llama_steer_context_info": (c_int32, [c_void_p, POINTER(_Info)]),
    "llama_steer_arch_name": (c_char_p, [c_int32]),
    "llama_steer_vector_set": (
        c_int32,
        [c_void_p, c_int32, c_int32, POINTER(c_int32), POINTER(c_int32), POINTER(c_float), POINTER(c_double)],
    ),
    "llama_steer_vector_put": (c_int32, [c_void_p, c_int32, POINTER(VectorStruct)]),
    "llama_steer_vector_clear": (c_int32, [c_void_p, c_int32]),
    "llama_steer_config_set": (c_int32, [c_void_p, c_int32, c_int32, POINTER(_Term)]),
    "llama_steer_config_clear": (c_int32, [c_void_p, c_int32]),
    "llama_steer_range": (c_int32, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_steer_seq_clear": (c_int32, [c_void_p, c_int32]),
    "llama_steer_edit_id": (c_uint64, [c_void_p, c_int32, c_int32]),
    "llama_steer_config_id": (c_uint64, [c_void_p, c_int32]),
    "llama_steer_config_acts": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_steer_plan_edits": (c_int32, [c_void_p, c_void_p, c_int32, POINTER(c_int32), POINTER(c_uint64)]),
    "llama_steer_plan_apply": (c_int32, [c_void_p, c_void_p, c_int32, c_int32]),
    "llama_steer_vector_pin": (c_int32, [c_void_p, POINTER(VectorStruct), c_int32, POINTER(c_int32)]),
    "llama_steer_vector_unpin": (c_int32, [c_void_p, c_int32]),
    "llama_steer_seq_error": (c_int32, [c_void_p, c_int32]),
    "llama_steer_capture_set": (
        c_int32,
        [c_void_p, c_int32, POINTER(c_int32), POINTER(c_int32), c_int32, c_int32, c_bool],
    ),
    "llama_steer_capture_range": (c_int32, [c_void_p, c_int32, c_int32, c_int32, c_bool]),
    "llama_steer_capture_count": (c_int32, [c_void_p]),
    "llama_steer_capture_index": (c_int32, [c_void_p, POINTER(c_int32), POINTER(c_int32)]),
    "llama_steer_capture_get": (c_int32, [c_void_p, c_int32, c_int32, POINTER(c_float), c_size_t]),
    "llama_steer_capture_clear": (c_int32, [c_void_p]),
    "llama_steer_set_read_callback": (c_int32, [c_void_p, _READ_CB, c_void_p]),
    "llama_steer_set_add_callback": (c_int32, [c_void_p, _ADD_CB, c_void_p]),
    "llama_steer_get_stats": (c_int32, [c_void_p, POINTER(_Stats)]),
    "llama_steer_fired": (c_int64, [c_void_p, c_int32, c_int32]),
    "llama_steer_config_fired": (c_int64, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_steer_free": (c_int32, [c_void_p]),
}


def load(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the steering functions on an opened libllama.

    Raises:
        RuntimeMissing: the library has no steering, or another version of its API.
    """
    try:
        planner.declare(library)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
    except AttributeError:
        raise RuntimeMissing(
            "the llama.cpp that this process loaded has no steering: import steer_plugins before llama_cpp, "
            "or point LLAMA_CPP_LIB_PATH at a runtime made by `steer build`"
        ) from None
    version = library.llama_steer_version().decode()
    if version != f"llama-steer {API_VERSION}":
        raise RuntimeMissing(f"the runtime speaks '{version}', this package needs version {API_VERSION}: run `steer build`")
    return library


@dataclass(frozen=True)
class SteerInfo:
    """What can be steered in a model; see ``llama_steer_info`` in the header."""

    n_layer: int
    n_embd: int
    n_streams: int
    sites: tuple[str, ...]
    last_layer_outputs_only: bool


@dataclass(frozen=True)
class SteerStats:
    """Counters of one context; see ``llama_steer_stats`` in the header."""

    n_ubatches: int
    n_graph_builds: int
    n_graph_on: int
    n_edit_nodes: int
    n_reserves: int
    n_row_uploads: int
    n_row_waits: int
    n_rows_capacity: int
    n_device_bytes: int


@dataclass(frozen=True)
class NativeTerm:
    """One term of a config: a vector with op (index of :data:`OPS`), strength, inclusive window (-1: open), stream, and level."""

    vector: int
    op: int = 0
    strength: float = 1.0
    il_first: int = -1
    il_last: int = -1
    stream: int = STREAM_ALL
    level: float = 0.0


def _message(library: ctypes.CDLL, context: Any) -> str:
    return str(library.llama_steer_error(context).decode(errors="replace"))


def model_info(library: ctypes.CDLL, model: Any) -> SteerInfo:
    """Steerable layers, streams and sites of a ``llama_model`` pointer.

    Raises:
        ModelError: the architecture is not in the tested list.
    """
    return _told(library, library.llama_steer_model_info, model)


def context_info(library: ctypes.CDLL, context: Any) -> SteerInfo:
    """The same, of a context."""
    return _told(library, library.llama_steer_context_info, context)


def _told(library: ctypes.CDLL, call: Any, whom: Any) -> SteerInfo:
    info = _Info()
    if call(whom, ctypes.byref(info)) != 0:
        raise untested(library)
    return SteerInfo(
        n_layer=info.n_layer,
        n_embd=info.n_embd,
        n_streams=info.n_streams,
        sites=tuple(name for name, i in SITES.items() if info.sites[i]),
        last_layer_outputs_only=info.last_layer_outputs_only,
    )


def untested(library: ctypes.CDLL) -> ModelError:
    """What to raise when a model cannot be steered: the library's last sentence, and the architectures that can."""
    count = len(tested_architectures(library))
    return ModelError(f"{_message(library, None)}; take a model of one of the {count} that `steer doctor --json` lists")


def tested_architectures(library: ctypes.CDLL) -> list[str]:
    """Names of the architectures that the patch steers."""
    names: list[str] = []
    while (name := library.llama_steer_arch_name(len(names))) is not None:
        names.append(name.decode())
    return names


def _ints(values: Sequence[int]) -> ctypes.Array[c_int32]:
    return (c_int32 * len(values))(*values)


@dataclass(frozen=True)
class ReadRows:
    """What a read callback gets: the rows of one layer and site in one ubatch.

    Attributes:
        layer: 0-based block index.
        site: ``resid_post``, ``attn_out`` or ``ffn_out``.
        sequences: int32 [n_rows], sequence ids.
        positions: int32 [n_rows], token positions.
        values: float32 [n_rows, n_embd], or [n_rows, n_streams, n_embd] when all streams are read.
    """

    layer: int
    site: str
    sequences: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


@dataclass(frozen=True)
class AddTokens:
    """What an add callback gets: the tokens of the ubatch that is about to run, and the arrays to fill.

    Attributes:
        sequences: int32 [n_tokens], sequence ids.
        positions: int32 [n_tokens], token positions.
        c: float32 [n_tokens, n_vectors], writable, zero: ``h += c * scale * v`` for the vector's directions.
        g: float32 [n_tokens, n_vectors], writable, zero: ``h += g * v (v·h)``; only for vectors that a config projects.
    """

    sequences: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    c: npt.NDArray[np.float32]
    g: npt.NDArray[np.float32]


class SteerContext:
    """The steering of one ``llama_context``: vectors, configs, ranges, captures and callbacks, as in ``llama-steer.h``.

    Args:
        library: libllama with its signatures declared by :func:`load`.
        context: the ``llama_context`` pointer; it must outlive this object's use.
        n_embd: width of a direction, to check arrays before their address is passed on.
    """

    def __init__(self, library: ctypes.CDLL, context: Any, n_embd: int) -> None:
        self.library = library
        self._context = context
        self._n_embd = n_embd
        self._callbacks: dict[str, Any] = {}
        self._set: set[str] = set()  # kinds of callbacks that there are
        self.callback_error: BaseException | None = None

    def _check(self, code: int) -> None:
        if code != 0:
            raise EngineError(self.error())

    def decode(self, llama_cpp: Any, batch: Any) -> int:
        """``llama_decode()`` of a batch of the bindings ``llama_cpp``, steered; its result."""
        return int(llama_cpp.llama_decode(self._context, batch))

    def error(self) -> str:
        """The library's sentence on its last failing call, a failed decode included."""
        return _message(self.library, self._context)

    def set_vector(
        self,
        vector: int,
        layers: Sequence[int],
        sites: Sequence[int],
        directions: npt.NDArray[np.float32],
        scales: Sequence[float],
        columns: Mapping[int, planner.Columns] | None = None,
    ) -> None:
        """Set vector ``vector`` to unit ``directions`` (float32 [n, n_embd]) at ``layers[i]``, ``sites[i]``.

        ``columns``: by index of a direction, as :class:`PlanVector` takes them.
        """
        data = np.asarray(directions)
        n = len(layers)
        if data.shape != (n, self._n_embd) or len(sites) != n or len(scales) != n:
            raise EngineError(f"directions of shape {data.shape} do not fit {n} layers of a model with n_embd {self._n_embd}")
        content = PlanVector("", layers, sites, data, scales, columns)
        self._check(self.library.llama_steer_vector_put(self._context, vector, ctypes.byref(content.struct)))

    def clear_vector(self, vector: int) -> None:
        """Forget a vector that no config uses."""
        self._check(self.library.llama_steer_vector_clear(self._context, vector))

    def set_config(self, config: int, terms: Sequence[NativeTerm]) -> None:
        """Set or replace config ``config`` (>= 1)."""
        array = (_Term * max(len(terms), 1))()
        for slot, t in zip(array, terms, strict=False):
            slot.vector, slot.op, slot.strength = t.vector, t.op, t.strength
            slot.il_first, slot.il_last, slot.stream, slot.level = t.il_first, t.il_last, t.stream, t.level
        self._check(self.library.llama_steer_config_set(self._context, config, len(terms), array))

    def clear_config(self, config: int) -> None:
        """Forget a config; its ranges become unsteered."""
        self._check(self.library.llama_steer_config_clear(self._context, config))

    def set_range(self, sequence: int, first: int, end: int, config: int) -> None:
        """Tokens at ``first <= position < end`` (``end`` -1: no end) of a sequence get a config."""
        self._check(self.library.llama_steer_range(self._context, sequence, first, end, config))

    def clear_sequence(self, sequence: int = -1) -> None:
        """Drop the ranges and read wishes of a sequence, or of all."""
        self._check(self.library.llama_steer_seq_clear(self._context, sequence))

    def config_id(self, config: int) -> int:
        """Edit id of a config: 64-bit content hash of what it applies; 0 = nothing."""
        return int(self.library.llama_steer_config_id(self._context, config))

    def config_acts(self, config: int, layer: int, site: int) -> bool:
        """Whether a config applies anything at (layer, site); False where its terms cancel out."""
        return bool(self.library.llama_steer_config_acts(self._context, config, layer, site))

    def edit_id(self, sequence: int, position: int) -> int:
        """Edit id that a token at this place would get from its range."""
        return int(self.library.llama_steer_edit_id(self._context, sequence, position))

    # ---- plans ----

    def _check_plan(self, code: int) -> None:
        if code == _ERR_ARG:
            raise SpecError(self.error())
        self._check(code)

    def edits(self, plan: Plan, positions: Sequence[int]) -> list[int]:
        """Edit ids of what tokens at ``positions`` get under a plan.

        Raises:
            SpecError: the plan cannot be applied in this context.
        """
        n = len(positions)
        out = (c_uint64 * n)()
        self._check_plan(self.library.llama_steer_plan_edits(self._context, plan.pointer, n, _ints(positions), out))
        return list(out)

    def apply(self, plan: Plan, sequence: int, first: int) -> None:
        """Tokens of a sequence at positions >= ``first`` get what a plan says; on an error nothing has changed.

        Raises:
            SpecError: the plan cannot be applied in this context.
            EngineError: not enough memory, or more different steerings at once than a context holds.
        """
        self._check_plan(self.library.llama_steer_plan_apply(self._context, plan.pointer, sequence, first))

    def pin(self, vector: PlanVector, op: int) -> int:
        """Id of a vector for an add callback that does ``op`` with it; it stays until :meth:`unpin`."""
        if vector.n_embd != self._n_embd:
            raise EngineError(f"directions of {vector.n_embd} numbers do not fit a model with n_embd {self._n_embd}")
        out = c_int32()
        self._check(self.library.llama_steer_vector_pin(self._context, ctypes.byref(vector.struct), op, ctypes.byref(out)))
        return int(out.value)

    def unpin(self, vector: int) -> None:
        """Let a pinned vector go."""
        self._check(self.library.llama_steer_vector_unpin(self._context, vector))

    def sequence_error(self, sequence: int = -1) -> str | None:
        """What went wrong with a sequence (-1: any) while others were computed as they should; told once. None: nothing."""
        code = self.library.llama_steer_seq_error(self._context, sequence)
        return self.error() if code else None

    # ---- reading ----

    def set_captures(
        self, layers: Sequence[int], sites: Sequence[int], *, stream: int = STREAM_MEAN, n_rows: int = 0, keep: bool = True
    ) -> None:
        """Replace the captures; ``layers`` empty takes them away. ``n_rows``: most tokens wanted of one ubatch (0: n_ubatch)."""
        if len(layers) != len(sites):
            raise EngineError(f"{len(layers)} layers and {len(sites)} sites were given for captures: name a site for each layer")
        self._check(
            self.library.llama_steer_capture_set(self._context, len(layers), _ints(layers), _ints(sites), stream, n_rows, keep)
        )

    def want(self, sequence: int, first: int, end: int, wanted: bool = True) -> None:
        """Read the tokens at ``first <= position < end`` of a sequence when they are computed."""
        self._check(self.library.llama_steer_capture_range(self._context, sequence, first, end, wanted))

    def kept(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(sequences, positions), int32 [n] each, of the rows kept so far, in the order they were computed."""
        n = self.library.llama_steer_capture_count(self._context)
        sequences = np.empty(n, np.int32)
        positions = np.empty(n, np.int32)
        if n:
            as_int = POINTER(c_int32)
            self._check(
                self.library.llama_steer_capture_index(
                    self._context, sequences.ctypes.data_as(as_int), positions.ctypes.data_as(as_int)
                )
            )
        return sequences, positions

    def rows(self, layer: int, site: int, n_streams: int = 1) -> npt.NDArray[np.float32]:
        """Rows kept at one capture: float32 [n, n_embd], or [n, n_streams, n_embd] for ``n_streams`` > 1."""
        n = self.library.llama_steer_capture_count(self._context)
        out = np.empty((n, n_streams, self._n_embd), np.float32)
        self._check(
            self.library.llama_steer_capture_get(self._context, layer, site, out.ctypes.data_as(POINTER(c_float)), out.size)
        )
        return out if n_streams > 1 else out[:, 0, :]

    def clear_rows(self) -> None:
        """Drop the rows kept so far."""
        self._check(self.library.llama_steer_capture_clear(self._context))

    def on_read(self, callback: Callable[[ReadRows], None] | None) -> None:
        """Call ``callback`` after each ubatch for each capture; None removes it. An exception in it fails the decode."""
        names = {i: name for name, i in SITES.items()}

        def trampoline(pointer: Any, _: Any) -> bool:
            r = pointer.contents
            shape = (r.n_rows, r.n_streams, r.n_embd) if r.n_streams > 1 else (r.n_rows, r.n_embd)
            try:
                assert callback is not None
                callback(
                    ReadRows(
                        layer=r.layer,
                        site=names[r.site],
                        sequences=np.ctypeslib.as_array(r.seq_id, (r.n_rows,)).copy(),
                        positions=np.ctypeslib.as_array(r.pos, (r.n_rows,)).copy(),
                        values=np.ctypeslib.as_array(r.data, shape).copy(),
                    )
                )
            except BaseException as error:  # must not unwind through C; the engine raises it again
                self.callback_error = error
                return False
            return True

        self._set_callback("read", _READ_CB, trampoline if callback else None, self.library.llama_steer_set_read_callback)

    def on_add(self, callback: Callable[[AddTokens], None] | None) -> None:
        """Call ``callback`` before each ubatch to add to the coefficients; None removes it."""

        def trampoline(pointer: Any, c: Any, g: Any, _: Any) -> bool:
            t = pointer.contents
            shape = (t.n_tokens, t.n_vectors)
            try:
                assert callback is not None
                callback(
                    AddTokens(
                        sequences=np.ctypeslib.as_array(t.seq_id, (t.n_tokens,)).copy(),
                        positions=np.ctypeslib.as_array(t.pos, (t.n_tokens,)).copy(),
                        c=np.ctypeslib.as_array(c, shape),
                        g=np.ctypeslib.as_array(g, shape),
                    )
                )
            except BaseException as error:
                self.callback_error = error
                return False
            return True

        self._set_callback("add", _ADD_CB, trampoline if callback else None, self.library.llama_steer_set_add_callback)

    @contextlib.contextmanager
    def interrupts_held(self) -> Iterator[None]:
        """Around a native call that may run callbacks: Ctrl-C is taken note of, and acts when the call has returned.

        Python raises KeyboardInterrupt at the next line it comes to, which would be the first of a callback, before it can catch
        anything; ctypes prints such an exception and forgets it. (Only the main thread is interrupted.)
        """
        before = signal.getsignal(signal.SIGINT)
        if not self._set or not callable(before) or threading.current_thread() is not threading.main_thread():
            yield
            return
        came: list[tuple[int, FrameType | None]] = []
        signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            if came:
                before(*came[0])

    def _set_callback(self, kind: str, prototype: Any, function: Any, setter: Any) -> None:
        wrapped = prototype(function) if function else prototype()
        self._check(setter(self._context, wrapped, None))
        self._callbacks[kind] = wrapped  # ctypes callbacks die with their last reference
        (self._set.add if function else self._set.discard)(kind)

    def raise_callback_error(self) -> None:
        """Raise what a callback raised during the last decode, if it did."""
        error, self.callback_error = self.callback_error, None
        if error is not None:
            raise error

    def stats(self) -> SteerStats:
        """Counters since the first steering call on this context."""
        raw = _Stats()
        self._check(self.library.llama_steer_get_stats(self._context, ctypes.byref(raw)))
        return SteerStats(**{name: getattr(raw, name) for name in SteerStats.__dataclass_fields__})

    def fired(self, layer: int, site: int) -> int:
        """How often (layer, site) was edited with something that is not zero."""
        return int(self.library.llama_steer_fired(self._context, layer, site))

    def config_fired(self, config: int, layer: int, site: int) -> int:
        """In how many ubatches a config did so; 0 for a place that none of its tokens was seen to pass."""
        return int(self.library.llama_steer_config_fired(self._context, config, layer, site))

    def free(self) -> None:
        """Free the steering of the context, which is then as it was before."""
        self._check(self.library.llama_steer_free(self._context))
        self._callbacks.clear()
        self._set.clear()

    def close(self) -> None:
        """The context is gone."""


class Steering(Protocol):
    """How the contexts of one model are steered: by the patch, or beside an unmodified library.

    ``library`` holds the planner; ``info`` says what can be steered. ``one_sequence``: this model's batches can hold one sequence
    only. ``unified``: sequences have to share one buffer.
    """

    library: ctypes.CDLL
    info: SteerInfo
    unified: bool
    one_sequence: bool

    def prepare(self, params: Any) -> Any:
        """Take note of the parameters of a context that is about to be made, and change them where needed."""
        ...

    def attach(self, prepared: Any, context: Any) -> SteerContext:
        """The steering of that context."""
        ...

    def close(self) -> None:
        """The model is about to be freed."""
        ...


class PatchedSteering:
    """Of a model that a patched library has loaded.

    Raises:
        RuntimeMissing: the library speaks another version of the API.
        ModelError: the architecture is not in the tested list.
    """

    unified = False
    one_sequence = False

    def __init__(self, library: ctypes.CDLL, model: Any) -> None:
        self.library = load(library)
        self.info = model_info(library, model)

    def prepare(self, params: Any) -> Any:
        return None

    def attach(self, prepared: Any, context: Any) -> SteerContext:
        return SteerContext(self.library, context, self.info.n_embd)

    def close(self) -> None:
        pass
