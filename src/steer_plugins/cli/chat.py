"""``steer chat``: talk to a model and move its steering while it answers."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from ..plugins import hookimpl
from .common import Combining, EngineOptions, combining_options, engine_options

if TYPE_CHECKING:
    from ..engine.base import Engine
    from ..steering.grammar import TermSpec
    from ..steering.terms import Steering
    from ..steering.vector import SteeringVector

STEP = 0.1
HELP = """\
/steer EXPRESSION   steer from now on: /steer mood:0.5 + succinctness:-0.3
/steer              what is in force    /steer off   nothing
/vectors            this model's vectors in the library
/system TEXT        a system prompt     /reset       forget the conversation
/help  /quit        (Ctrl-D ends too)
While a reply runs: left and right (or - and +) move the chosen term by 0.1, up and down (or Tab) choose another,
0 switches the steering off and on, Esc or q stops the reply."""


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer chat``."""
    cli.add_command(chat)


@click.command(epilog='\b\nExample:\n  steer chat --steer "mood:0.5"')
@click.option("-s", "--steer", "steer", multiple=True, metavar="TERMS", help="Initial steering, as for generate.")
@combining_options
@engine_options
@click.option("-n", "--max-tokens", type=click.IntRange(min=1), default=400, show_default=True, metavar="N")
@click.option("--temperature", type=click.FloatRange(min=0.0), default=0.0, show_default=True, help="0 for the likeliest token.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed for temperatures above 0.")
@click.option("--system", metavar="TEXT", help="A system prompt.")
@click.option("--force", is_flag=True, help="Accept a vector of another fine-tune of this model.")
@click.option("--meter", multiple=True, metavar="VECTOR", help="Tell after each reply how far it drifted along VECTOR.")
def chat(
    steer: tuple[str, ...],
    combining: Combining,
    engine: EngineOptions,
    max_tokens: int,
    temperature: float,
    seed: int,
    system: str | None,
    force: bool,
    meter: tuple[str, ...],
) -> None:
    """Talk to the model; /steer and the arrow keys move its steering, also in the middle of a reply.

    Below each reply: its tokens per second, the steering at its end, and the projection of its last token on each vector
    (one more is what strength 1 adds). With --meter also the mean projection of all tokens of the reply, and how far that is from
    the first reply's: a model that leaves its role shows it on the vector assistant (steer train assistant).
    """
    from ..steering.grammar import TermSpec, parse_options

    terms = parse_options(steer)
    with engine.open() as opened:
        options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        talk = Conversation(opened, force=force, combining=combining, system=system, **options)
        talk.sliders = talk.sliders_of(terms)
        talk.meter = Meter([term.vector for term in opened.steering([TermSpec(name) for name in meter], force=force)])
        talk.run()


class Meter:
    """How far a conversation drifts along some vectors: the mean projection of each reply, in strengths.

    ``turns``: for each reply, ``{name: mean over its tokens}``.
    """

    def __init__(self, vectors: Sequence[SteeringVector] = ()) -> None:
        self.vectors = list(vectors)
        self.turns: list[dict[str, float]] = []
        self._sums: dict[str, list[float]] = {}

    def take(self, projections: Mapping[str, float]) -> None:
        """Those of a token that was just produced."""
        for vector in self.vectors:
            if vector.name in projections:
                self._sums.setdefault(vector.name, []).append(projections[vector.name])

    def turn(self) -> str:
        """End a reply: what it measured, in words; empty where nothing was."""
        found = {name: sum(values) / len(values) for name, values in self._sums.items()}
        self._sums = {}
        if not found:
            return ""
        self.turns.append(found)
        parts = []
        for name, value in found.items():
            first = next(turn[name] for turn in self.turns if name in turn)
            since = f" ({value - first:+.2f} since the first reply)" if len(self.turns) > 1 else ""
            parts.append(f"{name} {value:+.2f}{since}")
        return f"reply {len(self.turns)}: " + ", ".join(parts)


class Sliders:
    """The terms in force and the keys that move them.

    >>> sliders.press("right")   # the chosen term's strength + 0.1
    """

    def __init__(self, terms: Sequence[TermSpec], steering: Steering, max_dose: float | None = None) -> None:
        self._steering = steering
        self.strengths = [t.strength for t in terms]
        self._terms = list(terms)
        self._max_dose = max_dose
        self.chosen = 0
        self.off = False

    def press(self, key: str) -> bool:
        """Take a key; True if the steering is another now."""
        n = len(self.strengths)
        if key in ("up", "down", "tab") and n:
            self.chosen = (self.chosen + (-1 if key == "up" else 1)) % n
            return False
        if key == "0" and n:
            self.off = not self.off
            return True
        if key in ("left", "right") and n:
            step = STEP if key == "right" else -STEP
            self.strengths[self.chosen] = round(self.strengths[self.chosen] + step, 6) + 0.0
            self.off = False
            return True
        return False

    @property
    def steering(self) -> Steering:
        """What is in force now."""
        from ..steering.terms import Steering

        if self.off:
            return Steering([])
        wanted = Steering([replace(t, strength=s) for t, s in zip(self._steering.terms, self.strengths, strict=True)])
        if self._max_dose is None:
            return wanted
        from ..steering.combine import cap_dose

        return cap_dose(wanted, self._max_dose)

    @property
    def probes(self) -> list[Any]:
        """The vectors, each once."""
        return list({t.vector.name: t.vector for t in self._steering.terms}.values())

    def text(self, mark: bool = False) -> str:
        """The expression; ``mark`` puts brackets around the chosen term."""
        from ..steering.grammar import format_terms

        parts = [format_terms([replace(t, strength=s)]) for t, s in zip(self._terms, self.strengths, strict=True)]
        if mark and len(parts) > 1:
            parts[self.chosen] = f"[{parts[self.chosen]}]"
        return (" + ".join(parts) or "nothing") + (" (off)" if self.off else "")


class Conversation:
    """The loop of ``steer chat``."""

    def __init__(
        self, engine: Engine, *, force: bool, system: str | None, combining: Combining | None = None, **options: Any
    ) -> None:
        self.engine = engine
        self._force = force
        self._combining = combining or Combining()
        self._options = options
        self._system = system
        self.sliders = Sliders([], engine.steering([]))
        self.meter = Meter()
        self.messages: list[dict[str, str]] = []
        self._plain = ""  # what was said, for a model without a chat template

    def sliders_of(self, terms: Sequence[TermSpec]) -> Sliders:
        """Sliders for terms, whose vectors are made fit to act together. Raises SteerError."""
        from ..steering.terms import Steering

        wanted = self.engine.steering(terms, force=self._force)
        # a term at 0 may be moved later, so it counts here like the others
        fit = Combining(self._combining.orthogonal).apply(Steering([replace(t, strength=t.strength or 1.0) for t in wanted]))
        return Sliders(terms, fit, self._combining.max_dose)

    def run(self) -> None:
        """Read lines and answer them until the end of the input."""
        from ..errors import SteerError

        click.echo(f"{self.engine.info.name}. /help says what can be done here.")
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                click.echo()
                return
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self.command(*line[1:].partition(" ")[::2])
                elif line:
                    self.answer(line)
            except SteerError as error:
                click.echo(f"steer: {error}", err=True)

    def command(self, name: str, rest: str) -> None:
        """Do what a line that starts with / says."""
        from ..steering.grammar import parse

        rest = rest.strip()
        if name == "steer" and rest:
            terms = [] if rest == "off" else parse(rest)
            self.sliders = self.sliders_of(terms)
            click.echo(f"steering: {self.sliders.text()}")
        elif name == "steer":
            click.echo(f"steering: {self.sliders.text()}")
        elif name == "vectors":
            from ..store.library import Library

            names = [entry.name for entry in Library().list(self.engine.info.identity)]
            click.echo(", ".join(names) or "none yet: fit one with `steer train mood`")
        elif name == "system":
            self._system = rest or None
            self.reset()
        elif name == "reset":
            self.reset()
        else:
            click.echo(HELP if name == "help" else f"/{name} is not a command.\n{HELP}")

    def reset(self) -> None:
        """Forget what was said."""
        self.messages, self._plain = [], ""
        self.meter.turns.clear()
        click.echo("A new conversation.")

    def prompt(self, line: str) -> Any:
        """What the model is given."""
        if not self.engine.info.has_chat_template:
            return f"{self._plain}{line}"
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self.messages, {"role": "user", "content": line}]

    def answer(self, line: str) -> None:
        """Stream a reply, with the keys at work."""
        from ..engine.base import GenerateRequest

        probes = list({v.name: v for v in (*self.meter.vectors, *self.sliders.probes)}.values())
        request = GenerateRequest(prompt=self.prompt(line), steering=self.sliders.steering, probe=probes, **self._options)
        stream = self.engine.stream(request)
        started, status = 0.0, ""
        with Keys() as keys, StatusLine() as bottom:
            try:
                for piece in stream:
                    started = started or time.monotonic()
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                    bottom.wrote(piece)
                    for key in keys.pressed():
                        if key in ("escape", "q"):
                            stream.cancel()
                        elif self.sliders.press(key):
                            stream.steer(self.sliders.steering)
                    self.meter.take(stream.projections)
                    status = self._status(len(stream.result.tokens), started, stream.projections)
                    bottom.show(status)
            except KeyboardInterrupt:
                stream.cancel()
        reply = stream.result
        if self.engine.info.has_chat_template:
            self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": reply.text}]
        else:
            self._plain += f"{line}{reply.text}\n"
        click.echo(f"\n[{status}]" if status else "")
        if drift := self.meter.turn():
            click.echo(f"[{drift}]")

    def _status(self, n_tokens: int, started: float, projections: Any) -> str:
        seconds = time.monotonic() - started
        speed = f"{(n_tokens - 1) / seconds:.1f} tok/s" if seconds > 0 and n_tokens > 1 else "- tok/s"
        parts = [speed, self.sliders.text(mark=True)]
        parts += [f"{name} {value:+.2f}" for name, value in projections.items()]
        return "   ".join(parts)


_SEQUENCES = {"\x1b[A": "up", "\x1b[B": "down", "\x1b[C": "right", "\x1b[D": "left", "\t": "tab"}
_SEQUENCES |= {"+": "right", "-": "left", "\x1b": "escape"}
_WINDOWS = {"H": "up", "P": "down", "M": "right", "K": "left"}
# what one key sends: a control sequence as a whole, of which Esc is but the first character, or a character
_KEY = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO[@-~]|.", re.DOTALL)
_KEY_SECONDS = 0.02
_UNFINISHED = re.compile(r"\x1b(\[[0-?]*[ -/]*|O)?$")


def keys_of(text: str) -> list[str]:
    """Names of the keys whose terminal input is ``text``. Keys without a name here (Page Up, Delete) are left out, with all
    that they send; an arrow with Shift or Ctrl is an arrow."""
    found = []
    for part in _KEY.findall(text):
        if len(part) > 1 and part[-1] in "ABCD":
            part = f"\x1b[{part[-1]}"
        if len(part) == 1 or part in _SEQUENCES:
            found.append(_SEQUENCES.get(part, part))
    return found


class Keys:
    """Keys that are pressed while something else goes on. Without a terminal there are none."""

    def __init__(self) -> None:
        self._restore: Callable[[], None] | None = None
        self._read: Callable[[], str] = str

    def __enter__(self) -> Keys:
        if not sys.stdin.isatty():
            return self
        if sys.platform == "win32":
            self._read = _read_windows
            return self
        import select
        import termios
        import tty

        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
        tty.setcbreak(fd)
        self._restore = lambda: termios.tcsetattr(fd, termios.TCSADRAIN, before)

        def read(wait: float = 0.0) -> str:
            return os.read(fd, 64).decode(errors="ignore") if select.select([fd], [], [], wait)[0] else ""

        def whole() -> str:
            text = read()
            # the rest of an arrow key may be on its way; a lone Esc stays one
            return text + read(_KEY_SECONDS) if _UNFINISHED.search(text) else text

        self._read = whole
        return self

    def pressed(self) -> list[str]:
        """Keys since the last call."""
        return keys_of(self._read())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._restore is not None:
            self._restore()


def _read_windows() -> str:
    import msvcrt

    text = ""
    back = {name: sequence for sequence, name in reversed(_SEQUENCES.items())}
    while msvcrt.kbhit():  # type: ignore[attr-defined, unused-ignore]
        char = msvcrt.getwch()  # type: ignore[attr-defined, unused-ignore]
        if char in "\x00\xe0":  # the first half of a key that is not a character
            char = back.get(_WINDOWS.get(msvcrt.getwch(), ""), "")  # type: ignore[attr-defined, unused-ignore]
        text += char
    return text


class StatusLine:
    """A line at the foot of the terminal, below text that scrolls. Nothing where there is no terminal."""

    def __init__(self) -> None:
        self._on = sys.stdout.isatty() and os.environ.get("TERM", "") != "dumb"
        self._last = 0.0
        self._column = 0

    def __enter__(self) -> StatusLine:
        if self._on:
            self._rows = shutil.get_terminal_size().lines
            # one line up for the foot, then let all but the last line scroll
            sys.stdout.write(f"\n\x1b[1A\x1b7\x1b[1;{self._rows - 1}r\x1b8")
            sys.stdout.flush()
        return self

    def wrote(self, text: str) -> None:
        """Take note of text that was written above the line."""
        _, newline, rest = text.rpartition("\n")
        self._column = len(rest) if newline else self._column + len(rest)

    def show(self, text: str) -> None:
        """Write the line, at most ten times a second."""
        now = time.monotonic()
        width = shutil.get_terminal_size().columns
        # behind the last column the cursor waits to wrap, which many terminals forget when it is put back: the character would go
        waits = self._column > 0 and self._column % width == 0
        if self._on and not waits and now - self._last > 0.1:
            self._last = now
            sys.stdout.write(f"\x1b7\x1b[{self._rows};1H\x1b[2K\x1b[2m{text[: width - 1]}\x1b[0m\x1b8")
            sys.stdout.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._on:
            sys.stdout.write(f"\x1b7\x1b[{self._rows};1H\x1b[2K\x1b[r\x1b8")
            sys.stdout.flush()
