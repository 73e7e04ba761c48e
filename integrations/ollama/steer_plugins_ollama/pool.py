"""llama-server processes: one for each set of weights, shared by all variants on them, ended when nobody needs them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steer_plugins.client import ServerFacts, ServerProcess
from steer_plugins.errors import EngineError
from steer_plugins.store.library import Library

from .desk import Desk
from .errors import ApiError
from .expression import Terms
from .llama import LlamaServer
from .model import Model
from .options import FOREVER, LoadOptions, whole_number
from .starting import environment, load_timeout, why_not

log = logging.getLogger("steer.ollama")

Weights = tuple[Path, tuple[Path, ...], tuple[Path, ...]]


@dataclass
class Runner:
    """One llama-server. ``users``: requests that need it now; ``expires``: monotonic seconds."""

    weights: Weights
    options: LoadOptions
    process: ServerProcess
    names: list[str]
    last: Model
    server: LlamaServer = field(init=False)
    facts: ServerFacts = field(init=False)
    users: int = 0
    keep: float = FOREVER
    expires: float = FOREVER
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    desk: Desk | None = None
    ending: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return self.process.url

    @property
    def media_marker(self) -> str:
        """What stands for an image in a prompt."""
        return str(self.facts.props.get("media_marker") or "<__media__>")

    @property
    def vision(self) -> bool:
        """Whether it sees images."""
        return bool((self.facts.props.get("modalities") or {}).get("vision"))

    @property
    def tools(self) -> bool:
        """Whether its chat template tells the model of tools."""
        return bool((self.facts.props.get("chat_template_caps") or {}).get("supports_tools"))

    @property
    def closing(self) -> bool:
        """Whether it is being stopped, or has been."""
        return self.ending is not None


class Pool:
    """All processes of a sidecar.

    Args:
        binary: the llama-server; the runtime's by default, found when the first model is loaded.
        flags: further flags of every llama-server.
        library: where vectors are looked up.

    ``before_load`` is awaited with a model before its weights are loaded: whoever else holds them lets go.
    """

    def __init__(
        self,
        *,
        binary: Path | None = None,
        flags: Sequence[str] = (),
        library: Library | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        env = os.environ if environ is None else environ
        self._environ = env
        self._binary = binary
        self._flags = list(flags)
        self._library = library
        self.before_load: Callable[[Model], Awaitable[None]] | None = None
        self.n_parallel = whole_number(env, "OLLAMA_NUM_PARALLEL", 2)
        self._max_loaded = whole_number(env, "OLLAMA_MAX_LOADED_MODELS", 3)
        self._runners: dict[Weights, Runner] = {}
        self._locks: dict[Weights, asyncio.Lock] = {}
        self._load_lock = asyncio.Lock()
        self._loading: list[Path] = []
        self._tidying: set[asyncio.Task[None]] = set()
        self._janitor: asyncio.Task[None] | None = None

    # ---- use ----

    def loaded(self) -> list[Runner]:
        """The processes that serve, oldest first."""
        return [r for r in self._runners.values() if r.process.running and not r.closing]

    def holding(self, gguf: Path) -> Runner | None:
        """The process that has these weights, if one has."""
        return next((r for r in self.loaded() if r.weights[0] == gguf), None)

    def holds(self, gguf: Path) -> bool:
        """Whether a process has these weights, or is about to."""
        return gguf in self._loading or self.holding(gguf) is not None

    @contextlib.asynccontextmanager
    async def use(self, model: Model, options: LoadOptions, keep: float) -> AsyncIterator[Runner]:
        """The process for a model, loaded if need be, for as long as the block runs; then it is kept ``keep`` seconds more.

        Raises:
            SteerError: it cannot be loaded.
        """
        runner = await self._acquire(model, options)
        runner.keep = keep
        try:
            yield runner
        finally:
            runner.users -= 1
            self._touch(runner)
            if runner.users == 0:
                runner.idle.set()
                if runner.keep == 0:
                    await self._end(runner)

    async def unload(self, model: Model) -> None:
        """End a model's process: now if nobody uses it, else after the last request."""
        runner = self._runners.get(model.weights)
        if runner is None:
            return
        runner.keep, runner.expires = 0, time.monotonic()
        if runner.users == 0:
            await self._end(runner)

    async def release_weights(self, gguf: Path) -> None:
        """End every process that holds these weights, once it is idle."""
        for runner in [r for r in self._runners.values() if r.weights[0] == gguf]:
            async with self._lock(runner.weights):
                await runner.idle.wait()
                await self._end(runner)

    async def close(self) -> None:
        """End all processes."""
        if self._janitor is not None:
            self._janitor.cancel()
        for runner in list(self._runners.values()):
            await self._end(runner)

    # ---- inside ----

    def _lock(self, weights: Weights) -> asyncio.Lock:
        return self._locks.setdefault(weights, asyncio.Lock())

    async def _acquire(self, model: Model, options: LoadOptions) -> Runner:
        async with self._lock(model.weights):
            runner = self._runners.get(model.weights)
            if runner is not None and not runner.closing and not runner.process.running:
                log.warning("the llama-server of %s has ended: %s", model.name, runner.process.log_tail[-1:])
                await self._end(runner)
                runner = None
            elif runner is not None and (runner.closing or not options.served_by(runner.options)):
                await runner.idle.wait()  # those who use it finish first; later ones wait at the lock
                await self._end(runner)
                runner = None
            if runner is None:
                runner = await self._load(model, options)
            runner.users += 1
            runner.idle.clear()
            runner.last = model
            if str(model.name) not in runner.names:
                runner.names.append(str(model.name))
            return runner

    async def _load(self, model: Model, options: LoadOptions) -> Runner:
        self._loading.append(model.gguf)
        try:
            async with self._load_lock:  # one after another, so that there are never more than OLLAMA_MAX_LOADED_MODELS
                await self._make_room()
                if self.before_load is not None:
                    await self.before_load(model)
                runner = await self._started(model, options)
                self._runners[model.weights] = runner
        finally:
            self._loading.remove(model.gguf)
        if self._janitor is None or self._janitor.done():
            self._janitor = asyncio.create_task(self._sweep())
        return runner

    async def _started(self, model: Model, options: LoadOptions) -> Runner:
        """A process with the model loaded. One whose client leaves meanwhile is ended, and so is one that fails."""
        binary = self._binary
        if binary is None:
            from steer_plugins.runtime import ensure_runtime

            binary = self._binary = (await asyncio.to_thread(ensure_runtime, need_server=True)).server
        process = ServerProcess(binary, on_line=lambda line: log.debug("llama-server: %s", line))
        runner = Runner(model.weights, options, process, [str(model.name)], model)
        runner.idle.set()
        flags = [*options.flags(self.n_parallel, self._environ), "--no-webui"]
        if model.adapters:
            flags += ["--lora", ",".join(map(str, model.adapters))]
        if model.projectors:
            flags += ["--mmproj", str(model.projectors[0])]
        began = time.monotonic()
        log.info("loading %s for %s", model.gguf, model.name)
        starting = asyncio.create_task(asyncio.to_thread(process.start, model.gguf, [*flags, *self._flags], environment()))
        try:
            await asyncio.shield(starting)
            await asyncio.to_thread(process.wait_ready, load_timeout(self._environ))
            runner.server = LlamaServer(process.url, process.api_key)
            runner.facts = await asyncio.to_thread(ServerFacts.ask, process.url, api_key=process.api_key, timeout=30.0)
        except BaseException as error:
            tail = "\n".join(process.log_tail)
            tidying = asyncio.create_task(_given_up(process, starting))
            self._tidying.add(tidying)  # asyncio itself does not keep it
            tidying.add_done_callback(self._tidying.discard)
            await asyncio.shield(tidying)
            if isinstance(error, EngineError):
                why = why_not(model, str(error), tail)
                log.warning("%s", why)
                raise ApiError(why) from None
            raise
        log.info("loaded %s on %s in %.1f s", model.name, runner.facts.device, time.monotonic() - began)
        return runner

    async def _make_room(self) -> None:
        while len(self._runners) >= self._max_loaded:
            idle = [r for r in self._runners.values() if r.users == 0]
            if not idle:
                busy = [asyncio.create_task(r.idle.wait()) for r in self._runners.values()]
                try:
                    await asyncio.wait(busy, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in busy:
                        task.cancel()
                continue
            await self._end(min(idle, key=lambda r: (r.process.running, r.expires)))

    def _touch(self, runner: Runner) -> None:
        runner.expires = time.monotonic() + runner.keep

    async def _end(self, runner: Runner) -> None:
        """Stop a process, and wait until it has ended, whoever asked for it first."""
        if runner.ending is None:
            runner.ending = asyncio.create_task(self._stop(runner))
        await asyncio.shield(runner.ending)

    async def _stop(self, runner: Runner) -> None:
        try:
            await runner.server.close()
            await asyncio.to_thread(runner.process.stop)
        except Exception as error:
            log.error("the llama-server of %s could not be ended: %s", runner.weights[0].name, error)
        finally:
            if self._runners.get(runner.weights) is runner:
                del self._runners[runner.weights]
            log.info("unloaded %s", runner.weights[0].name)

    async def _sweep(self) -> None:
        while self._runners:
            await asyncio.sleep(0.5)
            now = time.monotonic()
            for runner in list(self._runners.values()):
                if runner.users == 0 and now >= runner.expires:
                    await self._end(runner)

    # ---- steering ----

    async def attempts(self, runner: Runner, model: Model, terms: Terms | None) -> Iterator[dict[str, Any]]:
        """llama-server's request fields for a steering, its vectors uploaded: see :meth:`.desk.Desk.attempts`.

        Raises:
            SteerError: a vector is missing or does not fit.
        """
        if not terms:
            return iter([{"steering": []}])  # said also when empty: nobody but the request steers
        if runner.desk is None:
            runner.desk = await asyncio.to_thread(Desk, runner.process, self._library or Library())
        return await asyncio.to_thread(runner.desk.attempts, model, terms)


async def _given_up(process: ServerProcess, starting: asyncio.Task[None]) -> None:
    """End a process that nobody waits for any more: only once it has started can it be ended."""
    with contextlib.suppress(Exception):
        await starting
    await asyncio.to_thread(process.stop)
