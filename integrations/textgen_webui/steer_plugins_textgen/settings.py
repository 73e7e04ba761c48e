"""What the user has set, kept in ``user_data/steering/settings.json``: the webui saves no lists, and forgets at restarts."""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from steer_plugins.atomic import write_atomically
from steer_plugins.errors import SpecError, SteerError
from steer_plugins.steering.grammar import TermSpec, format_terms, from_json

MAX_FILE = 1 << 24
MAX_PRESETS = 500
MAX_CHARACTERS = 1000
MAX_CHARACTER = 256
"""Characters of a character's name."""
SAVE_AFTER = 0.3
"""Seconds without a change until the file is written: a dragged slider is one change."""

_PRESET = re.compile(r"[^\W_][\w .'()+-]{0,63}")


class Settings:
    """One set for the whole webui. May be used by several threads at once.

    Attributes are read freely and changed by the methods, each of which ends in the file being written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None
        self.on = True
        self.terms: list[TermSpec] = []
        self.api_too = False
        self.cpu_too = False
        self.presets: dict[str, list[TermSpec]] = {}
        self.characters: dict[str, str] = {}
        self.character = ""
        """Whom the chat was with last: reopening the page does not count as a change of character."""
        self.loaded = ""
        """The preset that was loaded or saved last; it may have been changed since."""
        self._own: list[TermSpec] | None = None  # what was set before a character's preset took its place
        self.problem = ""
        self.touched = False
        """Whether the terms have ever been set, here or in an earlier session."""
        self._load()

    # ---- the active steering ----

    @property
    def active(self) -> list[TermSpec]:
        """The terms that act: none while the overall switch is off; those at strength 0 do nothing and are left out."""
        with self._lock:
            return [term for term in self.terms if term.strength != 0.0] if self.on else []

    @property
    def expression(self) -> str:
        """All terms in the common grammar."""
        return format_terms(self.terms)

    def set_terms(self, terms: list[TermSpec]) -> None:
        """Replace the whole list."""
        with self._lock:
            self.terms = list(terms)
            self.touched = True
        self._changed()

    def change_term(self, index: int, **changes: Any) -> None:
        """Change fields of one term; an index beyond the list (a page of long ago) changes nothing.

        Raises SpecError for a strength that is not a finite number: what cannot be read again must not be kept.
        """
        if not math.isfinite(changes.get("strength", 0.0)):
            raise SpecError(f"the strength is {changes['strength']}, not a finite number")
        with self._lock:
            if not 0 <= index < len(self.terms):
                return
            self.terms[index] = replace(self.terms[index], **changes)
        self._changed()

    def set_flag(self, name: str, value: bool) -> None:
        """``on``, ``api_too`` or ``cpu_too``."""
        setattr(self, name, bool(value))
        self._changed()

    # ---- presets ----

    def save_preset(self, name: str) -> str:
        """Keep the terms under a name; returns the name as it is kept. Raises SpecError for a name that is none."""
        self.loaded = self.add_preset(name, self.terms)
        return self.loaded

    def load_preset(self, name: str) -> None:
        """Set the terms of a preset. Raises SpecError when there is none of that name."""
        with self._lock:
            self.set_terms(self.preset(name))
            self.loaded = name

    def add_preset(self, name: str, terms: list[TermSpec]) -> str:
        """Keep these terms under a name; returns the name as it is kept. Raises SpecError for a name that is none."""
        name = check_preset_name(name)
        with self._lock:
            if name not in self.presets and len(self.presets) >= MAX_PRESETS:
                raise SpecError(f"there are {MAX_PRESETS} presets already: delete one first")
            self.presets[name] = list(terms)
        self._changed()
        return name

    def preset(self, name: str) -> list[TermSpec]:
        """The terms of a preset. Raises SpecError when there is none of that name."""
        with self._lock:
            if name not in self.presets:
                known = ", ".join(sorted(self.presets)) or "none"
                raise SpecError(f"there is no preset {name!r:.80}: the presets are {known}")
            return list(self.presets[name])

    def delete_preset(self, name: str) -> None:
        """Forget a preset, and the characters that use it."""
        with self._lock:
            self.presets.pop(name, None)
            self.loaded = "" if self.loaded == name else self.loaded
            self.characters = {who: preset for who, preset in self.characters.items() if preset != name}
        self._changed()

    def set_character(self, character: str, preset: str | None) -> None:
        """Load ``preset`` whenever the character is chosen; None: no longer. Raises SpecError for more than can be kept."""
        if len(character) > MAX_CHARACTER:
            raise SpecError(f"a character's name of {len(character)} characters cannot be kept: {MAX_CHARACTER} are the limit")
        with self._lock:
            if preset and character not in self.characters and len(self.characters) >= MAX_CHARACTERS:
                raise SpecError(f"{MAX_CHARACTERS} characters have presets already: take one away first")
            self.characters.pop(character, None)
            if preset:
                self.characters[character] = preset
                self.character = character
        self._changed()

    def meet(self, character: str) -> bool:
        """The chat is with this character now: its preset comes, and goes with it. Returns whether the terms have changed."""
        with self._lock:
            if not character or character == self.character:
                return False
            self.character = character
            name = self.characters.get(character)
            if name is not None:
                if self._own is None:
                    self._own = list(self.terms)
                self.load_preset(name)
            elif self._own is not None:
                self.set_terms(self._own)
                self._own, self.loaded = None, ""
                return True
        self._changed()
        return name is not None

    # ---- the file ----

    def _changed(self) -> None:
        with self._lock:
            if self._path is None or self._timer is not None:
                return
            self._timer = threading.Timer(SAVE_AFTER, self.flush)
            self._timer.daemon = True
            self._timer.start()

    def flush(self) -> None:
        """Write the file now, if anything has changed."""
        with self._lock:
            if self._timer is None or self._path is None:
                return
            self._timer.cancel()
            self._timer = None
            data = {
                "format": "steer-plugins-textgen-v1",
                "on": self.on,
                "steering": [term.to_json() for term in self.terms],
                "api_too": self.api_too,
                "cpu_too": self.cpu_too,
                "presets": {name: [t.to_json() for t in terms] for name, terms in sorted(self.presets.items())},
                "characters": dict(sorted(self.characters.items())),
                "character": self.character,
                "loaded": self.loaded,
                **({} if self._own is None else {"own": [t.to_json() for t in self._own]}),
            }
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self._path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
            except OSError as error:
                self.problem = f"settings cannot be written to {self._path}: {error.strerror or error}"

    def _load(self) -> None:
        """A file that cannot be read is set aside, not overwritten."""
        if self._path is None or not self._path.is_file():
            return
        try:
            if self._path.stat().st_size > MAX_FILE:
                raise ValueError("it is too large")
            data = json.loads(self._path.read_text("utf-8"))
            presets = {check_preset_name(name): from_json(terms) for name, terms in data.get("presets", {}).items()}
            characters = {str(who): str(name) for who, name in data.get("characters", {}).items() if name in presets}
            self.terms = from_json(data.get("steering", []))
            self.on = data.get("on") is not False
            self.touched = True
            self.api_too, self.cpu_too = data.get("api_too") is True, data.get("cpu_too") is True
            self.presets, self.characters = presets, characters
            self.character = str(data.get("character") or "")
            self.loaded = str(data.get("loaded")) if data.get("loaded") in presets else ""
            self._own = from_json(data["own"]) if "own" in data else None
        except (OSError, ValueError, AttributeError, TypeError, RecursionError, SteerError) as error:
            aside = self._path.with_suffix(".damaged.json")
            with contextlib.suppress(OSError):
                self._path.replace(aside)
            self.problem = f"{self._path} could not be read ({' '.join(str(error).split()):.120}): it is now {aside.name}"


def check_preset_name(name: Any) -> str:
    """The name without spaces around it. Raises SpecError unless it can be shown in a list and typed in a request."""
    text = name.strip() if isinstance(name, str) else ""
    if not _PRESET.fullmatch(text):
        raise SpecError(
            "a preset's name begins with a letter or digit and has at most 64 letters, digits, spaces and .'()+-_: choose another"
        )
    return text


_settings: Settings | None = None
_lock = threading.Lock()


def settings() -> Settings:
    """The settings of this webui, read on first use."""
    global _settings
    with _lock:
        if _settings is None:
            import atexit

            from . import webui

            _settings = Settings(webui.data_dir() / "settings.json")
            atexit.register(_settings.flush)
        return _settings
