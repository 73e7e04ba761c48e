"""What a quantisation left of an autoencoder's features: the same tokens, read with a GGUF and with its original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.base import Engine
from ..errors import DataError, VectorError
from .code import SparseCode
from .corpus import SINK_FACTOR

_BATCH = 16
KEPT_CORRELATION = 0.9
"""A feature whose activations correlate less than this with the original's is counted as damaged."""

Report = Callable[[str, int, int], None]


def audit(
    engine: Engine,
    code: SparseCode,
    windows: Sequence[Sequence[int]],
    *,
    original: Engine | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Figures of an autoencoder on a model's own states: does it fit, and what did quantisation change?

    Args:
        windows: token ids; position 0 and attention sinks are left out, as in training.
        original: the same model in f16 or f32.

    Returns:
        ``tokens``, ``explained_variance``, ``l0``, ``dead`` (share of features that never fire) and, with an original, its
        ``original_explained_variance``, ``original_l0``, ``median_correlation`` of features active in both, ``damaged`` (their
        share below :data:`KEPT_CORRELATION`) and ``worst`` (feature, correlation, rate here, rate there), worst first.

    Raises:
        VectorError: the autoencoder's width or site is not the model's.
        DataError: too little text.
    """
    tell = report or (lambda stage, done, total: None)
    if code.n_embd != engine.info.n_embd or code.layer >= engine.info.n_layer:
        raise VectorError(
            f"the autoencoder is of width {code.n_embd} at layer {code.layer}, the model of width {engine.info.n_embd} "
            f"with layers 0 to {engine.info.n_layer - 1}"
        )
    if code.site not in engine.info.sites:
        raise VectorError(f"the autoencoder reads {code.site}, which {engine.info.architecture} does not offer")
    if original is not None and original.info.identity.tokens_sha256 != engine.info.identity.tokens_sha256:
        raise VectorError("the original has another vocabulary: name the unquantised file of the same model")
    here = _states(engine, code, windows, "reading", tell)
    kept = np.linalg.norm(here, axis=1)
    keep = kept <= SINK_FACTOR * np.median(kept)
    if keep.sum() < 200:
        raise DataError(f"{int(keep.sum())} tokens are too few to judge an autoencoder: give more text")
    z = code.encode(here[keep])
    result: dict[str, Any] = {"tokens": int(keep.sum()), **_figures(code, here[keep], z)}
    if original is None:
        return result
    there = _states(original, code, windows, "reading the original", tell)[keep]
    w = code.encode(there)
    result |= {f"original_{name}": value for name, value in _figures(code, there, w).items() if name != "dead"}
    correlations = _correlations(z, w)
    live = np.flatnonzero(((z > 0).sum(axis=0) >= 5) | ((w > 0).sum(axis=0) >= 5))
    if len(live):
        known = correlations[live]
        order = live[np.argsort(known)]
        result |= {
            "median_correlation": float(np.median(known)),
            "damaged": float((known < KEPT_CORRELATION).mean()),
            "judged": len(live),
            "worst": [
                {
                    "feature": int(f),
                    "correlation": float(correlations[f]),
                    "rate": float((z[:, f] > 0).mean()),
                    "original_rate": float((w[:, f] > 0).mean()),
                }
                for f in order[:20]
            ],
        }
    return result


def _states(
    engine: Engine, code: SparseCode, windows: Sequence[Sequence[int]], stage: str, tell: Report
) -> npt.NDArray[np.float32]:
    rows = []
    for first in range(0, len(windows), _BATCH):
        part = [list(map(int, w)) for w in windows[first : first + _BATCH]]
        found = engine.read(part, layers=[code.layer], site=code.site, positions="all")
        rows += [one.values[code.layer][1:] for one in found]
        tell(stage, first + len(part), len(windows))
    if not rows:
        raise DataError("there is no text to read: give --text FILE with more than a few words")
    return np.concatenate(rows)


def _figures(code: SparseCode, rows: npt.NDArray[np.float32], z: npt.NDArray[np.float32]) -> dict[str, float]:
    left = float(((code.decode(z) - rows).astype(np.float64) ** 2).sum())
    total = float(((rows - rows.mean(axis=0)).astype(np.float64) ** 2).sum())
    return {
        "explained_variance": 1.0 - left / max(total, 1e-12),
        "l0": float((z > 0).sum(axis=1).mean()),
        "dead": float(((z > 0).sum(axis=0) == 0).mean()),
    }


def _correlations(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Pearson correlation of each column; 0 where one side never varies."""
    x = a.astype(np.float64) - a.mean(axis=0, dtype=np.float64)
    y = b.astype(np.float64) - b.mean(axis=0, dtype=np.float64)
    scale = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    return np.where(scale > 0, (x * y).sum(axis=0) / np.maximum(scale, 1e-300), 0.0)
