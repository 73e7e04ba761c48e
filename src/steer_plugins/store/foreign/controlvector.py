"""Control vectors of repeng and llama.cpp: GGUF, ``direction.N`` added to the output of block N, for every token.

llama.cpp applies ``direction.N`` after the 0-based block N (common/common.cpp and src/llama-adapter.cpp) and has no place
for layer 0. repeng writes the block's index as N; llama.cpp's own generator and jukofyork's write N = block + 1, so
that their files act one block late: ``Facts.gguf_layers = "plus-one"`` puts such a file back.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import VectorError
from ...steering.vector import SteeringVector
from ..formats import NO_FACTS, Facts, Format, Limits
from .common import by_layer, check_made_for, check_writable, clip, head, imported, reading, stated
from .gguftensors import architecture, check_layers, read_directions, write_directions

NAME = "gguf-control-vector"
LIMITS = Limits(
    ops=("add",), sites=("resid_post",), first_layer=1, scopes=("0-",), calibration=False, identity=False, notes=False
)
#: Keys that begin like this make a file one of the GLP format, which may mean another op.
GLP_PREFIXES = ("glp.", "dspark.")


def read(path: Path, facts: Facts = NO_FACTS) -> SteeringVector:
    """The vector in ``path``: op add, scope ``0-`` as llama.cpp applies it. Raises VectorError."""
    with reading(path):
        if facts.gguf_layers not in (None, "block", "plus-one"):
            raise VectorError(f"--gguf-layers is block or plus-one, not {clip(facts.gguf_layers)}")
        file = read_directions(path)
        if file.values.get("general.architecture") != "controlvector":
            raise VectorError(f"it is a GGUF file of {clip(file.values.get('general.architecture'))}, no control vector")
        if any(key.startswith(GLP_PREFIXES) for key in file.values):
            raise VectorError("it has GLP metadata, which a control vector has not: read it as glp")
        plus_one = facts.gguf_layers == "plus-one"
        if facts.gguf_layers is None:
            check_layers(file, facts.identity)
        check_made_for(file.text("controlvector.model_hint"), facts)
        return imported(
            path,
            NAME,
            {(n - plus_one, "resid_post"): array for n, array in file.directions.items()},
            op="add",
            scope=stated("scope", None, facts.scope, "0-"),
            notes={
                "model_hint": file.text("controlvector.model_hint"),
                "layers": "direction.N was made at block N-1" if plus_one else "direction.N acts on block N",
            },
        )


def write(vector: SteeringVector, path: Path) -> None:
    """Write what ``vector`` adds at strength 1 as ``direction.N`` for block N. Raises VectorError."""
    check_writable(vector, NAME, LIMITS)
    directions = by_layer(vector)
    values = {
        "controlvector.model_hint": vector.identity.architecture if vector.identity else "",
        "controlvector.layer_count": len(directions),
    }
    write_directions(path, values, directions)


def sniff(path: Path) -> bool:
    """True for a GGUF file whose architecture is ``controlvector``, without GLP metadata near its start."""
    return architecture(path) == "controlvector" and not any(prefix.encode() in head(path) for prefix in GLP_PREFIXES)


FORMAT = Format(NAME, (".gguf",), read, write, sniff, read, ("gguf_layers", "scope"), LIMITS)
