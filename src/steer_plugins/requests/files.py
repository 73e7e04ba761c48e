"""The vector files of engines of others, under names that follow from their content: no file is ever replaced by another."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import VectorError
from ..steering.vector import SteeringVector
from ..store.foreign.common import save
from ..store.foreign.gguftensors import write_directions

EASYSTEER, HOTWIRE = "easysteer", "hotwire"
FILES = {EASYSTEER: ".gguf", HOTWIRE: ".pt"}
"""Targets, and the suffix of their files."""


def file_name(vector: SteeringVector, target: str, op: str | None = None) -> str:
    """The file that requests name: the vector's name and content, and ``erase`` for a direction whose component is removed."""
    what = "-erase" if (op or vector.op) == "project" else ""
    return f"{vector.name}-{vector.content_hash[:12]}{what}{FILES[target]}"


def export(vector: SteeringVector, target: str, folder: Path, op: str | None = None) -> Path:
    """Write a vector's file for a target, unless it is there; returns it.

    ``easysteer``: GGUF with ``direction.N``, float32 [n_embd], for the output of layer N. ``hotwire``: a tensor that torch reads,
    float32 [n_layer, n_embd]. Both hold what strength 1 adds, or for ``project`` the unit directions.

    Raises:
        VectorError: a site other than ``resid_post``, an op that the target has not, or the folder cannot be written to.
    """
    op = op or vector.op
    if vector.sites != ["resid_post"] or vector.columns:
        raise VectorError(f"{vector.name!r} is not made of plain directions at resid_post, which is all that {target} has")
    if op not in (("add", "project") if target == EASYSTEER else ("add",)):
        raise VectorError(f"{vector.name!r} has op {op}, which {target} has not")
    path = folder / file_name(vector, target, op)
    if path.exists():
        return path
    rows = {il: _row(vector, il, op) for il in vector.layers}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VectorError(f"the folder {folder} cannot be made: {error.strerror or error}") from None
    if target == EASYSTEER:
        architecture = vector.identity.architecture if vector.identity else ""
        write_directions(path, {"controlvector.model_hint": architecture, "controlvector.layer_count": len(rows)}, rows)
    else:
        if vector.identity is None:
            raise VectorError(
                f"a {target} file has a row for each layer, and {vector.name!r} names no model: give it with --model"
            )
        table = np.zeros((vector.identity.n_layer, vector.n_embd), np.float32)
        for il, row in rows.items():
            table[il] = row
        save(path, torch_file(table))
    return path


def _row(vector: SteeringVector, layer: int, op: str) -> npt.NDArray[np.float32]:
    row = vector.directions[layer, "resid_post"] if op == "project" else vector.effective(layer, "resid_post")
    row = np.asarray(row, np.float32)
    if not np.isfinite(row).all():
        raise VectorError(f"the scale of layer {layer} of {vector.name!r} is too large for float32")
    return row


def torch_file(table: npt.NDArray[np.float32]) -> bytes:
    """A float32 matrix as ``torch.save`` writes a tensor: a zip of plain storage, and a pickle of four names that
    ``torch.load(weights_only=True)`` knows."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def numbers(*values: int) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    n_rows, n_columns = table.shape
    storage = (
        b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text("0")
        + text("cpu")
        + b"J"
        + struct.pack("<i", table.size)
        + b"tQ"
    )
    shape = numbers(n_rows, n_columns) + numbers(n_columns, 1)
    program = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"J" + struct.pack("<i", 0) + shape
    program += b"\x89ccollections\nOrderedDict\n)RtR"
    members = {
        "data.pkl": b"\x80\x02" + program + b".",
        "byteorder": b"little",
        "data/0": np.ascontiguousarray(table, "<f4").tobytes(),
        "version": b"3\n",
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return out.getvalue()
