"""Neuronpedia's vectors: JSON of one vector at one layer, as sent to or returned by its API.

``hook_resid_pre`` of layer L is the input of block L, and so the output of block L - 1, which is our layer.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...errors import VectorError
from ...steering.vector import SteeringVector
from ..formats import NO_FACTS, Facts, Format, Limits
from .common import (
    MAX_LAYERS,
    as_utf8,
    by_layer,
    check_writable,
    clip,
    head,
    imported,
    load_json,
    number,
    numbers,
    reading,
    save,
    stated,
    whole,
)

NAME = "neuronpedia"
LIMITS = Limits(
    ops=("add",), sites=("resid_post",), scopes=("all",), calibration=False, one_layer=True, identity=False, notes=False
)
_HOOK = re.compile(r"(?:blocks\.([0-9]{1,5})\.)?(?:hook_)?(resid_pre|resid_post|attn_out|mlp_out)")
_SITES = {"resid_pre": "resid_post", "resid_post": "resid_post", "attn_out": "attn_out", "mlp_out": "ffn_out"}


def place_of_hook(hook: object, layer: object = None) -> tuple[int, str]:
    """(layer, site) of a TransformerLens hook name, ``blocks.L.hook_resid_pre`` or, with ``layer``, ``hook_resid_pre``.

    Raises VectorError for another hook, for two layers that differ, and for the input of block 0, which is the embedding.
    """
    match = _HOOK.fullmatch(hook) if isinstance(hook, str) else None
    if not match:
        raise VectorError(f"its hook is {clip(hook)}: resid_pre, resid_post, attn_out and mlp_out can be read")
    if match[1] is None and layer is None:
        raise VectorError("it does not say for which layer it is")
    block = whole(layer, "its layer") if match[1] is None or layer is not None else int(match[1])
    if match[1] is not None and int(match[1]) != block:
        raise VectorError(f"its hook is {clip(hook)}, and its layer {block}")
    if match[2] == "resid_pre":
        if block == 0:
            raise VectorError("it acts on the input of block 0, the embedding, which is not a layer's output")
        block -= 1
    return block, _SITES[match[2]]


def read(path: Path, facts: Facts = NO_FACTS) -> SteeringVector:
    """The vector in ``path``. Its default strength goes into the provenance. Raises VectorError."""
    with reading(path):
        data = load_json(path)
        layer = _first(data, "layerNumber", "layer_num", "layerNum", "layer")
        source = data.get("source")
        if layer is None and isinstance(source, str) and re.match(r"[0-9]{1,5}-", source):
            layer = int(source.split("-")[0])
        if isinstance(layer, str) and re.fullmatch(r"[0-9]{1,5}(-.*)?", layer):
            layer = int(layer.split("-")[0])
        hook = _first(data, "hookType", "hook_type", "hookName", "hook_name")
        # A hook name with a layer of its own settles it; the source is a label that counts in its own way.
        block, site = place_of_hook(hook, None if isinstance(hook, str) and hook.startswith("blocks.") else layer)
        strength = _first(data, "vectorDefaultSteerStrength", "default_steer_strength")
        label = _first(data, "vectorLabel", "label")
        model = _first(data, "modelId", "model_id")
        return imported(
            path,
            NAME,
            {(block, site): numbers(_first(data, "vector", "values"), "its vector")},
            op=stated("op", None, facts.op, "add"),
            scope=stated("scope", None, facts.scope, "all"),
            name=label if isinstance(label, str) and label else None,
            notes={
                "recommended_strength": number(strength),
                "model": model[:200] if isinstance(model, str) else None,
                "hook": f"{hook}, layer {layer}"[:200],
            },
        )


def _first(data: dict[str, Any], *names: str) -> Any:
    return next((data[name] for name in names if data.get(name) is not None), None)


def write(vector: SteeringVector, path: Path) -> None:
    """Write what ``vector`` adds at strength 1, as its API takes it: for the input of the next block. Raises VectorError."""
    check_writable(vector, NAME, LIMITS)
    (layer,) = vector.layers
    if layer + 1 >= MAX_LAYERS:
        raise VectorError(f"layer {layer} is beyond any model's")
    data = {
        "modelId": vector.identity.name if vector.identity else "",
        "layerNumber": layer + 1,
        "hookType": "hook_resid_pre",
        "vector": [float(x) for x in by_layer(vector)[layer]],
        "vectorDefaultSteerStrength": number((vector.provenance or {}).get("recommended_strength")) or 1.0,
        "vectorLabel": vector.name,
    }
    save(path, (json.dumps(data, allow_nan=False) + "\n").encode())


def sniff(path: Path) -> bool:
    """True for a JSON object that names a hook; the vector itself may stand anywhere."""
    try:
        if (
            path.suffix.lower() != ".json"
            or not as_utf8(head(path, 64)).lstrip().startswith(b"{")
            or path.stat().st_size > 16 << 20
        ):
            return False
        text = as_utf8(path.read_bytes())
    except OSError:
        return False
    return any(name in text for name in (b'"hookType"', b'"hook_type"', b'"hookName"', b'"hook_name"')) and any(
        name in text for name in (b'"vector"', b'"values"')
    )


FORMAT = Format(NAME, (".json",), read, write, sniff, read, ("op", "scope"), LIMITS)
