"""Ollama's own store on disk, which is only read, but for :meth:`OllamaStore.carry`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer_plugins.atomic import write_atomically
from steer_plugins.errors import EngineError, ModelError, SpecError
from steer_plugins.paths import expand_path

from . import expression
from .bodies import loads
from .errors import BadRequest, NotFound, NotSteerable
from .model import STEERING, Model
from .names import Name, parse_name

_MEDIA = "application/vnd.ollama.image."
VECTOR_MEDIA = "application/vnd.steer-plugins.vector; name="
"""Our own layers: Ollama ignores them and keeps them through show, cp, FROM and prune. Of their keys FROM keeps the type and the
digest only, so the type says the vector's name."""

MAX_MANIFEST = 4 << 20
MAX_TEXT_BLOB = 16 << 20
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")


def store_root(environ: Mapping[str, str] | None = None) -> Path:
    """Where Ollama keeps models: ``OLLAMA_MODELS``, else the user's folder, else that of the Linux service."""
    env = os.environ if environ is None else environ
    if env.get("OLLAMA_MODELS"):
        return expand_path(env["OLLAMA_MODELS"])
    home = Path.home() / ".ollama" / "models"
    service = Path("/usr/share/ollama/.ollama/models")
    if sys.platform == "linux" and not has_models(home) and has_models(service):
        return service
    return home


def has_models(root: Path) -> bool:
    """Whether a folder is Ollama's store; also where it may not be read."""
    try:
        return stat.S_ISDIR(os.stat(root / "manifests").st_mode)
    except PermissionError:
        return True
    except OSError:
        return False


def check_readable(root: Path) -> None:
    """Raise ModelError for a store that this user may not read."""
    try:
        os.listdir(root / "manifests")
    except PermissionError as error:
        raise ModelError(f"the models of Ollama in {root} cannot be read ({error.strerror}): {_permission_hint(error)}") from None
    except OSError:
        return  # not there yet


class OllamaStore:
    """Models of Ollama's store."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def manifest_path(self, name: Name) -> Path:
        """The manifest of a name. Ollama compares names without case; the file found is the one that is there."""
        path = self.root.joinpath("manifests", *name.parts)
        if os.path.isfile(path):
            return path
        here = self.root / "manifests"
        for part in name.parts:
            try:
                match = next((p for p in sorted(here.iterdir()) if p.name.lower() == part.lower()), None)
            except OSError:
                return path
            if match is None:
                return path
            here = match
        return here

    def names(self) -> list[Name]:
        top = self.root / "manifests"
        found = []
        for path in sorted(top.glob("*/*/*/*")) if os.path.isdir(top) else ():
            if os.path.isfile(path) and not path.name.startswith("."):
                try:
                    host, namespace, model, tag = path.relative_to(top).parts
                    found.append(parse_name(f"{host}/{namespace}/{model}:{tag}"))
                except BadRequest:
                    continue  # not a model of anybody
        return found

    def blob(self, digest: str) -> Path | None:
        match = _DIGEST.fullmatch(digest)
        path = self.root / "blobs" / f"sha256-{match[1]}" if match else None
        return path if path is not None and os.path.isfile(path) else None

    def get(self, name: str) -> Model:
        whole = parse_name(name)
        path = self.manifest_path(whole)
        manifest, raw = self.manifest(path, name)
        layers = manifest["layers"]
        parameters = self._json(name, layers, "params", dict)
        licenses = [self._text(name, layer) for layer in layers if layer["mediaType"] == _MEDIA + "license"]
        terms, carriers = own_steering(parameters, licenses)
        weights = self._weights(name, layers, steered=bool(terms))
        templates = [self._text(name, layer) for layer in layers if layer["mediaType"] == _MEDIA + "template"]
        systems = [self._text(name, layer) for layer in layers if layer["mediaType"] == _MEDIA + "system"]
        messages = self._json(name, layers, "messages", list)
        return Model(
            name=whole,
            gguf=weights,
            digest=hashlib.sha256(raw).hexdigest(),
            size=sum(int(layer.get("size") or 0) for layer in layers),
            modified=path.stat().st_mtime,
            parameters={key: value for key, value in parameters.items() if key != STEERING},
            terms=terms,
            template=templates[-1] if templates else None,
            system=systems[-1] if systems else "",
            messages=tuple(m for m in messages if isinstance(m, dict)),
            licenses=tuple(licenses),
            adapters=self._files(name, layers, "adapter"),
            projectors=self._files(name, layers, "projector"),
            vectors={
                layer["mediaType"].removeprefix(VECTOR_MEDIA): self._blob_of(name, layer)
                for layer in layers
                if layer["mediaType"].startswith(VECTOR_MEDIA)
            },
            parent=str(layers[0].get("from") or ""),
            carriers=carriers,
        )

    def manifest(self, path: Path, name: str) -> tuple[dict[str, Any], bytes]:
        """A manifest and its bytes. Raises NotFound or ModelError."""
        try:
            if path.stat().st_size > MAX_MANIFEST:
                raise ModelError(f"the manifest of {name!r} is too large: pull the model again")
            raw = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise NotFound(f"model {name!r} not found") from None
        except OSError as error:
            raise ModelError(f"the manifest of {name!r} cannot be read ({error.strerror}): {_permission_hint(error)}") from None
        try:
            manifest = json.loads(raw)
            layers = manifest["layers"] = manifest["layers"] or []
            ok = bool(layers or manifest.get("config"))  # a cloud model may have no layers
            ok = ok and all(isinstance(la["mediaType"], str) and isinstance(la["digest"], str) for la in layers)
        except (ValueError, KeyError, TypeError, RecursionError):
            ok = False
        if not ok:
            raise ModelError(f"the manifest of {name!r} is damaged: pull or create the model again")
        return manifest, raw

    def _weights(self, name: str, layers: list[dict[str, Any]], *, steered: bool) -> Path:
        models = [layer for layer in layers if layer["mediaType"] == _MEDIA + "model"]
        if not models:
            text = f"{name!r} has no GGUF (it may be a safetensors or cloud model): steer a GGUF model"
            raise BadRequest(text) if steered else NotSteerable(text)
        return self._blob_of(name, models[-1])

    def _blob_of(self, name: str, layer: Mapping[str, Any]) -> Path:
        path = self.blob(layer["digest"])
        if path is None:
            raise ModelError(f"a part of {name!r} ({str(layer['digest'])[:20]}…) is missing: pull or create the model again")
        return path

    def _files(self, name: str, layers: list[dict[str, Any]], kind: str) -> tuple[Path, ...]:
        return tuple(self._blob_of(name, layer) for layer in layers if layer["mediaType"] == _MEDIA + kind)

    def _text(self, name: str, layer: Mapping[str, Any]) -> str:
        path = self._blob_of(name, layer)
        try:
            if path.stat().st_size > MAX_TEXT_BLOB:
                raise ModelError(f"a text of {name!r} is too large: {path.name}")
            return path.read_text("utf-8", errors="replace")
        except OSError as error:
            raise ModelError(f"a part of {name!r} cannot be read ({error.strerror}): {_permission_hint(error)}") from None

    def _json(self, name: str, layers: list[dict[str, Any]], kind: str, shape: type) -> Any:
        found = shape()
        for layer in layers:
            if layer["mediaType"] == _MEDIA + kind:
                try:
                    value = loads(self._text(name, layer).encode())
                except ValueError:
                    value = None
                if not isinstance(value, shape):
                    raise ModelError(f"the {kind} of {name!r} are damaged: create the model again")
                found = value
        return found

    def add_blobs(self, files: Mapping[str, bytes]) -> None:
        """Write vectors as blobs, where they are not there yet. Raises EngineError when the store cannot be written."""
        try:
            for data in files.values():
                blob = self.root / "blobs" / f"sha256-{hashlib.sha256(data).hexdigest()}"
                if not blob.is_file():
                    write_atomically(blob, data)
        except OSError as error:
            raise self._unwritable(error) from None

    def carry(self, name: str, files: Mapping[str, bytes]) -> None:
        """Put vectors into a model's manifest, in place of those of the same name.

        Raises:
            NotFound: there is no such model.
            EngineError: the store cannot be written; the model is as it was.
        """
        path = self.manifest_path(parse_name(name))
        manifest, _ = self.manifest(path, name)
        layers = [la for la in manifest["layers"] if la["mediaType"].removeprefix(VECTOR_MEDIA) not in files]
        self.add_blobs(files)
        for key, data in files.items():
            digest = hashlib.sha256(data).hexdigest()
            layers.append({"mediaType": VECTOR_MEDIA + key, "digest": f"sha256:{digest}", "size": len(data)})
        try:
            write_atomically(path, json.dumps({**manifest, "layers": layers}).encode())
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> EngineError:
        return EngineError(
            f"vectors cannot be stored with a model in {self.root} ({error.strerror or error}): "
            "run as the user that owns Ollama's store, or keep the vectors in the library"
        )


def own_steering(parameters: Mapping[str, Any], licenses: list[str]) -> tuple[expression.Terms | None, bool]:
    """A model's steering from its parameters and from licence lines, which come after them; and whether there are such lines.

    Raises:
        SpecError: an expression is wrong.
    """
    carried = [text for text in map(expression.of_license, licenses) if text is not None]
    try:
        steering = expression.combine_lines(None, expression.of_parameters(parameters.get(STEERING)))
        for text in carried:
            steering = expression.combine(steering, text)
    except SpecError as error:
        raise SpecError(f"the steering of the model is wrong: {error}") from None
    return steering, bool(carried)


def _permission_hint(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return (
            "join the group that may (`sudo usermod -aG ollama $USER`, then log in again), run the sidecar as Ollama's user, or "
            "point OLLAMA_MODELS at another store"
        )
    return "check the disk"
