"""What is applied: named unit directions over the layers of one model, and the model they belong to.

Words (layer, site, op, scope, strength, dose) are those of ``docs/architecture.md``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from ..errors import VectorError
from .columns import MAX_COLUMNS, Columns

#: Where in a block a direction acts: after the block, or on what attention or the feed-forward part writes.
SITES = ("resid_post", "attn_out", "ffn_out")
#: What a vector does there by itself: move along the direction, remove its component, set its component to a target.
OPS = ("add", "project", "clamp", "renorm")
#: What a term can do: these, or keep the component above or below a level that the term names.
TERM_OPS = (*OPS, "floor", "cap")
#: Ops that need a level.
BOUNDS = ("floor", "cap")
#: Named scopes; a range of token positions ``a-b`` or ``a-`` is a scope too (see :func:`scope_range`).
SCOPES = ("all", "prompt", "response", "thinking", "answer")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_HUB_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,37}[a-z0-9])?/[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
#: What ends like this is a file, and no name.
FILE_SUFFIXES = (".safetensors", ".gguf", ".pt", ".pth", ".npz", ".svec", ".f32", ".json")
_RANGE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Device names that Windows reserves in every folder, whatever the suffix.
_RESERVED = frozenset(["con", "prn", "aux", "nul", *(f"{p}{d}" for p in ("com", "lpt") for d in range(10))])
# A float32 unit vector measures 1 within about 6e-8: anything nearer than this keeps its bits.
_UNIT_TOLERANCE = 1e-6

Key = tuple[int, str]


def check_name(name: object) -> str:
    """Return ``name`` if it may name a vector (and so a file on every system), else raise :class:`VectorError`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        rule = "use 1 to 64 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit"
        raise VectorError(f"{_clip(name)} is not a vector name: {rule}")
    if name.split(".")[0] in _RESERVED:
        raise VectorError(f"{name!r} is not a vector name: Windows reserves it for a device, so choose another")
    return name


def is_hub_name(text: str) -> bool:
    """True for ``owner/name``, which names what was pulled from a hub; a path with a file's suffix is none."""
    return _HUB_NAME.fullmatch(text) is not None and not text.endswith(FILE_SUFFIXES)


def scope_range(scope: str) -> tuple[int, int | None] | None:
    """The token positions ``(first, last)`` of a range scope, 0-based and inclusive (last None: open), else None.

    Raises VectorError if ``scope`` is neither a named scope nor a range.
    """
    if isinstance(scope, str):
        if scope in SCOPES:
            return None
        match = _RANGE.fullmatch(scope)
        if match:
            first, last = int(match[1]), None if match[2] is None else int(match[2])
            if last is not None and last < first:
                raise VectorError(f"scope {scope!r} ends before it starts: write the lower position first")
            return first, last
    raise VectorError(f"unknown scope {_clip(scope)}: use {', '.join(SCOPES)}, or positions such as 5-20 or 0-")


def _clip(value: object, limit: int = 60) -> str:
    """``repr`` of something a stranger wrote, short enough for one line."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a vector belongs to: what must agree for its directions to mean anything.

    ``tokens_sha256``: sha256 over the token strings in id order, each as u32 little-endian byte length and UTF-8 bytes.
    ``norms_sha256``: sha256 over the float32 1-D tensors named ``*_norm.weight``, sorted by name: the name's UTF-8
    bytes, then the little-endian data. It is the same in nearly every quantisation of a model and different in most
    fine-tunes. ``name`` is for people and is not compared.
    """

    architecture: str
    n_layer: int
    n_embd: int
    tokens_sha256: str
    norms_sha256: str
    name: str = ""
    n_streams: int = 1

    @property
    def key(self) -> str:
        """Folder name of this model in a library; safe on every file system whatever the architecture is called."""
        parts = (self.architecture, str(self.n_layer), str(self.n_embd), self.tokens_sha256, self.norms_sha256)
        digest = hashlib.sha256("|".join(parts).encode()).hexdigest()
        safe = re.sub(r"[^a-z0-9_-]", "_", self.architecture.lower())[:32] or "_"
        return f"{safe}-{self.n_layer}x{self.n_embd}-{digest[:12]}"

    @property
    def label(self) -> str:
        """For sentences: ``llama 30x576 "SmolLM2 135M Instruct"``."""
        shape = f"{self.architecture} {self.n_layer}x{self.n_embd}"
        text = f'{shape} "{self.name}"' if self.name else shape
        return "".join(c for c in text if c.isprintable())  # both come from files: no line breaks, no escape codes

    def mismatch(self, other: ModelIdentity) -> str | None:
        """None if both are the same model, else a phrase that names the first difference (``n_embd 576 vs 2048``)."""
        for what in ("architecture", "n_layer", "n_embd", "n_streams"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                return f"{what} {mine} vs {theirs}"
        if self.tokens_sha256 != other.tokens_sha256:
            return f"another vocabulary, tokens {self.tokens_sha256[:8]} vs {other.tokens_sha256[:8]}"
        if self.norms_sha256 != other.norms_sha256:
            return f"another fine-tune, norm weights {self.norms_sha256[:8]} vs {other.norms_sha256[:8]}"
        return None

    def differs_only_in_norms(self, other: ModelIdentity) -> bool:
        """True for what looks like a fine-tune of the same model: everything but the norm weights agrees."""
        if self.norms_sha256 == other.norms_sha256:
            return False
        return ModelIdentity(**{**asdict(self), "norms_sha256": other.norms_sha256}).mismatch(other) is None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, in the order of the class."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> ModelIdentity:
        """The identity in ``data`` (see :meth:`to_dict`), every field checked. Raises VectorError."""
        if not isinstance(data, dict):
            raise VectorError("the model identity is not a JSON object")
        required = {"architecture", "n_layer", "n_embd", "tokens_sha256", "norms_sha256"}
        missing, unknown = required - data.keys(), data.keys() - required - {"name", "n_streams"}
        if missing or unknown:
            what = f"lacks {sorted(missing)[0]!r}" if missing else f"has the unknown field {_clip(sorted(unknown)[0])}"
            raise VectorError(f"the model identity {what}")
        for field in ("architecture", "name"):
            text = data.get(field, "")
            # JSON can spell lone surrogates, which are not text.
            if not isinstance(text, str) or len(text) > 1000 or any("\ud800" <= c <= "\udfff" for c in text):
                raise VectorError(f"the model identity's {field!r} is not a text of at most 1000 characters")
        if not data["architecture"]:
            raise VectorError("the model identity's 'architecture' is empty")
        for field in ("n_layer", "n_embd", "n_streams"):
            value = data.get(field, 1)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise VectorError(f"the model identity's {field!r} is not a positive whole number")
        for field in ("tokens_sha256", "norms_sha256"):
            if not isinstance(data[field], str) or not _SHA256.fullmatch(data[field]):
                raise VectorError(f"the model identity's {field!r} is not a sha256 in 64 lower-case hex digits")
        return cls(**data)


class SteeringVector:
    """Unit directions by (layer, site), and how far strength 1.0 moves along each of them. Immutable.

    ``directions``: ``{(layer, site): array [n_embd]}``, layers 0-based. An array that is not of unit length is
    normalised and its length is folded into the scale. ``scales``: the same keys, dose in units of the residual
    stream at strength 1.0; left out, the lengths of the arrays. A zero array with no scale (or 0) does nothing under
    any op and is dropped. ``columns``: what reads the state besides, at some of these keys (a direction with a scale of 0
    may stand where nothing else acts): a *responsive* vector.

    Raises VectorError for NaN or Inf, a wrong rank, unequal n_embd, a negative layer, an unknown site, op or scope,
    nothing that steers, a zero direction with a scale, a bad name, layers or n_embd beyond ``identity``.
    """

    # Readable by all; nothing assigns them after __init__.
    name: str
    op: str
    default_scope: str
    identity: ModelIdentity | None

    def __init__(
        self,
        name: str,
        directions: Mapping[Key, Any],
        scales: Mapping[Key, float] | None = None,
        *,
        columns: Mapping[Key, Columns] | None = None,
        op: str = "add",
        default_scope: str = "all",
        identity: ModelIdentity | None = None,
        provenance: dict[str, Any] | None = None,
        calibration: dict[str, Any] | None = None,
    ) -> None:
        check_name(name)
        if op not in OPS:
            raise VectorError(f"vector {name!r}: unknown op {_clip(op)}: use {', '.join(OPS)}")
        try:
            scope_range(default_scope)
        except VectorError as error:
            raise VectorError(f"vector {name!r}: {error}") from None
        if identity is not None and not isinstance(identity, ModelIdentity):
            raise VectorError(f"vector {name!r}: the identity is {_clip(identity)}, not a ModelIdentity")
        if scales is not None and set(scales) != set(directions):
            extra = sorted(set(scales) ^ set(directions), key=str)[0]
            raise VectorError(f"vector {name!r}: {_clip(extra)} has a direction or a scale, but not both")

        units: dict[Key, np.ndarray] = {}
        doses: dict[Key, float] = {}
        for key in directions:
            layer, site = _checked_key(name, key)
            unit, length = _unit(name, layer, site, directions[key])
            scale = _checked_scale(name, layer, site, 1.0 if scales is None else scales[key])
            if length == 0.0:
                if scales is not None and scale != 0.0:
                    raise VectorError(f"vector {name!r}: layer {layer} {site} has a scale but a direction of zero")
                continue
            dose = scale * length
            if not math.isfinite(dose):
                raise VectorError(f"vector {name!r}: the scale of layer {layer} {site} is too large")
            units[layer, site] = unit
            doses[layer, site] = dose
        if not units:
            raise VectorError(f"vector {name!r} has no direction that is not zero")
        order = sorted(units)
        widths = {units[key].shape[0] for key in order}
        if len(widths) > 1:
            raise VectorError(f"vector {name!r} mixes directions of {' and '.join(map(str, sorted(widths)))} numbers")
        if identity is not None:
            if widths != {identity.n_embd}:
                has = f"has n_embd {widths.pop()}, its model {identity.label} {identity.n_embd}"
                raise VectorError(f"vector {name!r} {has}")
            if order[-1][0] >= identity.n_layer:
                has = f"names layer {order[-1][0]}, its model {identity.label} has 0 to {identity.n_layer - 1}"
                raise VectorError(f"vector {name!r} {has}")
        self.name, self.op, self.default_scope, self.identity = name, op, default_scope, identity
        self._directions = {key: units[key] for key in order}
        self._scales = {key: doses[key] for key in order}
        self._columns = _checked_columns(name, columns or {}, units)
        self._provenance = _json_object(name, "provenance", provenance)
        self._calibration = _json_object(name, "calibration", calibration)
        self._hash: str | None = None

    @property
    def directions(self) -> Mapping[Key, np.ndarray]:
        """``{(layer, site): float32 [n_embd]}``, unit length, read-only, sorted by layer then site."""
        return MappingProxyType(self._directions)

    @property
    def scales(self) -> Mapping[Key, float]:
        """``{(layer, site): dose at strength 1.0}``, the same keys in the same order."""
        return MappingProxyType(self._scales)

    @property
    def columns(self) -> Mapping[Key, Columns]:
        """What reads the state, at the (layer, site) pairs that have any, in the same order; empty for a plain vector."""
        return MappingProxyType(self._columns)

    @property
    def provenance(self) -> dict[str, Any] | None:
        """Where the vector comes from (a copy of a JSON object), or None."""
        return copy.deepcopy(self._provenance)

    @property
    def calibration(self) -> dict[str, Any] | None:
        """The sweep that calibrated strength 1.0 (a copy of a JSON object), or None if there was none."""
        return copy.deepcopy(self._calibration)

    @property
    def n_embd(self) -> int:
        """Length of each direction."""
        return int(next(iter(self._directions.values())).shape[0])

    @property
    def layers(self) -> list[int]:
        """The layers that have a direction, sorted."""
        return sorted({layer for layer, _ in self._directions})

    @property
    def sites(self) -> list[str]:
        """The sites that have a direction, sorted."""
        return sorted({site for _, site in self._directions})

    @property
    def is_zero(self) -> bool:
        """True if applying the vector at any strength changes nothing (an ``add`` whose scales are all 0, without columns)."""
        return self.op == "add" and not any(self._scales.values()) and not self._columns

    @property
    def content_hash(self) -> str:
        """sha256 of what is applied: op, layers, sites, directions, scales, columns (docs/vector-format.md). Hex."""
        if self._hash is None:
            self._hash = content_sha256(self.op, self._directions, self._scales, self._columns)
        return self._hash

    def effective(self, layer: int, site: str) -> np.ndarray:
        """scale * direction at (layer, site): float32 [n_embd]. Raises VectorError if the vector has none there."""
        if (layer, site) not in self._directions:
            raise VectorError(f"vector {self.name!r} has no direction at layer {layer} {site}")
        return self._effective64((layer, site)).astype(np.float32)

    def _effective64(self, key: Key) -> np.ndarray:
        return self._scales[key] * self._directions[key].astype(np.float64)

    def check_fits(self, identity: ModelIdentity, *, force: bool = False) -> None:
        """Raise VectorError, naming the difference, unless the vector may be applied to this model.

        ``force`` accepts a model that differs in its norm weights only, as a fine-tune does. A vector without an
        identity needs the right n_embd and no layer beyond the model's.
        """
        if self.identity is not None:
            difference = self.identity.mismatch(identity)
            if difference is None or (force and self.identity.differs_only_in_norms(identity)):
                return
            way_out = f"fit it with: steer train {self.name}"
            if self.identity.differs_only_in_norms(identity):
                way_out += ", or use it all the same with force"
            models = f"{self.identity.label}, not for this model ({identity.label})"
            raise VectorError(f"vector {self.name!r} is for {models}: {difference}; {way_out}")
        if self.n_embd != identity.n_embd:
            raise VectorError(
                f"vector {self.name!r} does not fit this model ({identity.label}): n_embd {self.n_embd} vs {identity.n_embd}"
            )
        if self.layers[-1] >= identity.n_layer:
            raise VectorError(
                f"vector {self.name!r} does not fit this model ({identity.label}): "
                f"it names layer {self.layers[-1]}, the model has 0 to {identity.n_layer - 1}"
            )

    def replace(self, **changes: Any) -> SteeringVector:
        """A copy with some arguments of the constructor changed: ``v.replace(name="calm", calibration=None)``.

        With other directions, the columns at places that are gone go too.
        """
        now: dict[str, Any] = {
            "name": self.name,
            "directions": self._directions,
            "scales": self._scales,
            "columns": self._columns,
            "op": self.op,
            "default_scope": self.default_scope,
            "identity": self.identity,
            "provenance": self._provenance,
            "calibration": self._calibration,
        }
        if "directions" in changes and "columns" not in changes:
            now["columns"] = {key: value for key, value in self._columns.items() if key in changes["directions"]}
        return SteeringVector(**{**now, **changes})

    def with_layers(self, lo: int, hi: int) -> SteeringVector:
        """Only layers lo to hi, both included. A calibration is dropped: it was measured with the other layers on.

        Raises VectorError if none of the vector's layers are in the window.
        """
        keys = [key for key in self._directions if lo <= key[0] <= hi]
        if not keys:
            raise VectorError(f"vector {self.name!r} has no layer in {lo}-{hi}: it has {layer_ranges(self.layers)}")
        directions = {key: self._directions[key] for key in keys}
        scales = {key: self._scales[key] for key in keys}
        same = len(keys) == len(self._directions)
        return self.replace(directions=directions, scales=scales, calibration=self._calibration if same else None)

    def scaled(self, factor: float) -> SteeringVector:
        """The vector whose strength 1 is this one's strength ``factor``, bit for bit: only the scales change."""
        if isinstance(factor, bool) or not isinstance(factor, int | float | np.integer | np.floating):
            raise VectorError(f"vector {self.name!r} can only be multiplied by a number, not by {_clip(factor)}")
        factor = float(factor)
        if not math.isfinite(factor):
            raise VectorError(f"vector {self.name!r} cannot be multiplied by {factor}")
        self._need_add("multiplied")
        scales = {key: factor * scale for key, scale in self._scales.items()}
        columns = {key: value.scaled(factor) for key, value in self._columns.items()}
        provenance = {"method": "arithmetic", "sum": [_operand(self, factor)]}
        return self.replace(scales=scales, columns=columns, provenance=provenance, calibration=None)

    def _need_add(self, doing: str) -> None:
        # project ignores the scale and clamp at 0 is not "off": k*v would silently mean something else.
        if self.op != "add":
            raise VectorError(f"vector {self.name!r} has op {self.op!r}, so it cannot be {doing}: use it as its own term")

    def _plus(self, other: SteeringVector, sign: float) -> SteeringVector:
        for vector in (self, other):
            vector._need_add("added")
        if self.n_embd != other.n_embd:
            raise VectorError(f"{self.name!r} and {other.name!r} differ: n_embd {self.n_embd} vs {other.n_embd}")
        if self.identity is not None and other.identity is not None:
            difference = self.identity.mismatch(other.identity)
            if difference:
                raise VectorError(f"{self.name!r} and {other.name!r} are for different models: {difference}")
        if self.default_scope != other.default_scope:
            raise VectorError(
                f"{self.name!r} acts on scope {self.default_scope!r}, {other.name!r} on {other.default_scope!r}: "
                "use them as two terms, or change one with replace(default_scope=...)"
            )
        directions, scales = dict(self._directions), dict(self._scales)
        for key, direction in other._directions.items():
            scale = sign * other._scales[key]
            if key not in directions or scales[key] == 0.0:
                directions[key], scales[key] = direction, scale
            elif scale == 0.0:
                continue
            elif np.array_equal(directions[key], direction):
                scales[key] += scale  # exact: v + v is 2*v, v - v is zero
            else:
                total = self._effective64(key) + sign * other._effective64(key)
                length = float(np.linalg.norm(total))
                if length == 0.0:
                    scales[key] = 0.0  # cancelled: the direction no longer matters, but a unit one must stand there
                else:
                    directions[key], scales[key] = (total / length).astype(np.float32), length
        columns = dict(self._columns)
        for key, value in other._columns.items():
            parts = [columns[key], value.scaled(sign)] if key in columns else [value.scaled(sign)]
            if sum(map(len, parts)) > MAX_COLUMNS:
                raise VectorError(
                    f"{self.name!r} and {other.name!r} have {sum(map(len, parts))} columns at layer {key[0]}, "
                    f"{MAX_COLUMNS} are the limit: use them as two terms"
                )
            columns[key] = Columns.joined(parts)
        joint = "-plus-" if sign > 0 else "-minus-"
        return SteeringVector(
            (self.name + joint + other.name)[:64],
            directions,
            scales,
            columns=columns,
            default_scope=self.default_scope,
            identity=self.identity or other.identity,
            provenance={"method": "arithmetic", "sum": [_operand(self, 1.0), _operand(other, sign)]},
        )

    def __add__(self, other: SteeringVector) -> SteeringVector:
        return self._plus(other, 1.0) if isinstance(other, SteeringVector) else NotImplemented

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self._plus(other, -1.0) if isinstance(other, SteeringVector) else NotImplemented

    def __neg__(self) -> SteeringVector:
        return self.scaled(-1.0)

    def __mul__(self, factor: float) -> SteeringVector:
        return NotImplemented if isinstance(factor, SteeringVector) else self.scaled(factor)

    __rmul__ = __mul__
    # numpy scalars must defer to __rmul__ instead of looping over the vector.
    __array_ufunc__ = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return self.content_hash == other.content_hash and all(
            getattr(self, field) == getattr(other, field)
            for field in ("name", "default_scope", "identity", "_provenance", "_calibration")
        )

    def __hash__(self) -> int:
        return hash((self.name, self.content_hash))

    def __repr__(self) -> str:
        where = f"layers {layer_ranges(self.layers)} at {', '.join(self.sites)}"
        kind = "responsive " if self._columns else ""
        return f"<SteeringVector {self.name!r} {kind}{self.op} {where}, n_embd {self.n_embd}, scope {self.default_scope}>"


def layer_ranges(layers: list[int]) -> str:
    """Sorted layers for people: ``[3, 4, 5, 9]`` is ``3-5, 9``."""

    def runs() -> Iterator[str]:
        first = last = layers[0]
        for layer in [*layers[1:], -1]:
            if layer != last + 1:
                yield f"{first}" if first == last else f"{first}-{last}"
                first = layer
            last = layer

    return ", ".join(runs()) if layers else "none"


class HashedColumns(Protocol):
    """Columns, or what a file holds of them."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def content(self) -> bytes:
        """What is hashed of them."""
        ...


def content_sha256(
    op: str,
    directions: Mapping[Key, np.ndarray],
    scales: Mapping[Key, float],
    columns: Mapping[Key, HashedColumns] = MappingProxyType({}),
) -> str:
    """sha256 (hex) of what is applied: op, then layer, site, direction, scale and columns of each key, sorted.

    ``directions``: float32 [n_embd]; ``scales``: float64. The byte layout is in docs/vector-format.md.
    """
    version = b"v2" if columns else b"v1"
    digest = hashlib.sha256(b"steer-content-" + version + b"\0" + op.encode() + b"\0")
    for layer, site in sorted(directions):
        direction = np.ascontiguousarray(directions[layer, site], "<f4")
        digest.update(layer.to_bytes(4, "little") + site.encode() + b"\0" + direction.size.to_bytes(4, "little"))
        digest.update(direction.tobytes())
        digest.update(np.array(scales[layer, site] + 0.0, "<f8").tobytes())  # + 0.0: -0.0 is hashed as 0.0
        if columns:
            here = columns.get((layer, site))
            digest.update(b"\0\0\0\0" if here is None else len(here).to_bytes(4, "little") + here.content())
    return digest.hexdigest()


def _checked_key(name: str, key: object) -> Key:
    if not isinstance(key, tuple) or len(key) != 2:
        raise VectorError(f"vector {name!r}: {_clip(key)} is not a (layer, site) pair")
    layer, site = key
    if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not 0 <= layer < 2**31:
        raise VectorError(f"vector {name!r}: {_clip(layer)} is not a layer: layers are whole numbers from 0")
    if site not in SITES:
        raise VectorError(f"vector {name!r}: unknown site {_clip(site)} at layer {layer}: use {', '.join(SITES)}")
    return int(layer), site


def _checked_columns(name: str, columns: Mapping[Key, Columns], units: Mapping[Key, np.ndarray]) -> dict[Key, Columns]:
    """Sorted by key; each must stand where there is a direction, and be as wide."""
    found = {}
    for key, value in columns.items():
        layer, site = _checked_key(name, key)
        if not isinstance(value, Columns):
            raise VectorError(f"vector {name!r}: the columns of layer {layer} {site} are {_clip(value)}, not Columns")
        if (layer, site) not in units:
            raise VectorError(f"vector {name!r} has columns at layer {layer} {site}, but no direction there")
        if value.read.shape[1] != units[layer, site].shape[0]:
            has = f"{value.read.shape[1]} numbers, its direction {units[layer, site].shape[0]}"
            raise VectorError(f"vector {name!r}: the columns of layer {layer} {site} have {has}")
        found[layer, site] = value
    return {key: found[key] for key in sorted(found)}


def _checked_scale(name: str, layer: int, site: str, scale: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.integer | np.floating):
        raise VectorError(f"vector {name!r}: the scale of layer {layer} {site} is {_clip(scale)}, not a number")
    try:
        value = float(scale)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise VectorError(f"vector {name!r}: the scale of layer {layer} {site} is {value}")
    return value


def _unit(name: str, layer: int, site: str, values: Any) -> tuple[np.ndarray, float]:
    """(read-only unit float32 copy, length of the original); a unit input keeps its bits and has length 1."""
    where = f"vector {name!r}: the direction of layer {layer} {site}"
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "fiu":
            raise TypeError
    except (TypeError, ValueError):
        raise VectorError(f"{where} is not an array of real numbers") from None
    if array.ndim != 1 or array.size == 0:
        raise VectorError(f"{where} has shape {list(array.shape)}, not [n_embd]")
    wide = array.astype(np.float64)
    if not np.isfinite(wide).all():
        raise VectorError(f"{where} contains NaN or Inf")
    # Two steps, so that very long and very short arrays neither overflow nor vanish.
    peak = float(np.abs(wide).max())
    length = peak * float(np.linalg.norm(wide / peak)) if peak > 0.0 else 0.0
    if length == 0.0:
        return np.zeros(array.shape, np.float32), 0.0
    if abs(length - 1.0) <= _UNIT_TOLERANCE:
        unit, length = array.astype(np.float32), 1.0
    else:
        unit = (wide / peak / (length / peak)).astype(np.float32)
    unit.flags.writeable = False
    return unit, length


def _json_object(name: str, what: str, data: dict[str, Any] | None) -> dict[str, Any] | None:
    """A copy made of JSON values only, so that what is stored is what is read back."""
    if data is None:
        return None
    try:
        if not isinstance(data, dict):
            raise TypeError
        copied = json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise VectorError(f"vector {name!r}: its {what} is not a JSON object (no NaN, strings as keys)") from None
    return copied


def _operand(vector: SteeringVector, factor: float) -> dict[str, Any]:
    return {"name": vector.name, "factor": factor, "content_sha256": vector.content_hash}
