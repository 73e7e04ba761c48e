"""Vector file formats: what a format is, and reading a file of whichever format it has."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import VectorError
from .plugins.manager import PluginWarning, manager
from .vector import SteeringVector
from .vectorfile import read_vector, sniff, write_vector


@dataclass(frozen=True)
class Format:
    """A file format for steering vectors.

    ``suffixes``: as in ``(".safetensors",)``. ``read(path)`` returns a SteeringVector or raises VectorError.
    ``write(vector, path)`` writes atomically; None for a format that is only read. ``sniff(path)`` says, from the first
    bytes of an existing file, whether it could be of this format; it must be quick and must not raise.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Path], SteeringVector]
    write: Callable[[SteeringVector, Path], None] | None
    sniff: Callable[[Path], bool]


#: The package's own format: docs/vector-format.md.
STEER_VECTOR = Format("steer-vector", (".safetensors",), read_vector, write_vector, sniff)


def read_any(path: str | os.PathLike[str]) -> SteeringVector:
    """The vector in a file of any registered format. Raises VectorError when the file is missing or no format fits."""
    path = Path(path)
    if not path.is_file():
        raise VectorError(f"no vector file {path}" + (": it is a folder" if path.is_dir() else ""))
    formats: dict[str, Format] = manager().registry("formats")
    # A format that also knows the suffix goes first, so that its message is the one the user reads.
    for fmt in sorted(formats.values(), key=lambda fmt: path.suffix.lower() not in fmt.suffixes):
        if _could_be(fmt, path):
            return fmt.read(path)
    raise VectorError(f"{path} is in none of the formats that can be read: {', '.join(sorted(formats))}")


def _could_be(fmt: Format, path: Path) -> bool:
    try:
        return bool(fmt.sniff(path))
    except Exception as error:  # a stranger's code, asked about every file: it must not keep others from reading theirs
        warnings.warn(f"the format {fmt.name!r} failed to look at {path}: {error!r:.200}", PluginWarning, stacklevel=3)
        return False
