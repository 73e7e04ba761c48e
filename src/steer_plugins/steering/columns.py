"""What reads the state in order to steer it: rows that are read, rows that are written, and a knee between them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import VectorError

MAX_COLUMNS = 16
"""At one layer and site of a vector."""
MAX_BIAS = 1e15
"""Largest bias and knee, in units of the hidden state."""
LINEAR = -math.inf
"""The knee of a column that has none."""


@dataclass(frozen=True, eq=False)
class Columns:
    """Responsive columns at one layer and site: h <- h + sum of gain * phi(read·h + bias) * write, times the strength.

    phi(z) is z above the knee and 0 elsewhere: a knee of 0 is ReLU, one above 0 JumpReLU, :data:`LINEAR` leaves z as it is.

    Attributes:
        read, write: float32 [k, n_embd], unit rows, read-only. Rows that are given are normalised: the length of a written row is
            folded into the gain, that of a read row into gain, bias and knee.
        gain: float64 [k], at strength 1.
        bias, knee: float64 [k], in units of the hidden state.

    Raises:
        VectorError: NaN or Inf, shapes that do not fit, a row of zero, a knee below 0, more than :data:`MAX_COLUMNS`.
    """

    read: np.ndarray
    write: np.ndarray
    gain: np.ndarray
    bias: np.ndarray
    knee: np.ndarray

    def __init__(self, read: Any, write: Any, gain: Any, bias: Any = 0.0, knee: Any = 0.0) -> None:
        rows = [_rows(what, values) for what, values in (("read", read), ("write", write))]
        (read, lengths), (write, sizes) = rows
        if read.shape != write.shape:
            raise VectorError(f"columns read rows of shape {list(read.shape)} and write rows of shape {list(write.shape)}")
        k = len(read)
        if not 0 < k <= MAX_COLUMNS:
            raise VectorError(f"{k} columns were given at one layer and site: 1 to {MAX_COLUMNS} are possible")
        numbers = [_numbers(what, values, k) for what, values in (("gain", gain), ("bias", bias), ("knee", knee))]
        gain, bias, knee = numbers[0] * lengths * sizes, numbers[1] / lengths, numbers[2] / lengths
        if not np.isfinite(gain).all() or not (np.abs(bias) <= MAX_BIAS).all():
            raise VectorError(f"a column has a gain that is not finite, or a bias beyond {MAX_BIAS:g}")
        if not all(x == LINEAR or 0.0 <= x <= MAX_BIAS for x in knee):
            raise VectorError("a column has a knee below 0: 0 is ReLU, above it JumpReLU, and none at all is linear")
        for name, value in (("read", read), ("write", write), ("gain", gain), ("bias", bias), ("knee", knee)):
            value.flags.writeable = False
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.read)

    def scaled(self, factor: float) -> Columns:
        """The same with every gain times ``factor``."""
        return Columns(self.read, self.write, factor * self.gain, self.bias, self.knee)

    @classmethod
    def joined(cls, parts: Iterable[Columns]) -> Columns:
        """All columns of several, in order."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("read", "write", "gain", "bias", "knee")))

    def response(self, h: np.ndarray) -> np.ndarray:
        """phi(read·h + bias), [..., k], of states ``h`` [..., n_embd]."""
        z = h @ self.read.T.astype(h.dtype) + self.bias.astype(h.dtype)
        fired: np.ndarray = np.where(z > self.knee.astype(h.dtype), z, h.dtype.type(0))
        return fired

    def to_json(self) -> list[dict[str, float | None]]:
        """Gain, bias and knee (None: linear) of each column, as the vector file has them."""
        return [
            {"gain": float(g), "bias": float(b), "knee": None if t == LINEAR else float(t)}
            for g, b, t in zip(self.gain, self.bias, self.knee, strict=True)
        ]

    def content(self) -> bytes:
        """What is hashed (:func:`column_content`)."""
        return column_content(self.read, self.write, np.stack([self.gain, self.bias, self.knee], axis=1))


def column_content(read: np.ndarray, write: np.ndarray, numbers: np.ndarray) -> bytes:
    """For each column its two rows, float32, then its ``numbers``, float64 [k, 3] gain, bias and knee, all little-endian."""
    return b"".join(
        r.astype("<f4").tobytes() + w.astype("<f4").tobytes() + n.astype("<f8").tobytes()
        for r, w, n in zip(read, write, numbers + 0.0, strict=True)  # -0.0 is hashed as 0.0
    )


def _rows(what: str, values: Any) -> tuple[np.ndarray, np.ndarray]:
    """(unit float32 rows, their former lengths); rows of length 1 keep their bits."""
    try:
        wide = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise VectorError(f"the rows that columns {what} are not arrays of real numbers") from None
    if wide.ndim == 1:
        wide = wide[None]
    if wide.ndim != 2 or wide.shape[1] == 0:
        raise VectorError(f"the rows that columns {what} have shape {list(wide.shape)}, not [k, n_embd]")
    if not np.isfinite(wide).all():
        raise VectorError(f"the rows that columns {what} contain NaN or Inf")
    lengths = np.linalg.norm(wide, axis=1)
    if not (lengths > 0.0).all() or not np.isfinite(lengths).all():
        raise VectorError(f"a row that a column has to {what} is zero, or too long")
    near = np.abs(lengths - 1.0) <= 1e-6  # float32 rows of length 1 keep their bits
    lengths = np.where(near, 1.0, lengths)
    return np.ascontiguousarray(wide / lengths[:, None], np.float32), lengths


def _numbers(what: str, values: Any, k: int) -> np.ndarray:
    try:
        array = np.broadcast_to(np.asarray(values, dtype=np.float64), (k,)).copy()
    except (TypeError, ValueError):
        raise VectorError(f"the {what} of {k} columns is {values!r:.60}: give a number for each") from None
    if np.isnan(array).any():
        raise VectorError(f"the {what} of a column is not a number")
    return array
