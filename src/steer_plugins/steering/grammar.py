"""The one text form of a steering, and the canonical JSON beneath it. docs/grammar.md is its table.

    mood:0.6 + succinctness:-0.3@10-20?response + !hedging

A text becomes a list of :class:`TermSpec`, which name vectors; :func:`steering_of` looks the names up. Nothing is guessed:
whatever is not in the grammar is a :class:`~steer_plugins.errors.SpecError` that points at the character.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SpecError, VectorError
from ..paths import expand_path
from .gate import Gate
from .schedule import Schedule
from .terms import Steering, Term, parse_term
from .vector import BOUNDS, FILE_SUFFIXES, SCOPES, TERM_OPS, SteeringVector, is_hub_name, scope_range

MAX_TERMS = 64
MAX_TEXT = 10_000

_SPACE = re.compile(r"\s*")
# A feature's name or number follows its autoencoder's. A number without a strength behind it reads as a stream, until the library
# says which it is.
_FEATURE = r"#[A-Za-z_][A-Za-z0-9._-]*|#[0-9]{4,6}(?![0-9])|#[0-9]{1,3}(?=:)"
_NAME = re.compile(rf"[a-z0-9-]+/[a-z0-9][a-z0-9._-]*|[A-Za-z0-9_][A-Za-z0-9._-]*(?:{_FEATURE})?")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_LAYERS = re.compile(r"([0-9]{1,6})(?:(-)([0-9]{1,6})?)?")
_SCOPE = re.compile(r"[a-z]+|[0-9]+-[0-9]*")
_STREAM = re.compile(r"[0-9]{1,3}")
_OP = re.compile(r"[a-z]+")
_SCHEDULE = re.compile(rf"([a-z]+)(?::([0-9]{{1,7}}))?(?::({_NUMBER.pattern}))?\]")
_PLAIN_NAME = re.compile(
    r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?(?:#[A-Za-z_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?|#[0-9]{4,6})?"
)


@dataclass(frozen=True)
class TermSpec:
    """One term as written: a vector's name or file, and how it is to be used.

    ``layers``: inclusive window, an end of None is open. ``op`` and ``scope`` None are the vector's own. ``level``: of the ops
    floor and cap, which need one.
    """

    vector: str
    strength: float = 1.0
    layers: tuple[int, int | None] | None = None
    op: str | None = None
    scope: str | None = None
    stream: int | None = None
    schedule: Schedule | None = None
    gate: str | None = None
    level: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The term as JSON; what is left to the vector is left out."""
        data: dict[str, Any] = {"vector": self.vector, "strength": self.strength}
        if self.layers is not None:
            data["layers"] = list(self.layers)
        for key in ("op", "level", "scope", "stream", "gate"):
            if getattr(self, key) is not None:
                data[key] = getattr(self, key)
        if self.schedule is not None:
            data["schedule"] = self.schedule.to_json()
        return data


def parse(text: str) -> list[TermSpec]:
    """The terms of a text; an empty one has none.

    Raises:
        SpecError: with the position (characters are counted from 1) and what was expected there.
    """
    if len(text) > MAX_TEXT:
        raise SpecError(f"a steering of {len(text)} characters is too long: {MAX_TEXT} are the limit")
    parser = _Parser(text)
    terms: list[TermSpec] = []
    parser.space()
    if parser.done:
        return []
    sign = -1.0 if parser.take("-") else 1.0
    while True:
        terms.append(parser.term(sign))
        if len(terms) > MAX_TERMS:
            raise SpecError(f"a steering takes at most {MAX_TERMS} terms")
        parser.space()
        if parser.done:
            return terms
        sign = parser.operator()


def parse_options(texts: Iterable[str]) -> list[TermSpec]:
    """The terms of ``--steer`` options: each a text of the grammar, or an unquoted file with an optional ``:strength``.

    Raises:
        SpecError: as :func:`parse`.
    """
    terms: list[TermSpec] = []
    for text in texts:
        if not text.strip():
            raise SpecError("an empty --steer names no vector: write NAME:STRENGTH, such as mood:0.8")
        name, strength = _as_file(text)
        terms += parse(text) if name is None else [TermSpec(name, strength)]
    return terms


def _as_file(text: str) -> tuple[str | None, float]:
    """A file and its strength, where the text is one: it has a file's suffix or a separator, and no quotes."""
    if text.lstrip()[:1] in ('"', "!", "-", ""):
        return None, 1.0
    head = re.sub(r":[^:/\\]*$", "", text)
    named = [part for part in re.split(r"[\s:@?%#\[\]{}!]+", head) if not is_hub_name(part)]
    if any(re.search(r"[/\\]", part) for part in named) or head.lower().endswith(FILE_SUFFIXES):
        if re.search(r"\s[+-]\s|[?%@{\[]", text) and not expand_path(text).is_file() and not expand_path(head).is_file():
            how = "in an expression write its path in quotes, as in '\"./calm.gguf\":0.5 + mood'"
            raise SpecError(f"{text!r:.90} is not a file: {how}")
        return parse_term(text)
    return None, 1.0


def terms_of(wish: Any) -> list[TermSpec] | None:
    """The terms of a text, of canonical JSON (one object, or a list of them) or of TermSpecs; None for anything else.

    Raises:
        SpecError: as :func:`parse` and :func:`from_json`.
    """
    if isinstance(wish, str):
        return parse(wish)
    if isinstance(wish, dict):
        return from_json([wish])
    if isinstance(wish, list | tuple):
        if all(isinstance(term, TermSpec) for term in wish):
            return list(wish)
        if any(isinstance(term, dict | str | int | float) for term in wish):
            return from_json(list(wish))
    return None


def is_file_name(name: str) -> bool:
    """Whether what a term names can only be a file: it has a separator, and is not a hub's ``owner/name``."""
    return re.search(r"[/\\]", name) is not None and not is_hub_name(name)


def refuse_file(name: str) -> None:
    """Raise SpecError if what a term names is a file: whoever can send a request must not open files here."""
    if is_file_name(name):
        raise SpecError(f"{name[:80]!r} is a file: requests name vectors of the library")


def names_of(terms: Iterable[TermSpec]) -> list[str]:
    """What terms name: vectors and gates, each once."""
    return list(dict.fromkeys(name for term in terms for name in (term.vector, term.gate) if name is not None))


def format_terms(terms: Iterable[TermSpec]) -> str:
    """The text that :func:`parse` turns into the same terms."""
    parts = []
    for t in terms:
        text = ("!" if t.op == "project" else "") + _name(t.vector)
        if t.strength != 1.0:
            text += f":{_number(t.strength)}"
        if t.layers is not None:
            lo, hi = t.layers
            text += f"@{lo}" if hi == lo else f"@{lo}-{'' if hi is None else hi}"
        if t.scope is not None:
            text += f"?{t.scope}"
        if t.op not in (None, "project"):
            text += f"%{t.op}" + ("" if t.level is None else f":{_number(t.level)}")
        if t.stream is not None:
            text += f"#{t.stream}"
        if t.schedule is not None:
            floor = f":{_number(t.schedule.floor)}" if t.schedule.floor else ""
            text += f"[{t.schedule.kind}:{t.schedule.over}{floor}]"
        if t.gate is not None:
            text += f"{{{_name(t.gate)}}}"
        parts.append(text)
    return " + ".join(parts)


def from_json(data: Any) -> list[TermSpec]:
    """The terms of canonical JSON: a list of objects, every key checked.

    Raises:
        SpecError: a wrong type, an unknown key, op or scope, a window that ends before it starts.
    """
    if not isinstance(data, list):
        raise SpecError("a steering in JSON is a list of terms")
    if len(data) > MAX_TERMS:
        raise SpecError(f"a steering takes at most {MAX_TERMS} terms")
    return [_term_from_json(i, item) for i, item in enumerate(data, start=1)]


def _term_from_json(number: int, item: Any) -> TermSpec:
    where = f"term {number}"
    if not isinstance(item, dict):
        raise SpecError(f"{where} is not a JSON object")
    for key in item:
        if key not in ("vector", "strength", "layers", "op", "level", "scope", "stream", "schedule", "gate"):
            raise SpecError(f"{where} has the unknown key {str(key)!r:.60}")
    vector, strength = item.get("vector"), item.get("strength", 1.0)
    if not isinstance(vector, str) or not vector:
        raise SpecError(f"{where} names no vector")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise SpecError(f"{where}: the strength of {vector!r} is not a finite number")
    layers = item.get("layers")
    if layers is not None:
        layers = _checked_window(where, layers)
    op, scope, stream = item.get("op"), item.get("scope"), item.get("stream")
    if op is not None and op not in TERM_OPS:
        raise SpecError(f"{where}: unknown op {op!r:.60}: use {', '.join(TERM_OPS)}")
    if scope is not None:
        _checked_scope(scope, where)
    if stream is not None and (isinstance(stream, bool) or not isinstance(stream, int) or not 0 <= stream < 1000):
        raise SpecError(f"{where}: the stream is {stream!r:.60}: streams are whole numbers from 0")
    schedule = None
    if item.get("schedule") is not None:
        try:
            schedule = Schedule.from_json(item["schedule"])
        except SpecError as error:
            raise SpecError(f"{where}: {error}") from None
    gate = item.get("gate")
    if gate is not None and (not isinstance(gate, str) or not gate):
        raise SpecError(f"{where}: the gate is {gate!r:.60}: name one, or its file")
    level = item.get("level")
    if level is not None and (isinstance(level, bool) or not isinstance(level, int | float) or not math.isfinite(level)):
        raise SpecError(f"{where}: the level of {vector!r} is not a finite number")
    if (level is not None) != (op in BOUNDS):
        raise SpecError(f"{where}: " + (f"op {op} needs a level" if op in BOUNDS else "a level belongs to op floor or cap"))
    return TermSpec(
        vector, float(strength) + 0.0, layers, op, scope, stream, schedule, gate, None if level is None else float(level) + 0.0
    )


def _checked_window(where: str, layers: Any) -> tuple[int, int | None]:
    ok = isinstance(layers, list | tuple) and len(layers) == 2
    if ok:
        lo, hi = layers
        ok = _whole(lo) and (hi is None or (_whole(hi) and hi >= lo))
    if not ok:
        raise SpecError(f"{where}: the layers are {layers!r:.60}: give the first and the last, from 0")
    return lo, hi


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1_000_000


def _checked_scope(scope: Any, where: str) -> None:
    try:
        scope_range(scope)
    except VectorError as error:
        raise SpecError(f"{error} ({where})") from None


def steering_of(terms: str | Sequence[TermSpec], resolve: Callable[[str], SteeringVector]) -> Steering:
    """The steering that a text or its terms mean. ``resolve`` finds a vector by name or file (``Library.resolve``).

    Raises:
        SpecError: the text is wrong, or a layer window holds none of a vector's layers.
    """
    specs = parse(terms) if isinstance(terms, str) else terms
    result = []
    for t in specs:
        vector = resolve(t.vector)
        window = None
        if t.layers is not None:
            lo, hi = t.layers
            window = (lo, max(lo, vector.layers[-1]) if hi is None else hi)
        gate = None if t.gate is None else Gate.of(resolve(t.gate))
        result.append(
            Term(
                vector,
                t.strength,
                layers=window,
                op=t.op,
                scope=t.scope,
                stream=t.stream,
                schedule=t.schedule,
                gate=gate,
                level=t.level,
            )
        )
    return Steering(result)


def _name(name: str) -> str:
    return name if _PLAIN_NAME.fullmatch(name) or is_hub_name(name) else json.dumps(name, ensure_ascii=False)


def _number(value: float) -> str:
    return str(int(value)) if abs(value) < 1e15 and value == int(value) else repr(value)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    @property
    def done(self) -> bool:
        return self._at >= len(self._text)

    def fail(self, what: str, at: int | None = None) -> SpecError:
        at = self._at if at is None else at
        found = f"{self._text[at]!r}" if at < len(self._text) else "the end"
        shown = self._text if len(self._text) <= 80 else self._text[max(0, at - 30) : at + 30]
        return SpecError(f"at character {at + 1} of {shown!r}, found {found}: {what}")

    def space(self) -> None:
        match = _SPACE.match(self._text, self._at)
        assert match
        self._at = match.end()

    def take(self, mark: str) -> bool:
        if self._text.startswith(mark, self._at):
            self._at += len(mark)
            self.space()
            return True
        return False

    def operator(self) -> float:
        if self.take("+"):
            return 1.0
        if self.take("-"):
            return -1.0
        raise self.fail("expected + or - and another term, or the end")

    def match(self, pattern: re.Pattern[str], what: str) -> re.Match[str]:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise self.fail(what)
        self._at = match.end()
        return match

    def term(self, sign: float) -> TermSpec:
        removes = self.take("!")
        name = self.name()
        strength = self.number() if self._after(":") else 1.0
        found: dict[str, Any] = {"op": "project"} if removes else {}
        key: str
        value: Any
        while not self.done:
            at = self._at
            if self._after("@"):
                key, value = "layers", self.layers()
            elif self._after("?"):
                key, value = "scope", self.scope()
            elif self._after("%"):
                key, value = "op", self.op()
                if value in BOUNDS:
                    found["level"] = self.level(value)
            elif self._after("#"):
                key, value = "stream", int(self.match(_STREAM, "expected a stream number, such as #2")[0])
            elif self._after("["):
                key, value = "schedule", self.schedule()
            elif self._after("{"):
                key, value = "gate", self.gate()
            else:
                break
            if key in found:
                raise self.fail(f"a second {key}" + (": ! has said project" if removes and key == "op" else ""), at)
            found[key] = value
        if not self.done and self._text[self._at] not in "+-" and not self._text[self._at].isspace():
            raise self.fail("expected :strength, @layers, ?scope, %op, #stream, [schedule], {gate}, or + and another term")
        return TermSpec(name, sign * strength + 0.0, **found)

    def _after(self, mark: str) -> bool:
        if self._text.startswith(mark, self._at):
            self._at += 1
            return True
        return False

    def name(self) -> str:
        if self._text.startswith('"', self._at):
            start = self._at
            match = self.match(_QUOTED, "a quoted file name that never ends")
            try:
                name = json.loads(match[0])
            except ValueError:
                raise self.fail("a quoted file name with a bad escape (write \\\\ for a backslash)", start) from None
            if not name:
                raise self.fail("an empty name", start)
            return str(name)
        start = self._at
        match = self.match(_NAME, 'expected a vector\'s name, such as mood, or a file in "quotes"')
        if "/" in match[0] and not is_hub_name(match[0]):
            raise self.fail('expected owner/name, or a file in "quotes"', start)
        return match[0]

    def number(self) -> float:
        at = self._at
        value = float(self.match(_NUMBER, "expected a number, such as 0.6")[0])
        if not math.isfinite(value):
            raise self.fail("the number is too large", at)
        return value

    def op(self) -> str:
        at = self._at
        match = self.match(_OP, f"expected an op: {', '.join(TERM_OPS)}")
        if match[0] not in TERM_OPS:
            raise self.fail(f"unknown op: use {', '.join(TERM_OPS)}", at)
        return match[0]

    def level(self, op: str) -> float:
        if not self._after(":"):
            raise self.fail(f"expected the level of {op}, such as %{op}:0.5")
        return self.number() + 0.0

    def layers(self) -> tuple[int, int | None]:
        at = self._at
        match = self.match(_LAYERS, "expected layers, such as @12, @10-20 or @10-")
        lo = int(match[1])
        hi = lo if match[2] is None else (None if match[3] is None else int(match[3]))
        if hi is not None and hi < lo:
            raise self.fail("the layer window ends before it starts", at)
        return lo, hi

    def schedule(self) -> Schedule | None:
        at = self._at
        match = self.match(_SCHEDULE, "expected a schedule, such as [linear:64] or [cosine:64:0.2]")
        data: dict[str, Any] = {"kind": match[1]}
        if match[2] is not None:
            data["over"] = int(match[2])
        if match[3] is not None:
            data["floor"] = float(match[3])
        try:
            return Schedule.from_json(data)
        except SpecError as error:
            raise self.fail(str(error), at) from None

    def gate(self) -> str:
        name = self.name()
        if not self._after("}"):
            raise self.fail("expected } after the name of the gate")
        return name

    def scope(self) -> str:
        at = self._at
        match = self.match(_SCOPE, f"expected a scope: {', '.join(SCOPES)}, or positions such as 5-20 or 0-")
        try:
            scope_range(match[0])
        except VectorError as error:
            raise self.fail(str(error), at) from None
        return match[0]
