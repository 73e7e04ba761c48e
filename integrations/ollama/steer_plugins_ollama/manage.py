"""The routes that manage models: Ollama's answers with our steered models in them, or those of a folder."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from steer_plugins import __version__
from steer_plugins.errors import EngineError, SteerError

from . import creating
from .bodies import read_body
from .checks import checked_messages
from .daemon import Forwarded
from .describe import entry_of_ps, entry_of_tags, parameter_text, shown
from .errors import BadRequest, NotFound, Unavailable
from .folder import FolderStore
from .model import STEERING, Model
from .names import parse_name
from .service import Service
from .store import OllamaStore
from .streams import Streamed, Whole, error_answer, line

#: What a sidecar without Ollama says its version is: that of the API it follows.
API_VERSION = "0.12.0"


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


async def show(request: Request) -> Response:
    """``POST /api/show``: what Ollama says, and the steering."""
    service: Service = request.app.state.service
    body = await read_body(request)
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


async def create(request: Request) -> Response:
    """``POST /api/create``: checked, then stored by Ollama or in the folder."""
    service: Service = request.app.state.service
    body = await read_body(request)
    if body.get("messages") is not None:
        body["messages"] = checked_messages(body["messages"])
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
                found.append(entry_of_tags(service.store.get(str(name))))
        return found

    return JSONResponse({"models": await asyncio.to_thread(collect)})


async def delete(request: Request) -> Response:
    """``DELETE /api/delete``."""
    service: Service = request.app.state.service
    body = await read_body(request)
    name = str(body.get("model") or body.get("name") or "")
    with contextlib.suppress(SteerError):
        model = await service.find(name)
        await forget(service, model)
    if service.daemon is not None:
        return Forwarded(service.daemon, request, body)
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
    body = await read_body(request)
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
    body = await read_body(request)
    if service.daemon is None:
        raise BadRequest("this sidecar serves no embeddings: ask Ollama, or a llama-server with --embeddings")
    with contextlib.suppress(SteerError):
        await service.pool.release_weights((await service.find(str(body.get("model") or ""))).gguf)
    return Forwarded(service.daemon, request, body)


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
