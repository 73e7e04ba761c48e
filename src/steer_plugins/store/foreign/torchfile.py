"""``.pt`` and ``.pth``: tensors that torch.save wrote, read without torch and without loading a pickle.

Such a file is a zip archive: ``data.pkl`` says which tensors there are, ``data/N`` holds their numbers. ``data.pkl`` is a
program for the pickle machine. It is not run: :class:`_Machine` goes through its opcodes and knows only those
that build plain values and describe tensors; names are compared with a short list, nothing is ever imported or called.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import VectorError
from ...steering.vector import Key, SteeringVector
from ..formats import NO_FACTS, Facts, Format
from .archive import Archive
from .common import MAX_BYTES, clip, head, imported, joined, reading, row_directions, stated, whole

NAME = "torch"
_MAX_PICKLE = 1 << 20
_MAX_STEPS = 200_000
_BFLOAT16: np.dtype[Any] = np.dtype("V2")  # a mark: numpy has no bfloat16
_DTYPES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "DoubleStorage": np.dtype("<f8"),
    "BFloat16Storage": _BFLOAT16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
}
_NAMES = {
    *(("torch", name) for name in _DTYPES),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("collections", "OrderedDict"),
}
_LAYER = re.compile(r"(?:layers?[._]?)?(0|[1-9][0-9]{0,4})")


@dataclass(frozen=True)
class _Name:
    """A name the program mentions. It stays a name."""

    module: str
    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    n_items: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Numbers:
    """Gives tensors their numbers. Every storage is read once, and all tensors together are bounded."""

    def __init__(self, archive: Archive, prefix: str, most: int) -> None:
        """``most``: bytes of all storages. Raises VectorError for an unknown byte order."""
        self.archive, self.prefix, self.most = archive, prefix, most
        order = archive.whole(f"{prefix}byteorder", 16) if f"{prefix}byteorder" in archive.sizes else b"little"
        if order not in (b"little", b"big"):
            raise VectorError(f"its byte order is {clip(order)}")
        self.big_endian = order == b"big"
        self.flat: dict[str, np.ndarray] = {}
        self.left = most // 8

    def of(self, tensor: _Tensor) -> np.ndarray:
        """The numbers in the tensor's shape, a copy. Raises VectorError."""
        count = math.prod(tensor.shape)
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
        # count: strides of 0 would turn a few numbers into any number of them.
        if not 1 <= count <= tensor.storage.n_items or last >= tensor.storage.n_items:
            raise VectorError("it has a tensor that does not lie within its storage")
        self.left -= count
        if self.left < 0:
            raise VectorError("its tensors are too large for a vector")
        flat = self.storage(tensor.storage)
        steps = tuple(step * flat.itemsize for step in tensor.stride)
        return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps, writeable=False).copy()

    def storage(self, storage: _Storage) -> np.ndarray:
        """The numbers of a storage, in this machine's byte order."""
        if storage.key not in self.flat:
            stored = np.dtype("<u2") if storage.dtype is _BFLOAT16 else storage.dtype
            data = self.archive.whole(f"{self.prefix}data/{storage.key}", self.most)
            if len(data) != storage.n_items * stored.itemsize:
                raise VectorError(
                    f"its storage {clip(storage.key)} has {len(data)} bytes, not those of {storage.n_items} numbers"
                )
            flat = np.frombuffer(data, stored.newbyteorder(">") if self.big_endian else stored)
            flat = flat.astype(stored.newbyteorder("="))
            self.flat[storage.key] = (flat.astype(np.uint32) << 16).view(np.float32) if storage.dtype is _BFLOAT16 else flat
        elif len(self.flat[storage.key]) != storage.n_items:
            raise VectorError(f"it describes the storage {clip(storage.key)} in two ways")
        return self.flat[storage.key]


class _Machine:
    """Follows the opcodes of a ``data.pkl``; :meth:`run` gives what it describes. Nothing is imported or called."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """Dicts, lists, tuples, texts, numbers and :class:`_Tensor`. Raises VectorError for any other program."""
        try:
            for step, (opcode, argument, _) in enumerate(pickletools.genops(program)):
                if step >= _MAX_STEPS:
                    raise VectorError("its data.pkl is too long")
                if opcode.name == "STOP":
                    if len(self.stack) != 1 or self.marks:
                        raise ValueError
                    return self.stack[0]
                self.step(opcode.name, argument)
            raise ValueError
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, AttributeError):
            raise VectorError("its data.pkl is damaged") from None

    def step(self, name: str, argument: Any) -> None:
        push, stack = self.stack.append, self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name == "MARK":
            self.marks.append(len(stack))
        elif name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"):
            push(argument)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            push({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            push(self.memo[argument])
        elif name == "TUPLE":
            push(tuple(self.since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            push(tuple(self.pop(int(name[-1]))))
        elif name in ("APPEND", "APPENDS"):
            items = self.pop(1) if name == "APPEND" else self.since_mark()
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items(self.pop(2) if name == "SETITEM" else self.since_mark())
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            push(_known_name(*(argument.split(" ", 1) if name == "GLOBAL" else self.pop(2))))
        elif name == "BINPERSID":
            push(_storage(self.pop(1)[0]))
        elif name == "REDUCE":
            push(_built(*self.pop(2)))
        elif name == "BUILD":
            # torch sets _metadata on the OrderedDict of a module's weights; it says nothing about them.
            self.pop(1)
            self.top(dict)
        else:
            raise VectorError(f"its data.pkl has the opcode {name}, which no file of tensors needs, so it is not read")

    def pop(self, count: int) -> list[Any]:
        """The last ``count`` values, not reaching below the last mark."""
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise ValueError
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def since_mark(self) -> list[Any]:
        at = self.marks.pop()
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError
        return self.stack[-1]

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise VectorError("its data.pkl has a dictionary with keys that are neither texts nor whole numbers")
            if key in target:
                raise VectorError(f"it names {clip(key)} twice")
            target[key] = value


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def _known_name(module: object, name: object) -> _Name:
    if (module, name) not in _NAMES:
        text = f"{module}.{name}"
        raise VectorError(f"its data.pkl mentions {clip(text)}, which no file of tensors needs, so it is not read")
    return _Name(str(module), str(name))


def _storage(described: Any) -> _Storage:
    kind, name, key, _, n_items = described
    if kind != "storage" or not isinstance(name, _Name) or not isinstance(key, str) or not re.fullmatch(r"[0-9]{1,6}", key):
        raise ValueError
    return _Storage(key, _DTYPES[name.name], whole(n_items, "the length of a storage", 1 << 40))


def _built(name: Any, arguments: Any) -> Any:
    """What a call in the program would make: known by its name, from its arguments' values."""
    if not isinstance(name, _Name) or type(arguments) is not tuple:
        raise ValueError
    if name.name == "OrderedDict" and arguments == ():
        return {}
    if name.name == "_rebuild_parameter" and isinstance(arguments[0], _Tensor):
        return arguments[0]
    if name.name != "_rebuild_tensor_v2":
        raise ValueError
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, _Storage) or not type(shape) is type(stride) is tuple or len(shape) != len(stride):
        raise ValueError
    if len(shape) > 4:
        raise VectorError(f"it has a tensor with {len(shape)} dimensions")
    sizes = [whole(n, "a number in a tensor's shape", 1 << 40) for n in (offset, *shape, *stride)]
    return _Tensor(storage, sizes[0], tuple(sizes[1 : 1 + len(shape)]), tuple(sizes[1 + len(shape) :]))


def read(path: Path, facts: Facts = NO_FACTS) -> SteeringVector:
    """The vector in ``path``: a tensor of rows, a dictionary by layer, or one tensor among other entries. Raises VectorError."""
    with reading(path):
        if head(path, 2)[:1] == b"\x80":
            raise VectorError("it is a plain pickle, which is never loaded: save it again with torch 1.6 or later")
        with Archive(path) as archive:
            program, prefix = _program(archive)
            numbers = _Numbers(archive, prefix, MAX_BYTES)
            content = _Machine().run(program)
            tensors, described = _tensors(content)
            site = stated("site", None, facts.site, "resid_post")
            directions: dict[Key, np.ndarray] = {}
            if isinstance(content, list | tuple):
                directions.update(row_directions(_stacked([numbers.of(tensor) for tensor in tensors.values()]), site, facts))
            elif facts.key is None and tensors and all(_layer(key) is not None for key in tensors):
                for key, tensor in tensors.items():
                    place = _layer(key) or 0, site
                    if place in directions:
                        raise VectorError(f"it has two tensors for layer {place[0]}")
                    directions[place] = _one_row(numbers.of(tensor))
            else:
                tensor = _chosen(tensors, facts.key)
                rows = numbers.of(tensor)
                if rows.ndim == 1 and "layer" in described:
                    layer = whole(described["layer"], "its layer")
                    if facts.at not in (None, (layer,)):
                        raise VectorError(f"it is for layer {layer}: leave --at out")
                    directions[layer, site] = rows
                else:
                    directions.update(row_directions(rows, site, facts))
        return imported(
            path,
            NAME,
            directions,
            op=stated("op", None, facts.op, "add"),
            scope=stated("scope", None, facts.scope, "all"),
            notes={"entries": described or None, "key": facts.key},
        )


def read_tensors(path: Path, most: int) -> dict[str, np.ndarray]:
    """All tensors of a file that torch.save wrote, by name, as they are stored; at most ``most`` bytes. Raises VectorError."""
    with reading(path):
        if head(path, 2)[:1] == b"\x80":
            raise VectorError("it is a plain pickle, which is never loaded: save it again with torch 1.6 or later")
        with Archive(path, most) as archive:
            program, prefix = _program(archive)
            numbers = _Numbers(archive, prefix, most)
            tensors, _ = _tensors(_Machine().run(program))
            return {str(key): numbers.of(tensor) for key, tensor in tensors.items()}


def _program(archive: Archive) -> tuple[bytes, str]:
    """(what ``data.pkl`` holds, the folder of the archive's members)."""
    names = [name for name in archive.sizes if name == "data.pkl" or re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(names) != 1:
        raise VectorError("it is not a file of torch.save: an archive with one data.pkl")
    return archive.whole(names[0], _MAX_PICKLE), names[0].removesuffix("data.pkl")


def _tensors(content: Any) -> tuple[dict[str | int, _Tensor], dict[str, Any]]:
    """(the tensors by key, the plain values beside them)."""
    if isinstance(content, _Tensor):
        return {"": content}, {}
    if isinstance(content, dict):
        for inner in ("directions", "layer_activations", "vectors"):
            if isinstance(content.get(inner), dict):
                content = content[inner]
                break
        tensors = {key: value for key, value in content.items() if isinstance(value, _Tensor)}
        plain = {str(k): v for k, v in content.items() if _is_plain(v)}
        return tensors, plain
    if isinstance(content, list | tuple) and content and all(isinstance(item, _Tensor) for item in content):
        return dict(enumerate(content)), {}
    raise VectorError("it holds no tensor, nor a dictionary of tensors")


def _is_plain(value: Any) -> bool:
    """A text, number or truth value that provenance can keep."""
    if type(value) is float:
        return math.isfinite(value)
    return type(value) in (str, int, bool) and len(str(value)) <= 1000


def _layer(key: str | int) -> int | None:
    match = _LAYER.fullmatch(str(key))
    return int(match[1]) if match else None


def _stacked(rows: list[np.ndarray]) -> np.ndarray:
    """A list of [n_embd] as [rows, n_embd]. Raises VectorError."""
    if {row.shape for row in rows} != {(rows[0].size,)}:
        raise VectorError("it is a list of tensors that are not all [n_embd]")
    return np.stack(rows)


def _one_row(array: np.ndarray) -> np.ndarray:
    return array[0] if array.ndim == 2 and len(array) == 1 else array


def _chosen(tensors: dict[str | int, _Tensor], key: str | None) -> _Tensor:
    by_text = {str(k): tensor for k, tensor in tensors.items()}
    if key is None and len(by_text) == 1:
        return next(iter(by_text.values()))
    if key not in by_text:
        if not by_text:
            raise VectorError("it holds no tensors")
        names = joined([clip(k, 30) for k in _sorted(by_text)])
        raise VectorError(f"it has the tensors {names}: choose one with steer convert --key NAME")
    return by_text[key]


def _sorted(names: Iterable[str]) -> list[str]:
    return sorted(names)[:10]


def sniff(path: Path) -> bool:
    """True for a zip archive whose first member is a ``data.pkl``, and for a plain pickle named .pt or .pth."""
    start = head(path, 1024)
    if start.startswith(b"PK\x03\x04"):
        return b"data.pkl" in start[30 : 30 + int.from_bytes(start[26:28], "little")]
    return start[:1] == b"\x80" and path.suffix.lower() in FORMAT.suffixes


FORMAT = Format(NAME, (".pt", ".pth"), read, None, sniff, read, ("at", "key", "op", "site", "scope"))
