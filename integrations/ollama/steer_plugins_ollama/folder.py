"""A folder of GGUFs and Modelfiles: the store of a sidecar without Ollama.

``*.gguf`` files are models under their own names. ``NAME.modelfile`` is a model that says how; characters that file names cannot
have are percent-encoded (``me%2Fcalm%3Av2.modelfile`` is ``me/calm:v2``). What is created here is written out in full, so that it
does not depend on the model it was made from. Uploaded files are in ``blobs/``, vectors that models carry in ``vectors/``.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from steer_plugins.atomic import write_atomically
from steer_plugins.errors import EngineError, ModelError

from . import expression, modelfile
from .errors import BadRequest, NotFound
from .model import STEERING, Model
from .names import HOST, NAMESPACE, Name, parse_name
from .store import MAX_TEXT_BLOB

MAX_DEPTH = 16
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_VECTOR_LINE = re.compile(r"#\s*steer-vector (\S+) sha256:([0-9a-f]{64})\s*")
_SUFFIX = ".modelfile"


class FolderStore:
    """Models of a folder. ``extra``: GGUFs from elsewhere, by name (the demo model)."""

    def __init__(self, root: Path, extra: Mapping[str, Path] | None = None) -> None:
        self.root = root
        self.extra = dict(extra or {})

    # ---- reading ----

    def names(self) -> list[Name]:
        found: dict[str, Name] = {}
        for text in [*self.extra, *(p.stem for p in self._ggufs()), *(unquote(p.stem) for p in self._modelfiles())]:
            try:
                name = parse_name(text)
            except BadRequest:
                continue  # a file whose name no model can have
            found[str(name)] = name
        return [found[key] for key in sorted(found)]

    def get(self, name: str) -> Model:
        return self._get(name, 0)

    def blob(self, digest: str) -> Path | None:
        path = self.blob_path(digest)
        return path if path.is_file() else None

    def blob_path(self, digest: str) -> Path:
        """Where a blob belongs. Raises BadRequest for what is no digest."""
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise BadRequest(f"invalid digest format: {digest[:100]!r}")
        return self.root / "blobs" / f"sha256-{match[1]}"

    def _ggufs(self) -> list[Path]:
        return sorted(p for p in self.root.glob("*.gguf") if p.is_file()) if self.root.is_dir() else []

    def _modelfiles(self) -> list[Path]:
        return sorted(p for p in self.root.glob(f"*{_SUFFIX}") if p.is_file()) if self.root.is_dir() else []

    def _get(self, text: str, depth: int) -> Model:
        name = parse_name(text)
        if depth > MAX_DEPTH:
            raise ModelError(f"the Modelfile of {text!r} is FROM itself: name another model there")
        for path in self._modelfiles():
            if _same(unquote(path.stem), name):
                return self._from_modelfile(name, path, depth)
        for path in self._ggufs():
            if _same(path.stem, name):
                return self._plain(name, path)
        for key, path in self.extra.items():
            if _same(key, name):
                return self._plain(name, path)
        raise NotFound(f"model {text!r} not found")

    def _plain(self, name: Name, path: Path) -> Model:
        try:
            stat = path.stat()
        except OSError as error:
            raise ModelError(f"cannot read the model file {path}: {error.strerror}") from None
        digest = hashlib.sha256(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
        return Model(name, path, digest, stat.st_size, stat.st_mtime)

    def _from_modelfile(self, name: Name, path: Path, depth: int) -> Model:
        try:
            if path.stat().st_size > MAX_TEXT_BLOB:
                raise ModelError(f"{path.name} is too large for a Modelfile")
            text = modelfile.decode(path.read_bytes(), errors="replace")
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from None
        try:
            parsed = modelfile.parse(text)
        except modelfile.ModelfileError as error:
            raise BadRequest(f"{path.name}: {error}") from None
        base = self._source(name, parsed.source, depth)
        licenses = (*base.licenses, *parsed.licenses)
        steering = expression.combine_lines(base.steering, parsed.steering)
        carried = [one for one in map(expression.of_license, parsed.licenses) if one is not None]
        for one in carried:
            steering = expression.combine(steering, one)
        head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())  # below, it may be a text's own line
        vectors = {m[1]: self.vector_path(m[2]) for m in map(_VECTOR_LINE.fullmatch, head) if m}
        return Model(
            name=name,
            gguf=base.gguf,
            digest=hashlib.sha256((base.digest + text).encode()).hexdigest(),
            size=base.size,
            modified=path.stat().st_mtime,
            parameters={**base.parameters, **parsed.parameters},
            steering=steering,
            template=parsed.template if parsed.template is not None else base.template,
            system=parsed.system if parsed.system is not None else base.system,
            messages=tuple(parsed.messages) or base.messages,
            licenses=licenses,
            adapters=(*base.adapters, *(self._file(one) for one, _ in parsed.adapters)),
            projectors=tuple(self._file(one) for one, _ in parsed.more_sources) or base.projectors,
            vectors={**base.vectors, **vectors},
            parent="" if base.parent == "" and depth else str(base.name),
            carriers=bool(carried),
        )

    def _source(self, name: Name, source: str, depth: int) -> Model:
        path = (self.root / source).expanduser() if re.search(r"[/\\]|\.gguf$", source) or source.startswith("~") else None
        if path is not None and path.is_file():
            return self._plain(name, path)
        if _same(source, name):  # `smollm.modelfile` may be FROM the GGUF of the same name
            plain = next((p for p in self._ggufs() if _same(p.stem, name)), self.extra.get(source))
            if plain is not None:
                return self._plain(name, plain)
        try:
            return self._get(source, depth + 1)
        except NotFound:
            raise BadRequest(f"the model {str(name)!r} is FROM {source!r}, which is neither a model nor a file here") from None

    def _file(self, source: str) -> Path:
        path = (self.root / source).expanduser()
        if not path.is_file():
            raise ModelError(f"the file {source!r} is missing in {self.root}")
        return path

    # ---- writing ----

    def vector_path(self, digest: str) -> Path:
        """Where a carried vector is."""
        return self.root / "vectors" / f"{digest}.safetensors"

    def new_blob(self) -> Path:
        """A file to write an upload into, beside where it will be."""
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)
        return self.root / "blobs" / f".upload-{secrets.token_hex(8)}"

    def modelfile_path(self, name: Name) -> Path:
        """The file of a created model."""
        short = str(name).removesuffix(":latest")
        return self.root / f"{quote(short, safe='')}{_SUFFIX}"

    def create(self, name: Name, body: Mapping[str, Any], vectors: Mapping[str, bytes] | None = None) -> None:
        """Write a model from a checked ``/api/create`` body, whose steering is combined already.

        Raises:
            BadRequest: it has no weights, or asks for what only Ollama does.
            EngineError: the folder cannot be written.
        """
        if body.get("quantize") or body.get("quantization"):
            raise BadRequest("quantize is Ollama's: this sidecar serves GGUFs as they are")
        base, source = self._base(body)
        if name.host != HOST and name.namespace == NAMESPACE:
            raise BadRequest(f"{name} is a model of a registry: name a model of your own")
        licenses = body.get("license") or []
        licenses = [licenses] if isinstance(licenses, str) else [str(one) for one in licenses]
        parameters = {**(base.parameters if base else {}), **(body.get("parameters") or {})}
        for key, value in parameters.items():
            if key not in modelfile.PARAMETERS:
                raise BadRequest(f"unknown parameter {key[:60]!r}")
            if key == "stop" and isinstance(value, str):
                parameters[key] = [value]
        adapters = [self._relative(digest) for digest in (body.get("adapters") or {}).values()]
        wanted: dict[str, Any] = {
            "template": body.get("template") or (base.template if base else None),
            "system": body.get("system") or (base.system if base else None),
            "adapters": [*(str(p) for p in (base.adapters if base else ())), *adapters],
            "parameters": parameters,
            "messages": list(body.get("messages") or (base.messages if base else ())),
            "licenses": [*(base.licenses if base else ()), *licenses],
            "projectors": [str(p) for p in (base.projectors if base else ())],
        }
        text = modelfile.render(source, **wanted)
        _check_same(text, source, wanted)
        carried = {key: hashlib.sha256(data).hexdigest() for key, data in (vectors or {}).items()}
        inherited = {key: path.stem for key, path in (base.vectors if base else {}).items()}
        head = "".join(f"# steer-vector {key} sha256:{digest}\n" for key, digest in {**inherited, **carried}.items())
        try:
            for key, data in (vectors or {}).items():
                self.vector_path(carried[key]).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.vector_path(carried[key]), data)
            self.root.mkdir(parents=True, exist_ok=True)
            write_atomically(self.modelfile_path(name), (head + text).encode())
        except OSError as error:
            raise EngineError(f"{name} cannot be stored in {self.root}: {error.strerror or error}") from None

    def _base(self, body: Mapping[str, Any]) -> tuple[Model | None, str]:
        files = body.get("files") or {}
        if files:
            if len(files) > 1:
                raise BadRequest("without Ollama a model is made from one GGUF file")
            return None, self._relative(next(iter(files.values())))
        source = body.get("from")
        if not isinstance(source, str) or not source:
            raise BadRequest("neither 'from' or 'files' was specified")
        base = self.get(source)
        try:
            inside = base.gguf.relative_to(self.root).as_posix()
            return base, f"./{inside}"
        except ValueError:
            return base, str(base.gguf)

    def _relative(self, digest: Any) -> str:
        path = self.blob_path(str(digest))
        if not path.is_file():
            raise BadRequest(f"the blob {str(digest)[:80]} was not uploaded")
        return f"./blobs/{path.name}"

    def copy(self, source: str, target: Name) -> None:
        """Raises NotFound, or EngineError when the folder cannot be written."""
        model = self.get(source)
        path = self.modelfile_path(model.name)
        try:
            text = path.read_text("utf-8", errors="replace") if path.is_file() else f"FROM {str(model.name)}\n"
            write_atomically(self.modelfile_path(target), text.encode())
        except OSError as error:
            raise EngineError(f"{target} cannot be stored in {self.root}: {error.strerror or error}") from None

    def delete(self, text: str) -> None:
        """Remove a model that was created here, and the uploads that only it used. GGUFs of the folder are not ours to delete.

        Raises:
            NotFound: there is no such model.
            BadRequest: it is a GGUF of the folder.
        """
        model = self.get(text)
        path = next((p for p in self._modelfiles() if _same(unquote(p.stem), model.name)), None)
        if path is None:
            raise BadRequest(f"{str(model.name)!r} is the file {model.gguf}: delete it yourself if that is what you want")
        try:
            text = path.read_text("utf-8", errors="replace")
            path.unlink()
            self._collect(text)
        except OSError as error:
            raise EngineError(f"{path} cannot be deleted: {error.strerror or error}") from None

    def _collect(self, deleted: str) -> None:
        """Remove the uploads that a deleted Modelfile names and no other does."""
        texts = "".join(p.read_text("utf-8", errors="replace") for p in self._modelfiles())
        for folder, mark in (("blobs", "{0.name}"), ("vectors", "{0.stem}")):
            for path in (self.root / folder).glob("*"):
                name = mark.format(path)
                if not path.name.startswith(".") and name in deleted and name not in texts:
                    path.unlink()


def _check_same(text: str, source: str, wanted: Mapping[str, Any]) -> None:
    """Raise BadRequest where a text of the request would end its own quotes, and what follows be read as instructions."""
    parsed = modelfile.parse(text)
    parameters = dict(wanted["parameters"])
    steering = parameters.pop(STEERING, None)
    lists = {"adapters": parsed.adapters, "projectors": parsed.more_sources}
    same = (
        parsed.source == source
        and (parsed.template or "", parsed.system or "") == (wanted["template"] or "", wanted["system"] or "")
        and all([one for one, _ in found] == wanted[key] for key, found in lists.items())
        and parsed.licenses == wanted["licenses"]
        and [(m["role"], m["content"]) for m in parsed.messages]
        == [(m["role"], m.get("content") or "") for m in wanted["messages"]]
        and parsed.parameters == {key: value for key, value in parameters.items() if value != []}
        and "".join(parsed.steering) == (steering or "")
        and not (parsed.drafts or parsed.renderer or parsed.parser or parsed.requires or parsed.ignored)
    )
    if not same:
        raise BadRequest(
            "a text of the model cannot be written into a Modelfile as it is: it has quotes at a line end, or carriage returns"
        )


def _same(text: str, name: Name) -> bool:
    try:
        other = parse_name(text)
    except BadRequest:
        return False
    return [p.lower() for p in other.parts] == [p.lower() for p in name.parts]
