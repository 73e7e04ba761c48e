"""What steering and reading cost: plain, llama.cpp's own control vector, and ours, in turn on one machine in one run.

Every arm has its own context on the same weights. The arms take turns in short blocks and in random order, so that a slow
spell of the machine hits all of them; a ratio is taken within a round and the median of these ratios is reported. The
second plain row shows how much of a difference is noise.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from steer_plugins import native
from steer_plugins.engine.base import Progress
from steer_plugins.engine.model import LoadedModel
from steer_plugins.engine.session import Entry, Limits, Session
from steer_plugins.errors import EngineError

PREFILL_TOKENS = 128
BLOCK = 8
"""Decoded tokens of one arm before the next has its turn."""


@dataclass(frozen=True)
class Row:
    """One arm. Speeds are medians in tokens per second; ratios are to ``plain`` with a 95 % bootstrap interval."""

    name: str
    prefill_tps: float
    decode_tps: float
    prefill_ratio: float
    decode_ratio: float
    prefill_ratio_ci: tuple[float, float]
    decode_ratio_ci: tuple[float, float]


class _Arm:
    def __init__(self, name: str, session: Session) -> None:
        self.name = name
        self.session = session
        self.position = 0
        self.prefill: list[float] = []
        self.decode: list[float] = []

    def timed(self, entries: Sequence[Entry]) -> float:
        """Seconds that one decode of prepared tokens takes, without our own bookkeeping in Python."""
        c, batch = self.session.c, self.session._batch
        batch.n_tokens = len(entries)
        for i, e in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = e.token, e.position, 1
            batch.seq_id[i][0], batch.logits[i] = e.sequence, e.output
        start = time.perf_counter()
        code = c.llama_decode(self.session.pointer, batch)
        c.llama_synchronize(self.session.pointer)
        seconds = time.perf_counter() - start
        if code != 0:
            raise EngineError(f"A benchmark batch failed: {self.session.steer.error()}")
        if self.name == "read-all":
            self.session.steer.clear_rows()
        return seconds


def bench_speed(
    model: LoadedModel,
    *,
    n_threads: int = 1,
    rounds: int = 24,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Row]:
    """Time all arms; see the module's text. ``rounds``: how often each arm gets a prefill and ``BLOCK`` × 4 tokens.

    Arms: ``plain``, ``plain-again``, ``stock-cvec`` (llama.cpp's control vector on all layers), ``steer-1`` and
    ``steer-4`` (that many vectors added on all layers), ``project-1`` (one vector projected out on all layers) and
    ``read-all`` (all layers of every token, the last one where tokens are outputs).
    """
    rng = np.random.default_rng(seed)
    info = model.steer
    n_ctx = PREFILL_TOKENS + 4 * BLOCK + 8
    limits = Limits(n_ctx=n_ctx, n_batch=PREFILL_TOKENS, n_threads=n_threads, n_threads_batch=n_threads)
    low, high = min(300, model.n_vocab // 4), min(20000, model.n_vocab // 2)
    tokens = [int(t) for t in rng.integers(low, high, n_ctx)]

    def directions(seed: int) -> np.ndarray:
        v = np.random.default_rng(seed).standard_normal((info.n_layer, info.n_embd))
        return (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)

    scale = 1e-3  # too small to change what the model does, so that all arms do the same work

    def steer(session: Session, n: int, op: str) -> None:
        for k in range(n):
            layers = list(range(info.n_layer))
            session.steer.set_column(k, layers, [0] * len(layers), directions(k), [scale] * len(layers))
        session.steer.set_config(1, [native.NativeTerm(k, native.OPS[op], 1.0 if op == "add" else 1e-3) for k in range(n)])
        session.steer.set_range(0, 0, -1, 1)

    def stock(session: Session, n: int, op: str) -> None:
        data = np.ascontiguousarray(directions(0)[1:] * np.float32(scale))
        session.c.llama_set_adapter_cvec(
            session.pointer, data.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), data.size, info.n_embd, 1, info.n_layer
        )

    def read(session: Session, n: int, op: str) -> None:
        top = info.n_layer - (1 if info.last_layer_outputs_only else 0)
        session.steer.set_taps(list(range(top)), [0] * top)
        session.steer.want(0, 0, -1)

    setups: dict[str, tuple[Callable[[Session, int, str], None] | None, int, str]] = {
        "plain": (None, 0, ""),
        "plain-again": (None, 0, ""),
        "stock-cvec": (stock, 1, "add"),
        "steer-1": (steer, 1, "add"),
        "steer-4": (steer, 4, "add"),
        "project-1": (steer, 1, "project"),
        "read-all": (read, 0, ""),
    }
    arms: list[_Arm] = []
    try:
        for name, (setup, n, op) in setups.items():
            arm = _Arm(name, Session(model, limits))
            arms.append(arm)
            if setup is not None:
                setup(arm.session, n, op)
        _run(arms, tokens, rounds, rng, progress)
    finally:
        for arm in arms:
            arm.session.close()
    return [_row(arm, arms[0], rng) for arm in arms]


def _run(arms: list[_Arm], tokens: list[int], rounds: int, rng: np.random.Generator, progress: Progress | None) -> None:
    for round_ in range(-1, rounds):  # round -1 warms up and is not counted
        order = list(rng.permutation(len(arms)))
        for i in order:
            arm = arms[i]
            arm.session.c.llama_memory_clear(arm.session.memory, False)
            prompt = [Entry(tokens[p], p, 0, output=p == PREFILL_TOKENS - 1) for p in range(PREFILL_TOKENS)]
            seconds = arm.timed(prompt)
            if round_ >= 0:
                arm.prefill.append(seconds / PREFILL_TOKENS)
        spent = {arm.name: 0.0 for arm in arms}
        for block in range(4):
            for i in rng.permutation(len(arms)):
                arm = arms[i]
                first = PREFILL_TOKENS + block * BLOCK
                for p in range(first, first + BLOCK):
                    seconds = arm.timed([Entry(tokens[p], p, 0, output=True)])
                    # the first token after a prefill builds the graph; it is a cost of the prompt, not of decoding
                    if p != PREFILL_TOKENS:
                        spent[arm.name] += seconds
        if round_ >= 0:
            for arm in arms:
                arm.decode.append(spent[arm.name] / (4 * BLOCK - 1))
        if progress is not None:
            progress(round_ + 2, rounds + 1)


def _row(arm: _Arm, plain: _Arm, rng: np.random.Generator) -> Row:
    def ratio(mine: list[float], base: list[float]) -> tuple[float, tuple[float, float]]:
        ratios = np.array(base) / np.array(mine)  # speed ratio: plain's seconds over this arm's
        draws = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        return float(np.median(ratios)), (float(low), float(high))

    prefill, prefill_ci = ratio(arm.prefill, plain.prefill)
    decode, decode_ci = ratio(arm.decode, plain.decode)
    return Row(
        name=arm.name,
        prefill_tps=float(1 / np.median(arm.prefill)),
        decode_tps=float(1 / np.median(arm.decode)),
        prefill_ratio=prefill,
        decode_ratio=decode,
        prefill_ratio_ci=prefill_ci,
        decode_ratio_ci=decode_ci,
    )


def as_json(rows: Sequence[Row], **facts: Any) -> dict[str, Any]:
    """One JSON object: ``rows`` and the facts of the run."""
    return {**facts, "rows": [asdict(row) for row in rows]}
