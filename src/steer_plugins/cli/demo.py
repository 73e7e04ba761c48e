"""``steer demo``: the same small model answering the same questions, steered from -1 to 1 along two traits."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..plugins import hookimpl
from .common import EngineOptions, cell_text, console, engine_options, json_option, print_json
from .train import N_PARALLEL, duration, run_training

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.base import Engine, Generation
    from ..steering.vector import SteeringVector
    from ..store.library import Library

QUESTIONS = {
    "mood": ("How was your walk in the park?", "Describe a small town."),
    "succinctness": ("What is a friend?", "Why do leaves fall?"),
}
"""By vector, what shows it."""
STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0)
LONGEST = {"mood": 56, "succinctness": 112}
"""Tokens of a reply. Those of a terse model come to their end before it."""
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "repeat_penalty": 1.1, "seed": 1}
"""As people use such a model. Without the penalty, one this small says the same again and again, steered or not."""
SHOWN_LINES = 4


@dataclass(frozen=True)
class DemoRow:
    """One answer. ``score``: the trait's metric of the text; ``perplexity``: of the text under the unsteered model."""

    vector: str
    prompt: str
    strength: float
    text: str
    score: float
    words: int
    perplexity: float | None


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer demo``."""
    cli.add_command(demo)


@click.command()
@engine_options
@json_option
def demo(engine: EngineOptions, as_json: bool) -> None:
    """Have a small model answer four questions in several moods and lengths.

    Takes the demo model, and its vectors mood and succinctness from the starter set that comes with the project, unless
    the library has some. With another --model they are fitted the first time, which takes some minutes.
    """
    from ..store.library import Library

    err = console(stderr=True)
    library = Library()
    with engine.open(n_parallel=N_PARALLEL) as opened:
        _announce(err, opened, library)
        vectors = [_vector(opened, library, name) for name in QUESTIONS]
        with err.status("answering ..."):
            rows, identical = answers(opened, vectors)
        if as_json:
            result: dict[str, Any] = {"model": opened.info.path, "strength_zero_identical": identical}
            print_json({**result, "rows": [asdict(row) for row in rows]})
        else:
            _show(rows, vectors, identical)
    if not identical:
        click.get_current_context().exit(1)


def answers(engine: Engine, vectors: Sequence[SteeringVector]) -> tuple[list[DemoRow], bool]:
    """All rows, and whether each answer at strength 0 has the very tokens of one that was made without any steering."""
    from ..engine.base import GenerateRequest
    from ..metrics import word_count
    from ..plugins import manager
    from ..steering.terms import Term
    from ..training.calibrate import perplexity
    from ..training.traits import load_trait
    from .generate import make_prompt

    prompts = {q: make_prompt(engine, q, system=None, raw=False) for asked in QUESTIONS.values() for q in asked}

    def request(vector: SteeringVector, question: str, steering: Any) -> GenerateRequest:
        return GenerateRequest(prompts[question], steering=steering, max_tokens=LONGEST[vector.name], **SAMPLING)

    asked = [(v, q) for v in vectors for q in QUESTIONS[v.name]]
    plain = dict(zip((q for _, q in asked), engine.generate_many([request(v, q, None) for v, q in asked]), strict=True))
    wanted = [(v, q, s) for v, q in asked for s in STRENGTHS]
    replies = engine.generate_many([request(v, q, Term(v, s)) for v, q, s in wanted])
    known = _logprobs(engine, prompts, wanted, replies)
    identical = all(r.tokens == plain[q].tokens for (_, q, s), r in zip(wanted, replies, strict=True) if s == 0.0)
    metrics = {v.name: manager().find("metrics", load_trait(v.name).metric or v.name) for v in vectors}
    rows = [
        DemoRow(
            vector=vector.name,
            prompt=question,
            strength=strength,
            text=reply.text,
            score=float(metrics[vector.name](reply.text)),
            words=word_count(reply.text),
            perplexity=perplexity(logprobs),
        )
        for (vector, question, strength), reply, logprobs in zip(wanted, replies, known, strict=True)
    ]
    return rows, identical


def _logprobs(engine: Engine, prompts: Mapping[str, Any], wanted: Sequence[Any], replies: Sequence[Generation]) -> list[Any]:
    """Log probabilities of all replies under the unsteered model; an empty array for an empty reply."""
    import numpy as np

    there = [k for k, reply in enumerate(replies) if reply.tokens]
    found = engine.logprobs([(prompts[wanted[k][1]], replies[k].tokens) for k in there]) if there else []
    by_index = dict(zip(there, found, strict=True))
    return [by_index.get(k, np.zeros(0)) for k in range(len(replies))]


def _vector(engine: Engine, library: Library, name: str) -> SteeringVector:
    """The library's vector; if it is missing, that of the starter set, or for another model one that is fitted now."""
    from ..hub.starter import starter_vector
    from ..training.train import Training
    from ..training.traits import load_trait

    identity = engine.info.identity
    if library.path(name, identity).is_file():
        return library.get(name, identity)
    vector = starter_vector(name, identity) or run_training(Training(engine, name, load_trait(name)))
    # another process may have been quicker; both have the same
    library.put(vector, identity, overwrite=True)
    return vector


def _announce(err: Console, engine: Engine, library: Library) -> None:
    from ..hub.starter import starter_vector

    identity = engine.info.identity
    missing = [n for n in QUESTIONS if not library.path(n, identity).is_file() and starter_vector(n, identity) is None]
    per_vector, per_demo = 100.0, 45.0  # seconds on two cores; the training says its own estimate, measured
    first = f"first fits {' and '.join(missing)}, then " if missing else ""
    questions = sum(map(len, QUESTIONS.values()))
    err.print(
        f"The demo {first}has {Path(engine.info.path).name} answer {questions} questions at {len(STRENGTHS)} strengths: "
        f"about {duration(per_vector * len(missing) + per_demo)} on two cores.",
        markup=False,
    )


def _lines(text: str, width: int) -> list[str]:
    """The text in lines, at most SHOWN_LINES of them; what was cut off is said."""
    return textwrap.wrap(" ".join(cell_text(text).split()) or "(nothing)", width, max_lines=SHOWN_LINES, placeholder=" […]")


def _show(rows: Sequence[DemoRow], vectors: Sequence[SteeringVector], identical: bool) -> None:
    """Rows for people: a heading for each vector and prompt, a block for each strength."""
    from rich.text import Text

    from ..training.traits import load_trait

    out = console()
    width = min(out.width, 80)
    seen: tuple[str, str] | None = None
    for row in rows:
        if (row.vector, row.prompt) != seen:
            seen = (row.vector, row.prompt)
            poles = load_trait(row.vector).poles
            heading = f"{row.vector} (-1 {poles['negative']}, 1 {poles['positive']}): {row.prompt}"
            out.print()
            out.print(Text(heading, style="bold"), width=width, soft_wrap=False)
        perplexity = "-" if row.perplexity is None else f"{row.perplexity:.1f}"
        facts = f"{row.strength:+.1f}   score {row.score:+.2f}   {row.words} words   perplexity {perplexity}"
        style = "blue" if row.strength < 0 else "red" if row.strength > 0 else "default"
        out.print(Text(facts.replace("+0.0 ", " 0.0 ", 1), style=style))
        for line in _lines(row.text, width - 6):
            out.print(Text("      " + line), width=width, soft_wrap=False)
    out.print()
    same = "the same tokens as" if identical else "NOT the same tokens as, which is a bug:"
    out.print(f"Strength 0 gave {same} the plain model.", markup=False)
    for vector in vectors:
        record = vector.calibration
        if record is not None:
            window = f"layers {record['window'][0]}-{record['window'][1]}"
            out.print(f"{vector.name}: {window}, dose {record['dose']:.2g}, scope {record['scope']}", markup=False)
    out.print('Now yours: steer generate --steer mood:0.8 "Describe a walk in the forest"', markup=False)
