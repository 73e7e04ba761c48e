"""GLP v1 ("GGUF layer projection", also known as weightless): control-vector tensors with the op in the metadata.

``glp.mode`` project: h - alpha d (d.h), alpha being the strength; add: h + alpha d; absent: add. ``direction.N`` is for block N.
Older files have ``dspark.`` for ``glp.``. ``glp.alpha_default`` is a recommended strength: it goes into the provenance
and never into the directions, since a projection is quadratic in their length.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ...errors import VectorError
from ...steering.vector import SteeringVector
from ..formats import NO_FACTS, Facts, Format, Limits
from .common import by_layer, check_writable, clip, head, imported, kept_sites, number, reading, stated, unit_rows
from .controlvector import GLP_PREFIXES
from .gguftensors import DirectionFile, architecture, check_layers, read_directions, write_directions

NAME = "glp"
HOOKS = {
    "residual_stream_post_layer": "resid_post",
    "ffn_out_pre_residual": "ffn_out",
    "attn_out_pre_residual": "attn_out",
}
LIMITS = Limits(
    ops=("project", "add"), first_layer=1, scopes=("0-",), calibration=False, one_site=True, identity=False, notes=False
)


def read(path: Path, facts: Facts = NO_FACTS) -> SteeringVector:
    """The vector in ``path``, every ``glp.`` field that changes the meaning checked. Raises VectorError."""
    with reading(path):
        file = read_directions(path)
        fields = _fields(file)
        mode = fields.get("mode", "add")
        if mode not in LIMITS.ops:
            raise VectorError(f"its mode is {clip(mode)}: project and add can be read")
        hook = fields.get("hook_point", "residual_stream_post_layer")
        if not isinstance(hook, str) or hook not in HOOKS:
            raise VectorError(f"its hook point is {clip(hook)}: {', '.join(HOOKS)} can be read")
        _check(file, fields)
        check_layers(file, facts.identity)
        directions = {(n, HOOKS[hook]): array for n, array in file.directions.items()}
        alpha = number(fields.get("alpha_default"))
        if alpha is None and "alpha_default" in fields:
            raise VectorError(f"its alpha_default is {clip(fields['alpha_default'])}, not a number")
        return imported(
            path,
            NAME,
            unit_rows(directions) if mode == "project" else directions,
            op=mode,
            scope=stated("scope", None, facts.scope, "0-"),
            notes={
                "recommended_strength": alpha,
                **{what: _short(fields.get(what)) for what in ("method", "contrast", "derived_at", "content_sha256", "created")},
                **{f"base_model_{part}": file.text(f"general.base_model.0.{part}") for part in _BASE_MODEL},
                "model_hint": file.text("controlvector.model_hint"),
            },
        )


_BASE_MODEL = ("name", "organization", "version", "repo_url")


def _fields(file: DirectionFile) -> dict[str, Any]:
    """The fields without their prefix."""
    if file.values.get("general.architecture") not in ("controlvector", "glp"):
        raise VectorError(f"it is a GGUF file of {clip(file.values.get('general.architecture'))}, not of directions")
    used = [prefix for prefix in GLP_PREFIXES if any(key.startswith(prefix) for key in file.values)]
    if len(used) != 1:
        raise VectorError("it has both glp. and dspark. metadata" if used else "it has no GLP metadata")
    return {key.removeprefix(used[0]): value for key, value in file.values.items() if key.startswith(used[0])}


def _check(file: DirectionFile, fields: dict[str, Any]) -> None:
    for what, known in (("spec_version", 1), ("rank", 1), ("structure", "per-layer")):
        value = fields.get(what, known)
        if value != known or isinstance(value, bool):
            raise VectorError(f"its {what} is {clip(value)}: only {known} can be read")
    listed = fields.get("layer_ids_zero_based")
    if isinstance(listed, str) and listed != ",".join(map(str, file.directions)):
        raise VectorError("its layer_ids_zero_based and its tensors name different layers")
    digest = fields.get("content_sha256")
    if digest is not None and digest != _digest(file.directions):
        raise VectorError("its directions do not match its content_sha256, so it is damaged")


def _short(value: Any) -> str | None:
    return "".join(c for c in value if c.isprintable())[:1000] if isinstance(value, str) else None


def _digest(directions: dict[int, Any]) -> str:
    """sha256 (hex) of the tensor bytes in the order of the layers."""
    digest = hashlib.sha256()
    for _, array in sorted(directions.items()):
        digest.update(array.astype("<f4").tobytes())
    return digest.hexdigest()


def write(vector: SteeringVector, path: Path) -> None:
    """Write unit directions (project) or what is added at strength 1 (add). Raises VectorError."""
    check_writable(vector, NAME, LIMITS)
    directions = by_layer(vector)
    (hook,) = [hook for hook, site in HOOKS.items() if site == kept_sites(vector)]
    values: dict[str, Any] = {
        "general.type": "controlvector",
        "general.name": vector.name,
        "controlvector.model_hint": vector.identity.architecture if vector.identity else "",
        "controlvector.layer_count": len(directions),
        "glp.spec_version": 1,
        "glp.mode": vector.op,
        "glp.hook_point": hook,
        "glp.alpha_default": number((vector.provenance or {}).get("recommended_strength")) or 1.0,
        "glp.rank": 1,
        "glp.orthonormal": vector.op == "project",
        "glp.layer_ids_zero_based": ",".join(map(str, directions)),
        "glp.content_sha256": _digest(directions),
    }
    if vector.identity is not None and vector.identity.name:
        values |= {"general.base_model.count": 1, "general.base_model.0.name": vector.identity.name}
    write_directions(path, values, directions)


def sniff(path: Path) -> bool:
    """True for a GGUF file of directions with GLP metadata near its start."""
    return architecture(path) in ("controlvector", "glp") and any(p.encode() in head(path) for p in GLP_PREFIXES)


FORMAT = Format(NAME, (".gguf",), read, write, sniff, read, ("scope",), LIMITS)
