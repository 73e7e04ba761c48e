"""Reading and scoring many texts at once: prompts share their common prefix and go through the model in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import native
from ..errors import DataError, EngineError
from ..steering.terms import Steering
from .base import Activations, Progress
from .session import BatchToken, SequenceSteering, Session, chunks, shared_prefix
from .trie import MAX_OUTPUTS, OnLogits, groups_of, read_trie, rows_needed, run_trie

TRUNK = 0
"""The sequence that holds what the texts of a group have in common."""

MIN_SHARED = 8
"""A shorter common prefix is not worth the copy."""

GROUP_COST = 8
"""What one more group costs, in tokens: its batches are shorter, and it takes two of them."""


@dataclass
class TokenText:
    """Tokens to push through the model. ``wanted``: positions to read; ``scored``: positions whose logits are needed.

    ``average``: the mean of the rows is wanted, not the rows. ``plan``: its steering, and ``edits``: what
    that is at each token; nothing if unsteered.
    """

    tokens: list[int]
    n_prompt: int
    wanted: list[int]
    scored: list[int]
    average: bool = False
    plan: SequenceSteering | None = None
    edits: list[int] = field(default_factory=list)

    @cached_property
    def keys(self) -> list[Any]:
        """What a token's hidden state depends on, besides what is before it: the token, and how it is steered."""
        return list(zip(self.tokens, self.edits, strict=True)) if self.edits else self.tokens


@dataclass(frozen=True)
class Group:
    """Texts (indices) that are computed together, and the length of the prefix that is computed once for them."""

    texts: list[int]
    shared: int


@dataclass(frozen=True)
class Done:
    """A group whose rows are in the captures: text ``group.texts[k]`` ran on sequence ``k + 1``, what is shared on ``TRUNK``.

    ``kept``: length of the part of the prefix that was there from the group before, and not computed now.
    """

    group: Group
    kept: int


def run_texts(
    session: Session,
    texts: Sequence[TokenText],
    steering: Steering,
    *,
    on_logits: OnLogits | None = None,
    progress: Progress | None = None,
) -> None:
    """Compute all texts for their logits, with as few tokens as the model's memory allows."""
    if not session.model.shares_tokens:
        for _ in run_groups(session, texts, steering, on_logits=on_logits, progress=progress):
            pass
        return
    done = 0
    with _planned(session, texts, steering) as planned:
        for batch in run_trie(session, planned, on_logits=on_logits):
            done += len(batch.texts)
            if progress is not None:
                progress(done, len(texts))


@contextmanager
def _planned(session: Session, texts: Sequence[TokenText], steering: Steering) -> Iterator[list[TokenText]]:
    """The texts with their plans and the edits of their tokens."""
    if not steering:
        yield list(texts)
        return
    plans = [_plan(session, text, steering) for text in texts]
    yield [replace(text, plan=plan, edits=plan.edits()) for text, plan in zip(texts, plans, strict=True)]


def _plan(session: Session, text: TokenText, steering: Steering) -> SequenceSteering:
    """The steering of a text with a given response."""
    plan = SequenceSteering(session, steering, text.tokens[: text.n_prompt])
    for token in text.tokens[text.n_prompt :]:
        plan.feed(token)
    return plan


def run_groups(
    session: Session,
    texts: Sequence[TokenText],
    steering: Steering,
    *,
    on_logits: OnLogits | None = None,
    outputs_for_reading: bool = False,
    progress: Progress | None = None,
    groups: Sequence[Group] | None = None,
) -> Iterator[Done]:
    """Compute all texts, a group of as many as the session has sequences at a time. ``groups``: of :func:`plan_groups`.

    Yields after each group, while its rows are still in the captures. Prefixes that texts share are computed once.
    """
    steered = bool(steering)
    if groups is None:
        groups = plan_groups(texts, session.limits.n_seq - 1, share=not steered)
    trunk_wanted = reads_prefixes(texts, groups)
    done = 0
    for group in groups:
        kept = _run_trunk(session, texts[group.texts[0]].tokens[: group.shared], trunk_wanted, outputs_for_reading)
        entries: list[BatchToken] = []
        owners: dict[tuple[int, int], int] = {}
        for slot, i in enumerate(group.texts, start=1):
            text = texts[i]
            if group.shared:
                session.clear_ranges(slot)
                session.copy(TRUNK, slot)
            else:
                session.forget(slot)
            owners.update({(slot, p): i for p in text.scored})
            if steered:
                _plan(session, text, steering).apply(slot)
            wanted = {p for p in text.wanted if p >= group.shared}
            _want(session, slot, sorted(wanted))
            needed = set(text.scored) | (wanted if outputs_for_reading else set())
            if steered:  # so that the last layer's edits are seen to fire
                needed.add(len(text.tokens) - 1)
            entries += [BatchToken(text.tokens[p], p, slot, output=p in needed) for p in range(group.shared, len(text.tokens))]
        for part in chunks(entries, session.limits.n_batch, MAX_OUTPUTS):
            session.decode(part)
            if on_logits is not None:
                for k, e in enumerate(part):
                    owner = owners.get((e.sequence, e.position))
                    if owner is not None:
                        on_logits(owner, e.position, session.logits(k))
        yield Done(group, kept)
        for slot in range(1, len(group.texts) + 1):
            session.forget(slot)
        done += len(group.texts)
        if progress is not None:
            progress(done, len(texts))
    session.forget(TRUNK)


def reads_prefixes(texts: Sequence[TokenText], groups: Sequence[Group]) -> bool:
    """Whether any text is read within what its group shares. Then all prefixes are read when they are computed, as one that
    is computed for a group may be read for the next."""
    return any(texts[i].wanted and texts[i].wanted[0] < group.shared for group in groups for i in group.texts)


def plan_groups(texts: Sequence[TokenText], n_slots: int, *, share: bool = True) -> list[Group]:
    """Put texts into groups so that few tokens are computed: prefixes once, and not again when the next group starts with
    the same. Found by dynamic programming over where, in the sorted texts, a group may begin.
    """
    order = sorted(range(len(texts)), key=lambda i: texts[i].tokens)  # neighbours share the longest prefixes
    n = len(order)
    if not share:  # steered texts: what applies to a token depends on where its text's prompt ends
        return [Group(order[start : start + n_slots], 0) for start in range(0, n, n_slots)]
    # logits belong to one text, and one token at least has to be left to compute
    limits = [min([len(texts[i].tokens) - 1, *texts[i].scored[:1]]) for i in order]
    common = [shared_prefix(texts[a].tokens, texts[b].tokens) for a, b in zip(order, order[1:], strict=False)] + [0]
    cost = [0.0] + [float("inf")] * n
    best: list[tuple[int, int]] = [(0, 0)] * (n + 1)  # (where the last group begins, its shared prefix)
    for start in range(n):
        before = common[start - 1] if start else 0
        shared, total = min(limits[start], before), 0  # alone, a text can still use what the last group computed
        for end in range(start, min(n, start + n_slots)):
            if end > start:
                whole = limits[start] if end == start + 1 else shared
                shared = min(whole, common[end - 1], limits[end])
            total += len(texts[order[end]].tokens)
            prefix = shared if shared >= MIN_SHARED else 0
            reused = min(best[start][1], before, prefix)
            price = cost[start] + total - (end - start + 1) * prefix + prefix - reused + GROUP_COST
            if price < cost[end + 1]:
                cost[end + 1], best[end + 1] = price, (start, prefix)
    groups: list[Group] = []
    while n:
        start, shared = best[n]
        groups.append(Group(list(order[start:n]), shared))
        n = start
    return groups[::-1]


def _run_trunk(session: Session, tokens: Sequence[int], wanted: bool, outputs: bool) -> int:
    """Let ``TRUNK`` hold ``tokens``, reading them if ``wanted``; returns how many of them were there already."""
    if not tokens:
        session.forget(TRUNK)
        return 0
    session.clear_ranges(TRUNK)
    have = session.cut(TRUNK, shared_prefix([token for token, _ in session.kv[TRUNK]], tokens))
    if wanted:
        _want(session, TRUNK, range(have, len(tokens)))
    entries = [BatchToken(tokens[p], p, TRUNK, output=wanted and outputs) for p in range(have, len(tokens))]
    for part in chunks(entries, session.limits.n_batch, MAX_OUTPUTS):
        session.decode(part)
    return have


def _want(session: Session, sequence: int, positions: Sequence[int]) -> None:
    start = 0
    for i in range(1, len(positions) + 1):
        if i == len(positions) or positions[i] != positions[i - 1] + 1:
            session.steer.want(sequence, positions[start], positions[i - 1] + 1)
            start = i


def read_texts(
    session: Session,
    texts: Sequence[TokenText],
    steering: Steering,
    *,
    layers: Sequence[int],
    site: str,
    stream: str,
    progress: Progress | None,
) -> list[Activations]:
    """Hidden states of all texts at their wanted positions, or the mean of those rows in float64 where they say so."""
    info = session.model.steer
    s = native.SITES[site]
    n_streams = info.n_streams if stream == "all" and site == "resid_post" else 1
    mode = native.STREAM_ALL if stream == "all" else native.STREAM_MEAN
    hosts = {i: [i] for i in range(len(texts))} if steering else find_hosts(texts)
    owners = list(hosts)
    runs = [TokenText(texts[i].tokens, texts[i].n_prompt, _union(texts, hosts[i]), []) for i in owners]
    outputs = info.last_layer_outputs_only and info.n_layer - 1 in layers
    results: list[Activations | None] = [None] * len(texts)

    def set_captures(wanted: int) -> None:
        """With room for what one ubatch can want: 8 rows for the last tokens of 8 texts, not the 512 of a whole ubatch."""
        n_rows = 1 << (min(wanted, session.limits.n_batch) - 1).bit_length()
        session.steer.set_captures(list(layers), [s] * len(layers), stream=mode, n_rows=n_rows)

    if session.model.shares_tokens:
        done_texts = 0
        with _planned(session, runs, steering) as planned:
            set_captures(rows_needed(planned, groups_of(planned, session.limits.n_seq - 1)))
            for run, states in read_trie(session, planned, layers=layers, site=s, n_streams=n_streams, outputs=outputs):
                place = {p: r for r, p in enumerate(runs[run].wanted)}
                for i in hosts[owners[run]]:
                    index = [place[p] for p in texts[i].wanted]
                    results[i] = _made(texts[i], {il: one[index] for il, one in states.items()}, site)
                done_texts += len(hosts[owners[run]])
                if progress is not None:
                    progress(done_texts, len(texts))
        return [r for r in results if r is not None]
    groups = plan_groups(runs, session.limits.n_seq - 1, share=not steering)
    wanted = sum(sorted((len(t.wanted) for t in runs), reverse=True)[: session.limits.n_seq])
    set_captures(max([wanted, *(group.shared for group in groups)] if reads_prefixes(runs, groups) else [wanted]))
    trunk: dict[int, npt.NDArray[np.float32]] = {}  # rows of the prefix, kept as long as groups begin with it
    done_texts = 0
    for done in run_groups(session, runs, steering, outputs_for_reading=outputs, groups=groups):
        sequences, positions = session.steer.kept()
        row_of = {(int(q), int(p)): r for r, (q, p) in enumerate(zip(sequences, positions, strict=True))}
        kept = {il: session.steer.rows(il, s, n_streams) for il in layers}
        session.steer.clear_rows()
        shared = done.group.shared
        fresh = [row_of[TRUNK, p] for p in range(done.kept, shared) if (TRUNK, p) in row_of]
        for il, rows in kept.items():
            trunk[il] = np.concatenate([trunk[il][: done.kept], rows[fresh]]) if done.kept and il in trunk else rows[fresh]
        for slot, run in enumerate(done.group.texts, start=1):
            for i in hosts[owners[run]]:
                results[i] = _activations(texts[i], slot, shared, row_of, kept, trunk, site)
            done_texts += len(hosts[owners[run]])
        if progress is not None:
            progress(done_texts, len(texts))
    return [r for r in results if r is not None]


def _activations(
    text: TokenText,
    slot: int,
    shared: int,
    row_of: Mapping[tuple[int, int], int],
    kept: Mapping[int, npt.NDArray[np.float32]],
    trunk: Mapping[int, npt.NDArray[np.float32]],
    site: str,
) -> Activations:
    """The rows of a text that ran on sequence ``slot`` after a prefix of ``shared`` tokens."""
    early = [p for p in text.wanted if p < shared]
    try:
        index = [row_of[slot, p] for p in text.wanted[len(early) :]]
    except KeyError as missing:
        raise EngineError(f"position {missing.args[0][1]} was not read; please report this") from None
    found = {il: np.concatenate([trunk[il][early], rows[index]]) if early else rows[index] for il, rows in kept.items()}
    return _made(text, found, site)


def _made(text: TokenText, rows: Mapping[int, npt.NDArray[np.float32]], site: str) -> Activations:
    """The rows of a text's wanted positions, or their mean."""
    values = dict(rows)
    if text.average:
        values = {il: one.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32) for il, one in rows.items()}
    return Activations(
        tokens=text.tokens,
        n_prompt=text.n_prompt,
        positions=[] if text.average else list(text.wanted),
        values=values,
        site=site,
    )


def find_hosts(texts: Sequence[TokenText]) -> dict[int, list[int]]:
    """Texts that have to be computed, each with those that can be read on the way: itself, its equals and its beginnings."""
    hosts: dict[int, list[int]] = {}
    host = -1
    for i in sorted(range(len(texts)), key=lambda i: texts[i].tokens, reverse=True):
        tokens = texts[i].tokens
        # among sorted texts, what a text is a beginning of follows it at once
        if host < 0 or texts[host].tokens[: len(tokens)] != tokens:
            host = i
            hosts[host] = []
        hosts[host].append(i)
    return hosts


def _union(texts: Sequence[TokenText], members: Sequence[int]) -> list[int]:
    return sorted({p for i in members for p in texts[i].wanted})


def wanted_positions(positions: str | Sequence[int], n_prompt: int, n_total: int) -> tuple[list[int], bool]:
    """Positions to read and whether to average them; see ``POSITIONS`` of the engine's interface.

    Raises:
        DataError: an unknown word, an index outside the text, or nothing to read.
    """
    if isinstance(positions, str):
        if positions == "last":
            return [n_total - 1], False
        if positions == "all":
            return list(range(n_total)), False
        if positions == "mean":
            if n_total < 2:
                raise DataError("a mean needs at least two tokens, as position 0 is left out")
            return list(range(1, n_total)), True
        if positions in ("response", "response_mean"):
            if n_total <= n_prompt:
                raise DataError("there is no response to read: the text ends with the prompt")
            return list(range(n_prompt, n_total)), positions == "response_mean"
        raise DataError(f"unknown positions '{positions}': use last, all, mean, response, response_mean or indices")
    wanted = sorted({int(p) + n_total if int(p) < 0 else int(p) for p in positions})
    if not wanted or wanted[0] < 0 or wanted[-1] >= n_total:
        raise DataError(f"positions {list(positions)} do not all lie in a text of {n_total} tokens")
    return wanted, False


def log_softmax_at(logits: npt.NDArray[np.float32], token: int) -> float:
    """Natural log probability of a token, summed in float64."""
    return float(logits[token]) - _log_total(logits)


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Natural log probabilities of all tokens: float32 like ``logits``, their sum taken in float64."""
    return logits - np.float32(_log_total(logits))


def _log_total(logits: npt.NDArray[np.float32]) -> float:
    top = float(logits.max())
    return top + float(np.log(np.exp(logits - np.float32(top)).sum(dtype=np.float64)))
