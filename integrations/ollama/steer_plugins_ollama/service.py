"""What the routes of the sidecar share: where models are, who runs them, and which are answered here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steer_plugins.errors import ModelError, SteerError

from .daemon import Daemon
from .describe import steered_in_show
from .errors import BadName, NotFound, NotSteerable, Unavailable
from .folder import FolderStore
from .model import Model
from .pool import Pool
from .store import OllamaStore

if TYPE_CHECKING:
    from steer_plugins.store.library import Library

log = logging.getLogger("steer.ollama")

_OTHER_STORE = "the sidecar reads another store than Ollama, so set OLLAMA_MODELS to Ollama's own folder where the sidecar starts"


class Service:
    """What the routes share.

    Args:
        store: where models are looked up.
        daemon: Ollama; None: a folder is served without it.
        pool: the llama-servers.
        serve_all: run every model here, not only steered ones.
    """

    def __init__(
        self,
        store: OllamaStore | FolderStore,
        pool: Pool,
        library: Library,
        *,
        daemon: Daemon | None = None,
        serve_all: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.store, self.pool, self.library, self.daemon = store, pool, library, daemon
        self.serve_all = serve_all or daemon is None
        self.environ = os.environ if environ is None else environ
        if daemon is not None:
            pool.before_load = self.free_daemon

    async def close(self) -> None:
        """End the processes and connections."""
        await self.pool.close()
        if self.daemon is not None:
            await self.daemon.close()

    async def free_daemon(self, model: Model) -> None:
        """Have Ollama unload the weights that are about to be loaded here."""
        assert self.daemon is not None
        for name in await self.daemon.loaded():
            with contextlib.suppress(SteerError):
                if (await asyncio.to_thread(self.store.get, name)).gguf == model.gguf:
                    log.info("Ollama unloads %s, whose weights are loaded here", name)
                    await self.daemon.unload(name)

    async def find(self, name: str) -> Model:
        """Raises SteerError."""
        return await asyncio.to_thread(self.store.get, name)

    async def check_not_steered(self, name: str) -> None:
        """Raise ModelError for a model that Ollama has with a steering, and that is not in the store that the sidecar reads."""
        assert self.daemon is not None
        try:
            status, found = await self.daemon.call("POST", "/api/show", {"model": name, "name": name})
        except Unavailable:
            return  # the request itself will say so
        if status == 200 and isinstance(found, dict) and steered_in_show(found):
            raise ModelError(f"{name} has a steering in Ollama, but is not in {self.store.root}: {_OTHER_STORE}")

    async def check_same_store(self) -> None:
        """Raise ModelError where none of Ollama's models is in the store that the sidecar reads."""
        assert self.daemon is not None
        status, found = await self.daemon.call("GET", "/api/tags")
        models = found.get("models") if status == 200 and isinstance(found, dict) else None
        theirs = {str(m.get("name")) for m in models or () if isinstance(m, dict)}
        if theirs and theirs.isdisjoint(map(str, await asyncio.to_thread(self.store.names))):
            raise ModelError(f"none of Ollama's models is in {self.store.root}: {_OTHER_STORE}")

    async def mine(self, body: Mapping[str, Any], steering: Any) -> Model | None:
        """The model of a request, where the sidecar answers it; None where Ollama does.

        Raises:
            SteerError: the model cannot be steered, and the request or the model wants to be, or it cannot be known.
        """
        name = body.get("model") or body.get("name")
        try:
            model = await self.find(name or "")
        except (NotFound, NotSteerable, BadName):
            if self.daemon is None or steering is not None:
                raise
            await self.check_not_steered(str(name or ""))
            return None  # Ollama knows better what is wrong with it, or runs it elsewhere
        wanted = steering is not None or model.terms is not None or self.serve_all
        return model if wanted or self.pool.holds(model.gguf) else None
