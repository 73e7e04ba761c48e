"""Zip archives from strangers (.npz, .pt), opened with bounds, and the header of .npy arrays without evaluating anything."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from ...errors import VectorError
from .common import MAX_BYTES, clip

_MAX_MEMBERS = 10_000
#: Weights hardly shrink when they are packed: what grows more than this is not an array.
_MAX_RATIO = 30
#: What zipfile raises for archives that are damaged or lie about themselves.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError, OverflowError)
_NPY = re.compile(
    rb"\{'descr': '([<>|][fiu][1248])', 'fortran_order': (True|False), 'shape': \(((?:[0-9]{1,12}, ?)*(?:[0-9]{1,12})?)\), \} *\n"
)


class Archive:
    """A zip file of stored or deflated members with different names. Use as a context manager."""

    def __init__(self, path: Path, most: int = MAX_BYTES) -> None:
        """``most``: bytes that all members may have together, unpacked. Raises VectorError, OSError."""
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except _ZIP_ERRORS:
            raise VectorError("it is not a zip archive, or is truncated") from None
        try:
            infos = self._zip.infolist()
            self.sizes = {info.filename: info.file_size for info in infos}
            if len(infos) > _MAX_MEMBERS or len(self.sizes) != len(infos):
                raise VectorError("its archive has too many members, or two of the same name")
            total = sum(self.sizes.values())
            if total > most or total > max(MAX_BYTES, _MAX_RATIO * path.stat().st_size):
                raise VectorError(f"its archive unpacks to {total} bytes, more than a file like it can have")
            if any(i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or i.flag_bits & 1 for i in infos):
                raise VectorError("its archive is encrypted, or packed in another way than deflate")
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._zip.close()

    def whole(self, name: str, most: int = MAX_BYTES) -> bytes:
        """The whole of a member, its checksum compared. Raises VectorError."""
        if self.sizes.get(name, most + 1) > most:
            raise VectorError(f"its archive lacks {clip(name)}, or it is too large")
        return self.part(name, 0, self.sizes[name])

    def part(self, name: str, start: int, count: int) -> bytes:
        """``count`` bytes from ``start``, without holding what comes before them. Raises VectorError."""
        try:
            with self._zip.open(name) as member:
                _skip(member, start)
                # One byte beyond the end makes zipfile compare the checksum; more than is asked for is never kept.
                data = member.read(count)
                if start + count == self.sizes[name]:
                    data += member.read(1)
        except _ZIP_ERRORS:
            raise VectorError(f"its archive is damaged or truncated at {clip(name)}") from None
        if len(data) != count:
            raise VectorError(f"its archive is damaged: {clip(name)} is not as long as it says")
        return data


def _skip(member: IO[bytes], count: int) -> None:
    while count > 0:
        chunk = member.read(min(count, 1 << 20))
        if not chunk:
            return
        count -= len(chunk)


class NpyArray:
    """The header of a member ``NAME.npy``: ``dtype``, ``shape``, and where the data starts."""

    def __init__(self, archive: Archive, member: str) -> None:
        """Raises VectorError for what is not a plain array of numbers: objects, records, strings, complex numbers."""
        self.archive, self.member = archive, member
        size = archive.sizes[member]
        start = archive.part(member, 0, min(size, 4096))
        if start[:6] != b"\x93NUMPY" or len(start) < 12 or start[6] not in (1, 2, 3):
            raise VectorError(f"its {clip(member)} is not a .npy array")
        width = 2 if start[6] == 1 else 4
        length = int.from_bytes(start[8 : 8 + width], "little")
        match = _NPY.fullmatch(start[8 + width : 8 + width + length])
        if not match:
            raise VectorError(f"its {clip(member)} is not a plain array of numbers")
        self.dtype = np.dtype(match[1].decode())
        self.fortran = match[2] == b"True"
        self.shape = tuple(int(n) for n in match[3].replace(b" ", b"").split(b",") if n)
        self.data_start = 8 + width + length
        n_items = 1
        for n in self.shape:
            n_items *= n
        if n_items * self.dtype.itemsize != size - self.data_start:
            raise VectorError(f"its {clip(member)} says shape {list(self.shape)}, which its data do not have")

    def read(self) -> np.ndarray:
        """The array as it is stored. Raises VectorError."""
        data = self.archive.whole(self.member)[self.data_start :]
        return np.frombuffer(data, self.dtype).reshape(self.shape, order="F" if self.fortran else "C")

    def row(self, index: int) -> np.ndarray:
        """One row of a 2-D array in C order, without reading the others into memory. Raises VectorError."""
        n_bytes = self.shape[1] * self.dtype.itemsize
        if n_bytes > MAX_BYTES:
            raise VectorError(f"its {clip(self.member)} has rows that are too long for a vector")
        return np.frombuffer(self.archive.part(self.member, self.data_start + index * n_bytes, n_bytes), self.dtype)
