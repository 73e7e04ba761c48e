"""Hidden states of one layer on disk, written as they are read: memory stays flat, and Ctrl-C loses nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..atomic import write_atomically
from ..engine.base import Engine
from ..errors import DataError

WINDOW = 128
"""Tokens of a window: long enough for context, short enough for a batch of many."""

SINK_FACTOR = 3.0
"""A token whose state is longer than this many medians is an attention sink (so is position 0): it is left out."""

_STATE = "corpus.json"
_BATCH = 16
_MAX_TEXT_BYTES = 256 << 20


@dataclass(frozen=True)
class Corpus:
    """Rows of one layer in a folder.

    Attributes:
        rows: float16 [n, n_embd], memory-mapped.
        tokens: int32 [n], the token of each row; ``windows``: int32 [n], which window it is from; ``places``: int32 [n], its
            position there.
        window_tokens: int32 [n_windows, WINDOW], all tokens of each window, -1 after its end.
        median_norm: median length of a row.
        sha256: hash of the windows' tokens.
        layer: 0-based.
    """

    rows: npt.NDArray[np.float16]
    tokens: npt.NDArray[np.int32]
    windows: npt.NDArray[np.int32]
    places: npt.NDArray[np.int32]
    window_tokens: npt.NDArray[np.int32]
    median_norm: float
    sha256: str
    layer: int

    def split(self, share: float = 1 / 12) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Indices of the rows to train on and of those held out: whole windows, spread evenly, at least one of each."""
        n = len(self.window_tokens)
        every = max(2, round(1 / share))
        held = np.arange(n) % every == every - 1
        if n > 1 and not held.any():
            held[-1] = True
        mask = held[self.windows]
        return np.flatnonzero(~mask), np.flatnonzero(mask)


def windows_of(token_lists: Iterable[Sequence[int]], limit: int, bos: Sequence[int] = ()) -> list[list[int]]:
    """Token lists cut into windows of at most :data:`WINDOW`, each behind ``bos``, until ``limit`` tokens are had.

    Pieces of fewer than 16 tokens are left out: their states are mostly those of a text's beginning.
    """
    result: list[list[int]] = []
    total, step = 0, WINDOW - len(bos)
    for tokens in token_lists:
        for first in range(0, len(tokens), step):
            part = [*bos, *tokens[first : first + step]]
            if len(part) < 16:
                continue
            result.append(part)
            total += len(part)
            if total >= limit:
                return result
    return result


def read_text_files(paths: Sequence[Path]) -> Iterator[str]:
    """Texts of .txt files (parted by blank lines) and of .jsonl files (on each line a string, or an object with ``text``).

    Raises DataError that names the file and line.
    """
    for path in paths:
        try:
            if path.stat().st_size > _MAX_TEXT_BYTES:
                raise DataError(f"{path} is larger than {_MAX_TEXT_BYTES >> 20} MiB: give a part of it")
            content = path.read_text("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path} is not UTF-8 text: convert it first") from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        if path.suffix.lower() != ".jsonl":
            yield from (part for part in content.split("\n\n") if part.strip())
            continue
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"{path}:{number} is not JSON") from None
            text = value.get("text") if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise DataError(f"{path}:{number} is neither a text nor an object with 'text'")
            yield text


def collect(
    engine: Engine,
    windows: Sequence[Sequence[int]],
    layer: int,
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Read the states of windows after block ``layer`` into ``folder``, going on where an earlier run was interrupted.

    ``progress`` gets (tokens read, tokens in all). Raises DataError if there is nothing to read or the disk is full.
    """
    if not windows:
        raise DataError("there is no text to read: give --text FILE with more than a few words")
    padded = np.full((len(windows), WINDOW), -1, np.int32)
    for i, window in enumerate(windows):
        padded[i, : len(window)] = window
    digest = hashlib.sha256(padded.tobytes()).hexdigest()
    state_file, rows_file = folder / _STATE, folder / "rows.f16"
    about_file = folder / "about.i32"  # token, window, place of each row
    wanted = {"layer": layer, "sha256": digest, "n_embd": engine.info.n_embd, "model": engine.info.identity.key}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = _load_state(state_file)
        if {key: state.get(key) for key in wanted} != wanted:
            state = {**wanted, "windows": 0, "rows": 0}
        n_embd, total = engine.info.n_embd, sum(map(len, windows))
        with open(rows_file, "r+b" if rows_file.exists() else "w+b") as rows, _open(about_file) as about:
            # what an interrupted run wrote after its last note is not counted
            rows.truncate(state["rows"] * n_embd * 2)
            about.truncate(state["rows"] * 12)
            rows.seek(0, 2)
            about.seek(0, 2)
            for first in range(state["windows"], len(windows), _BATCH):
                part = [list(map(int, w)) for w in windows[first : first + _BATCH]]
                found = engine.read(part, layers=[layer], positions="all")
                for i, one in enumerate(found):
                    kept = one.values[layer][1:]
                    facts = np.stack([one.tokens[1:], np.full(len(kept), first + i), np.arange(1, len(kept) + 1)], axis=1)
                    rows.write(np.clip(kept, -65504, 65504).astype("<f2").tobytes())
                    about.write(facts.astype("<i4").tobytes())
                    state["rows"] += len(kept)
                state["windows"] = first + len(part)
                rows.flush()
                about.flush()
                write_atomically(state_file, json.dumps(state).encode())
                if progress is not None:
                    progress(sum(map(len, windows[: state["windows"]])), total)
    except OSError as error:
        raise DataError(f"cannot write hidden states to {folder}: {error.strerror or error}") from None
    return _opened(folder, state, padded)


def _opened(folder: Path, state: dict[str, Any], padded: npt.NDArray[np.int32]) -> Corpus:
    n, d = state["rows"], state["n_embd"]
    rows: npt.NDArray[np.float16] = np.memmap(folder / "rows.f16", "<f2", "r", shape=(n, d))
    about = np.fromfile(folder / "about.i32", "<i4").reshape(-1, 3)
    norms = np.concatenate([np.linalg.norm(rows[i : i + 4096].astype(np.float32), axis=1) for i in range(0, n, 4096)])
    median = float(np.median(norms))
    kept = np.flatnonzero(norms <= SINK_FACTOR * median)
    if len(kept) < n:
        rows = rows[kept]
        about = about[kept]
    return Corpus(
        rows=rows,
        tokens=about[:, 0],
        windows=about[:, 1],
        places=about[:, 2],
        window_tokens=padded,
        median_norm=float(np.median(norms[kept])),
        sha256=state["sha256"],
        layer=state["layer"],
    )


def _open(path: Path) -> Any:
    return open(path, "r+b" if path.exists() else "w+b")


def _load_state(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
