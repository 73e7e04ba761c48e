"""Texts as a trie: what several begin with, under the same steering, is computed once, as tokens of all their sequences.

llama.cpp lets a token of a batch belong to several sequences when they share one KV buffer. So texts that part at different
places need no pass of their own for each common beginning: all go into one batch, and the number of tokens in it is that of
the different prefixes. Between batches the path of the last text is kept, which is all that the next, in sorted order, can
share.

Not for caches that hold a state instead of cells (recurrent and hybrid models, the compressed cache of deepseek4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from .session import BatchToken, SequenceSteering, Session, chunks, shared_prefix

TRUNK = 0
"""The sequence that holds the path which the next texts may begin with."""

MAX_OUTPUTS = 128
"""Rows of logits held at once: each weighs n_vocab floats."""

Rows = Mapping[int, npt.NDArray[np.float32]]
"""``{layer: float32 [rows, ...]}``."""

OnLogits = Callable[[int, int, npt.NDArray[np.float32]], None]
"""Called with (index of the text, position, logits [n_vocab])."""


class TokenText(Protocol):
    """Tokens, the positions to read and those whose logits are needed, ascending. ``plan``: its steering, or None.

    ``keys``: what two texts have to have in common at a position to share it, and all before it.
    """

    tokens: list[int]
    wanted: list[int]
    scored: list[int]
    plan: SequenceSteering | None

    @property
    def keys(self) -> list[Any]: ...


@dataclass
class Node:
    """A token and the sequences whose texts pass through it; the first of them computes it, and reads it if ``read``.

    ``scored``: texts (indices) that need its logits. ``last``: a text ends here.
    """

    token: int
    position: int
    sequences: list[int]
    read: bool = False
    scored: list[int] = field(default_factory=list)
    last: bool = False


@dataclass(frozen=True)
class Batch:
    """Texts (indices) that are computed together, the k-th on sequence k + 1.

    ``kept``: for each text, how much of it ``TRUNK`` holds. ``paths``: for each text its nodes, from position ``kept`` on.
    ``nodes``: all of them, parents before children. ``next``: how much of the last text the next batch begins with.
    """

    texts: list[int]
    kept: list[int]
    paths: list[list[Node]]
    nodes: list[Node] = field(repr=False)
    next: int = 0


def plan_batch(texts: Sequence[TokenText], group: Sequence[int], held: Sequence[Any], after: Sequence[int] = ()) -> Batch:
    """The nodes of some texts, given what ``TRUNK`` holds (keys).

    ``group``: indices in the order of the keys. ``after``: those of the group that follows. What its first text will share
    with the last of these is kept for it, as far as none of them needs the logits there.
    """
    kept: list[int] = []
    paths: list[list[Node]] = []
    nodes: list[Node] = []
    last: Sequence[Any] = []
    for sequence, i in enumerate(group, start=1):
        text, keys = texts[i], texts[i].keys
        old = shared_prefix(held, keys)
        stem = max(old, shared_prefix(last, keys))
        path = paths[-1][: stem - old] if stem > old else []  # one that shares more than TRUNK holds has kept as much of it
        for node in path:
            node.sequences.append(sequence)
        new = [Node(text.tokens[p], p, [sequence]) for p in range(stem, len(keys))]
        nodes += new
        path = path + new
        for p in text.wanted:
            if p >= old:
                path[p - old].read = True
        for p in text.scored:
            path[p - old].scored.append(i)
        if path:
            path[-1].last = True
        kept.append(old)
        paths.append(path)
        last = keys
    following = shared_prefix(last, texts[after[0]].keys) if after else 0
    return Batch(list(group), kept, paths, nodes, min([following, *(texts[i].scored[0] for i in after if texts[i].scored)]))


def reads_paths(texts: Sequence[TokenText], groups: Sequence[Sequence[int]]) -> bool:
    """Whether any text wants a position that a batch before its own has computed. Then whole paths are read."""
    for before, group in zip(groups, groups[1:], strict=False):
        last = texts[before[-1]].keys
        if any(texts[i].wanted and texts[i].wanted[0] < shared_prefix(last, texts[i].keys) for i in group):
            return True
    return False


def groups_of(texts: Sequence[TokenText], n_slots: int) -> list[list[int]]:
    """The texts in sorted order, as many at a time as there are sequences for them."""
    order = sorted(range(len(texts)), key=lambda i: texts[i].keys)
    return [order[start : start + n_slots] for start in range(0, len(order), n_slots)]


def rows_needed(texts: Sequence[TokenText], groups: Sequence[Sequence[int]]) -> int:
    """An upper bound for the rows that one batch reads."""
    whole = reads_paths(texts, groups)
    return max(sum(len(texts[i].wanted) for i in group) + whole * len(texts[group[-1]].tokens) for group in groups)


def run_trie(
    session: Session,
    texts: Sequence[TokenText],
    *,
    whole: bool = False,
    outputs: bool = False,
    on_logits: OnLogits | None = None,
) -> Iterator[Batch]:
    """Compute the texts, and yield after each batch of them, while its rows are still in the captures.

    ``whole``: what the next batch begins with is read as well, see :func:`reads_paths`. ``outputs``: rows are kept of output
    tokens only.
    """
    groups = groups_of(texts, session.limits.n_seq - 1)
    held: Sequence[Any] = []
    for group, after in zip(groups, [*groups[1:], []], strict=True):
        batch = plan_batch(texts, group, held, after)
        if whole:
            for node in batch.paths[-1][: max(0, batch.next - batch.kept[-1])]:
                node.read = True
        _compute(session, texts, batch, outputs, on_logits)
        yield batch
        held = _keep(session, len(group), texts[group[-1]].keys[: batch.next])
    session.forget(TRUNK)


def read_trie(
    session: Session, texts: Sequence[TokenText], *, layers: Sequence[int], site: int, n_streams: int, outputs: bool
) -> Iterator[tuple[int, Rows]]:
    """Compute the texts, and yield each (index) with its rows at the wanted positions.

    The captures have to be set, with room for :func:`rows_needed`. ``outputs``: rows are kept of output tokens only.
    """
    whole = reads_paths(texts, groups_of(texts, session.limits.n_seq - 1))
    trunk: dict[int, npt.NDArray[np.float32]] = {}  # rows of what TRUNK holds, where whole paths are read
    for batch in run_trie(session, texts, whole=whole, outputs=outputs):
        sequences, positions = session.steer.kept()
        row_of = {(int(q), int(p)): r for r, (q, p) in enumerate(zip(sequences, positions, strict=True))}
        rows = {il: session.steer.rows(il, site, n_streams) for il in layers}
        session.steer.clear_rows()

        def at(k: int, wanted: Sequence[int]) -> dict[int, npt.NDArray[np.float32]]:
            kept, path = batch.kept[k], batch.paths[k]  # noqa: B023
            early = [p for p in wanted if p < kept]
            try:
                index = [row_of[path[p - kept].sequences[0], p] for p in wanted[len(early) :]]  # noqa: B023
            except KeyError as missing:
                raise EngineError(f"position {missing.args[0][1]} was not read; please report this") from None
            if not early:
                return {il: one[index] for il, one in rows.items()}  # noqa: B023
            return {il: np.concatenate([trunk[il][early], one[index]]) for il, one in rows.items()}  # noqa: B023

        for k, i in enumerate(batch.texts):
            yield i, at(k, texts[i].wanted)
        trunk = at(len(batch.texts) - 1, range(batch.next)) if whole else {}


def _compute(session: Session, texts: Sequence[TokenText], batch: Batch, outputs: bool, on_logits: OnLogits | None) -> None:
    for sequence, (i, kept) in enumerate(zip(batch.texts, batch.kept, strict=True), start=1):
        session.forget(sequence)
        if kept:
            session.copy(TRUNK, sequence, kept)
        if (plan := texts[i].plan) is not None:
            plan.apply(sequence)
    steered = any(texts[i].plan is not None for i in batch.texts)
    for node in batch.nodes:
        if node.read:
            session.steer.want(node.sequences[0], node.position, node.position + 1)
    entries = [
        BatchToken(
            node.token,
            node.position,
            node.sequences[0],
            # the last token of a steered text: so that the last layer's edits are seen to fire
            bool(node.scored) or (outputs and node.read) or (steered and node.last),
            tuple(node.sequences[1:]),
        )
        for node in batch.nodes
    ]
    done = 0
    for part in chunks(entries, session.limits.n_batch, MAX_OUTPUTS if on_logits else session.limits.n_batch):
        session.decode(part)
        for k, node in enumerate(batch.nodes[done : done + len(part)]):
            if on_logits is not None and node.scored:
                logits = session.logits(k)
                for i in node.scored:
                    on_logits(i, node.position, logits)
        done += len(part)


def _keep(session: Session, n_texts: int, keys: Sequence[Any]) -> Sequence[Any]:
    """Let ``TRUNK`` hold the beginning of the last text, and forget all others; returns what it holds."""
    last = n_texts
    session.forget(TRUNK)
    if keys and session.is_whole(last):
        session.copy(last, TRUNK, len(keys))
    else:
        keys = []
    for sequence in range(1, n_texts + 1):
        session.forget(sequence)
    return keys
