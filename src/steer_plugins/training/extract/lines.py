"""JSON lines that people write: read within bounds, and one sentence for what is wrong with a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ...errors import DataError

MAX_FILE_BYTES = 64_000_000
MAX_LINE_BYTES = 1_000_000


@dataclass(frozen=True)
class Line:
    """A line of a JSONL file that is not blank; ``number`` counts from 1."""

    source: str
    number: int
    text: str

    def refuse(self, what: str) -> NoReturn:
        """Raises the DataError about this line: file and number, then ``what``."""
        raise DataError(f"{self.source}, line {self.number}: {what}")

    def json(self) -> Any:
        """The JSON value. Raises DataError where there is none, and for an object that has a key twice."""
        try:
            return json.loads(self.text, object_pairs_hook=self._object)
        except json.JSONDecodeError as error:
            self.refuse(f"is not JSON (column {error.colno}, {error.msg}): write one object on each line")
        except (RecursionError, ValueError):  # nested without end, or a number with thousands of digits
            self.refuse("is not JSON that can be read: it should hold a flat JSON object")

    def _object(self, items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            keys = [key for key, _ in items]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            self.refuse(f'has the key "{twice[:60]}" twice: keep one of them')
        return found


def read_file(path: str | Path, what: str) -> bytes:
    """The bytes of a JSONL file. ``what`` it is ("the pairs file") stands in the DataError for one that cannot be read."""
    source, file = str(path), Path(path)
    try:
        if not file.is_file():
            how = "is not a file" if file.exists() else "does not exist"
            raise DataError(f"{what} {source} {how}: give the path of a JSONL file")
        with file.open("rb") as opened:
            raw = opened.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{what} {source!r} cannot be read ({reason}): check its path and permissions") from None
    if len(raw) > MAX_FILE_BYTES:
        raise DataError(f"{what} {source} is larger than {MAX_FILE_BYTES // 1_000_000} MB: take a part of it")
    return raw


def lines_of(raw: bytes, source: str) -> Iterator[Line]:
    """The lines that are not blank. Raises DataError for one that is too long or not UTF-8."""
    for number, data in enumerate(raw.split(b"\n"), start=1):
        line = Line(source, number, "")
        if len(data) > MAX_LINE_BYTES:
            line.refuse(f"is longer than {MAX_LINE_BYTES // 1_000_000} MB: shorten its texts")
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            line.refuse(f"is not UTF-8 (byte {error.start}): save the file as UTF-8")
        if text:
            yield Line(source, number, text)
