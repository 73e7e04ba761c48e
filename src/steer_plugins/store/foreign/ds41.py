"""Direction files of a fork of DwarfStar 4 for DeepSeek-V4.1-Flash: a header of 72 bytes, then n_layer x n_embd float32.

Little-endian: the magic ``DS41DIR``, version, layers, width, rank, site and mode (u32 each), the layers that are steered (u64, a
bit each), the SHA-256 of the model file; then unit rows, zero where nothing is steered. Always ``project``, for every token. Site
1 is what a block writes, without saying which of its two parts; site 2, the streams' mean taken out of each stream, is no op of
ours.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import VectorError
from ...steering.vector import SteeringVector
from ..formats import NO_FACTS, Facts, Format, Limits
from .common import by_layer, check_writable, head, imported, load, reading, save, stated, unit_rows
from .ds4 import SITES

NAME = "ds41dir"
MAGIC = b"DS41DIR\0"
MAX_LAYERS = 64
WRITER, RESIDUAL_MEAN = 1, 2
LIMITS = Limits(ops=("project",), sites=SITES, scopes=("0-",), calibration=False, one_site=True, identity=False, notes=False)

_HEADER = struct.Struct("<8s6IQ32s")


def read(path: Path, facts: Facts = NO_FACTS) -> SteeringVector:
    """The vector in ``path``. Raises VectorError, also for rows that are not of unit length or not selected."""
    with reading(path):
        data = load(path)
        if len(data) < _HEADER.size or not data.startswith(MAGIC):
            raise VectorError("it has no header of a DS41DIR file")
        _, version, n_layer, n_embd, rank, site, mode, mask, digest = _HEADER.unpack_from(data)
        if (version, rank, mode) != (1, 1, 0):
            raise VectorError(f"its version, rank and mode are {version}, {rank} and {mode}: only 1, 1 and 0 can be read")
        if not 1 <= n_layer <= MAX_LAYERS or not n_embd or mask == 0 or mask >> n_layer:
            raise VectorError(f"its header speaks of {n_layer} layers of {n_embd} numbers, with layer mask {mask:#x}")
        if len(data) != _HEADER.size + 4 * n_layer * n_embd:
            raise VectorError(f"it has {len(data)} bytes, not those of {n_layer} x {n_embd} float32 numbers behind its header")
        if facts.identity is not None and (facts.identity.n_layer, facts.identity.n_embd) != (n_layer, n_embd):
            raise VectorError(f"it is for a model of {n_layer} layers of {n_embd} numbers")
        if site == RESIDUAL_MEAN:
            raise VectorError("it takes the streams' mean out of each stream, which no op here does: fit a vector instead")
        if site != WRITER:
            raise VectorError(f"its site is {site}: only 1, what a block writes, can be read")
        if facts.site is None:
            raise VectorError(
                "it does not say which part of a block it acts on: convert it with --site ffn_out or --site attn_out"
            )
        if facts.site not in SITES:
            raise VectorError(f"it acts on {' or '.join(SITES)}, not on {facts.site}")
        rows = np.frombuffer(data, "<f4", offset=_HEADER.size).reshape(n_layer, n_embd)
        directions = unit_rows({(il, facts.site): row for il, row in enumerate(rows)})
        if sorted(il for il, _ in directions) != [il for il in range(n_layer) if mask >> il & 1]:
            raise VectorError("its layer mask and its rows name different layers")
        scope = stated("scope", None, facts.scope, "0-")
        return imported(path, NAME, directions, op="project", scope=scope, notes={"model_sha256": digest.hex()})


def write(vector: SteeringVector, path: Path) -> None:
    """Write the unit directions. Its provenance names the model file, see ``steer convert --model``. Raises VectorError."""
    check_writable(vector, NAME, LIMITS)
    digest = _digest(vector)
    if vector.identity is None or digest is None:
        raise VectorError(f"a {NAME} file is bound to the bytes of a model file: name that of {vector.name!r} with --model")
    n_layer = vector.identity.n_layer
    if n_layer > MAX_LAYERS:
        raise VectorError(f"a {NAME} file has at most {MAX_LAYERS} layers, and the model of {vector.name!r} has {n_layer}")
    rows, mask = np.zeros((n_layer, vector.n_embd), "<f4"), 0
    for layer, row in by_layer(vector).items():
        rows[layer] = row
        mask |= 1 << layer
    save(path, _HEADER.pack(MAGIC, 1, n_layer, vector.n_embd, 1, WRITER, 0, mask, digest) + rows.tobytes())


def _digest(vector: SteeringVector) -> bytes | None:
    text: Any = (vector.provenance or {}).get("model_sha256")
    try:
        found = bytes.fromhex(text)
    except (TypeError, ValueError):
        return None
    return found if len(found) == 32 else None


def sniff(path: Path) -> bool:
    """True for a file that begins with the magic."""
    return head(path).startswith(MAGIC)


FORMAT = Format(NAME, (".ds41dir",), read, write, sniff, read, ("site", "scope"), LIMITS)
