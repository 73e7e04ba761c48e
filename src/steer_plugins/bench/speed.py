"""What steering and reading cost: plain, llama.cpp's own control vector, and ours, in turn on one machine in one run.

Every arm has its own context on the same weights. The arms take turns in short blocks and in random order, so that a slow
spell of the machine hits all of them; a ratio is taken within a round and the median of these ratios is reported. The
second plain row shows how much of a difference is noise.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .. import native
from ..engine.base import Progress
from ..engine.model import LoadedModel
from ..engine.session import BatchToken, Session, SessionLimits
from ..errors import EngineError
from .busy import Neighbours
from .costs import Costs, Measure, name_by_processor

PREFILL_TOKENS = 128
BLOCK = 8
"""Decoded tokens of one arm before the next has its turn."""
BLOCKS = 4
DOSE = 1e-3
"""Too small to change what the model does, so that all arms do the same work."""

MEASURES = (
    Measure("prefill", "tok/s", "plain", f"A prompt of {PREFILL_TOKENS} tokens, computed at once."),
    Measure("decode", "tok/s", "plain", f"{BLOCK * BLOCKS} tokens after it, one by one. Only the model's own time is counted."),
)
QUIET, BUSY = "", ", busy"
"""The machine as it is, and with spinning neighbours: what stands after a measure's name."""


def measures_of(*, busy: int, by_processor: bool) -> tuple[Measure, ...]:
    """What is measured in a run with ``busy`` spinning neighbours."""
    found: tuple[Measure, ...] = MEASURES
    if busy:
        found += tuple(Measure(m.name + BUSY, m.unit, m.base, f"{m.about} Beside {busy} spinning programs.") for m in MEASURES)
    if by_processor:
        about = "The same by processor time, which a busy machine disturbs less."
        found += tuple(Measure(name_by_processor(m.name), m.unit, m.base, about) for m in found)
    return found


FINE_CLOCK = time.get_clock_info("process_time").resolution < 1e-4
"""Processor time is counted in steps of a sixtieth of a second on some systems: longer than a token takes."""
ARMS = {
    "plain": "no steering",
    "plain-again": "the same once more: how far it is from 1 is noise",
    "stock-cvec": "llama.cpp's own control vector, on all layers it can",
    "steer-1": "one vector added on all layers",
    "steer-4": "four vectors added on all layers",
    "project-1": "one vector projected out on all layers",
    "responsive-1": "one vector with a ReLU column on all layers",
    "responsive-4": "one vector with four ReLU columns on all layers",
    "stock-add": "one vector added on all layers but 0 of an unmodified library: by its control vector, which we drive",
    "stock-callback-1": "one vector projected out on one layer of an unmodified library, by the callback",
    "stock-callback-9": "one vector projected out on nine layers of an unmodified library, by the callback",
    "read-all": "all layers of every token read (the last one where tokens are outputs)",
}


BARE = ("plain", "plain-again", "stock-cvec")
"""Arms in which an unmodified library is left alone."""
OUTSIDE = ("stock-add", "stock-callback-1", "stock-callback-9")
"""Arms of an unmodified library only; the patched one has ``INSIDE``."""
INSIDE = ("steer-1", "steer-4")


def arms_of(*, stock: bool) -> list[str]:
    """The arms of a run on an unmodified library, or on a patched one."""
    return [name for name in ARMS if name not in (INSIDE if stock else OUTSIDE)]


@dataclass(frozen=True)
class SpeedRow:
    """One arm. Speeds are medians in tokens per second; ratios are to ``plain`` with a 95 % bootstrap interval.

    ``..._cpu_ratio``: the same ratios by processor time; None where that tells nothing (layers on a GPU, a coarse clock).
    """

    name: str
    prefill_tps: float
    decode_tps: float
    prefill_ratio: float
    decode_ratio: float
    prefill_ratio_ci: tuple[float, float]
    decode_ratio_ci: tuple[float, float]
    prefill_cpu_ratio: float | None = None
    decode_cpu_ratio: float | None = None


Seconds = tuple[float, float]
"""On the clock, and of the processor (all threads)."""


class Arm(Protocol):
    """Something that computes tokens in turn with others."""

    @property
    def name(self) -> str:
        """What the report calls it."""

    @property
    def about(self) -> str:
        """What it is, in a few words."""

    def prefill(self, tokens: Sequence[int]) -> Seconds:
        """Forget everything and compute a prompt; the seconds that took."""

    def decode(self, tokens: Sequence[int], position: int) -> list[Seconds]:
        """Compute tokens one by one from a position on; the seconds of each."""


class _LocalArm:
    def __init__(self, name: str, session: Session) -> None:
        self.bare = name in BARE
        self.name = name
        self.about = ARMS[name]
        self.session = session

    def prefill(self, tokens: Sequence[int]) -> Seconds:
        self.session.c.llama_memory_clear(self.session.memory, False)
        last = len(tokens) - 1
        return self._timed([BatchToken(token, p, 0, output=p == last) for p, token in enumerate(tokens)])

    def decode(self, tokens: Sequence[int], position: int) -> list[Seconds]:
        return [self._timed([BatchToken(token, position + i, 0, output=True)]) for i, token in enumerate(tokens)]

    def _timed(self, entries: Sequence[BatchToken]) -> Seconds:
        """Seconds that one decode of prepared tokens takes, without our own bookkeeping in Python."""
        c, batch = self.session.c, self.session._batch
        batch.n_tokens = len(entries)
        for i, e in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = e.token, e.position, 1
            batch.seq_id[i][0], batch.logits[i] = e.sequence, e.output
        start, cpu = time.perf_counter(), time.process_time()
        code = c.llama_decode(self.session.pointer, batch) if self.bare else self.session.steer.decode(c, batch)
        c.llama_synchronize(self.session.pointer)
        seconds = time.perf_counter() - start, time.process_time() - cpu
        if code != 0:
            raise EngineError(f"a benchmark batch failed: {self.session.steer.error()}")
        if self.name == "read-all":
            self.session.steer.clear_rows()
        return seconds


_N_CTX = PREFILL_TOKENS + BLOCKS * BLOCK + 8


def _limits(n_threads: int) -> SessionLimits:
    return SessionLimits(n_ctx=_N_CTX, n_batch=PREFILL_TOKENS, n_threads=n_threads, n_threads_batch=n_threads)


def plain_arm(model: LoadedModel, n_threads: int) -> Arm:
    """The arm ``plain``, for a process of its own."""
    return _LocalArm("plain", Session(model, _limits(n_threads), bare=True))


def bench_speed(
    model: LoadedModel,
    *,
    n_threads: int = 1,
    rounds: int = 24,
    seed: int = 0,
    busy: int = 0,
    others: Sequence[Arm] = (),
    by_processor: bool = True,
    progress: Progress | None = None,
) -> Costs:
    """Time all arms; see the module's text and :data:`ARMS`.

    Args:
        rounds: how often each arm gets a prefill and ``BLOCK`` × ``BLOCKS`` tokens, after one turn that is not counted.
        busy: with that many spinning neighbours each round is run once more, with them.
        others: further arms that take their turns with these, each with its own way to decode.
        by_processor: also take processor time, which says nothing where layers are on a GPU.
        progress: called with (rounds done, all rounds).

    Raises:
        EngineError: a context cannot be made, or a batch fails.
    """
    rng = np.random.default_rng(seed)
    info = model.steer
    limits = _limits(n_threads)
    low, high = min(300, model.n_vocab // 4), min(20000, model.n_vocab // 2)
    tokens = [int(t) for t in rng.integers(low, high, _N_CTX)]

    def directions(seed: int) -> np.ndarray:
        v = np.random.default_rng(seed).standard_normal((info.n_layer, info.n_embd))
        return (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)

    def steer(session: Session, n: int, op: str) -> None:
        place(session, n, op, list(range(info.n_layer)))

    def outside(session: Session, n: int, op: str) -> None:
        middle = info.n_layer // 2
        spots = range(1, info.n_layer) if op == "add" else range(max(0, middle - n // 2), min(info.n_layer, middle + n // 2 + 1))
        place(session, 1, op, list(spots))

    def place(session: Session, n: int, op: str, layers: list[int]) -> None:
        for k in range(n):
            session.steer.set_vector(k, layers, [0] * len(layers), directions(k)[layers], [DOSE] * len(layers))
        session.steer.set_config(1, [native.NativeTerm(k, native.OPS[op], 1.0 if op == "add" else 1e-3) for k in range(n)])
        session.steer.set_range(0, 0, -1, 1)

    def respond(session: Session, n: int, op: str) -> None:
        layers, ones = list(range(info.n_layer)), np.ones(n)
        rows = {il: np.stack([directions(1 + k)[il] for k in range(2 * n)]) for il in layers}
        columns = {il: (rows[il][:n], rows[il][n:], DOSE * ones, 0 * ones, 0 * ones) for il in layers}
        session.steer.set_vector(0, layers, [0] * len(layers), directions(0), [DOSE] * len(layers), columns)
        session.steer.set_config(1, [native.NativeTerm(0)])
        session.steer.set_range(0, 0, -1, 1)

    def stock(session: Session, n: int, op: str) -> None:
        data = np.ascontiguousarray(directions(0)[1:] * np.float32(DOSE))
        session.c.llama_set_adapter_cvec(
            session.pointer, data.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), data.size, info.n_embd, 1, info.n_layer
        )

    def read(session: Session, n: int, op: str) -> None:
        top = info.n_layer - (1 if info.last_layer_outputs_only else 0)
        session.steer.set_captures(list(range(top)), [0] * top)
        session.steer.want(0, 0, -1)

    setups: dict[str, tuple[Callable[[Session, int, str], None] | None, int, str]] = {
        "plain": (None, 0, ""),
        "plain-again": (None, 0, ""),
        "stock-cvec": (stock, 1, "add"),
        "steer-1": (steer, 1, "add"),
        "steer-4": (steer, 4, "add"),
        "project-1": (steer, 1, "project"),
        "responsive-1": (respond, 1, "add"),
        "responsive-4": (respond, 4, "add"),
        "stock-add": (outside, 1, "add"),
        "stock-callback-1": (outside, 1, "project"),
        "stock-callback-9": (outside, 9, "project"),
        "read-all": (read, 0, ""),
    }
    local: list[_LocalArm] = []
    try:
        for name in arms_of(stock=model.steering.unified):
            setup, n, op = setups[name]
            arm = _LocalArm(name, Session(model, limits, bare=name in BARE))
            local.append(arm)
            if setup is not None:
                setup(arm.session, n, op)
        arms: list[Arm] = [*local, *others]
        plan = {"threads": n_threads, "rounds": rounds, "seed": seed, "prefill": PREFILL_TOKENS, "decode": BLOCKS * BLOCK}
        plan |= {"busy": busy} if busy else {}
        measures = measures_of(busy=busy, by_processor=by_processor and FINE_CLOCK)
        costs = Costs(measures, {arm.name: arm.about for arm in arms}, plan)
        _run(arms, tokens, rounds, rng, costs, busy, progress)
        return costs
    finally:
        for arm in local:
            arm.session.close()


def _run(
    arms: Sequence[Arm],
    tokens: list[int],
    rounds: int,
    rng: np.random.Generator,
    costs: Costs,
    busy: int,
    progress: Progress | None,
) -> None:
    turns = [(-1, QUIET)]  # round -1 warms up and is not counted
    for round_ in range(rounds):
        turns += [(round_, QUIET), (round_, BUSY)][:: int(rng.choice([1, -1]))] if busy else [(round_, QUIET)]
    for n, (round_, state) in enumerate(turns, start=1):
        with Neighbours(busy if state == BUSY else 0):
            _turn(arms, tokens, rng, costs, round_, state)
        if progress is not None:
            progress(n, len(turns))


def _turn(arms: Sequence[Arm], tokens: list[int], rng: np.random.Generator, costs: Costs, round_: int, state: str) -> None:
    """Once each arm."""
    for i in rng.permutation(len(arms)):
        taken = arms[i].prefill(tokens[:PREFILL_TOKENS])
        if round_ >= 0:
            _add(costs, round_, "prefill" + state, arms[i].name, PREFILL_TOKENS, [taken])
    spent: dict[str, list[Seconds]] = {arm.name: [] for arm in arms}
    for block in range(BLOCKS):
        for i in rng.permutation(len(arms)):
            first = PREFILL_TOKENS + block * BLOCK
            each = arms[i].decode(tokens[first : first + BLOCK], first)
            # the first token after a prefill builds the graph; it is a cost of the prompt, not of decoding
            spent[arms[i].name] += each if block else each[1:]
    if round_ >= 0:
        for arm in arms:
            _add(costs, round_, "decode" + state, arm.name, len(spent[arm.name]), spent[arm.name])


def _add(costs: Costs, round_: int, measure: str, arm: str, tokens: int, spent: Sequence[Seconds]) -> None:
    clock, cpu = (sum(part) for part in zip(*spent, strict=True))
    costs.add(round_, measure, arm, tokens / clock)
    if any(m.name == name_by_processor(measure) for m in costs.measures):
        costs.add(round_, name_by_processor(measure), arm, tokens / cpu)


def rows_of(costs: Costs, state: str = QUIET) -> list[SpeedRow]:
    """A row for each arm that computes tokens; of the turns with neighbours for ``BUSY``."""
    measures = costs.summary(costs.plan["seed"])["measures"]
    names = [m.name + state for m in MEASURES]
    rows = []
    for name, decode in measures[names[1]]["arms"].items():
        prefill = measures[names[0]]["arms"][name]
        (p, p_low, p_high, _), (d, d_low, d_high, _) = prefill["ratio"], decode["ratio"]
        by_processor = (measures.get(name_by_processor(m), {"arms": {}})["arms"].get(name) for m in names)
        cpu = [None if found is None else found["ratio"][0] for found in by_processor]
        rows.append(SpeedRow(name, prefill["value"], decode["value"], p, d, (p_low, p_high), (d_low, d_high), *cpu))
    return rows
