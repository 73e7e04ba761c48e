"""Vector file formats: what a format is, and reading a file of whichever format it has."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import VectorError
from ..plugins.manager import PluginWarning, manager
from ..steering.vector import OPS, SITES, ModelIdentity, SteeringVector
from .vectorfile import read_vector, sniff, write_vector


@dataclass(frozen=True)
class Facts:
    """What a user knows about a file that the file does not say; None: not known. Options of ``steer convert``.

    ``at``: which layers the rows of a bare array are for: ``"blocks"`` (row 0 is layer 0), ``"embedding"`` (row 0 is the
    embedding, row 1 is layer 0), or one layer for each row. ``gguf_layers``: ``"block"`` or ``"plus-one"``, how the
    writer of a GGUF control vector numbered them. ``feature``: row of an SAE's decoder. ``key``: which array of several.
    ``identity``: the model that the file is read for; it may settle ``at`` and the shape, and is not stored.
    """

    at: str | tuple[int, ...] | None = None
    gguf_layers: str | None = None
    feature: int | None = None
    key: str | None = None
    op: str | None = None
    site: str | None = None
    scope: str | None = None
    identity: ModelIdentity | None = None


#: Nothing is known beyond the file.
NO_FACTS = Facts()


@dataclass(frozen=True)
class Limits:
    """What a file of some format can hold; the default is everything that a SteeringVector of plain directions can say.

    ``scopes``: None for any. ``one_site``, ``one_layer``: a file is for one only. ``identity``: it names the model well
    enough to refuse others; ``notes``: it keeps name and provenance. ``columns``: it holds responsive vectors.
    """

    ops: tuple[str, ...] = OPS
    sites: tuple[str, ...] = SITES
    first_layer: int = 0
    scopes: tuple[str, ...] | None = None
    calibration: bool = True
    one_site: bool = False
    one_layer: bool = False
    identity: bool = True
    notes: bool = True
    columns: bool = False


@dataclass(frozen=True)
class Format:
    """A file format for steering vectors.

    ``suffixes``: as in ``(".safetensors",)``. ``read(path)`` returns a SteeringVector or raises VectorError.
    ``write(vector, path)`` writes atomically; None for a format that is only read. ``sniff(path)`` says, from the first
    bytes of an existing file, whether it could be of this format; it must be quick and must not raise.

    ``read_with(path, facts)``: the same as ``read``, for a format that leaves something open; ``facts`` names those that
    it takes. ``limits``: what can be written; ``write`` must refuse the rest.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Path], SteeringVector]
    write: Callable[[SteeringVector, Path], None] | None
    sniff: Callable[[Path], bool]
    read_with: Callable[[Path, Facts], SteeringVector] | None = None
    facts: tuple[str, ...] = ()
    limits: Limits = Limits()


#: The package's own format: docs/vector-format.md.
STEER_VECTOR = Format("steer-vector", (".safetensors",), read_vector, write_vector, sniff, limits=Limits(columns=True))


def read_any(path: str | os.PathLike[str], facts: Facts | None = None) -> SteeringVector:
    """The vector in a file of any registered format, read with what is known beyond the file, if anything.

    Raises VectorError when the file is missing, no format fits, or the file leaves something open.
    """
    path = Path(path)
    fmt = format_of(path)
    return fmt.read(path) if facts is None or fmt.read_with is None else fmt.read_with(path, facts)


def format_of(path: str | os.PathLike[str]) -> Format:
    """The registered format that a file is in, from its first bytes. Raises VectorError."""
    path = Path(path)
    if not path.is_file():
        raise VectorError(f"no vector file {path}" + (": it is a folder" if path.is_dir() else ""))
    formats: dict[str, Format] = manager().registry("formats")
    # A format that also knows the suffix goes first, so that its message is the one the user reads.
    for fmt in sorted(formats.values(), key=lambda fmt: path.suffix.lower() not in fmt.suffixes):
        if _could_be(fmt, path):
            return fmt
    raise VectorError(f"{path} is in none of the formats that can be read: {', '.join(sorted(formats))}")


def _could_be(fmt: Format, path: Path) -> bool:
    try:
        return bool(fmt.sniff(path))
    except Exception as error:  # a stranger's code, asked about every file: it must not keep others from reading theirs
        warnings.warn(f"the format {fmt.name!r} failed to look at {path}: {error!r:.200}", PluginWarning, stacklevel=3)
        return False
