"""A reply of the in-process engine that is given out piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import native
from ..errors import EngineError
from ..steering.vector import SteeringVector
from .base import GenerateRequest, Generation, GenerationStream, as_steering
from .reply import GrowingReply
from .session import SequenceSteering, Session, cleaned
from .steered import check_fits

if TYPE_CHECKING:
    from .local import LocalEngine


class LocalStream(GenerationStream):
    """A reply of :class:`LocalEngine`; see :class:`GenerationStream`."""

    def __init__(self, engine: LocalEngine, session: Session, request: GenerateRequest, prompt: list[int]) -> None:
        self._engine = engine
        self._session = session
        self._reply = GrowingReply(session, 0, request, prompt, engine.info.n_ctx)
        self._cancelled = False
        self._pending: list[Any] = []
        self.result = Generation("", [], prompt, "cancelled")
        self._probe = _Probe(engine, request.probe) if request.probe else None

    def steer(self, steering: Any) -> None:
        (steering,) = self._engine._decided(as_steering(steering), [self._reply.prompt])
        SequenceSteering(self._session, steering, self._reply.prompt)  # complain now, not in the middle of a reply
        self._pending.append(steering)

    def cancel(self) -> None:
        self._cancelled = True

    def __iter__(self) -> Iterator[str]:
        engine, session, reply = self._engine, self._session, self._reply
        engine._running = self
        try:
            with cleaned(session):
                held = _Holder(reply)
                entries = reply.start()
                if engine._read_callback is not None:
                    session.steer.want(0, 0, -1)
                if self._probe is not None:
                    self._probe.start(session, len(reply.prompt) - 1)
                n_batch = session.limits.n_batch
                for start in range(0, len(entries), n_batch):
                    session.decode(entries[start : start + n_batch])
                index = (len(entries) - 1) % n_batch
                while True:
                    reply.sample(index)
                    self.result = reply.result()
                    if self._probe is not None:
                        self.projections = self._probe.newest()
                    if piece := held.release():
                        yield piece
                    if reply.finished or self._cancelled:
                        break
                    while self._pending:
                        reply.change(self._pending.pop(0))
                    session.decode([reply.next_entry()])
                    index = 0
            self.result = reply.result()
        finally:
            engine._running = None
            reply.close()
            if self._probe is not None:
                self._probe.stop(session)


class _Probe:
    """Projections of the newest hidden state on some vectors, taken by the read callback."""

    def __init__(self, engine: LocalEngine, vectors: Sequence[SteeringVector]) -> None:
        if engine._read_callback is not None:
            raise EngineError("hidden states are read by a callback already: take it away with on_read(None) before probing")
        self._places: dict[tuple[int, str], list[tuple[str, npt.NDArray[np.float64]]]] = {}
        for vector in vectors:
            check_fits(vector, engine._model)
            for key, v in vector.directions.items():
                unit = abs(vector.scales[key]) or 1.0
                share = v.astype(np.float64) / (unit * len(vector.directions))
                self._places.setdefault(key, []).append((vector.name, share))
        self._sums: dict[str, float] = {}
        self._position = -1

    def start(self, session: Session, first: int) -> None:
        places = list(self._places)
        session.steer.set_captures([il for il, _ in places], [native.SITES[site] for _, site in places], keep=False)
        session.steer.on_read(self._take)
        session.steer.want(0, first, -1)

    def stop(self, session: Session) -> None:
        session.steer.on_read(None)
        session.steer.set_captures([], [])

    def newest(self) -> dict[str, float]:
        return dict(self._sums)

    def _take(self, rows: native.ReadRows) -> None:
        if self._position != int(rows.positions[-1]):
            self._position, self._sums = int(rows.positions[-1]), {}
        for name, share in self._places.get((rows.layer, rows.site), ()):
            self._sums[name] = self._sums.get(name, 0.0) + float(rows.values[-1] @ share)


class _Holder:
    """Keeps back text that may turn out to be the start of a stop string."""

    def __init__(self, reply: GrowingReply) -> None:
        self._reply = reply
        self._sent = 0

    def release(self) -> str:
        text, keep = self._reply.text, 0
        if not self._reply.finished:
            for stop in self._reply.request.stop:
                for n in range(min(len(stop) - 1, len(text)), keep, -1):
                    if text.endswith(stop[:n]):
                        keep = n
                        break
        piece = text[self._sent : len(text) - keep]
        self._sent += len(piece)
        return piece
