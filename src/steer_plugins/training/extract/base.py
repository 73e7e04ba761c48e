"""What extraction is made of: pairs of contrasting texts, what was read of them, and a method that makes directions of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import DataError

POSITIONS = ("last", "response", "answer", "thinking")
"""Where hidden states are read: at the last prompt token; averaged over the tokens of the response; at the last token of the
answer that a pair gives, wherever it was cut; averaged over the tokens that are thought."""

Array = npt.NDArray[np.float64]

Prompt = str | list[dict[str, str]]
"""Raw text or chat messages."""


@dataclass(frozen=True)
class Side:
    """One side of a pair: a prompt, and the response to it where one is given."""

    prompt: Prompt
    response: str | None = None


@dataclass(frozen=True)
class Pair:
    """A positive and a negative example. ``line``: where it stands in a pairs file, 0 when it does not come from one.

    ``baseline``: a third example that leans to neither pole, for symmetric three-class data.
    """

    positive: Side
    negative: Side
    line: int = 0
    baseline: Side | None = None

    @property
    def sides(self) -> tuple[Side, ...]:
        """Two or three of them."""
        return (self.positive, self.negative) + (() if self.baseline is None else (self.baseline,))

    @property
    def same_prompt(self) -> bool:
        """True if the sides differ in their responses only, so that the last prompt token tells nothing."""
        return self.positive.prompt == self.negative.prompt


@dataclass(frozen=True)
class ContrastData:
    """Pairs to fit a direction to, and where they come from.

    ``kind``: ``trait`` or ``pairs``. ``sha256``: of the source's content (hex). ``extra``: more for the provenance.
    Either all pairs have a baseline or none.
    """

    kind: str
    pairs: tuple[Pair, ...]
    sha256: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def has_baseline(self) -> bool:
        """True for three-class data."""
        return bool(self.pairs) and all(pair.baseline is not None for pair in self.pairs)

    def default_positions(self) -> str:
        """``response`` where any pair differs in its responses only, else ``last``."""
        return "response" if any(pair.same_prompt for pair in self.pairs) else "last"


@dataclass(frozen=True)
class FitOptions:
    """How to read and fit.

    ``layers``: block indices. ``positions``: one of :data:`POSITIONS`. ``response_tokens``: length of responses that have
    to be generated. ``seed``: for methods that draw random numbers. ``thinking``: the chat template's switch.
    ``remove_neutral``: take the neutral direction out, see :func:`fit_directions`. ``folds``: of the cross-validation, for
    methods that have one; 0 leaves it out.
    """

    layers: tuple[int, ...]
    positions: str = "last"
    site: str = "resid_post"
    response_tokens: int = 32
    seed: int = 0
    thinking: bool | None = False
    remove_neutral: bool = False
    folds: int = 5


@dataclass(frozen=True)
class Contrast:
    """Hidden states of both sides: ``{layer: float32 [n_pairs, n_embd]}``, row i of one belongs to row i of the other.

    ``norms``: ``{layer: median length of a token's hidden state}``, position 0 excluded. ``baseline``: as the sides, for
    three-class data.
    """

    positive: dict[int, npt.NDArray[np.float32]]
    negative: dict[int, npt.NDArray[np.float32]]
    norms: dict[int, float]
    baseline: dict[int, npt.NDArray[np.float32]] | None = None

    @property
    def layers(self) -> list[int]:
        """The layers that were read, sorted."""
        return sorted(self.positive)

    @property
    def n_pairs(self) -> int:
        """Number of pairs that were read."""
        return int(next(iter(self.positive.values())).shape[0])

    def take(self, rows: npt.NDArray[np.intp]) -> Contrast:
        """The contrast of some of the pairs, in that order; one may be named twice."""
        positive, negative, baseline = (
            None if side is None else {il: values[rows] for il, values in side.items()}
            for side in (self.positive, self.negative, self.baseline)
        )
        assert positive is not None and negative is not None
        return Contrast(positive, negative, self.norms, baseline)


@dataclass(frozen=True)
class FitResult:
    """Directions of unit length, ``{layer: float32 [n_embd]}``, that point from the negative to the positive pole.

    ``strengths``: ``{layer: how far apart the poles are along it, in median norms}``, for reports. ``notes`` go to the
    provenance. ``accuracy``: ``{layer: cross-validated share of examples told apart}``, from methods that classify.
    """

    directions: dict[int, npt.NDArray[np.float32]]
    strengths: dict[int, float]
    notes: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[int, float] = field(default_factory=dict)


class Method(Protocol):
    """A way to make directions of a contrast; registered with the hook ``register_methods``."""

    name: str

    def fit(self, contrast: Contrast, options: FitOptions) -> FitResult:
        """One direction for each layer that has one. Raises DataError when the contrast holds none."""
        ...


_NEAR_ZERO = 1e-7
"""A difference shorter than this part of the median norm is rounding, not a direction."""

_SAME = (
    "the positive and the negative examples read the same at every layer: give examples that differ where they are read, or "
    "read elsewhere with --positions"
)


def fit_layers(
    contrast: Contrast, one: Callable[[Array, Array, Array | None], Array | None], *, nothing: str = _SAME
) -> FitResult:
    """Fit layer by layer: ``one(positive, negative, baseline)`` gets float64 [n_pairs, n_embd] and returns a direction of any
    length above 0, or None where there is none. Layers at which the poles read the same are left out.

    Raises:
        DataError: hidden states that are not finite; ``nothing``, when no layer has a direction.
    """
    directions, strengths = {}, {}
    same = True
    for layer in contrast.layers:
        positive, negative = contrast.positive[layer].astype(np.float64), contrast.negative[layer].astype(np.float64)
        baseline = None if contrast.baseline is None else contrast.baseline[layer].astype(np.float64)
        if not all(np.isfinite(side).all() for side in (positive, negative, baseline) if side is not None):
            raise DataError(f"the model's hidden states at layer {layer} are not finite: it cannot be fitted to")
        apart = float(np.sqrt(((positive - negative) ** 2).sum(axis=1).mean()))
        if apart <= _NEAR_ZERO * contrast.norms[layer]:
            continue
        same = False
        direction = one(positive, negative, baseline)
        length = 0.0 if direction is None else float(np.linalg.norm(direction))
        if direction is None or length == 0.0:
            continue
        direction = direction / length
        step = float((pole_mean(positive) - pole_mean(negative)) @ direction)
        directions[layer] = direction.astype(np.float32)
        strengths[layer] = step / contrast.norms[layer]
    if not directions:
        raise DataError(_SAME if same else nothing)
    return FitResult(directions, strengths)


def fit_directions(method: Method, contrast: Contrast, options: FitOptions) -> FitResult:
    """Fit, and with ``options.remove_neutral`` take out of each direction what lies along the neutral one.

    The neutral direction is that of the baseline's mean, or without a baseline of the negative examples' mean, as DwarfStar
    4 (ds4) orthogonalises against its control prompts. It is the part of the hidden state that all texts share, so a
    direction without it does not make every state longer or shorter. A layer where nothing else is left is left out.

    Raises:
        DataError: no direction at any layer.
    """
    result = method.fit(contrast, options)
    if not options.remove_neutral:
        return result
    directions, strengths, shares = {}, {}, {}
    for layer, direction in result.directions.items():
        neutral = pole_mean((contrast.negative if contrast.baseline is None else contrast.baseline)[layer])
        size = float(np.linalg.norm(neutral))
        wide = direction.astype(np.float64)
        along = float(wide @ neutral) / size if size > 0.0 else 0.0
        rest = wide - (along / size) * neutral if size > 0.0 else wide
        length = float(np.linalg.norm(rest))
        if length <= 1e-6:
            continue
        rest /= length
        directions[layer] = rest.astype(np.float32)
        step = float((pole_mean(contrast.positive[layer]) - pole_mean(contrast.negative[layer])) @ rest)
        strengths[layer] = step / contrast.norms[layer]
        shares[str(layer)] = round(along, 4)
    if not directions:
        raise DataError("nothing is left of the directions without the neutral one: fit without --remove-neutral")
    accuracy = {layer: value for layer, value in result.accuracy.items() if layer in directions}
    return FitResult(directions, strengths, {**result.notes, "neutral_removed": shares}, accuracy)


def pole_mean(rows: npt.NDArray[Any]) -> Array:
    """Mean over the rows, float64 [n_embd]."""
    found: Array = rows.mean(axis=0, dtype=np.float64)
    return found


def folds(n: int, count: int, seed: int) -> list[npt.NDArray[np.intp]]:
    """``range(n)`` in up to ``count`` parts of about equal size, drawn with ``seed``, each sorted."""
    order = np.random.default_rng(seed).permutation(n)
    return [np.sort(part) for part in np.array_split(order, min(n, count))]


def layers_to_read(n_layer: int, window: Sequence[int] | None = None) -> tuple[int, ...]:
    """All layers but the last, or those from ``window[0]`` to ``window[1]``.

    The last layer is left out because many models keep only output tokens there, and because nothing after it could
    make use of what is added.
    """
    if window is not None:
        return tuple(range(window[0], window[1] + 1))
    return tuple(range(max(1, n_layer - 1)))
