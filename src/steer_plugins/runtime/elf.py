"""The few facts of a 64-bit ELF file that moving it needs: what it loads, what it is called, where it looks.

Names are changed in place, and only to shorter ones: the string table keeps its size, so nothing else in the file moves.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_NEEDED, _STRTAB, _STRSZ, _SONAME, _RPATH, _RUNPATH = 1, 5, 10, 14, 15, 29
_LOAD, _DYNAMIC = 1, 2


@dataclass
class Dynamic:
    """The dynamic section: ``needed`` library names, ``soname`` and ``runpath`` ("" when absent; DT_RPATH counts too).

    ``yields``: the search path is a DT_RUNPATH, which comes after LD_LIBRARY_PATH (DT_RPATH comes before).
    ``places``: for each of these strings its tag, its text, and the offsets of the tag and of the text in the file.
    """

    needed: list[str] = field(default_factory=list)
    soname: str = ""
    runpath: str = ""
    yields: bool = False
    places: list[tuple[int, str, int, int]] = field(default_factory=list)


def read_dynamic(path: Path) -> Dynamic | None:
    """The dynamic section of a little-endian 64-bit ELF file; None for any other file, and for damaged ones."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(data)
    except (OSError, struct.error, LookupError, ValueError, OverflowError, StopIteration):
        return None


def _parse(data: mmap.mmap) -> Dynamic | None:
    if data[:6] != b"\x7fELF\x02\x01":
        return None
    start, count = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<H", data, 56)[0]
    loads: list[tuple[int, int, int]] = []
    dynamic = (0, 0)
    for index in range(count):
        kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", data, start + 56 * index)
        if kind == _LOAD:
            loads.append((address, size, offset))
        elif kind == _DYNAMIC:
            dynamic = (offset, size)
    if not dynamic[1]:
        return Dynamic()
    entries = [struct.unpack_from("<qQ", data, dynamic[0] + 16 * index) for index in range(dynamic[1] // 16)]
    tags = dict(entries)
    table = next(offset + tags[_STRTAB] - address for address, size, offset in loads if 0 <= tags[_STRTAB] - address < size)
    result = Dynamic()
    for index, (tag, value) in enumerate(entries):
        if tag in (_NEEDED, _SONAME, _RPATH, _RUNPATH):
            if value >= tags[_STRSZ]:
                raise ValueError("a name outside of the string table")
            text = data[table + value : data.find(b"\0", table + value)].decode("utf-8", "surrogateescape")
            result.places.append((tag, text, dynamic[0] + 16 * index, table + value))
            if tag == _NEEDED:
                result.needed.append(text)
            elif tag == _SONAME:
                result.soname = text
            else:
                result.runpath = text
                result.yields = tag == _RUNPATH
    return result


def make_relative(path: Path, names: Mapping[str, str], fallback: str = "$ORIGIN") -> None:
    """Rename the libraries ``names`` (old -> new, not longer) in a file, and drop absolute places from its search path.

    Where no relative place is left, ``fallback`` takes their place. The path then comes before LD_LIBRARY_PATH: a host
    that sets one must not put another ggml beside ours. Raises ValueError when something does not fit.
    """
    dynamic = read_dynamic(path)
    if dynamic is None:
        raise ValueError(f"{path.name} is not a readable 64-bit ELF file")
    changes = []
    for tag, text, tag_offset, offset in dynamic.places:
        if tag in (_RPATH, _RUNPATH):
            kept = [part for part in text.split(":") if part.startswith("$ORIGIN")]
            new = ":".join(kept) or fallback
            changes.append((tag_offset, struct.pack("<q", _RPATH)))
        else:
            new = names.get(text, text)
        if new != text:
            if len(new.encode()) > len(text.encode("utf-8", "surrogateescape")):
                raise ValueError(f"{path.name} has no room for the name {new} where {text!r} stands")
            changes.append((offset, new.encode() + b"\0"))
    if changes:
        with path.open("r+b") as stream:
            for offset, content in changes:
                stream.seek(offset)
                stream.write(content)
