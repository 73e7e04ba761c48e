"""The system prompt to imitate: as it is typed, from a text file, or from a character card."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from ...errors import DataError
from ...paths import expand_path

MAX_FILE_BYTES = 32 << 20
MAX_PROMPT_BYTES = 200_000
FILES = (".txt", ".md", ".json", ".png")
"""What ends like this, on one line, names a file."""
_PNG = b"\x89PNG\r\n\x1a\n"
_CARDS = (b"ccv3", b"chara")
"""Keywords of the text chunks that hold a card: version 3, and 1 and 2."""
_PARTS = ("system_prompt", "description", "personality", "scenario")


def load_prompt(given: str) -> tuple[str, dict[str, str]]:
    """(the prompt, where it comes from) of what a person gave: a text, or the name of a file.

    A ``.txt`` or ``.md`` file is the prompt. A ``.json`` or ``.png`` file is a character card, as SillyTavern, Agnai and others
    share them (versions 1 to 3): its system prompt, description, personality and scenario are joined, ``{{char}}`` and
    ``{{user}}`` filled in.

    Raises:
        DataError: an empty prompt, a file that is missing, too large or no card.
    """
    if "\n" in given or not given.strip().lower().endswith(FILES):
        return _checked(given, "the prompt"), {"kind": "prompt"}
    path = expand_path(given.strip())
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"{path} is too large for a prompt: {MAX_FILE_BYTES >> 20} MiB are the limit")
    where = {"kind": "prompt", "file": path.name}
    try:
        if path.suffix.lower() in (".txt", ".md"):
            return _checked(_text(data), str(path)), where
        card = _json(_of_png(data) if data.startswith(_PNG) else data)
        name, text = _of_card(card)
    except DataError as error:
        raise DataError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    return _checked(text, str(path)), {**where, "character": name}


def _checked(text: str, what: str) -> str:
    text = text.strip()
    if not text:
        raise DataError(f"{what} is empty, so there is nothing to imitate: say how the model should answer")
    if len(text.encode(errors="replace")) > MAX_PROMPT_BYTES:
        raise DataError(f"{what} is longer than {MAX_PROMPT_BYTES} bytes: shorten it")
    return text


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"it is not UTF-8 at byte {error.start + 1}: save it as UTF-8") from None


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(_text(data))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError("it holds no character card: a card is a JSON object, or a PNG with one inside")
    return found


def _of_png(data: bytes) -> bytes:
    """The card in the text chunks of a PNG. Pictures are not decoded, and compressed text is not unpacked."""
    found: dict[bytes, bytes] = {}
    at = len(_PNG)
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if len(body) < length or kind == b"IEND":
            break
        keyword, separator, text = body.partition(b"\0")
        if kind == b"tEXt" and separator and keyword.lower() in _CARDS:
            found.setdefault(keyword.lower(), text)
        at += 12 + length
    for keyword in _CARDS:
        if keyword in found:
            try:
                return base64.b64decode(found[keyword], validate=True)
            except binascii.Error:
                raise DataError("its character card is damaged: the text inside is not base64") from None
    raise DataError("it is a picture without a character card: export it as a card (PNG) from the program it comes from")


def _of_card(card: dict[str, Any]) -> tuple[str, str]:
    """(name, prompt) of a card of any version: its fields, or those under ``data``."""
    fields = card["data"] if isinstance(card.get("data"), dict) else card
    name = _field(fields, "name") or _field(fields, "char_name") or "the character"
    old = {"description": "char_persona", "scenario": "world_scenario"}  # of still older files
    parts = [_field(fields, part) or _field(fields, old.get(part, part)) for part in _PARTS]
    parts[0] = parts[0].replace("{{original}}", "").strip()
    if not any(parts):
        raise DataError(f"the card of {name[:60]!r} has no {', '.join(_PARTS)}, so there is nothing to imitate")
    parts[2] = f"{name}'s personality: {parts[2]}" if parts[2] else ""
    parts[3] = f"Scenario: {parts[3]}" if parts[3] else ""
    if not parts[0]:
        parts[0] = f"You are {name}."
    text = "\n".join(part for part in parts if part)
    for mark, word in (("char", name), ("user", "the user")):
        for spelled in (f"{{{{{mark}}}}}", f"{{{{{mark.title()}}}}}", f"{{{{{mark.upper()}}}}}", f"<{mark.upper()}>"):
            text = text.replace(spelled, word)
    return name, text


def _field(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name, "")
    if value is not None and not isinstance(value, str):
        raise DataError(f"the card's {name!r} is not text")
    return (value or "").strip()
