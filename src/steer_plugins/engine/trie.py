"""Texts as a trie: what several begin with is computed once, as tokens that belong to all their sequences.

llama.cpp lets a token of a batch belong to several sequences when they share one KV buffer. So texts that part at different
places need no pass of their own for each common beginning: all go into one batch, and the number of tokens in it is that of
the different prefixes. Between batches the path of the last text is kept, which is all that the next, in sorted order, can
share.

Not for caches that hold a state instead of cells (recurrent and hybrid models, the compressed cache of deepseek4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from steer_plugins.engine.session import Entry, Session, chunks
from steer_plugins.errors import EngineError

TRUNK = 0
"""The sequence that holds the path which the next texts may begin with."""

Rows = Mapping[int, npt.NDArray[np.float32]]
"""``{layer: float32 [rows, ...]}``."""


class TokenText(Protocol):
    """Tokens, and the positions to read, ascending."""

    tokens: list[int]
    wanted: list[int]


@dataclass
class Node:
    """A token and the sequences whose texts pass through it; the first of them computes it, and reads it if ``read``."""

    token: int
    position: int
    sequences: list[int]
    read: bool = False


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


def plan_batch(texts: Sequence[TokenText], group: Sequence[int], held: Sequence[int], after: Sequence[int] | None) -> Batch:
    """The nodes of some texts, given what ``TRUNK`` holds.

    ``group``: indices in the order of the tokens. ``after``: tokens of the text that follows them, None at the end. What it will
    share with the last text is read too where ``held`` is not empty or a later text may want it: see :func:`reads_paths`.
    """
    kept: list[int] = []
    paths: list[list[Node]] = []
    nodes: list[Node] = []
    last: list[int] = []
    for sequence, i in enumerate(group, start=1):
        tokens = texts[i].tokens
        old = shared_prefix(held, tokens)
        stem = max(old, shared_prefix(last, tokens))
        path = paths[-1][: stem - old] if stem > old else []  # one that shares more than TRUNK holds has kept as much of it
        for node in path:
            node.sequences.append(sequence)
        new = [Node(tokens[p], p, [sequence]) for p in range(stem, len(tokens))]
        nodes += new
        path = path + new
        for p in texts[i].wanted:
            if p >= old:
                path[p - old].read = True
        kept.append(old)
        paths.append(path)
        last = tokens
    return Batch(list(group), kept, paths, nodes, shared_prefix(last, after) if after is not None else 0)


def reads_paths(texts: Sequence[TokenText], groups: Sequence[Sequence[int]]) -> bool:
    """Whether any text wants a position that a batch before its own has computed. Then whole paths are read."""
    for before, group in zip(groups, groups[1:], strict=False):
        last = texts[before[-1]].tokens
        if any(texts[i].wanted and texts[i].wanted[0] < shared_prefix(last, texts[i].tokens) for i in group):
            return True
    return False


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the prefix that two token lists share."""
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n


def groups_of(texts: Sequence[TokenText], n_slots: int) -> list[list[int]]:
    """The texts in sorted order, as many at a time as there are sequences for them."""
    order = sorted(range(len(texts)), key=lambda i: texts[i].tokens)
    return [order[start : start + n_slots] for start in range(0, len(order), n_slots)]


def rows_needed(texts: Sequence[TokenText], groups: Sequence[Sequence[int]]) -> int:
    """An upper bound for the rows that one batch reads."""
    whole = reads_paths(texts, groups)
    return max(sum(len(texts[i].wanted) for i in group) + whole * len(texts[group[-1]].tokens) for group in groups)


def read_trie(
    session: Session, texts: Sequence[TokenText], *, layers: Sequence[int], site: int, n_streams: int, outputs: bool
) -> Iterator[tuple[int, Rows]]:
    """Compute the texts, and yield each (index) with its rows at the wanted positions. No text begins another, none is steered.

    The taps have to be set, with room for :func:`rows_needed`. ``outputs``: rows are kept of output tokens only.
    """
    groups = groups_of(texts, session.limits.n_seq - 1)
    whole = reads_paths(texts, groups)
    held: list[int] = []
    trunk: dict[int, npt.NDArray[np.float32]] = {}  # rows of what TRUNK holds, where whole paths are read
    for number, group in enumerate(groups):
        after = texts[groups[number + 1][0]].tokens if number + 1 < len(groups) else None
        batch = plan_batch(texts, group, held, after)
        if whole:
            for node in batch.paths[-1][: max(0, batch.next - batch.kept[-1])]:
                node.read = True
        _compute(session, batch, outputs)
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
                raise EngineError(f"Position {missing.args[0][1]} was not read; please report this.") from None
            if not early:
                return {il: one[index] for il, one in rows.items()}  # noqa: B023
            return {il: np.concatenate([trunk[il][early], one[index]]) for il, one in rows.items()}  # noqa: B023

        for k, i in enumerate(batch.texts):
            yield i, at(k, texts[i].wanted)
        trunk = at(len(group) - 1, range(batch.next)) if whole else {}
        held = _keep(session, len(group), texts[group[-1]].tokens[: batch.next])
    session.forget(TRUNK)


def _compute(session: Session, batch: Batch, outputs: bool) -> None:
    for sequence, kept in enumerate(batch.kept, start=1):
        session.forget(sequence)
        if kept:
            session.copy(TRUNK, sequence, kept)
    for node in batch.nodes:
        if node.read:
            session.steer.want(node.sequences[0], node.position, node.position + 1)
    entries = [
        Entry(node.token, node.position, node.sequences[0], outputs and node.read, tuple(node.sequences[1:]))
        for node in batch.nodes
    ]
    for part in chunks(entries, session.limits.n_batch, session.limits.n_batch):
        session.decode(part)


def _keep(session: Session, n_texts: int, tokens: list[int]) -> list[int]:
    """Let ``TRUNK`` hold the beginning of the last text, and forget all others; returns what it holds."""
    last = n_texts
    # a sliding window has dropped what lies before it, so a cut there would leave holes
    holes = session.c.llama_memory_seq_pos_min(session.memory, last) > 0
    session.forget(TRUNK)
    if tokens and not holes:
        session.copy(last, TRUNK, len(tokens))
    else:
        tokens = []
    for sequence in range(1, n_texts + 1):
        session.forget(sequence)
    return tokens
