"""``steer ollama serve``: the sidecar as a program."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx

from steer_plugins.client import port_taken
from steer_plugins.errors import EngineError, ModelError, SteerError
from steer_plugins.paths import expand_path
from steer_plugins.runtime import ensure_runtime
from steer_plugins.store.library import Library, default_root

from .daemon import Daemon, daemon_url, is_local
from .folder import FolderStore
from .pool import Pool
from .starting import check_flags
from .store import OllamaStore, check_readable, has_models, store_root

if TYPE_CHECKING:
    from .model import Store
    from .service import Service

DEFAULT_PORT = 11435
log = logging.getLogger("steer.ollama")


@dataclass
class ServeOptions:
    """What ``steer ollama serve`` was asked for; ``flags`` go to every llama-server."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    folder: Path | None = None
    daemon: str | None = None
    serve_all: bool = False
    flags: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)


def default_folder() -> Path:
    """The folder that is served if there is no Ollama, beside the user's vectors."""
    return default_root().parent / "ollama"


def make_service(wanted: ServeOptions) -> tuple[Service, str]:
    """The service and a sentence on what it serves. Raises SteerError."""
    from .service import Service

    check_flags(wanted.flags)
    library = Library()
    pool = Pool(flags=wanted.flags, library=library, environ=wanted.environ)
    if wanted.daemon and is_itself(wanted.daemon, wanted.host, wanted.port):
        raise EngineError(f"--daemon {wanted.daemon} is where the sidecar itself listens: give another --daemon or --port")
    url = wanted.daemon or daemon_url(wanted.environ, (wanted.host, wanted.port))
    root = store_root(wanted.environ)
    if wanted.folder is None and (wanted.daemon or has_models(root) or _answers(url)):
        check_readable(root)
        service = Service(
            OllamaStore(root), pool, library, daemon=Daemon(url), serve_all=wanted.serve_all, environ=wanted.environ
        )
        return service, f"Ollama at {url} (its models: {root})"
    store = FolderStore(wanted.folder or default_folder(), {} if wanted.folder else _demo())
    if wanted.folder is not None and not store.root.is_dir():
        raise ModelError(f"there is no folder {store.root}: make it and put GGUF files into it")
    store.names()  # the log tells now which files are not served
    what = f"the folder {store.root}" + "".join(f" and the demo model {name}" for name in store.extra)
    return Service(store, pool, library, environ=wanted.environ), what


def local_store(folder: Path | None = None) -> Store:
    """The models of this machine as a sidecar serves them: of a folder, Ollama, or the default folder. Raises SteerError."""
    root = store_root()
    if folder is None and has_models(root):
        check_readable(root)
        return OllamaStore(root)
    return FolderStore(expand_path(folder) if folder else default_folder(), {} if folder else _demo())


def is_itself(url: str, host: str, port: int) -> bool:
    """Whether a URL is where a sidecar on ``host`` and ``port`` listens."""
    parts = urlsplit(url)
    return parts.port == port and (parts.hostname == host or is_local(str(parts.hostname)))


def _demo() -> dict[str, Path]:
    from steer_plugins.runtime.demo_model import default_model_path

    try:
        return {"smollm2": default_model_path()}
    except SteerError:
        return {}


def _answers(url: str) -> bool:
    try:
        local = is_local(httpx.URL(url).host)
        return httpx.get(url + "/api/version", timeout=2.0, trust_env=not local).status_code == 200
    except httpx.HTTPError:
        return False


def serve(wanted: ServeOptions, ready: Callable[[str], None]) -> None:
    """Run until a signal ends it. ``ready`` gets the sentence on what is served, once it listens.

    Raises:
        SteerError: the port is in use, there is nothing to serve, or no llama-server to serve it with.
    """
    import uvicorn

    from .app import make_app

    if wanted.port and port_taken(wanted.host, wanted.port):
        raise EngineError(f"port {wanted.port} of {wanted.host} is in use: stop what runs there, or choose another with --port")
    service, what = make_service(wanted)
    ensure_runtime(need_server=True)  # where it has to be compiled, that takes minutes: not while a client waits

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
            await super().startup(sockets)  # type: ignore[arg-type]
            if self.started:
                port = self.servers[0].sockets[0].getsockname()[1]
                host = f"[{wanted.host}]" if ":" in wanted.host else wanted.host
                ready(f"Listening on http://{host}:{port} for {what}")

    config = uvicorn.Config(
        make_app(service, local=is_local(wanted.host)),
        host=wanted.host,
        port=wanted.port,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    Server(config).run()


def configure_logging(debug: bool) -> None:
    """Log lines on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("steer.ollama")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
