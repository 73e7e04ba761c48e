"""Reading and scoring many texts at once: prompts share their common prefix and go through the model in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steer_plugins import native
from steer_plugins.engine.base import Activations, Progress
from steer_plugins.engine.session import Entry, SequenceSteering, Session, chunks
from steer_plugins.errors import DataError, EngineError
from steer_plugins.steering import Steering

TRUNK = 0
"""The sequence that holds what the texts of a group have in common."""

MIN_SHARED = 8
"""A shorter common prefix is not worth the copy."""

MAX_OUTPUTS = 128
"""Rows of logits held at once: each weighs n_vocab floats."""


@dataclass
class Text:
    """Tokens to push through the model. ``wanted``: positions to read; ``scored``: positions whose logits are needed."""

    tokens: list[int]
    n_prompt: int
    wanted: list[int]
    scored: list[int]


OnLogits = Callable[[int, int, npt.NDArray[np.float32]], None]
"""Called with (index of the text, position, logits [n_vocab])."""


def run_texts(
    session: Session,
    texts: Sequence[Text],
    steering: Steering,
    *,
    on_logits: OnLogits | None = None,
    outputs_for_reading: bool = False,
    progress: Progress | None = None,
) -> None:
    """Compute all texts for their logits; see :func:`run_groups`."""
    for _ in run_groups(
        session, texts, steering, on_logits=on_logits, outputs_for_reading=outputs_for_reading, progress=progress
    ):
        pass


def run_groups(
    session: Session,
    texts: Sequence[Text],
    steering: Steering,
    *,
    on_logits: OnLogits | None = None,
    outputs_for_reading: bool = False,
    progress: Progress | None = None,
) -> Iterator[list[tuple[int, int, int]]]:
    """Compute all texts, a group of as many as the session has sequences at a time.

    After each group yields (text index, sequence, length of the shared prefix) for its texts, while their rows are still in
    the taps. The shared prefix was computed once, on sequence ``TRUNK``.
    """
    n_slots = session.limits.n_seq - 1
    order = sorted(range(len(texts)), key=lambda i: texts[i].tokens)  # neighbours share the longest prefixes
    done = 0
    steered = bool(steering)
    for start in range(0, len(order), n_slots):
        group = order[start : start + n_slots]
        shared = 0 if steered or len(group) == 1 else common_prefix([texts[i].tokens for i in group])
        shared = min(shared, min(len(texts[i].tokens) for i in group) - 1)
        first_scored = min((p for i in group for p in texts[i].scored), default=shared)
        shared = min(shared, first_scored)  # logits belong to one text, so what is scored is computed for each
        if shared < MIN_SHARED:
            shared = 0
        _run_trunk(session, texts, group, shared, outputs_for_reading)
        entries: list[Entry] = []
        owners: dict[tuple[int, int], int] = {}
        for slot, i in enumerate(group, start=1):
            text = texts[i]
            if shared:
                session.clear_ranges(slot)
                session.copy(TRUNK, slot)
            else:
                session.forget(slot)
            owners.update({(slot, p): i for p in text.scored})
            if steered:
                plan = SequenceSteering(session, steering, text.tokens[: text.n_prompt])
                session.set_ranges(slot, 0, plan.configs(text.tokens))
            wanted = {p for p in text.wanted if p >= shared}
            _want(session, slot, sorted(wanted))
            needed = set(text.scored) | (wanted if outputs_for_reading else set())
            entries += [
                Entry(text.tokens[p], p, slot, output=p in needed or p == len(text.tokens) - 1)
                for p in range(shared, len(text.tokens))
            ]
        for part in chunks(entries, session.limits.n_batch, MAX_OUTPUTS):
            session.decode(part)
            if on_logits is not None:
                for k, e in enumerate(part):
                    owner = owners.get((e.sequence, e.position))
                    if owner is not None:
                        on_logits(owner, e.position, session.logits(k))
        yield [(i, slot, shared) for slot, i in enumerate(group, start=1)]
        for slot in range(1, len(group) + 1):
            session.forget(slot)
        done += len(group)
        if progress is not None:
            progress(done, len(texts))
    session.forget(TRUNK)


def _run_trunk(session: Session, texts: Sequence[Text], group: list[int], shared: int, outputs: bool) -> None:
    if not shared:
        session.forget(TRUNK)
        return
    tokens = texts[group[0]].tokens[:shared]
    wanted = sorted({p for i in group for p in texts[i].wanted if p < shared})
    session.clear_ranges(TRUNK)
    if wanted:
        session.forget(TRUNK)  # rows are read when they are computed, so nothing may come from the cache
        have = 0
        _want(session, TRUNK, wanted)
    else:
        held = [t for t, _ in session.kv[TRUNK]]
        have = common_prefix([held, tokens]) if held else 0
        if have < len(held):
            if have == 0 or not session.c.llama_memory_seq_rm(session.memory, TRUNK, have, -1):
                session.forget(TRUNK)
                have = 0
            else:
                del session.kv[TRUNK][have:]
    outs = set(wanted) if outputs else set()
    entries = [Entry(tokens[p], p, TRUNK, output=p in outs) for p in range(have, shared)]
    for part in chunks(entries, session.limits.n_batch, MAX_OUTPUTS):
        session.decode(part)


def _want(session: Session, sequence: int, positions: list[int]) -> None:
    start = 0
    for i in range(1, len(positions) + 1):
        if i == len(positions) or positions[i] != positions[i - 1] + 1:
            session.steer.want(sequence, positions[start], positions[i - 1] + 1)
            start = i


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the prefix that all sequences share."""
    low, high = min(map(list, sequences)), max(map(list, sequences))
    n = 0
    for a, b in zip(low, high, strict=False):
        if a != b:
            break
        n += 1
    return n


def read_texts(
    session: Session,
    texts: Sequence[Text],
    steering: Steering,
    *,
    layers: Sequence[int],
    site: str,
    stream: str,
    average: bool,
    progress: Progress | None,
) -> list[Activations]:
    """Hidden states of all texts at their wanted positions, or the mean of those rows in float64 with ``average``."""
    info = session.model.steer
    s = native.SITES[site]
    n_streams = info.n_streams if stream == "all" and site == "resid_post" else 1
    mode = native.STREAM_ALL if stream == "all" else native.STREAM_MEAN
    # room for what one ubatch can want: 8 rows for the last tokens of 8 texts, not the 512 of a whole ubatch
    wanted = sorted((len(t.wanted) for t in texts), reverse=True)[: session.limits.n_seq]
    n_rows = 1 << (min(sum(wanted), session.limits.n_batch) - 1).bit_length()
    session.steer.set_taps(list(layers), [s] * len(layers), stream=mode, n_rows=n_rows)
    outputs = info.last_layer_outputs_only and info.n_layer - 1 in layers
    results: list[Activations | None] = [None] * len(texts)
    for group in run_groups(session, texts, steering, outputs_for_reading=outputs, progress=progress):
        sequences, positions = session.steer.kept()
        row_of = {(int(q), int(p)): r for r, (q, p) in enumerate(zip(sequences, positions, strict=True))}
        kept = {il: session.steer.rows(il, s, n_streams) for il in layers}
        session.steer.clear_rows()
        for i, slot, shared in group:
            text = texts[i]
            try:
                index = [row_of[slot if p >= shared else TRUNK, p] for p in text.wanted]
            except KeyError as missing:
                raise EngineError(f"Position {missing.args[0][1]} was not read; please report this.") from None
            values = {il: rows[index] for il, rows in kept.items()}
            if average:
                values = {
                    il: rows.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
                    for il, rows in values.items()
                }
            results[i] = Activations(
                tokens=text.tokens,
                n_prompt=text.n_prompt,
                positions=[] if average else list(text.wanted),
                values=values,
                site=site,
            )
    return [r for r in results if r is not None]


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
                raise DataError("A mean needs at least two tokens, as position 0 is left out.")
            return list(range(1, n_total)), True
        if positions in ("response", "response_mean"):
            if n_total <= n_prompt:
                raise DataError("There is no response to read: the text ends with the prompt.")
            return list(range(n_prompt, n_total)), positions == "response_mean"
        raise DataError(f"Unknown positions '{positions}': use last, all, mean, response, response_mean or indices.")
    wanted = sorted({int(p) + n_total if int(p) < 0 else int(p) for p in positions})
    if not wanted or wanted[0] < 0 or wanted[-1] >= n_total:
        raise DataError(f"Positions {list(positions)} do not all lie in a text of {n_total} tokens.")
    return wanted, False


def log_softmax_at(logits: npt.NDArray[np.float32], token: int) -> float:
    """Natural log probability of a token, summed in float64."""
    top = float(logits.max())
    return float(logits[token]) - top - float(np.log(np.exp(logits - np.float32(top)).sum(dtype=np.float64)))
