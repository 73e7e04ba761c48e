"""What ``POST /steering/read`` answers: a safetensors file with the hidden states of some prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..engine.base import Activations
from ..errors import EngineError

FORMAT = "steer-read-v1"


def decode_read(data: bytes, n_prompts: int, *, site: str, average: bool) -> list[Activations]:
    """The hidden states of each prompt; rows are sorted by position, each position once.

    Args:
        data: the file; keys and shapes as in docs/http-protocol.md.
        n_prompts: how many prompts were sent.
        average: the rows are means, which belong to no position.

    Raises:
        EngineError: not that file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        facts = _metadata(data)
        tensors = load(data)
        layers = [int(il) for il in facts["layers"]]
        return [_one(tensors, i, layers, int(facts["n_prompt"][i]), site, average) for i in range(n_prompts)]
    except (SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise EngineError(f"the server's hidden states cannot be read ({what}); it may be a different version") from None


def _metadata(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= len(data) - 8:
        raise ValueError("no safetensors header")
    facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["steer"])
    if facts["format"] != FORMAT:
        raise ValueError(f"format {facts['format']!r:.40}, not {FORMAT}")
    return dict(facts)


def _one(tensors: dict[str, np.ndarray], i: int, layers: Sequence[int], n_prompt: int, site: str, average: bool) -> Activations:
    values, positions = tensors[f"{i}.values"], tensors[f"{i}.positions"]
    if values.ndim not in (3, 4) or values.shape[:2] != (len(layers), len(positions)):
        raise ValueError(f"values of shape {values.shape} for {len(layers)} layers and {len(positions)} rows")
    order = np.arange(len(positions)) if average else np.unique(positions, return_index=True)[1]
    return Activations(
        tokens=[int(t) for t in tensors[f"{i}.tokens"]],
        n_prompt=n_prompt,
        positions=[] if average else [int(p) for p in positions[order]],
        values={il: np.ascontiguousarray(values[k][order], np.float32) for k, il in enumerate(layers)},
        site=site,
    )
