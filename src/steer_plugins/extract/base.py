"""What extraction is made of: pairs of contrasting texts, what was read of them, and a method that makes directions of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

POSITIONS = ("last", "response")
"""Where hidden states are read: at the last prompt token, or averaged over the tokens of the response."""

Prompt = str | list[dict[str, str]]
"""Raw text or chat messages."""


@dataclass(frozen=True)
class Side:
    """One side of a pair: a prompt, and the response to it where one is given."""

    prompt: Prompt
    response: str | None = None


@dataclass(frozen=True)
class Pair:
    """A positive and a negative example. ``line``: where it stands in a pairs file, 0 when it does not come from one."""

    positive: Side
    negative: Side
    line: int = 0

    @property
    def same_prompt(self) -> bool:
        """True if the sides differ in their responses only, so that the last prompt token tells nothing."""
        return self.positive.prompt == self.negative.prompt


@dataclass(frozen=True)
class ContrastData:
    """Pairs to fit a direction to, and where they come from.

    ``kind``: ``trait`` or ``pairs``. ``sha256``: of the source's content (hex). ``extra``: more for the provenance.
    """

    kind: str
    pairs: tuple[Pair, ...]
    sha256: str
    extra: dict[str, Any] = field(default_factory=dict)

    def default_positions(self) -> str:
        """``response`` where any pair differs in its responses only, else ``last``."""
        return "response" if any(pair.same_prompt for pair in self.pairs) else "last"


@dataclass(frozen=True)
class FitOptions:
    """How to read and fit.

    ``layers``: block indices. ``positions``: one of :data:`POSITIONS`. ``response_tokens``: length of responses that have
    to be generated. ``seed``: for methods that draw random numbers. ``thinking``: the chat template's switch.
    """

    layers: tuple[int, ...]
    positions: str = "last"
    site: str = "resid_post"
    response_tokens: int = 32
    seed: int = 0
    thinking: bool | None = False


@dataclass(frozen=True)
class Contrast:
    """Hidden states of both sides: ``{layer: float32 [n_pairs, n_embd]}``, row i of one belongs to row i of the other.

    ``norms``: ``{layer: median length of a token's hidden state}``, position 0 excluded.
    """

    positive: dict[int, npt.NDArray[np.float32]]
    negative: dict[int, npt.NDArray[np.float32]]
    norms: dict[int, float]

    @property
    def layers(self) -> list[int]:
        """The layers that were read, sorted."""
        return sorted(self.positive)

    @property
    def n_pairs(self) -> int:
        """Number of pairs that were read."""
        return int(next(iter(self.positive.values())).shape[0])


@dataclass(frozen=True)
class FitResult:
    """Directions of unit length, ``{layer: float32 [n_embd]}``, that point from the negative to the positive pole.

    ``strengths``: ``{layer: how far apart the poles are, in median norms}``, for reports. ``notes`` go to the provenance.
    """

    directions: dict[int, npt.NDArray[np.float32]]
    strengths: dict[int, float]
    notes: dict[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A way to make directions of a contrast; registered with the hook ``register_methods``."""

    name: str

    def fit(self, contrast: Contrast, options: FitOptions) -> FitResult:
        """One direction for each layer that has one. Raises DataError when the contrast holds none."""
        ...


def layers_to_read(n_layer: int, window: Sequence[int] | None = None) -> tuple[int, ...]:
    """All layers but the last, or those from ``window[0]`` to ``window[1]``.

    The last layer is left out because many models keep only output tokens there, and because nothing after it could
    make use of what is added.
    """
    if window is not None:
        return tuple(range(window[0], window[1] + 1))
    return tuple(range(max(1, n_layer - 1)))
