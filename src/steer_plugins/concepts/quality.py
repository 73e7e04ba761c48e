"""How good an autoencoder is, each figure beside what a PCA and a random decoder of the same size reach.

Published work found random baselines close to trained autoencoders (arXiv 2602.14111): a figure alone says little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.base import Engine
from ..steering.terms import Steering, Term
from ..steering.vector import SteeringVector
from .code import Floats, SparseCode, keep_largest

_CHUNK = 2048

Reconstruct = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Quality:
    """Held-out figures.

    Attributes:
        explained_variance: 1 − |h − ĥ|² / |h − mean|², over all held-out tokens.
        l0: active features of a token, mean.
        dead: share of features that no token of the corpus activates.
        ce_recovered: (CE of the mean state − CE with ĥ) / (CE of the mean state − plain CE), None when it was not measured.
    """

    explained_variance: float
    l0: float
    dead: float
    ce_recovered: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


def explained_variance(rows: npt.NDArray[Any], chosen: npt.NDArray[np.intp], reconstruct: Reconstruct) -> float:
    """Share of the held-out rows' variance that is reconstructed, in bounded memory."""
    mean = np.mean([rows[chosen[i : i + _CHUNK]].astype(np.float64).mean(axis=0) for i in range(0, len(chosen), _CHUNK)], axis=0)
    left = total = 0.0
    for i in range(0, len(chosen), _CHUNK):
        part = rows[chosen[i : i + _CHUNK]].astype(np.float32)
        left += float(((reconstruct(part) - part).astype(np.float64) ** 2).sum())
        total += float(((part - mean) ** 2).sum())
    return 1.0 - left / max(total, 1e-12)


def firing_rates(code: SparseCode, rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Share of rows on which each feature is active: float64 [n_features]. Their sum is L0."""
    counts = np.zeros(code.n_features, np.int64)
    for i in range(0, len(rows), _CHUNK):
        counts += (code.encode(rows[i : i + _CHUNK].astype(np.float32)) > 0).sum(axis=0)
    return counts / max(len(rows), 1)


def sparse_pca(rows: npt.NDArray[Any], chosen: npt.NDArray[np.intp], k: int) -> Reconstruct:
    """The PCA twin: each token keeps its ``k`` largest coefficients along the principal directions of the training rows."""
    some = rows[chosen[:: max(1, len(chosen) // 20_000)]].astype(np.float32)
    mean = some.mean(axis=0)
    _, directions = np.linalg.eigh(np.cov(some - mean, rowvar=False))
    basis = np.asarray(directions[:, ::-1], np.float32)

    def reconstruct(part: Floats) -> Floats:
        coefficients = (part - mean) @ basis
        kept = np.where(keep_largest(np.abs(coefficients), k) > 0, coefficients, np.float32(0.0))
        return np.asarray(kept @ basis.T + mean, np.float32)

    return reconstruct


def states_replaced(engine: Engine, tokens: Sequence[int], layer: int, before: Floats, after: Floats) -> Floats:
    """Log probabilities of ``tokens[1:]`` with the states after block ``layer`` replaced.

    Args:
        before: float32 [n, n_embd], the states of ``tokens[1 : n + 1]`` as they are; ``after``: what to put there.

    One vector for each position adds the difference: exact, through the engine's own edit.
    """
    terms = []
    for i, difference in enumerate((after - before).astype(np.float32)):
        if np.any(difference):
            vector = SteeringVector(f"at-{i + 1}", {(layer, "resid_post"): difference}, op="add")
            terms.append(Term(vector, 1.0, scope=f"{i + 1}-{i + 1}"))
    return np.asarray(engine.logprobs([(list(tokens[:1]), list(tokens[1:]))], steering=Steering(terms))[0])


def ce_recovered(
    engine: Engine,
    windows: Sequence[Sequence[int]],
    layer: int,
    arms: dict[str, Reconstruct],
    *,
    mean: Floats,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float | None]:
    """Share of the cross-entropy between the mean state and the true one that each arm keeps, over windows of tokens.

    Position 0, an attention sink, stays as it is. Reconstruction is of the states that the windows really have.
    None where the mean state is no worse than the true one, so that there is nothing to recover.
    """
    totals = dict.fromkeys(("plain", "mean", *arms), 0.0)
    n = 0
    for i, window in enumerate(windows):
        tokens = list(map(int, window))
        rows = engine.read([tokens], layers=[layer], positions="all")[0].values[layer][1:-1]
        totals["plain"] -= float(engine.logprobs([(tokens[:1], tokens[1:])])[0].sum())
        everywhere = {"mean": lambda h: np.broadcast_to(mean, h.shape), **arms}
        for name, reconstruct in everywhere.items():
            totals[name] -= float(states_replaced(engine, tokens, layer, rows, np.asarray(reconstruct(rows))).sum())
        n += len(tokens) - 1
        if progress is not None:
            progress(i + 1, len(windows))
    span = totals["mean"] - totals["plain"]
    return {name: (totals["mean"] - totals[name]) / span if span > 0 else None for name in arms}
