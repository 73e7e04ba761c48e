"""One steering for a whole process: what an unmodified llama-server can do, by its control vector.

A host's own server (text-generation-webui's, Ollama's, a release of llama.cpp) takes no steering with a request. Started with the
flags of :func:`fixed_flags` it has one for all of them; another one means another start.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SpecError
from ..runtime import cache_dir
from ..steering.terms import Steering, Term
from ..steering.vector import SteeringVector, scope_range
from ..store.foreign import controlvector

WAY_OUT = "run the patched server (`steer serve`), or leave it out"


def fixed_flags(steering: Steering, folder: Path | None = None) -> list[str]:
    """Flags of llama-server that add a steering to every token of every request; none for a steering that does nothing.

    The control vector is written to ``folder`` (the cache by default), under a name that is its content.

    Raises:
        SpecError: a term asks for something else: another op than ``add``, a scope other than ``0-``, a gate, a schedule, a
            stream, a site other than ``resid_post``, layer 0.
        VectorError: the file cannot be written.
    """
    sums: dict[int, Any] = {}
    for term in steering:
        if term.is_zero:
            continue
        _check(term)
        for key in term.keys():
            dose = term.strength * term.vector.scales[key]
            sums[key[0]] = sums.get(key[0], 0.0) + dose * term.vector.directions[key].astype(np.float64)
    rows = {layer: row.astype(np.float32) for layer, row in sorted(sums.items()) if np.any(row)}
    if not rows:
        return []
    content = hashlib.sha256(b"".join(layer.to_bytes(4, "little") + row.tobytes() for layer, row in rows.items())).hexdigest()
    path = (folder or cache_dir() / "control-vectors") / f"{content[:16]}.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = next(iter(steering)).vector.identity
    vector = SteeringVector("fixed", {(il, "resid_post"): row for il, row in rows.items()}, default_scope="0-", identity=identity)
    controlvector.write(vector, path)
    # not --control-vector-scaled, whose colon is a part of a path on Windows: the strength is in the file
    return ["--control-vector", str(path), "--control-vector-layer-range", str(min(rows)), str(max(rows))]


def _check(term: Term) -> None:
    name = term.vector.name
    scope = term.effective_scope
    keys = term.keys()
    asked = {
        f"op {term.effective_op}": term.effective_op != "add",
        f"scope {scope}": scope_range(scope) != (0, None),
        "a gate": term.gate is not None,
        "a schedule": term.schedule is not None,
        "a stream": term.stream is not None,
        "columns": bool(term.vector.columns),
        "layer 0": any(layer == 0 for layer, _ in keys),
        "a site other than resid_post": any(site != "resid_post" for _, site in keys),
    }
    wrong = [what for what, is_so in asked.items() if is_so]
    if wrong:
        way_out = f"write {name}?0-" if wrong == [f"scope {scope}"] else WAY_OUT
        raise SpecError(
            f"{name!r} asks for {', '.join(wrong)}, but an unmodified llama-server adds one vector to every token, the first "
            f"included, from layer 1 on: {way_out}"
        )
