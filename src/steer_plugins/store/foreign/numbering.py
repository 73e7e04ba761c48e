"""Finds out how the writer of a GGUF control vector numbered its layers, by asking the model.

A direction that was made at the output of block L differs from the one made at L - 1 by what block L wrote into the residual
stream, since everything before that is in both. So the part of ``direction.N`` that ``direction.N-1`` does not have lies along
what block N writes if N is the block's index, and along what block N - 1 writes if the writer counts from 1. What blocks write
is read on a few ordinary sentences; each pair of neighbours in the file is one vote, and a sign test decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...errors import VectorError

TEXTS = (
    "The ferry leaves at half past six, so we had better pack tonight.",
    "def largest(values):\n    best = values[0]\n    for value in values:\n        best = max(best, value)\n    return best",
    "Q: How many legs does a spider have?\nA: It has eight, two more than any insect.",
    "I have never been so disappointed by a restaurant in all my life!",
    "Cut the onions into small pieces and let them fry slowly until they are golden.",
    "In 1889 the tower was finished, and for forty years no building in the world was taller.",
    "Dear Ms Alvarez, thank you for your letter of 3 May about the broken window.",
    '"You came back," she whispered, and the dog went mad with joy.',
)
"""Different kinds of text, so that blocks have reason to write different things."""

WIDTH = 16
"""Main directions of what a block writes."""

CERTAIN = 0.02
"""A sign test's probability of so many votes by chance, above which nothing is said."""

Floats = npt.NDArray[np.float64]


class Reader(Protocol):
    """As much of an engine as is needed."""

    def read(self, prompts: Sequence[str], *, layers: Sequence[int], positions: str) -> Sequence[object]:
        """Hidden states of all tokens, see :meth:`steer_plugins.engine.base.Engine.read`."""
        ...


@dataclass(frozen=True)
class Numbering:
    """``votes`` of ``of`` neighbouring layers say that ``direction.N`` was made at block N, the others at block N - 1."""

    votes: int
    of: int

    @property
    def chance(self) -> float:
        """Probability of a vote at least as lopsided if each were a coin's."""
        more = max(self.votes, self.of - self.votes)
        tail = sum(math.comb(self.of, k) for k in range(more, self.of + 1)) / 2**self.of
        return min(1.0, 2 * tail)

    @property
    def answer(self) -> str | None:
        """``block`` or ``plus-one``; None when the votes are too few or too even."""
        if self.chance > CERTAIN:
            return None
        return "block" if 2 * self.votes > self.of else "plus-one"

    @property
    def sentence(self) -> str:
        """What was found, for people."""
        if self.answer == "plus-one":
            return f"direction.N was made at block N-1 ({self.of - self.votes} of {self.of} layers say so)"
        if self.answer == "block":
            return f"direction.N was made at block N ({self.votes} of {self.of} layers say so)"
        return f"the model does not tell how the layers are numbered ({self.votes} of {self.of} speak for block N)"


def probe_numbering(engine: Reader, n_layer: int, directions: Mapping[int, npt.NDArray[np.float32]]) -> Numbering:
    """Read the model and let each pair of neighbouring directions vote.

    Args:
        engine: of the model the file was made for.
        n_layer: its number of blocks.
        directions: ``{N: float32 [n_embd]}`` as the file has them.

    Raises:
        VectorError: no pair of neighbours could vote.
    """
    # block N - 1 needs its input, the output of block N - 2, and the last block may keep output tokens only
    voters = [n for n in sorted(directions) if n - 1 in directions and 2 <= n <= n_layer - 2]
    if not voters:
        raise VectorError("it has no two neighbouring layers that could tell how they are numbered: say it with --gguf-layers")
    blocks = sorted({block for n in voters for block in (n - 1, n)})
    wanted = sorted({layer for block in blocks for layer in (block - 1, block)})
    found = engine.read(TEXTS, layers=wanted, positions="all")
    # without position 0, whose states are of another size
    states = {il: np.concatenate([one.values[il][1:] for one in found]).astype(np.float64) for il in wanted}  # type: ignore[attr-defined]
    main = {block: _main_directions(states[block] - states[block - 1]) for block in blocks}
    votes = of = 0
    for n in voters:
        new = _without(directions[n].astype(np.float64), directions[n - 1].astype(np.float64))
        if new is None:
            continue
        here, before = (float(((main[block] @ new) ** 2).sum()) for block in (n, n - 1))
        votes += here > before
        of += here != before
    return Numbering(votes, of)


def _main_directions(rows: Floats) -> Floats:
    """The first principal axes [WIDTH, n_embd] of rows around 0."""
    # of the smaller Gram matrix: a singular value decomposition of all rows takes many times as long
    n, width = rows.shape
    if n > width:
        return np.asarray(np.linalg.eigh(rows.T @ rows)[1][:, ::-1][:, :WIDTH].T)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    kept = values[::-1][:WIDTH] > 1e-10 * values[-1]
    axes = vectors[:, ::-1][:, :WIDTH][:, kept].T @ rows
    return np.asarray(axes / np.linalg.norm(axes, axis=1, keepdims=True))


def _without(one: Floats, other: Floats) -> Floats | None:
    """What ``one`` has besides ``other``, of unit length; None where that is rounding."""
    size, along = float(np.linalg.norm(one)), float(np.linalg.norm(other))
    if size == 0.0 or along == 0.0:
        return None
    rest = one - (one @ other) / along**2 * other
    length = float(np.linalg.norm(rest))
    return rest / length if length > 1e-3 * size else None
