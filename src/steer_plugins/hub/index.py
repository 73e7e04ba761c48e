"""The index: one JSON file that is read line by line, and the table that a search looks into.

``index.json`` is one JSON object, laid out so that a line is an entry: its head is the first line, each entry a line, sorted by
name, version and model. So a difference between two versions is a line, and memory does not grow with the number of entries.
What was read once is kept as a table beside the record; searching and pulling never read the index again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..errors import HubError
from ..steering.vector import ModelIdentity
from .schema import SortKey, canonical, check_entry, check_header, model_of, parse_json, sort_key, version_key

MAX_INDEX_BYTES = 512 << 20
MAX_HEAD_BYTES = 2 << 20
MAX_LINE_BYTES = 32 << 10

_OPENING, _CLOSING = ',"entries":[\n', "]}\n"


@dataclass
class Index:
    """An index as it is read: its head, and its entries one after the other (the file is closed after the last)."""

    header: dict[str, Any]
    lines: Iterator[tuple[str, str]]
    """Of each entry: what to call it in a sentence, and its JSON, not looked at yet."""
    file: TextIO

    @property
    def entries(self) -> Iterator[dict[str, Any]]:
        """The entries, checked, in order. Raises HubError for the first that is wrong."""
        last: SortKey | None = None
        for where, line in self.lines:
            entry = check_entry(parse_json(line, where), where)
            key = sort_key(entry)
            _check_order(last, key, where)
            last = key
            yield entry

    def close(self) -> None:
        """Stop reading."""
        self.file.close()


def read_index(path: Path, what: str) -> Index:
    """Open an index. Raises HubError for a head that is wrong, and while reading for the first entry that is."""
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise HubError(f"{what} is larger than {MAX_INDEX_BYTES >> 20} MiB: it has to be split")
        file = path.open("r", encoding="utf-8", errors="strict", newline="\n")
    except OSError as error:
        raise HubError(f"cannot read {what}: {error.strerror or error}") from None
    try:
        line = _line(file, MAX_HEAD_BYTES, what)
        if not line.endswith(_OPENING):
            raise HubError(f"{what} is not an index of a hub: its first line does not end with {_OPENING.strip()}")
        header = check_header(parse_json(line[: -len(_OPENING)] + "}", what), what)
    except BaseException:
        file.close()
        raise
    return Index(header, _lines(file, header["count"], what), file)


def _line(file: Any, most: int, what: str) -> str:
    try:
        line = file.readline(most + 1)
    except (UnicodeDecodeError, OSError):
        raise HubError(f"{what} is not UTF-8") from None
    if len(line) > most:
        raise HubError(f"{what} has a line of more than {most} characters")
    return str(line)


def _lines(file: Any, count: int, what: str) -> Iterator[tuple[str, str]]:
    with file:
        for number in range(1, count + 1):
            line, where = _line(file, MAX_LINE_BYTES, what), f"{what}, entry {number}"
            ending = ",\n" if number < count else "\n"
            if not line.endswith(ending):
                raise HubError(f"{where}: the line does not end as it should; the index may be cut off")
            yield where, line[: -len(ending)]
        if _line(file, 1024, what) != _CLOSING or _line(file, 1024, what):
            raise HubError(f"{what} has more or fewer than the {count} entries that it claims")


def _check_order(last: SortKey | None, key: SortKey, where: str) -> None:
    if last is not None and key <= last:
        raise HubError(f"{where} ({key[0]} {'.'.join(map(str, key[1]))}) is out of order or there twice")


def write_index(path: Path, header: dict[str, Any], lines: Iterable[str]) -> None:
    """Write an index to a new file; ``lines``: the JSON of its ``header["count"]`` entries, in order. Raises OSError."""
    count = header["count"]
    with path.open("x", encoding="ascii", newline="\n") as file:
        file.write(canonical(header)[:-1] + _OPENING)
        number = 0
        for number, line in enumerate(lines, start=1):  # noqa: B007
            file.write(line + (",\n" if number < count else "\n"))
        file.write(_CLOSING)
        file.flush()
        os.fsync(file.fileno())
    if number != count:
        raise AssertionError(f"{number} entries, not {count}")


def inserted(lines: Iterable[str], at: int, new: str) -> Iterator[str]:
    """The lines with a new one as number ``at``."""
    rest = iter(lines)
    yield from itertools.islice(rest, at)
    yield new
    yield from rest


# ---- the table ----

_SCHEMA = """
CREATE TABLE head(json TEXT NOT NULL);
CREATE TABLE entries(id INTEGER PRIMARY KEY, name TEXT NOT NULL, version TEXT NOT NULL, model TEXT NOT NULL, kind TEXT NOT NULL,
  newest INTEGER NOT NULL, text TEXT NOT NULL);
CREATE TABLE bodies(id INTEGER PRIMARY KEY, json TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Listed:
    """An entry of a table. ``model``: its key, "" for what fits any. ``json``: the entry itself."""

    name: str
    version: str
    model: str
    kind: str
    json: str

    @property
    def sort_key(self) -> SortKey:
        """As :func:`..schema.sort_key` of the entry."""
        return self.name, version_key(self.version), self.model

    def entry(self) -> dict[str, Any]:
        """What the index says of it."""
        return dict(json.loads(self.json))


def build_table(index: Index, table: Path, before: Path | None = None) -> None:
    """Make the table of an index, atomically. Raises HubError for a wrong entry, OSError.

    ``before``: the table of an older state; entries that are the same there to the letter are not checked again.
    """
    new = table.with_name(f".{table.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with contextlib.closing(sqlite3.connect(new)) as base:
            base.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;" + _SCHEMA)
            base.execute("INSERT INTO head VALUES (?)", (canonical(index.header),))
            with _rows_of(before) as known:
                base.executemany("INSERT INTO entries VALUES (?,?,?,?,?,?,?)", _rows(_checked(index.lines, known), base))
            base.execute("CREATE INDEX by_name ON entries(name)")
            base.commit()
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.replace(new, table)
    except sqlite3.Error as error:
        raise HubError(f"cannot write {table}: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


@contextlib.contextmanager
def _rows_of(table: Path | None) -> Iterator[Iterator[tuple[Listed, str]]]:
    """All rows of a table in order, and what a search looks into; none of a table that is missing."""
    if table is None or not table.is_file():
        yield iter(())
        return
    with _connected(table) as base:
        yield ((Listed(*row[:-1]), row[-1]) for row in base.execute(f"SELECT {_FIELDS}, text FROM {_BOTH} ORDER BY id"))


def _checked(lines: Iterator[tuple[str, str]], known: Iterator[tuple[Listed, str]]) -> Iterator[tuple[Listed, str]]:
    """The row of each line, and what a search looks into. Both sides are sorted, so one look at each is enough."""
    last: SortKey | None = None
    old = next(known, None)
    for where, line in lines:
        if old is not None and old[0].json == line:
            row = old
            old = next(known, None)
        else:
            entry = check_entry(parse_json(line, where), where)
            model = model_of(entry)
            key = "" if model is None else model.key
            row = Listed(entry["name"], entry["version"], key, entry["kind"], line), haystack(entry, model)
            while old is not None and old[0].sort_key <= row[0].sort_key:
                old = next(known, None)
        _check_order(last, row[0].sort_key, where)
        last = row[0].sort_key
        yield row


def _rows(rows: Iterator[tuple[Listed, str]], base: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    """What the table of entries holds; the last version of a name for a model is its newest, since entries are sorted."""
    name = ""
    newest: dict[str, int] = {}
    pending: list[tuple[int, Listed, str]] = []

    def flush() -> Iterator[tuple[Any, ...]]:
        for id, row, text in pending:
            yield id, row.name, row.version, row.model, row.kind, int(newest[row.model] == id), text

    for id, (row, text) in enumerate(rows):
        if row.name != name:
            yield from flush()
            name, newest, pending = row.name, {}, []
        newest[row.model] = id
        pending.append((id, row, text))
        base.execute("INSERT INTO bodies VALUES (?,?)", (id, row.json))
    yield from flush()


def haystack(entry: dict[str, Any], model: ModelIdentity | None) -> str:
    """What a search looks into, in lower case."""
    trait = entry["trait"] or {}
    parts = [entry["name"], entry["description"], entry["kind"], entry["base_model"], entry["licence"], *entry["tags"]]
    parts += [*trait.values(), *([model.label] if model is not None else [])]
    return "\n".join(part for part in parts if part).lower()


_FIELDS, _BOTH = "name, version, model, kind, json", "entries JOIN bodies USING (id)"


@contextlib.contextmanager
def _connected(table: Path) -> Iterator[sqlite3.Connection]:
    try:
        if not table.is_file():
            raise HubError(f"the table {table.name} of an index is missing: make it anew with: steer hub update")
        with contextlib.closing(sqlite3.connect(f"{table.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as base:
            yield base
    except sqlite3.Error:
        raise HubError(f"the table {table.name} of an index is damaged: make it anew with: steer hub update") from None


def head_of(table: Path) -> dict[str, Any]:
    """The head of the index that a table was made of. Raises HubError."""
    with _connected(table) as base:
        return dict(json.loads(base.execute("SELECT json FROM head").fetchone()[0]))


def search(
    table: Path, words: Iterable[str], *, model: str | None = None, kind: str | None = None, limit: int = 50
) -> tuple[list[Listed], int]:
    """The newest versions that hold all the words, and how many there are in all.

    What is for ``model`` (a key) comes first, then what fits any; a word in the name counts before one in the description.
    """
    words = [word.lower() for word in words]
    where = ["newest = 1", *("instr(text, ?) > 0" for _ in words)]
    given: list[Any] = [*words]
    if kind is not None:
        where.append("kind = ?")
        given.append(kind)
    order = ["model = ? DESC", "model = '' DESC"] if model is not None else []
    order += [*("instr(name, ?) > 0 DESC" for _ in words), "id"]  # entries are numbered by name
    named = [*([model] if model is not None else []), *words]
    # one look at each entry: the count comes with the first row
    query = f"SELECT id, count(*) OVER () AS total FROM entries WHERE {' AND '.join(where)} ORDER BY {', '.join(order)} LIMIT ?"
    with _connected(table) as base:
        hits = base.execute(query, [*given, *named, limit]).fetchall()
        rows = [base.execute(f"SELECT {_FIELDS} FROM {_BOTH} WHERE id = ?", (id,)).fetchone() for id, _ in hits]
    return [Listed(*row) for row in rows], int(hits[0][1]) if hits else 0


def named(table: Path, name: str) -> list[Listed]:
    """All versions of a name for all models, the oldest first. Raises HubError."""
    with _connected(table) as base:
        rows = base.execute(f"SELECT {_FIELDS} FROM {_BOTH} WHERE name = ? ORDER BY id", (name,)).fetchall()
    return [Listed(*row) for row in rows]
