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
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from steer_plugins.atomic import write_atomically
from steer_plugins.errors import EngineError, ModelError, SteerError
from steer_plugins.paths import expand_path

from . import expression, modelfile
from .errors import BadName, BadRequest, NotFound
from .gguf import check_answers, facts_of
from .log import tell_once
from .model import STEERING, Model
from .names import HOST, NAMESPACE, Name, parse_name
from .store import MAX_TEXT_BLOB

MAX_DEPTH = 16
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_VECTOR_LINE = re.compile(r"#\s*steer-vector (\S+) sha256:([0-9a-f]{64})\s*")
_SUFFIX = ".modelfile"
_LATER_SHARD = re.compile(r"-(?!00001-)[0-9]{5}-of-[0-9]{5}\.gguf$", re.IGNORECASE)


class FolderStore:
    """Models of a folder. ``extra``: GGUFs from elsewhere, by name (the demo model)."""

    def __init__(self, root: Path, extra: Mapping[str, Path] | None = None) -> None:
        self.root = expand_path(root).absolute()
        self.extra = dict(extra or {})
        self._writing = threading.Lock()

    # ---- reading ----

    def names(self) -> list[Name]:
        """The models that can answer. Of files that cannot the log tells once."""
        found: dict[str, Name] = {}
        files = [*self.extra.items(), *((p.stem, p) for p in self._ggufs()), *((unquote(p.stem), p) for p in self._modelfiles())]
        for text, path in files:
            try:
                name = parse_name(text)
                key = str(name).lower()
                if key in found and path.suffix.lower() != _SUFFIX:
                    raise ModelError(f"another file means the model {found[key]} too")
                self.get(text)
            except BadName:
                tell_once(f"{path.name} is not served: a model's name has letters, digits, '.', '_' and '-' only, so rename it")
            except SteerError as error:
                tell_once(f"{path.name} is not served: {error}")
            else:
                found.setdefault(key, name)
        return [found[key] for key in sorted(found)]

    def get(self, name: str) -> Model:
        return self._get(name, 0)

    def blob(self, digest: str) -> Path | None:
        path = self.blob_path(digest)
        return path if path.is_file() else None

    def blob_path(self, digest: str) -> Path:
        """Where a blob belongs. Raises BadRequest for what is not a digest."""
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise BadRequest(f"invalid digest format: {digest[:100]!r}")
        return self.root / "blobs" / f"sha256-{match[1]}"

    def _ggufs(self) -> list[Path]:
        """The GGUF files, of a model in several shards the first one."""
        return [p for p in self._files_with(".gguf") if not _LATER_SHARD.search(p.name)]

    def _modelfiles(self) -> list[Path]:
        return self._files_with(_SUFFIX)

    def _files_with(self, suffix: str) -> list[Path]:
        try:
            found = sorted(self.root.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ModelError(f"the folder {self.root} cannot be read: {error.strerror}") from None
        return [p for p in found if p.suffix.lower() == suffix and not p.name.startswith(".") and p.is_file()]

    def _modelfile_of(self, name: Name) -> Path | None:
        """The Modelfile of a model; as in Ollama, the case of names does not matter."""
        return next((p for p in self._modelfiles() if _same(unquote(p.stem), name)), None)

    def _get(self, text: str, depth: int) -> Model:
        name = parse_name(text)
        if depth > MAX_DEPTH:
            raise ModelError(f"the Modelfile of {text!r} is FROM itself: name another model there")
        found = self._modelfile_of(name)
        if found is not None:
            return self._from_modelfile(name, found, depth)
        for path in self._ggufs():
            if _same(path.stem, name):
                return self._plain(name, path)
        for key, path in self.extra.items():
            if _same(key, name):
                return self._plain(name, path)
        raise NotFound(f"model {text!r} not found")

    def _plain(self, name: Name, path: Path) -> Model:
        check_answers(path)
        try:
            stat = path.stat()
        except OSError as error:
            raise ModelError(f"cannot read the model file {path}: {error.strerror}") from None
        digest = hashlib.sha256(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode("utf-8", "replace")).hexdigest()
        return Model(name, path, digest, facts_of(path).size, stat.st_mtime)

    def _from_modelfile(self, name: Name, path: Path, depth: int) -> Model:
        try:
            if path.stat().st_size > MAX_TEXT_BLOB:
                raise ModelError(f"{path.name} is too large for a Modelfile")
            text = modelfile.decode(path.read_bytes())
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ModelError(f"{path.name} is not UTF-8: save it as UTF-8") from None
        try:
            parsed = modelfile.parse(text)
        except modelfile.ModelfileError as error:
            raise BadRequest(f"{path.name}: {error}") from None
        base = self._source(name, parsed.source, depth)
        licenses = (*base.licenses, *parsed.licenses)
        terms = expression.combine_lines(base.terms, parsed.steering)
        carried = [one for one in map(expression.of_license, parsed.licenses) if one is not None]
        for one in carried:
            terms = expression.combine(terms, one)
        head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())  # below, it may be a text's own line
        vectors = {m[1]: self.vector_path(m[2]) for m in map(_VECTOR_LINE.fullmatch, head) if m}
        return Model(
            name=name,
            gguf=base.gguf,
            digest=hashlib.sha256((base.digest + text).encode()).hexdigest(),
            size=base.size,
            modified=path.stat().st_mtime,
            parameters={**base.parameters, **parsed.parameters},
            terms=terms,
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
        path = self._path(source) if re.search(r"[/\\]|^~|\.gguf$", source, re.IGNORECASE) else None
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
        path = self._path(source)
        if not path.is_file():
            raise ModelError(f"the file {source!r} is missing in {self.root}")
        return path

    def _path(self, source: str) -> Path:
        """The file that a Modelfile means."""
        return self.root / expand_path(source)

    # ---- writing ----

    def vector_path(self, digest: str) -> Path:
        """Where a carried vector is."""
        return self.root / "vectors" / f"{digest}.safetensors"

    def new_blob(self) -> Path:
        """A file to write an upload into, beside where it will be."""
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)
        return self.root / "blobs" / f".upload-{secrets.token_hex(8)}"

    def modelfile_path(self, name: Name) -> Path:
        """The file of a created model: that which is there, else a new one."""
        short = str(name).removesuffix(":latest")
        return self._modelfile_of(name) or self.root / f"{quote(short, safe='')}{_SUFFIX}"

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
            "adapters": [*map(self._inside, base.adapters if base else ()), *adapters],
            "parameters": parameters,
            "messages": list(body.get("messages") or (base.messages if base else ())),
            "licenses": [*(base.licenses if base else ()), *licenses],
            "projectors": [*map(self._inside, base.projectors if base else ())],
        }
        inherited = {key: path.stem for key, path in (base.vectors if base else {}).items()}
        self._write(name, source, wanted, inherited, vectors or {})

    def _write(
        self,
        name: Name,
        source: str,
        wanted: Mapping[str, Any],
        inherited: Mapping[str, str],
        vectors: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write a Modelfile in full. ``inherited``: digests of vectors that are here. Raises BadRequest or EngineError."""
        text = modelfile.render(source, **wanted)
        _check_same(text, source, wanted)
        carried = {hashlib.sha256(data).hexdigest(): (key, data) for key, data in (vectors or {}).items()}
        named = {**inherited, **{key: digest for digest, (key, _) in carried.items()}}
        head = "".join(f"# steer-vector {key} sha256:{digest}\n" for key, digest in named.items())
        with self._writing:
            try:
                for digest, (_, data) in carried.items():
                    self.vector_path(digest).parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(self.vector_path(digest), data)
                self.root.mkdir(parents=True, exist_ok=True)
                path = self.modelfile_path(name)
                before = path.read_bytes() if path.is_file() else b""
                write_atomically(path, (head + text).encode())
                self._collect(before)
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
        return base, self._inside(base.gguf)

    def _inside(self, path: Path) -> str:
        """A file as a Modelfile names it: from the folder where it is in there, so that the folder can be moved."""
        return f"./{path.relative_to(self.root).as_posix()}" if path.is_relative_to(self.root) else str(path)

    def _relative(self, digest: Any) -> str:
        path = self.blob_path(str(digest))
        if not path.is_file():
            raise BadRequest(f"the blob {str(digest)[:80]} was not uploaded")
        return f"./blobs/{path.name}"

    def copy(self, source: str, target: Name) -> None:
        """Write a model under another name, in full: what its Modelfile says about itself would mean something else there.

        Raises:
            NotFound: there is no such model.
            EngineError: the folder cannot be written.
        """
        model = self.get(source)
        if _same(str(target), model.name):
            return  # as Ollama does
        steering = {} if model.steering is None else {STEERING: model.steering}
        wanted = {
            "template": model.template,
            "system": model.system,
            "adapters": [*map(self._inside, model.adapters)],
            "parameters": {**model.parameters, **steering},
            "messages": list(model.messages),
            "licenses": [one for one in model.licenses if expression.of_license(one) is None],
            "projectors": [*map(self._inside, model.projectors)],
        }
        self._write(target, self._inside(model.gguf), wanted, {key: path.stem for key, path in model.vectors.items()})

    def delete(self, text: str) -> None:
        """Remove a model that was created here, and the uploads that only it used. GGUFs of the folder are not ours to delete.

        Raises:
            NotFound: there is no such model.
            BadRequest: it is a GGUF of the folder.
        """
        with self._writing:
            path = self._modelfile_of(parse_name(text))
            if path is None:
                model = self.get(text)
                raise BadRequest(f"{str(model.name)!r} is the file {model.gguf}: delete it yourself if that is what you want")
            try:
                before = path.read_bytes()
                path.unlink()
                self._collect(before)
            except OSError as error:
                raise EngineError(f"{path} cannot be deleted: {error.strerror or error}") from None

    def _collect(self, before: bytes) -> None:
        """Remove the uploads that a Modelfile which is gone names, and that nothing else here uses.

        The other Modelfiles are searched as bytes, also those that cannot be read as Modelfiles, and UTF-16 without its zeros.
        """
        deleted = _searchable(before)
        kept = b"\n".join(_searchable(p.read_bytes()) for p in self._modelfiles())
        linked = {p.resolve() for p in self._ggufs()}
        for folder, mark in (("blobs", "{0.name}"), ("vectors", "{0.stem}")):
            for path in (self.root / folder).glob("*"):
                name = mark.format(path).lower().encode("utf-8", "replace")
                if not path.name.startswith(".") and name in deleted and name not in kept and path.resolve() not in linked:
                    path.unlink()


def _searchable(raw: bytes) -> bytes:
    return raw.replace(b"\0", b"").lower()


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
