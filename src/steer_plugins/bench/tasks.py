"""What the benchmark asks for, and how a program sees whether it was done: families of tasks.

A family is registered under a name by ``register_tasks``; the built-in ones (code, docs, style, advice, faults) come from files
in ``data``.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from ..errors import DataError
from ..metrics import word_count, words
from . import pycode

MAX_REPLY = 1_000_000


@dataclass(frozen=True)
class Task:
    """One thing to ask. ``id``: unique in its family; ``data``: what the family's scorer needs."""

    id: str
    prompt: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """``success``: 0 to 1. ``measures``: more numbers, by name, which the report averages."""

    success: float
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Tasks of one kind.

    Attributes:
        score: ``(task, reply, run_code) -> Scored``; nothing of a reply is run unless ``run_code``.
        success: what success means, in words for the report.
        max_tokens: longest reply.
        stretch: whether replies may become longer for a trait whose metric says that it needs that (``Metric.tokens``).
        traits: names of traits that make sense for it; empty: all but those in ``left_out``, which have one of their own.
    """

    name: str
    tasks: tuple[Task, ...]
    score: Callable[[Task, str, bool], Scored]
    success: str
    max_tokens: int
    traits: tuple[str, ...] = ()
    stretch: bool = False
    left_out: tuple[str, ...] = ()

    def fits(self, trait: str) -> bool:
        """Whether the trait of that name is measured on these tasks."""
        return trait in self.traits if self.traits else trait not in self.left_out

    def __post_init__(self) -> None:
        if not self.tasks:
            raise DataError(f"the task family {self.name!r} has no tasks")
        if len({task.id for task in self.tasks}) < len(self.tasks):
            raise DataError(f"the task family {self.name!r} has two tasks of one id")


# ---- code completion ----


def score_code(task: Task, reply: str, run_code: bool) -> Scored:
    """Success: the function passes all its checks; without ``run_code``: it is valid Python that defines the function.

    Measures: ``comments`` per line of code, ``lines`` of code, ``words`` around it.
    """
    code = pycode.find_code(reply[:MAX_REPLY], task.data["signature"])
    name = task.data["signature"].split("(")[0]
    good = pycode.defines(code, name)
    if good and run_code:
        good = pycode.run_checks(code, task.data["checks"])
    lines = sum(bool(line.strip()) for line in code.splitlines())
    measures = {"comments": pycode.comment_density(code), "lines": float(lines)}
    return Scored(float(good), {**measures, "words": float(word_count(pycode.without_fences(reply)))})


# ---- documentation ----

_BULLET = re.compile(r"^\s*(?:[-*+]|\d+[.)])\s", re.MULTILINE)
_HEADING = re.compile(r"^\s*(?:#{1,6}\s|\*\*[^*\n]+\*\*:?\s*$|[A-Z][A-Za-z ]{2,20}:\s*$)", re.MULTILINE)
_SENTENCE = re.compile(r"[.!?]+(?:\s|$)")
FEWEST_WORDS = 8


def score_docs(task: Task, reply: str, run_code: bool) -> Scored:
    """Success: the share of required facts in the text, 0 for fewer than eight words outside of code.

    The facts: the function's name, each of its parameters (but ``a``, an English word), and each group of words of which
    one must occur. Measures: ``words``, ``structure`` (headings and list items), ``readability`` (Flesch reading ease).
    """
    text = pycode.without_fences(reply[:MAX_REPLY])
    n_words = word_count(text)
    names: list[str] = task.data["names"]
    facts: list[list[str]] = task.data["facts"]
    kept = sum(_names(text, name) for name in names) + sum(any(_mentions(text, word) for word in group) for group in facts)
    success = kept / (len(names) + len(facts)) if n_words >= FEWEST_WORDS else 0.0
    structure = len(_BULLET.findall(text)) + len(_HEADING.findall(text))
    measures = {"words": float(n_words), "structure": float(structure), "readability": reading_ease(text)}
    return Scored(success, measures)


def _names(text: str, name: str) -> bool:
    """Whether a name of code stands in the text, whole; a capital may begin a sentence."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def _mentions(text: str, word: str) -> bool:
    """Whether a word of the text begins with ``word``; numbers match whole, signs may stand anywhere."""
    if not word[0].isalnum():
        return word in text
    return _names(text, word) if word.isdigit() else re.search(rf"(?<!\w){re.escape(word)}", text, re.IGNORECASE) is not None


def reading_ease(text: str) -> float:
    """Flesch's reading ease of English text (Flesch 1948): 100 very easy, 0 very hard; cut at -100 and 120; 0 for no text."""
    found = words(text)
    if not found:
        return 0.0
    sentences = max(1, len(_SENTENCE.findall(text)))
    syllables = sum(max(1, len(re.findall(r"[aeiouy]+", re.sub(r"e$", "", word.casefold())))) for word in found)
    return min(120.0, max(-100.0, 206.835 - 1.015 * len(found) / sentences - 84.6 * syllables / len(found)))


# ---- conversation ----

_HEDGES = re.compile(
    r"(?<!\w)(?:maybe|perhaps|possibly|probably|might|may|could|seems?|appears?|i think|i guess|i believe|in my opinion|"
    r"sort of|kind of|somewhat|it depends|not sure|likely)(?!\w)",
    re.IGNORECASE,
)


def score_style(task: Task, reply: str, run_code: bool) -> Scored:
    """Success: the reply is about the question, and not the question again: a word of the topic that is the reply's own.

    Measures: ``words``, ``hedges`` in a hundred words, ``mood`` and ``formality`` (the metrics of that name).
    """
    from ..metrics import score_formality, score_mood

    text = reply[:MAX_REPLY]
    n_words = word_count(text)
    said = [word.casefold() for word in words(text)]
    asked = [word.casefold() for word in words(task.prompt)]
    about = any(word.startswith(tuple(task.data["topic"])) for word in said)
    echo = " ".join(said) in " ".join(asked)
    measures = {
        "words": float(n_words),
        "hedges": 100.0 * len(_HEDGES.findall(text)) / max(1, n_words),
        "mood": score_mood(text),
        "formality": score_formality(text),
    }
    return Scored(float(about and not echo), measures)


# ---- the built-in families ----


def builtin_families() -> list[Family]:
    """Code completion, documentation and conversation, 60 tasks or more each. Traits that show in some conversations only have
    tasks of their own: ``advice`` for caution, ``faults`` for debugging."""
    functions = list(read_functions())
    return [
        Family(
            "code",
            tuple(Task(f["name"], _code_prompt(f), f) for f in functions),
            score_code,
            "the function passes its checks (without --run-code: it is valid Python that defines the function)",
            max_tokens=96,
            traits=("debugging",),
        ),
        Family(
            "docs",
            tuple(Task(f["name"], _docs_prompt(f), f) for f in functions),
            score_docs,
            "share of required facts kept",
            max_tokens=64,
            traits=("formality", "succinctness"),
        ),
        *(
            Family(name, tuple(_talk(name)), score_style, "the reply is about the question", 40, traits, True, left_out)
            for name, traits, left_out in (
                ("style", (), ("caution", "debugging")),
                ("advice", ("caution",), ()),
                ("faults", ("debugging",), ()),
            )
        ),
    ]


def read_functions() -> Iterator[dict[str, Any]]:
    """The functions of ``data/functions.txt``: name, signature, purpose, body, checks, names and facts."""
    found: list[dict[str, Any]] = []
    for line in data_lines("functions.txt"):
        sign, _, rest = line.partition(" ")
        if sign == "##":
            name, parameters = rest.rstrip(")").split("(")
            names = [name, *(p for p in map(str.strip, parameters.split(",")) if p != "a")]
            found.append({"name": name, "signature": rest, "purpose": "", "body": [], "checks": [], "names": names, "facts": []})
        elif sign == ":":
            found[-1]["purpose"] = rest
        elif sign == "|":
            found[-1]["body"].append(rest)
        elif sign == "?":
            found[-1]["checks"].append(rest)
        elif sign == "!":
            found[-1]["facts"].append(rest.split("/"))
    yield from found


def reference(function: dict[str, Any]) -> str:
    """The source of a function as it ought to be."""
    body = textwrap.indent("\n".join(function["body"]), "    ")
    return f"def {function['signature']}:\n{body}\n"


def _code_prompt(f: dict[str, Any]) -> str:
    return (
        f'Complete this Python function. Answer with the code.\n\n```python\ndef {f["signature"]}:\n    """{f["purpose"]}"""\n```'
    )


def _docs_prompt(f: dict[str, Any]) -> str:
    asked = "Write the documentation of this Python function: what it does, its parameters and what it returns."
    return f"{asked}\n\n```python\n{reference(f)}```"


def _talk(name: str) -> Iterator[Task]:
    for number, line in enumerate(data_lines(f"{name}.txt"), start=1):
        question, _, topic = line.partition(" @ ")
        yield Task(f"{name}-{number:02d}", question, {"topic": topic.split("|")})


def read_choices() -> list[tuple[str, list[str]]]:
    """Multiple choice: ``(beginning of a sentence, [right ending, wrong endings])``."""
    return [(parts[0], parts[1:]) for parts in ([p.strip() for p in line.split("|")] for line in data_lines("choices.txt"))]


def data_lines(name: str) -> list[str]:
    """Lines of a data file, without blank ones and comments (``# ...``)."""
    text = (resources.files(__package__) / "data" / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("# ")]
