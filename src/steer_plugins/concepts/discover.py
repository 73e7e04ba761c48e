"""Directions without labels: what a model tells apart by itself, found with forward passes only.

Each direction is shown by what the model writes on both sides of it; who finds it useful names and keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.base import Engine, GenerateRequest
from ..errors import DataError, SpecError
from ..metrics import words
from ..steering.terms import Steering, Term
from ..steering.vector import SteeringVector
from ..training.traits import bundled_traits, load_trait
from .code import SparseCode
from .features import PROMPTS, next_logprobs
from .index import FeatureIndex

METHODS = ("pca", "sae", "jacobian")
KL_GUARD = 1.5
"""Nats of the next-token distribution: beyond it text falls apart (at 6 it is broken)."""

_DOSES = (0.5, 0.4, 0.3, 0.2, 0.1)
_ALIKE = 0.35
_SEEDS = 5

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Direction:
    """One direction at one layer.

    Attributes:
        unit: float32 [n_embd].
        dose: what strength 1 adds, in units of the hidden state: the largest tried whose KL passes the guard on both sides.
        share: what the method says of it (share of variance, singular value, effect), for the order.
        kl: mean KL at ``dose`` of both signs, nats; ``random_kl``: the same of random directions, mean.
        samples: a reply at −1 and at +1 for each prompt.
        words: words that come up more on the + side, and on the − side.
        note: the feature it comes from, or "".
    """

    unit: npt.NDArray[np.float32]
    layer: int
    dose: float
    share: float
    kl: float
    random_kl: float
    samples: tuple[tuple[str, str, str], ...] = ()
    words: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    note: str = ""

    def vector(self, name: str, identity: Any, about: dict[str, Any] | None = None) -> SteeringVector:
        """The direction as a vector of the library. Raises VectorError for a bad name."""
        key = (self.layer, "resid_post")
        provenance = {"method": "discover", "kl": self.kl, "random_kl": self.random_kl, "note": self.note, **(about or {})}
        return SteeringVector(
            name,
            {key: self.unit},
            {key: self.dose},
            op="add",
            default_scope="response",
            identity=identity,
            provenance=provenance,
        )


def discover(
    engine: Engine,
    *,
    method: str = "pca",
    layer: int | None = None,
    count: int = 5,
    code: SparseCode | None = None,
    index: FeatureIndex | None = None,
    seed: int = 0,
    max_tokens: int = 40,
    report: Report | None = None,
) -> list[Direction]:
    """Find ``count`` directions at a layer (half depth by default), each with samples, effect and words.

    Args:
        method: ``pca``: principal directions of the last prompt token over the bundled prompts. ``sae``: rows of an
            autoencoder (``code`` and ``index``), by measured effect, no two alike. ``jacobian``: right singular directions of
            the change from this layer to a late one, by finite differences of differently steered copies of one prompt.

    Raises:
        SpecError: an unknown method, a layer that cannot be steered, or a missing autoencoder.
        DataError: fewer directions than asked for.
    """
    tell = report or (lambda stage, done, total: None)
    if method not in METHODS:
        raise SpecError(f"unknown method {method!r}: use {', '.join(METHODS)}")
    if method == "sae" and (code is None or index is None):
        raise SpecError("the method sae needs an autoencoder: name one with --sae")
    if code is not None:
        layer = code.layer
    layer = engine.info.n_layer // 2 if layer is None else layer
    last = engine.info.n_layer - 2
    if not 0 <= layer <= last:
        raise SpecError(f"layer {layer} leaves nothing to look at: use 0 to {last}")
    norm, states = _prompt_states(engine, layer, tell)
    if method == "pca":
        found = _principal(states, count)
    elif method == "sae":
        assert code is not None and index is not None
        found = _by_effect(code, index, count)
    else:
        found = _jacobian(engine, layer, norm, count, seed, tell)
    if len(found) < count:
        raise DataError(f"{len(found)} directions were found, not {count}: ask for fewer")
    rng = np.random.default_rng(seed)
    randoms = [_unit(rng.standard_normal(engine.info.n_embd)) for _ in range(_SEEDS)]
    result = []
    for i, (unit, share, note) in enumerate(found):
        dose, kl = _dose(engine, unit, layer, norm)
        random_kl = float(np.mean([_kl(engine, r, layer, dose) for r in randoms]))
        samples = _samples(engine, unit, layer, dose, max_tokens)
        result.append(Direction(unit, layer, dose, share, kl, random_kl, samples, _contrast_words(samples), note))
        tell("directions", i + 1, count)
    return result


def _prompt_states(engine: Engine, layer: int, tell: Report) -> tuple[float, npt.NDArray[np.float32]]:
    """(median norm, states of the last prompt token [n, n_embd]) over the bundled prompts."""
    asked = [p for trait in map(load_trait, bundled_traits()) for p in trait.train_prompts]
    asked = list(dict.fromkeys(asked))[:256]
    prompts: list[Any] = [[{"role": "user", "content": p}] if engine.info.has_chat_template else p for p in asked]
    found = engine.read(prompts, layers=[layer], positions="last", progress=lambda done, total: tell("reading", done, total))
    states = np.concatenate([one.values[layer] for one in found])
    return float(np.median(np.linalg.norm(states, axis=1))), states


def _principal(states: npt.NDArray[np.float32], count: int) -> list[tuple[npt.NDArray[np.float32], float, str]]:
    _, sizes, directions = np.linalg.svd(states - states.mean(axis=0), full_matrices=False)
    shares = sizes**2 / max(float((sizes**2).sum()), 1e-12)
    return [(_unit(directions[i]), float(shares[i]), "") for i in range(min(count, len(sizes)))]


def _by_effect(code: SparseCode, index: FeatureIndex, count: int) -> list[tuple[npt.NDArray[np.float32], float, str]]:
    measured = sorted((f for f in index.features if f.effect is not None), key=lambda f: -(f.effect or 0.0))
    if not measured:
        raise DataError("the effects of this autoencoder's features were not measured: run steer sae features NAME --by effect")
    kept: list[tuple[npt.NDArray[np.float32], float, str]] = []
    for feature in measured:
        unit = _unit(code.w_dec[feature.index])
        if all(abs(float(unit @ other)) < _ALIKE for other, _, _ in kept):
            label = f"#{feature.index}" + (f" {feature.name}" if feature.name else "")
            kept.append((unit, float(feature.effect or 0.0), label))
            if len(kept) == count:
                break
    return kept


def _jacobian(
    engine: Engine, layer: int, norm: float, count: int, seed: int, tell: Report, probes: int = 64
) -> list[tuple[npt.NDArray[np.float32], float, str]]:
    """Leading right singular directions of d(late state)/d(state), by a randomised range finder on finite differences.

    Forward differences give J·v for random v; the directions in which J stretches most are found by one more pass over the
    orthonormal basis of the responses' pull-back, all within the span of the probes (Halko, Martinsson & Tropp 2011).
    """
    late = engine.info.n_layer - 2
    step = 0.05 * norm
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((engine.info.n_embd, probes)))
    text = PROMPTS[0]
    prompt: Any = [{"role": "user", "content": text}] if engine.info.has_chat_template else text
    columns = []
    for i in range(probes):
        rows = []
        for sign in (1.0, -1.0):
            vector = SteeringVector("probe", {(layer, "resid_post"): basis[:, i] * step}, op="add", default_scope="response")
            rows.append(engine.read([prompt], layers=[late], positions="last", steering=sign * vector)[0].values[late][0])
        columns.append((rows[0].astype(np.float64) - rows[1]) / (2 * step))
        tell("jacobian", i + 1, probes)
    _, sizes, right = np.linalg.svd(np.stack(columns, axis=1), full_matrices=False)
    return [(_unit(basis @ right[i]), float(sizes[i]), "") for i in range(min(count, probes))]


def _steered(unit: npt.ArrayLike, layer: int, dose: float) -> Steering:
    key = (layer, "resid_post")
    vector = SteeringVector("direction", {key: np.asarray(unit, np.float32)}, {key: abs(dose)}, default_scope="response")
    return Steering([Term(vector, 1.0 if dose >= 0 else -1.0)])


def _kl(engine: Engine, unit: npt.ArrayLike, layer: int, dose: float) -> float:
    """Mean KL of the next-token distribution from the plain one, over both signs and all prompts."""
    chats: list[Any] = [[{"role": "user", "content": p}] if engine.info.has_chat_template else p for p in PROMPTS]
    plain = next_logprobs(engine, chats, None)
    both = [next_logprobs(engine, chats, _steered(unit, layer, sign * dose)) for sign in (1.0, -1.0)]
    return float(np.mean([(np.exp(one) * (one - plain)).sum(axis=1) for one in both]))


def _dose(engine: Engine, unit: npt.ArrayLike, layer: int, norm: float) -> tuple[float, float]:
    """(the largest dose tried that passes the guard, its KL); the smallest where none does."""
    dose, kl = 0.0, 0.0
    for share in _DOSES:
        dose = share * norm
        kl = _kl(engine, unit, layer, dose)
        if kl <= KL_GUARD:
            break
    return dose, kl


def _samples(engine: Engine, unit: npt.ArrayLike, layer: int, dose: float, max_tokens: int) -> tuple[tuple[str, str, str], ...]:
    requests = []
    for text in PROMPTS:
        prompt: Any = [{"role": "user", "content": text}] if engine.info.has_chat_template else text
        for sign in (-1.0, 1.0):
            requests.append(GenerateRequest(prompt, steering=_steered(unit, layer, sign * dose), max_tokens=max_tokens))
    replies = [one.text.strip() for one in engine.generate_many(requests)]
    return tuple((text, replies[2 * i], replies[2 * i + 1]) for i, text in enumerate(PROMPTS))


def _contrast_words(samples: Sequence[tuple[str, str, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words that come up more often on the + side, and on the − side: at most six each."""
    low = [w for _, text, _ in samples for w in words(text)]
    high = [w for _, _, text in samples for w in words(text)]
    counts = {w: high.count(w) - low.count(w) for w in dict.fromkeys([*high, *low]) if len(w) > 2}
    order = sorted(counts, key=lambda w: -counts[w])
    return tuple(w for w in order[:6] if counts[w] > 0), tuple(w for w in order[::-1][:6] if counts[w] < 0)


def _unit(row: npt.ArrayLike) -> npt.NDArray[np.float32]:
    values = np.asarray(row, np.float64)
    return np.asarray(values / max(float(np.linalg.norm(values)), 1e-12), np.float32)
