"""numpy ``.npz``: arrays by layer, or one array of rows. Never with pickles: only plain arrays of numbers are read.

Read: ``direction.L.SITE`` (what :func:`write` writes, with ``op`` and ``scope``), ``direction.L``, ``layer.L`` or ``L``, each
[n_embd]; or one array [n_embd] or [rows, n_embd] of any name.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np

from ...errors import VectorError
from ...steering.vector import SITES, Key, SteeringVector
from ..formats import NO_FACTS, Facts, Format, Limits
from .archive import Archive, NpyArray
from .common import amounts, check_writable, clip, head, imported, joined, reading, row_directions, save, stated

NAME = "npz"
LIMITS = Limits(calibration=False, identity=False, notes=False)
_LAYER = re.compile(rf"(?:(?:direction|layer)[._]?)?(0|[1-9][0-9]{{0,4}})(?:\.({'|'.join(SITES)}))?")
_TEXT = re.compile(r"(op|scope)\.([a-z0-9-]{1,30})")


def read(path: Path, facts: Facts = NO_FACTS) -> SteeringVector:
    """The vector in ``path``. Raises VectorError, also when rows do not say which layers they are for."""
    with reading(path), Archive(path) as archive:
        odd = [name for name in archive.sizes if not name.endswith(".npy")]
        if odd or not archive.sizes:
            raise VectorError(f"it has {clip(odd[0])} in it, which is not an array" if odd else "it holds no array")
        arrays = {name.removesuffix(".npy"): NpyArray(archive, name) for name in archive.sizes}
        said: dict[str, str] = {}
        for name in [name for name in arrays if _TEXT.fullmatch(name)]:
            what, value = name.split(".", 1)
            if what in said:
                raise VectorError(f"it has two entries for its {what}")
            said[what] = value
            del arrays[name]
        site = stated("site", None, facts.site, "resid_post")
        directions: dict[Key, np.ndarray] = {}
        if facts.key is None and arrays and all(_LAYER.fullmatch(name) for name in arrays):
            for name, array in arrays.items():
                match = _LAYER.fullmatch(name)
                assert match
                key = int(match[1]), stated("site", match[2], facts.site, site)
                if key in directions:
                    raise VectorError(f"it has two arrays for layer {key[0]}")
                directions[key] = array.read()
        else:
            directions.update(row_directions(choose(arrays, facts.key).read(), site, facts))
        return imported(
            path,
            NAME,
            directions,
            op=stated("op", said.get("op"), facts.op, "add"),
            scope=stated("scope", said.get("scope"), facts.scope, "all"),
            notes={"array": facts.key},
        )


def choose(arrays: dict[str, NpyArray], key: str | None) -> NpyArray:
    """The array named ``key``, or the only one. Raises VectorError."""
    if key is None and len(arrays) == 1:
        return next(iter(arrays.values()))
    if key not in arrays:
        names = joined([clip(name, 30) for name in sorted(arrays)[:10]])
        raise VectorError(f"it has the arrays {names}: choose one with steer convert --key NAME")
    return arrays[key]


def write(vector: SteeringVector, path: Path) -> None:
    """Write ``direction.L.SITE`` arrays: what is added at strength 1 (add, clamp, renorm), or unit directions (project).

    Op and scope are the names of two empty arrays, ``op.add`` and ``scope.all``, as text would need its own type.
    """
    check_writable(vector, NAME, LIMITS)
    if vector.op == "clamp" and not all(vector.scales.values()):
        raise VectorError(f"vector {vector.name!r} clamps to 0, which the length of an array cannot say")
    arrays = {f"direction.{layer}.{site}": array for (layer, site), array in amounts(vector).items()}
    empty = np.zeros(0, np.float32)
    out = io.BytesIO()
    np.savez(out, **arrays, **{f"op.{vector.op}": empty, f"scope.{vector.default_scope}": empty})  # type: ignore[arg-type]
    save(path, out.getvalue())


def sniff(path: Path) -> bool:
    """True for a zip archive whose first member is a .npy array."""
    start = head(path, 128)
    return start.startswith(b"PK\x03\x04") and b".npy" in start[30 : 30 + int.from_bytes(start[26:28], "little")]


FORMAT = Format(NAME, (".npz",), read, write, sniff, read, ("at", "key", "op", "site", "scope"), LIMITS)
