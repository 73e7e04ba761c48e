"""What the command line asks of the sidecar, or of Ollama itself where no sidecar runs."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from steer_plugins.errors import DataError, EngineError, SteerError
from steer_plugins.paths import expand_path
from steer_plugins.steering.grammar import format_terms
from steer_plugins.store.library import Library

from . import creating, expression, modelfile
from .bodies import whole
from .daemon import daemon_url, error_text, host_url, is_local
from .errors import BadRequest
from .key import server_key
from .model import STEERING
from .names import parse_name
from .store import OllamaStore, store_root

#: The files of a folder that FROM may name, as Ollama takes them.
_FOLDER_PARTS: tuple[str, ...] = (
    "*.gguf",
    "model*.safetensors",
    "consolidated*.safetensors",
    "pytorch_model*.bin",
    "*.json",
    "tokenizer.model",
)
_FOLDER_PARTS += ("adapter_model.safetensors", "chat_template.jinja")


class Api:
    """A few calls, one after another. Raises SteerError."""

    def __init__(self, url: str) -> None:
        self.url = host_url(url, "--url")
        local = is_local(httpx.URL(self.url).host)
        self._client = httpx.Client(trust_env=not local, timeout=httpx.Timeout(None, connect=5.0))

    def close(self) -> None:
        self._client.close()

    def version(self) -> dict[str, Any] | None:
        """What ``/api/version`` says; None if nobody answers."""
        try:
            response = self._client.get(self.url + "/api/version", timeout=5.0)
            found = response.json()
        except (httpx.HTTPError, ValueError):
            return None
        return found if response.status_code == 200 and isinstance(found, dict) else None

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON that a route answers."""
        try:
            response = self._client.request(method, self.url + path, json=whole(body))
        except httpx.HTTPError as error:
            raise self._broken(error) from None
        if response.status_code >= 400:
            raise BadRequest(error_text(response.content))
        return response.json() if response.content else None

    def lines(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """The objects of a streamed answer."""
        try:
            with self._client.stream("POST", self.url + path, json=whole(body)) as response:
                if response.status_code >= 400:
                    raise BadRequest(error_text(response.read()))
                for text in response.iter_lines():
                    found = json.loads(text) if text.strip() else {}
                    if "error" in found:
                        raise BadRequest(str(found["error"]))
                    yield found
        except httpx.HTTPError as error:
            raise self._broken(error) from None

    def upload(self, path: Path) -> str:
        """Upload a file where it is not there yet; its digest."""
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
            name = f"sha256:{digest.hexdigest()}"
            if self._client.head(f"{self.url}/api/blobs/{name}").status_code == 200:
                return name
            with open(path, "rb") as file:
                response = self._client.post(f"{self.url}/api/blobs/{name}", content=iter(lambda: file.read(1 << 20), b""))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
        except httpx.HTTPError as error:
            raise self._broken(error) from None
        if response.status_code >= 400:
            raise BadRequest(f"{path.name} was not stored: {error_text(response.content)}")
        return name

    def _broken(self, error: Exception) -> EngineError:
        return EngineError(
            f"{self.url} does not answer any more ({type(error).__name__}): see whether the program there still runs"
        )


def create(name: str, path: Path, url: str, *, quantize: str | None = None, carry: bool = False) -> Iterator[str]:
    """Create a model; yields what to print. Raises SteerError, with the line where the Modelfile is wrong."""
    parse_name(name)
    try:
        text = modelfile.decode(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the Modelfile {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    parsed = modelfile.parse(text)
    for key in parsed.ignored:
        yield f"warning: parameter {key} is deprecated"
    api, sidecar = _server(url)
    try:
        body = request_of(name, parsed, path.resolve().parent, api, carry=carry)
        if quantize:
            body["quantize"] = quantize
        yield from _statuses(api.lines("/api/create", body)) if sidecar else _direct(api, body)
    finally:
        api.close()


def _server(url: str) -> tuple[Api, bool]:
    """The sidecar, else Ollama; and whether it is the sidecar. Raises EngineError when there is neither."""
    first = Api(url)
    found = first.version()
    if found is not None:
        return first, "steer" in found
    first.close()
    sidecar = httpx.URL(first.url)
    second = Api(daemon_url(listen=(sidecar.host, sidecar.port or 80)))
    found = second.version()
    if found is None:
        second.close()
        raise EngineError(
            f"neither the sidecar ({first.url}) nor Ollama ({second.url}) answers: start one with `steer ollama serve` "
            "or `ollama serve`"
        )
    return second, "steer" in found


def request_of(name: str, parsed: modelfile.Modelfile, folder: Path, api: Api, *, carry: bool = False) -> dict[str, Any]:
    """The create body of a Modelfile, its files uploaded."""
    body: dict[str, Any] = {"model": name, "stream": True}
    steering, vectors = _steering_of(parsed, folder)
    for one, line in [(parsed.source, parsed.source_line), *parsed.more_sources]:
        path = _path(one, folder)
        if path.exists():
            body.setdefault("files", {}).update(_uploaded(path, line, api))
        elif _looks_like_path(one):
            raise modelfile.ModelfileError(line, f"FROM: there is no file {path}")
        else:
            body["from"] = one
    for key, entries in (("adapters", parsed.adapters), ("draft_files", parsed.drafts)):
        for one, line in entries:
            path = _path(one, folder)
            if not path.exists():
                raise modelfile.ModelfileError(line, f"there is no file {path}")
            body.setdefault(key, {}).update(_uploaded(path, line, api))
    for key in ("template", "system", "renderer", "parser", "requires"):
        if getattr(parsed, key) is not None:
            body[key] = getattr(parsed, key)
    parameters = dict(parsed.parameters)
    if steering is not None:
        parameters[STEERING] = steering
    for key, value in (("parameters", parameters), ("messages", parsed.messages), ("license", parsed.licenses)):
        if value:
            body[key] = value
    if vectors:
        body[creating.VECTORS] = {key: base64.b64encode(data).decode() for key, data in vectors.items()}
    if carry:
        body[creating.CARRY] = True
    return body


def _steering_of(parsed: modelfile.Modelfile, folder: Path) -> tuple[str | None, dict[str, bytes]]:
    """The steering of the file's lines as one text, with a leading ``+`` where it adds; and the vectors of the files it names."""
    if not parsed.steering:
        return None, {}
    adds = parsed.steering[0].strip().startswith("+")
    terms, vectors = creating.carry_files(expression.combine_lines(None, parsed.steering) or (), folder, None, Library())
    return ("+ " if adds else "") + format_terms(terms), vectors


def _path(text: str, folder: Path) -> Path:
    path = expand_path(text)
    return path if path.is_absolute() else folder / path


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~", "\\")) or text.endswith((".gguf", ".bin", ".safetensors"))


def _uploaded(path: Path, line: int, api: Api) -> dict[str, str]:
    if path.is_file():
        return {path.name: api.upload(path)}
    files = sorted({file for pattern in _FOLDER_PARTS for file in path.glob(pattern) if file.is_file()})
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if not files:
        raise modelfile.ModelfileError(line, f"{path} holds no model")
    return {file.relative_to(path).as_posix(): api.upload(file) for file in ggufs or files}


def _direct(api: Api, body: dict[str, Any]) -> Iterator[str]:
    """Without a sidecar: what it would have checked is checked here, and Ollama stores the model."""
    store = OllamaStore(store_root())
    prepared = creating.prepare(body, store, Library())
    name = str(prepared.name)
    is_new = not store.manifest_path(prepared.name).is_file()
    if prepared.vectors:
        store.add_blobs(prepared.vectors)
    yield from _statuses(api.lines("/api/create", prepared.body))
    if prepared.vectors:
        try:
            store.carry(name, prepared.vectors)
        except SteerError:
            if is_new:  # a model without its vectors is half a model
                api.call("DELETE", "/api/delete", {"model": name, "name": name})
            raise


def _statuses(lines: Iterator[dict[str, Any]]) -> Iterator[str]:
    last = ""
    for one in lines:
        status = str(one.get("status") or "")
        if status and status != last:
            yield status
        last = status


@contextlib.contextmanager
def _environ(name: str, value: str) -> Iterator[None]:
    """A variable of this process, for as long as the block runs."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def system_of(model: str) -> str:
    """The SYSTEM of a model of the store. Raises SteerError where it has none."""
    system = OllamaStore(store_root()).get(model).system.strip()
    if not system:
        raise DataError(f"{model} has no SYSTEM to imitate: give one with --from-prompt")
    return system if "\n" in system else system + "\n"  # one that looks like a file's name is a prompt all the same


@contextlib.contextmanager
def engine_of(model: str, url: str) -> Iterator[list[str]]:
    """The flags that make `steer train` use a model of the store: the sidecar's process, else its file. Raises SteerError."""
    api = Api(url)
    try:
        found = api.version()
        if found is None or "steer" not in found:
            yield ["--model", str(OllamaStore(store_root()).get(model).gguf)]
            return
        wanted = {"model": model, "options": {STEERING: ""}}
        api.call("POST", "/api/generate", {**wanted, "keep_alive": -1})
        try:
            name = str(parse_name(model))
            here = [m for m in api.call("GET", "/api/ps")["models"] if m.get("name") == name and m.get("steer_server")]
            if not here:
                raise EngineError(f"the sidecar at {api.url} did not load {model}: see its log")
            with _environ("STEER_API_KEY", server_key()):
                yield ["--server", str(here[0]["steer_server"])]
        finally:
            with contextlib.suppress(SteerError):
                api.call("POST", "/api/generate", wanted)
    finally:
        api.close()
