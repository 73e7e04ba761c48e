"""DwarfStar 4's directional steering: a headerless float32 file, n_layer x n_embd, and a JSON beside it that says the rest.

Always ``project``, y - S v (v.y) with unit v, at the output of the feed-forward part or of attention, for every token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import VectorError
from ...steering.vector import SteeringVector
from ..formats import NO_FACTS, Facts, Format, Limits
from .common import (
    MAX_BYTES,
    by_layer,
    check_writable,
    clip,
    imported,
    kept_sites,
    load,
    load_json,
    reading,
    save,
    stated,
    unit_rows,
    whole,
)

NAME = "ds4"
FORMAT_FIELD = "ds4-directional-steering-v1"
SITES = ("ffn_out", "attn_out")
LIMITS = Limits(ops=("project",), sites=SITES, scopes=("0-",), calibration=False, one_site=True, identity=False, notes=False)


def read(path: Path, facts: Facts = NO_FACTS) -> SteeringVector:
    """The vector in ``path``; without its JSON, the shape comes from the model and the site from the user.

    Raises VectorError, also for rows that are neither zero nor of unit length.
    """
    with reading(path):
        beside = path.with_suffix(".json")
        meta = load_json(beside) if beside.is_file() else {}
        if meta and meta.get("format") != FORMAT_FIELD:
            raise VectorError(f"{beside.name} beside it is of format {clip(meta.get('format'))}, not {FORMAT_FIELD}")
        n_layer, n_embd = _shape(meta, facts)
        if n_layer * n_embd * 4 != path.stat().st_size:
            raise VectorError(f"it has {path.stat().st_size} bytes, not those of {n_layer} x {n_embd} float32 numbers")
        site = meta.get("component")
        if site is None and facts.site is None:
            raise VectorError("nothing says where it acts: convert it with --site ffn_out or --site attn_out")
        if site is not None and site not in SITES:
            raise VectorError(f"its component is {clip(site)}: {' and '.join(SITES)} can be read")
        site = stated("site", site, facts.site, "ffn_out")
        rows = np.frombuffer(load(path), "<f4").reshape(n_layer, n_embd)
        notes = {key: meta.get(key) for key in ("thinking", "pair_normalize", "orthogonalize_control_mean")}
        files = {key: _base_name(meta.get(key)) for key in ("good_file", "bad_file", "model")}
        return imported(
            path,
            NAME,
            unit_rows({(il, site): row for il, row in enumerate(rows)}),
            op="project",
            scope=stated("scope", None, facts.scope, "0-"),
            notes={**{key: value for key, value in notes.items() if isinstance(value, bool)}, **files},
        )


def _shape(meta: dict[str, Any], facts: Facts) -> tuple[int, int]:
    shape = meta.get("shape")
    if shape is None and facts.identity is not None:
        return facts.identity.n_layer, facts.identity.n_embd
    if shape is None:
        raise VectorError("there is no JSON beside it that gives its shape: convert it with --model FILE")
    if not isinstance(shape, list) or len(shape) != 2:
        raise VectorError(f"the shape in its JSON is {clip(shape)}, not [n_layer, n_embd]")
    return whole(shape[0], "the number of layers in its JSON"), whole(shape[1], "the n_embd in its JSON", MAX_BYTES)


def _base_name(value: Any) -> str | None:
    return value.replace("\\", "/").rsplit("/", 1)[-1][:200] if isinstance(value, str) else None


def write(vector: SteeringVector, path: Path) -> None:
    """Write the unit directions, zeros for the layers without one, and the JSON. Raises VectorError."""
    check_writable(vector, NAME, LIMITS)
    if vector.identity is None:
        raise VectorError(f"a ds4 file has a row for each layer, and {vector.name!r} names no model: give it with --model")
    beside = path.with_suffix(".json")
    if beside == path:
        raise VectorError(f"{path} is where the JSON of a ds4 file goes: name the file .f32")
    if beside.exists() and _not_ours(beside):
        raise VectorError(f"{beside} is in the way: the JSON of {path.name} goes there")
    rows = np.zeros((vector.identity.n_layer, vector.n_embd), "<f4")
    for layer, row in by_layer(vector).items():
        rows[layer] = row
    meta = {
        "format": FORMAT_FIELD,
        "shape": list(rows.shape),
        "component": kept_sites(vector),
        "model": vector.identity.name or vector.identity.architecture,
        "note": "positive scales remove the direction, negative ones amplify it",
    }
    save(beside, (json.dumps(meta, indent=2) + "\n").encode())
    save(path, rows.tobytes())


def _not_ours(path: Path) -> bool:
    try:
        return load_json(path).get("format") != FORMAT_FIELD
    except (VectorError, OSError):
        return True


def sniff(path: Path) -> bool:
    """True for ``.f32``: the file has no header."""
    return path.suffix.lower() == ".f32"


FORMAT = Format(NAME, (".f32",), read, write, sniff, read, ("site", "scope"), LIMITS)
