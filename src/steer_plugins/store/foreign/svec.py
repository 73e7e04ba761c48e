"""``.svec`` of IBM's activation-steering: JSON with ``model_type``, ``directions`` by layer and ``explained_variances``.

A direction of layer L was made from the output of the 0-based block L, and is added there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from ...errors import VectorError
from ...steering.vector import Key, SteeringVector
from ..formats import NO_FACTS, Facts, Format, Limits
from .common import (
    as_utf8,
    by_layer,
    check_made_for,
    check_writable,
    clip,
    head,
    imported,
    load_json,
    numbers,
    reading,
    save,
    stated,
)

NAME = "svec"
LIMITS = Limits(ops=("add",), sites=("resid_post",), scopes=("all",), calibration=False, identity=False, notes=False)
_LAYER = re.compile(r"0|[1-9][0-9]{0,4}")


def read(path: Path, facts: Facts = NO_FACTS) -> SteeringVector:
    """The vector in ``path``. Raises VectorError, also for directions that differ from position to position."""
    with reading(path):
        data = load_json(path)
        stored = data.get("directions")
        if not isinstance(stored, dict) or not stored:
            raise VectorError("it has no 'directions' object with one list for each layer")
        directions: dict[Key, np.ndarray] = {}
        for layer, row in stored.items():
            if not _LAYER.fullmatch(layer):
                raise VectorError(f"{clip(layer)} is not a layer: layers are whole numbers from 0")
            if isinstance(row, list) and len(row) == 1 and isinstance(row[0], list):
                row = row[0]  # newer files: [positions, n_embd]
            if isinstance(row, list) and row and isinstance(row[0], list):
                raise VectorError(f"its layer {layer} has {len(row)} directions, one for each position: one can be read")
            directions[int(layer), "resid_post"] = numbers(row, f"the direction of layer {layer}")
        model_type = data.get("model_type")
        check_made_for(model_type if isinstance(model_type, str) else None, facts)
        return imported(
            path,
            NAME,
            directions,
            op=stated("op", None, facts.op, "add"),
            scope=stated("scope", None, facts.scope, "all"),
            notes={"model_type": model_type[:200] if isinstance(model_type, str) else None},
        )


def write(vector: SteeringVector, path: Path) -> None:
    """Write what ``vector`` adds at strength 1. Raises VectorError."""
    check_writable(vector, NAME, LIMITS)
    rows = {str(layer): [float(x) for x in row] for layer, row in by_layer(vector).items()}
    model_type = vector.identity.architecture if vector.identity else ""
    text = json.dumps({"model_type": model_type, "directions": rows, "explained_variances": {}}, allow_nan=False)
    save(path, text.encode())


def sniff(path: Path) -> bool:
    """True for a JSON object that speaks of directions and a model type near its start."""
    start = as_utf8(head(path, 4096)).lstrip()
    return start.startswith(b"{") and b'"directions"' in start and b'"model_type"' in start


FORMAT = Format(NAME, (".svec",), read, write, sniff, read, ("op", "scope"), LIMITS)
