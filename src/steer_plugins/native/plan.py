"""The native planner, ``cpp_patch/llama-steer-plan.h``: when each term of a steering acts, as segments of positions.

It needs nothing of llama.cpp: :func:`declare` takes any library that holds it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_double, c_float, c_int32, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError, SpecError

Columns = tuple[Any, Any, Any, Any, Any]
"""Read and written rows, gains, biases and knees of one place."""

SCOPES: dict[str, int] = {"all": 0, "prompt": 1, "response": 2, "thinking": 3, "answer": 4}
SCOPE_RANGE = 5
SCHEDULES: dict[str, int] = {"constant": 0, "linear": 1, "cosine": 2}


class _Column(ctypes.Structure):
    _fields_ = [("layer", c_int32), ("site", c_int32), ("gain", c_double), ("bias", c_double), ("knee", c_double)]


class VectorStruct(ctypes.Structure):
    """``struct llama_steer_vector``."""

    _fields_ = [
        ("key", c_char_p),
        ("n", c_int32),
        ("layers", POINTER(c_int32)),
        ("sites", POINTER(c_int32)),
        ("dirs", POINTER(c_float)),
        ("scales", POINTER(c_double)),
        ("n_columns", c_int32),
        ("columns", POINTER(_Column)),
        ("reads", POINTER(c_float)),
        ("writes", POINTER(c_float)),
    ]


class _Term(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p),
        ("vector", POINTER(VectorStruct)),
        ("strength", c_double),
        ("op", c_int32),
        ("il_first", c_int32),
        ("il_last", c_int32),
        ("stream", c_int32),
        ("scope", c_int32),
        ("first", c_int32),
        ("last", c_int32),
        ("schedule", c_int32),
        ("over", c_int32),
        ("floor", c_double),
        ("level", c_double),
    ]


class _Tags(ctypes.Structure):
    _fields_ = [
        ("known", c_bool),
        ("all_tools", c_bool),
        ("generation_prompt", c_char_p),
        ("prompt_end", c_char_p),
        ("open", POINTER(c_char_p)),
        ("n_open", c_int32),
        ("close", POINTER(c_char_p)),
        ("n_close", c_int32),
        ("tool_open", POINTER(c_char_p)),
        ("n_tool_open", c_int32),
        ("tool_close", POINTER(c_char_p)),
        ("n_tool_close", c_int32),
    ]


class _Segment(ctypes.Structure):
    _fields_ = [("first", c_int32), ("end", c_int32), ("strengths", POINTER(c_double))]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_steer_plan_new": (c_void_p, [c_int32, POINTER(_Term), c_int32, POINTER(_Tags)]),
    "llama_steer_plan_free": (None, [c_void_p]),
    "llama_steer_plan_error": (c_char_p, []),
    "llama_steer_plan_tracks": (c_bool, [c_void_p]),
    "llama_steer_plan_feed": (c_int32, [c_void_p, c_int32, c_char_p, c_int32]),
    "llama_steer_plan_change": (c_int32, [c_void_p, c_int32, c_int32, POINTER(_Term)]),
    "llama_steer_plan_thinking": (c_bool, [c_void_p]),
    "llama_steer_plan_in_tool": (c_bool, [c_void_p]),
    "llama_steer_plan_segments": (c_int32, [c_void_p, POINTER(POINTER(_Segment))]),
    "llama_steer_plan_terms": (c_int32, [c_void_p, POINTER(POINTER(_Term))]),
}


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the planner's functions on an opened library. Raises AttributeError if it holds none."""
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


class PlanVector:
    """A steering vector as the native side takes it. The arrays are kept alive by this object.

    Args:
        key: a hash of the content; vectors with the same key are the same.
        layers, sites: [n], where each direction acts; sites are indices of :data:`~steer_plugins.native.SITES`.
        directions: float32 [n, n_embd], unit.
        scales: [n], dose at strength 1, in units of the hidden state.
        columns: by index of a direction, ``(read, write, gain, bias, knee)``: float32 [k, n_embd] unit rows, float64 [k].
    """

    def __init__(
        self,
        key: str,
        layers: Sequence[int],
        sites: Sequence[int],
        directions: npt.NDArray[np.float32],
        scales: Sequence[float],
        columns: Mapping[int, Columns] | None = None,
    ) -> None:
        n = len(layers)
        self._directions = np.ascontiguousarray(directions, dtype=np.float32)
        if self._directions.ndim != 2 or not len(self._directions) == len(sites) == len(scales) == n:
            raise EngineError(f"directions of shape {self._directions.shape} do not fit {n} layers")
        self.n_embd = self._directions.shape[1]
        given = columns or {}
        flat = [
            _Column(layers[i], sites[i], *(float(x) for x in numbers))
            for i, (_, _, *each) in given.items()
            for numbers in zip(*each, strict=True)
        ]
        reads, writes = (
            np.ascontiguousarray(np.concatenate([np.zeros((0, self.n_embd)), *(c[j] for c in given.values())]), np.float32)
            for j in (0, 1)
        )
        if not len(reads) == len(writes) == len(flat) or reads.shape[1:] != writes.shape[1:]:
            raise EngineError(f"{len(flat)} columns do not fit rows of shapes {reads.shape} and {writes.shape}")
        self._rows = (reads, writes)
        self.struct = VectorStruct(
            key.encode(),
            n,
            (c_int32 * n)(*layers),
            (c_int32 * n)(*sites),
            self._directions.ctypes.data_as(POINTER(c_float)),
            (c_double * n)(*scales),
            len(flat),
            (_Column * max(1, len(flat)))(*flat),
            reads.ctypes.data_as(POINTER(c_float)),
            writes.ctypes.data_as(POINTER(c_float)),
        )


@dataclass(frozen=True)
class PlanTerm:
    """One term of a plan; fields as in ``struct llama_steer_plan_term``. ``vector`` None: for segments only.

    ``scope``: of :data:`SCOPES`, or :data:`SCOPE_RANGE` with positions ``first`` to ``last``, both included, -1: open.
    """

    vector: PlanVector | None = None
    strength: float = 1.0
    op: int = 0
    il_first: int = -1
    il_last: int = -1
    stream: int = -1
    scope: int = 0
    first: int = 0
    last: int = -1
    schedule: int = 0
    over: int = 0
    floor: float = 0.0
    level: float = 0.0
    name: str = "the vector"

    def _struct(self) -> _Term:
        vector = ctypes.pointer(self.vector.struct) if self.vector is not None else None
        return _Term(
            self.name.encode(),
            vector,
            self.strength,
            self.op,
            self.il_first,
            self.il_last,
            self.stream,
            self.scope,
            self.first,
            self.last,
            self.schedule,
            self.over,
            self.floor,
            self.level,
        )


@dataclass(frozen=True)
class Tags:
    """The tags that part a response, as text; see ``struct llama_steer_tags``.

    ``known`` False: thinking cannot be told from the answer, so both scopes are refused. ``generation_prompt``: what the chat
    template put at the end of the prompt. Where that is None, only a tag at the very end of ``prompt_end`` counts.
    """

    open: tuple[str, ...] = ()
    close: tuple[str, ...] = ()
    generation_prompt: str | None = None
    prompt_end: str = ""
    known: bool = True
    tool_open: tuple[str, ...] = ()
    tool_close: tuple[str, ...] = ()
    all_tools: bool = False

    def _struct(self) -> _Tags:
        def texts(tags: Sequence[str]) -> tuple[Any, int]:
            return (c_char_p * len(tags))(*(tag.encode() for tag in tags)), len(tags)

        return _Tags(
            self.known,
            self.all_tools,
            None if self.generation_prompt is None else self.generation_prompt.encode(),
            self.prompt_end.encode(),
            *texts(self.open),
            *texts(self.close),
            *texts(self.tool_open),
            *texts(self.tool_close),
        )


@dataclass(frozen=True)
class Segment:
    """Positions ``first <= p < end`` (``end`` -1: no end) have these strengths, one for each term; 0: it does not act."""

    first: int
    end: int
    strengths: tuple[float, ...]


class Plan:
    """What one text gets: its terms, where its prompt ends, and what its response has said so far.

    Args:
        library: holds the planner, declared by :func:`declare`.
        terms: what acts.
        last_prompt: position of the last prompt token; 0 for an empty prompt.
        tags: how the response is parted; None: not known.

    Raises:
        SpecError: the terms cannot be applied exactly as they are written.
    """

    def __init__(self, library: ctypes.CDLL, terms: Sequence[PlanTerm], last_prompt: int, tags: Tags | None = None) -> None:
        self.pointer: int | None = None
        self._library = library
        array, self._held = self._array(terms)
        self.pointer = library.llama_steer_plan_new(
            len(terms), array, last_prompt, ctypes.byref(tags._struct()) if tags is not None else None
        )
        if not self.pointer:
            raise self._error()

    @staticmethod
    def _array(terms: Sequence[PlanTerm]) -> tuple[Any, tuple[Any, ...]]:
        array = (_Term * max(1, len(terms)))(*(term._struct() for term in terms))
        return array, (array, tuple(terms))

    def _error(self) -> SpecError:
        return SpecError(self._library.llama_steer_plan_error().decode(errors="replace"))

    @property
    def tracks(self) -> bool:
        """Whether the text of the response matters; if not, :meth:`feed` need not be called."""
        return bool(self._library.llama_steer_plan_tracks(self.pointer))

    @property
    def thinking(self) -> bool:
        """Whether the response is thinking, after what was fed."""
        return bool(self._library.llama_steer_plan_thinking(self.pointer))

    def feed(self, position: int, text: bytes) -> bool:
        """The response token at ``position`` prints ``text``, special tokens included. True: other segments from there on."""
        result = self._library.llama_steer_plan_feed(self.pointer, position, text, len(text))
        if result < 0:
            raise self._error()
        return bool(result)

    def change(self, position: int, terms: Sequence[PlanTerm]) -> None:
        """Other terms from ``position`` on; the segments before it are forgotten.

        Raises:
            SpecError: they cannot be applied; nothing has changed.
        """
        array, held = self._array(terms)
        if self._library.llama_steer_plan_change(self.pointer, position, len(terms), array) < 0:
            raise self._error()
        self._held = held

    def segments(self) -> list[Segment]:
        """All segments, ascending and without gaps; the last is open."""
        found = POINTER(_Segment)()
        terms = POINTER(_Term)()
        n_terms = self._library.llama_steer_plan_terms(self.pointer, ctypes.byref(terms))
        n = self._library.llama_steer_plan_segments(self.pointer, ctypes.byref(found))
        return [Segment(s.first, s.end, tuple(s.strengths[:n_terms])) for s in found[:n]]

    def close(self) -> None:
        """Free it."""
        if self.pointer:
            self._library.llama_steer_plan_free(self.pointer)
            self.pointer = None

    def __del__(self) -> None:
        self.close()
