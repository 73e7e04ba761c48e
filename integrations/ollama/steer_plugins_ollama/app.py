"""The sidecar's HTTP surface: Ollama's API, of which it answers what steered models need and passes on the rest."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from steer_plugins import __version__
from steer_plugins.errors import EngineError, ModelError, SteerError

from . import creating, expression, llama, openai, options, replies
from .access import Access
from .daemon import Daemon, Forwarded
from .errors import BadName, BadRequest, NotFound, NotSteerable, Unavailable
from .folder import FolderStore
from .llama import Piece
from .model import STEERING, Model, rfc3339
from .names import parse_name
from .pool import Pool, Runner
from .store import OllamaStore
from .streams import Streamed, Whole, error_answer, guarded

if TYPE_CHECKING:
    from steer_plugins.library import Library

log = logging.getLogger("steer.ollama")

MAX_BODY = 256 << 20
#: What a sidecar without Ollama says its version is: that of the API it follows.
API_VERSION = "0.12.0"


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
        self.client = llama.new_client()
        if daemon is not None:
            pool._before_load = self.free_daemon

    async def close(self) -> None:
        """End the processes and connections."""
        await self.pool.close()
        await self.client.aclose()
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
        wanted = steering is not None or model.steering is not None or self.serve_all
        return model if wanted or self.pool.holds(model.gguf) else None


# ---- small answers ----


async def read_body(request: Request) -> tuple[bytes, dict[str, Any]]:
    """The body and its JSON object. Raises BadRequest."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise BadRequest(f"the request is longer than {MAX_BODY >> 20} MiB")
        parts.append(part)
    raw = b"".join(parts)
    if not raw.strip():
        raise BadRequest("missing request body")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the request is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest("the request must be a JSON object")
    return raw, body


def now() -> str:
    """The time as Ollama writes it."""
    return rfc3339(time.time())


def durations(started: float, loaded: float, end: llama.End) -> dict[str, int]:
    """Ollama's counts and times, nanoseconds."""
    return {
        "total_duration": int((time.monotonic() - started) * 1e9),
        "load_duration": int((loaded - started) * 1e9),
        "prompt_eval_count": end.n_prompt,
        "prompt_eval_duration": int(end.prompt_ms * 1e6),
        "eval_count": end.n_reply,
        "eval_duration": int(end.reply_ms * 1e6),
    }


def line(value: Mapping[str, Any]) -> bytes:
    """A line of NDJSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


# ---- chat and generate ----


@dataclass
class Call:
    """A request for text that the sidecar answers."""

    service: Service
    model: Model
    body: dict[str, Any]
    options: dict[str, Any]
    steering: str | None
    keep: float
    chat: bool

    @property
    def name(self) -> str:
        return str(self.body.get("model") or self.body.get("name"))

    @contextlib.asynccontextmanager
    async def job(self) -> AsyncGenerator[replies.Job, None]:
        """The process, loaded, and what is asked of it."""
        load = options.load_options(self.options, self.service.environ, self.model.facts.number("context_length"))
        async with self.service.pool.use(self.model, load, self.keep) as runner:
            think = replies.checked_think(self.body.get("think"), self.model, runner)
            yield replies.Job(
                self.service.pool, self.service.client, runner, self.model, self.body, self.options, self.steering, think
            )

    def head(self) -> dict[str, Any]:
        return {"model": self.name, "created_at": now()}

    def part(self, piece: Piece) -> dict[str, Any]:
        """A reply's line that is not the last."""
        if not self.chat:
            found = {**self.head(), "response": piece.content}
            if piece.thinking:
                found["thinking"] = piece.thinking
        else:
            message: dict[str, Any] = {"role": "assistant", "content": piece.content}
            if piece.thinking:
                message["thinking"] = piece.thinking
            if piece.tool_calls:
                message["tool_calls"] = piece.tool_calls
            found = {**self.head(), "message": message}
        found["done"] = False
        if piece.logprobs:
            found["logprobs"] = piece.logprobs
        return found

    def ended(self, reason: str) -> dict[str, Any]:
        """The last line, without its counts."""
        empty: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if self.chat else {"response": ""}
        return {**self.head(), **empty, "done": True, "done_reason": reason}

    async def pieces(self) -> AsyncGenerator[tuple[Piece, dict[str, Any] | None], None]:
        """Pieces of the reply; with the last one come the counts of the last line."""
        started = time.monotonic()
        told, tokens, ended = replies.Generated(), [], False
        async with self.job() as job:
            loaded = time.monotonic()
            stream = replies.chat(job) if self.chat else replies.generate(job, told)
            async with contextlib.aclosing(stream):
                async for piece in stream:
                    tokens += piece.tokens
                    counts = None
                    if piece.end is not None:
                        ended = True
                        counts = durations(started, loaded, piece.end)
                        if told.known:
                            counts["context"] = await replies.context_of(job, told, tokens)  # type: ignore[assignment]
                    yield piece, counts
        if not ended:
            raise llama.ServerGone("the model runner ended its answer too early: see the sidecar's log")

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """The streamed answer."""
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece, counts in pieces:
                if piece.content or piece.thinking or piece.tool_calls or piece.logprobs:
                    yield line(self.part(piece))
                if piece.end is not None:
                    yield line({**self.ended(piece.end.reason), **(counts or {})})

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        total = Piece()
        counts: dict[str, Any] = {}
        reason = "stop"
        texts, thoughts = [], []
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece, found in pieces:
                texts.append(piece.content)
                thoughts.append(piece.thinking)
                total.tool_calls += piece.tool_calls
                total.logprobs += piece.logprobs
                if piece.end is not None:
                    reason, counts = piece.end.reason, found or {}
        total.content, total.thinking = "".join(texts), "".join(thoughts)
        return {**self.part(total), "done": True, "done_reason": reason, **counts}

    async def load(self) -> dict[str, Any]:
        """An empty request: only load the model, and check that its steering can be had."""
        async with self.job() as job:
            await self.service.pool.fields(job.runner, self.model, self.steering)
        return self.ended("load")

    async def unload(self) -> dict[str, Any]:
        """An empty request with ``keep_alive`` 0."""
        await self.service.pool.unload(self.model)
        return self.ended("unload")


def make_call(service: Service, model: Model, body: dict[str, Any], *, chat: bool) -> Call:
    """Raises SteerError for a request that cannot be understood."""
    given = options.checked(body.get("options"))
    return Call(
        service=service,
        model=model,
        body=body,
        options=options.merged(model.parameters, given),
        steering=expression.of_request(steering_in(body), model.steering),
        keep=options.keep_alive(body.get("keep_alive"), service.environ),
        chat=chat,
    )


def steering_in(body: Mapping[str, Any]) -> Any:
    """The steering that a request brings, wherever it is; None if it brings none."""
    given = body.get("options")
    return body[STEERING] if body.get(STEERING) is not None else given.get(STEERING) if isinstance(given, dict) else None


async def reply(request: Request) -> Response:
    """``POST /api/chat`` and ``/api/generate``."""
    service: Service = request.app.state.service
    chat = request.url.path.endswith("chat")
    raw, body = await read_body(request)
    model = await service.mine(body, steering_in(body))
    if model is None:
        assert service.daemon is not None
        return Forwarded(service.daemon, request, raw)
    call = make_call(service, model, body, chat=chat)
    if not body.get("messages" if chat else "prompt"):
        if call.keep == 0 and body.get("keep_alive") is not None:
            return Whole(call.unload())
        return Whole(call.load())
    if body.get("stream", True) is False:
        return Whole(call.whole())
    return Streamed(call.lines())


# ---- management ----


async def running(request: Request) -> Response:
    """``GET /api/ps``: Ollama's and ours."""
    service: Service = request.app.state.service
    models: list[Any] = []
    if service.daemon is not None:
        with contextlib.suppress(Unavailable):
            status, found = await service.daemon.call("GET", "/api/ps")
            if status == 200 and isinstance(found, dict):
                models = list(found.get("models") or [])
    for runner in service.pool.loaded():
        for name in list(runner.names):
            with contextlib.suppress(SteerError):
                models.append(entry_of_ps(await service.find(name), runner))
    return JSONResponse({"models": models})


def entry_of_ps(model: Model, runner: Runner) -> dict[str, Any]:
    """A model of ours in ``/api/ps``; ``steering``, ``device`` and ``steer_server`` are additions."""
    left = runner.expires - time.monotonic() if runner.users == 0 else runner.keep
    forever = left > 100 * 365 * 86400
    return {
        "name": str(model.name),
        "model": str(model.name),
        "size": model.size,
        "digest": model.digest,
        "details": model.details(),
        "expires_at": "2318-01-01T00:00:00Z" if forever else rfc3339(time.time() + max(0.0, left)),
        "size_vram": model.size if runner.facts.on_gpu else 0,
        "context_length": runner.facts.n_ctx,
        STEERING: model.steering or "",
        "device": runner.facts.device,
        "steer_server": runner.url,
    }


async def show(request: Request) -> Response:
    """``POST /api/show``: what Ollama says, and the steering."""
    service: Service = request.app.state.service
    raw, body = await read_body(request)
    name = body.get("model") or body.get("name")
    if service.daemon is None:
        found = await asyncio.to_thread(shown, await service.find(name or ""), bool(body.get("verbose")))
        return JSONResponse(found)
    status, found = await service.daemon.call("POST", "/api/show", body)
    if status == 200 and isinstance(found, dict):
        with contextlib.suppress(SteerError):
            model = await service.find(str(name))
            if model.steering is not None:
                found[STEERING] = model.steering
                if model.carriers:
                    found["parameters"] = parameter_text({**model.parameters, STEERING: model.steering})
    return JSONResponse(found, status_code=status)


def steered_in_show(found: Mapping[str, Any]) -> bool:
    """Whether Ollama's answer to ``/api/show`` tells of a steering."""
    parameters = str(found.get("parameters") or "").splitlines()
    licenses = str(found.get("license") or "").splitlines()
    return any(re.match(rf"{STEERING}\s", text) for text in parameters) or any(map(expression.of_license, licenses))


def parameter_text(parameters: Mapping[str, Any]) -> str:
    """``parameters`` of ``/api/show``: a line for each value."""
    lines = []
    for key, value in sorted(parameters.items()):
        for one in value if isinstance(value, list) else [value]:
            text = json.dumps(one, ensure_ascii=False) if isinstance(one, str) else str(one).lower()
            lines.append(f"{key:<30} {text}")
    return "\n".join(lines)


def shown(model: Model, verbose: bool = False) -> dict[str, Any]:
    """``/api/show`` of a folder's model. Raises SteerError."""
    from . import modelfile

    parameters = dict(model.parameters)
    if model.steering is not None:
        parameters[STEERING] = model.steering
    values = {key: value for key, value in model.facts.values.items() if not key.startswith("tokenizer.") or verbose}
    values["general.parameter_count"] = model.facts.parameters
    text = modelfile.render(
        str(model.gguf),
        template=model.template,
        system=model.system,
        parameters=parameters,
        messages=model.messages,
        licenses=model.licenses,
        adapters=map(str, model.adapters),
        projectors=map(str, model.projectors),
    )
    found: dict[str, Any] = {
        "modelfile": f'# Modelfile generated by "steer ollama"\n{text}',
        "parameters": parameter_text(parameters),
        "template": model.template or model.facts.chat_template,
        "details": model.details(),
        "model_info": values,
        "capabilities": model.capabilities(),
        "modified_at": rfc3339(model.modified),
    }
    if model.licenses:
        found["license"] = "\n".join(model.licenses)
    if model.system:
        found["system"] = model.system
    if model.messages:
        found["messages"] = list(model.messages)
    if model.steering is not None:
        found[STEERING] = model.steering
    return found


async def create(request: Request) -> Response:
    """``POST /api/create``: checked, then stored by Ollama or in the folder."""
    service: Service = request.app.state.service
    _, body = await read_body(request)
    replies.checked_messages(body.get("messages"))
    steps = _created(service, body)
    if body.get("stream", True) is False:
        return Whole(_last(steps))
    return Streamed(steps_as_lines(steps))


async def steps_as_lines(steps: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(steps):
        async for step in steps:
            yield line(step)


async def _last(steps: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async for step in steps:
        found = step
        if "error" in step:
            raise BadRequest(str(step["error"]))
    return found


async def _created(service: Service, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """The status lines of a create."""
    if service.daemon is None:
        prepared = await asyncio.to_thread(creating.prepare, body, service.store, service.library, own=True)
        assert isinstance(service.store, FolderStore)
        await asyncio.to_thread(service.store.create, prepared.name, prepared.body, prepared.vectors)
        yield {"status": "writing the Modelfile"}
        yield {"status": "success"}
        return
    async for step in _pulled_first(service, body):
        yield step
        if "error" in step:
            return
    prepared = await asyncio.to_thread(creating.prepare, body, service.store, service.library)
    if prepared.steering:
        await service.check_same_store()
    store, name = service.store, str(prepared.name)
    assert isinstance(store, OllamaStore)
    if prepared.vectors:  # first, so that a store that cannot be written is found before anything is made
        await asyncio.to_thread(store.add_blobs, prepared.vectors)
    is_new = not store.manifest_path(prepared.name).is_file()
    async for step in service.daemon.lines("/api/create", {**prepared.body, "stream": True}):
        if "error" in step:
            status = int(step.pop("status", 500))
            raise BadRequest(str(step["error"])) if status < 500 else EngineError(str(step["error"]))
        if step.get("status") == "success" and prepared.vectors:
            try:
                await asyncio.to_thread(store.carry, name, prepared.vectors)
            except SteerError:
                if is_new:  # a model without its vectors is half a model
                    await service.daemon.call("DELETE", "/api/delete", {"model": name, "name": name})
                raise
        yield step


async def _pulled_first(service: Service, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """Pull the base of a steered model where it is not there yet, so that its vectors can be checked before anything is made."""
    assert service.daemon is not None
    parameters = body.get("parameters")
    if not isinstance(parameters, dict) or STEERING not in parameters or not isinstance(body.get("from"), str):
        return
    try:
        await service.find(body["from"])
    except NotFound:
        async for step in service.daemon.lines("/api/pull", {"model": body["from"], "stream": True}):
            if step.get("status") != "success":
                yield {key: value for key, value in step.items() if key != "status" or "error" not in step}
    except SteerError:
        return


async def tags(request: Request) -> Response:
    """``GET /api/tags`` of a folder."""
    service: Service = request.app.state.service

    def collect() -> list[dict[str, Any]]:
        found = []
        for name in service.store.names():
            with contextlib.suppress(SteerError):  # a broken Modelfile hides its own model only
                model = service.store.get(str(name))
                entry = {"name": str(name), "model": str(name), "modified_at": rfc3339(model.modified)}
                found.append({**entry, "size": model.size, "digest": model.digest, "details": model.details()})
        return found

    return JSONResponse({"models": await asyncio.to_thread(collect)})


async def delete(request: Request) -> Response:
    """``DELETE /api/delete``."""
    service: Service = request.app.state.service
    raw, body = await read_body(request)
    name = str(body.get("model") or body.get("name") or "")
    with contextlib.suppress(SteerError):
        model = await service.find(name)
        await forget(service, model)
    if service.daemon is not None:
        return Forwarded(service.daemon, request, raw)
    assert isinstance(service.store, FolderStore)
    await asyncio.to_thread(service.store.delete, name)
    return Response(status_code=200)


async def forget(service: Service, model: Model) -> None:
    """A model is about to be deleted: its process goes with it, unless other models are using it."""
    runner = service.pool.holding(model.gguf)
    if runner is None:
        return
    if str(model.name) in runner.names:
        runner.names.remove(str(model.name))
    if not runner.names and runner.users == 0:
        await service.pool.unload(runner.last)


async def copy(request: Request) -> Response:
    """``POST /api/copy`` of a folder."""
    service: Service = request.app.state.service
    _, body = await read_body(request)
    assert isinstance(service.store, FolderStore)
    await asyncio.to_thread(service.store.copy, str(body.get("source") or ""), parse_name(body.get("destination")))
    return Response(status_code=200)


async def blobs(request: Request) -> Response:
    """``HEAD`` and ``POST /api/blobs/DIGEST`` of a folder: uploads are checked, and there whole or not at all."""
    service: Service = request.app.state.service
    assert isinstance(service.store, FolderStore)
    try:
        path = service.store.blob_path(request.path_params["digest"])
        if request.method == "HEAD":
            return Response(status_code=200 if path.is_file() else 404)
        if path.is_file():
            return Response(status_code=200)
        beside = service.store.new_blob()
        digest = hashlib.sha256()
        try:
            with open(beside, "wb") as file:
                async for part in request.stream():
                    digest.update(part)
                    await asyncio.to_thread(file.write, part)
                file.flush()
                os.fsync(file.fileno())
            if f"sha256-{digest.hexdigest()}" != path.name:
                raise BadRequest("digest mismatch: the upload is not what its digest says")
            os.replace(beside, path)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()
        return Response(status_code=201)
    except OSError as error:
        raise EngineError(f"the upload cannot be stored in {service.store.root}: {error.strerror or error}") from None


async def embed(request: Request) -> Response:
    """Embeddings are Ollama's: weights that are loaded here are let go of first."""
    service: Service = request.app.state.service
    raw, body = await read_body(request)
    if service.daemon is None:
        raise BadRequest("this sidecar serves no embeddings: ask Ollama, or a llama-server with --embeddings")
    with contextlib.suppress(SteerError):
        await service.pool.release_weights((await service.find(str(body.get("model") or ""))).gguf)
    return Forwarded(service.daemon, request, raw)


async def root(request: Request) -> Response:
    """``GET /`` and ``HEAD /``, which the CLI asks before each command."""
    return PlainTextResponse("Ollama is running")


async def version(request: Request) -> Response:
    """``GET /api/version``."""
    service: Service = request.app.state.service
    found: dict[str, Any] = {"version": API_VERSION}
    if service.daemon is not None:
        _, said = await service.daemon.call("GET", "/api/version", timeout=10.0)
        found = said if isinstance(said, dict) else found
    return JSONResponse({**found, "steer": __version__})


async def anything(request: Request) -> Response:
    """All other routes are Ollama's."""
    service: Service = request.app.state.service
    if service.daemon is None:
        style = "openai" if request.url.path.startswith("/v1/") else "ollama"
        return error_answer(
            NotFound(f"{request.url.path} needs Ollama itself, and this sidecar serves a folder without it"), style
        )
    return Forwarded(service.daemon, request)


def make_app(service: Service, *, local: bool = True) -> Starlette:
    """The ASGI application. ``local``: it listens on a loopback address only."""
    everything = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

    def route(path: str, handler: Callable[[Request], Awaitable[Response]], *methods: str) -> Route:
        style = "openai" if path.startswith("/v1/") else "ollama"
        return Route(path, guarded(handler, style), methods=list(methods))

    routes = [
        route("/", root, "GET", "HEAD"),
        route("/api/version", version, "GET", "HEAD"),
        route("/api/chat", reply, "POST"),
        route("/api/generate", reply, "POST"),
        route("/api/ps", running, "GET"),
        route("/api/show", show, "POST"),
        route("/api/create", create, "POST"),
        route("/api/delete", delete, "DELETE"),
        *(route(path, embed, "POST") for path in ("/api/embed", "/api/embeddings", "/v1/embeddings")),
        *(route(path, openai.handle, "POST") for path in openai.PATHS),
    ]
    if service.daemon is None:
        routes += [
            route("/api/tags", tags, "GET", "HEAD"),
            route("/api/copy", copy, "POST"),
            route("/api/blobs/{digest}", blobs, "HEAD", "POST"),
            route("/v1/models", openai.models, "GET"),
            route("/v1/models/{model:path}", openai.models, "GET"),
        ]
    routes.append(route("/{path:path}", anything, *everything))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        yield
        await service.close()

    guard = Middleware(Access, environ=service.environ, local=local)
    app = Starlette(routes=routes, lifespan=lifespan, middleware=[guard])
    app.state.service = service
    return app
