"""``steer generate``: writes text, steered or plain."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ..errors import DataError
from ..plugins import hookimpl
from .common import Combining, EngineOptions, combining_options, engine_options, json_option, print_json

if TYPE_CHECKING:
    from ..engine.base import Engine


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer generate``."""
    cli.add_command(generate)


@click.command()
@click.argument("prompt")
@click.option(
    "-s",
    "--steer",
    "steer",
    multiple=True,
    metavar="TERMS",
    help='Vectors (library names or files) with strengths: mood:0.8, "mood:0.6 + !hedging@10-20?response", FILE:-0.5. '
    "May be repeated.",
)
@combining_options
@engine_options
@click.option("-n", "--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, metavar="N")
@click.option("--temperature", type=click.FloatRange(min=0.0), default=0.0, show_default=True, help="0 for the likeliest token.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed for temperatures above 0.")
@click.option("--system", metavar="TEXT", help="A system prompt.")
@click.option("--raw", is_flag=True, help="Continue PROMPT without the chat template.")
@click.option("--thinking/--no-thinking", default=None, help="The chat template's switch for thinking.")
@click.option("--force", is_flag=True, help="Accept a vector of another fine-tune of this model.")
@json_option
def generate(
    prompt: str,
    steer: tuple[str, ...],
    combining: Combining,
    engine: EngineOptions,
    max_tokens: int,
    temperature: float,
    seed: int,
    system: str | None,
    raw: bool,
    thinking: bool | None,
    force: bool,
    as_json: bool,
) -> None:
    """Answer PROMPT, steered or plain. The text streams to standard output. PROMPT - reads standard input.

    \b
    Examples:
      steer generate --steer mood:0.8 "Describe a walk in the forest"
      steer generate -s mood:-1 -s succinctness:0.5 --temperature 0.7 "How was your day?"
    """
    from ..steering.grammar import parse_options

    terms = parse_options(steer)  # before a model is loaded for it
    text = read_prompt(prompt)
    with engine.open() as opened:
        messages = make_prompt(opened, text, system=system, raw=raw)
        steering = combining.apply(opened.steering(terms, force=force))
        options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "thinking": thinking,
        }

        def show(piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        reply = opened.generate(messages, steering=steering, on_piece=None if as_json else show, **options)
        if as_json:
            print_json(
                {
                    "model": opened.info.path,
                    "prompt": text,
                    "steering": [{"vector": term.vector.name, "strength": term.strength} for term in steering],
                    "text": reply.text,
                    "finish_reason": reply.finish_reason,
                    "prompt_tokens": len(reply.prompt_tokens),
                    "tokens": len(reply.tokens),
                }
            )
        else:
            click.echo()


def read_prompt(prompt: str) -> str:
    """The prompt itself, or standard input for ``-``."""
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 (byte {error.start}): save the text as UTF-8") from None


def make_prompt(engine: Engine, text: str, *, system: str | None, raw: bool) -> str | list[dict[str, str]]:
    """Chat messages, or the text itself when it is meant raw or the model knows no chat."""

    from ..training.extract import chat

    if not text.strip() and not raw:
        raise DataError("the prompt is empty: write what the model should answer")
    if raw or not engine.info.has_chat_template:
        if system is not None:
            why = "--raw leaves no place" if raw else "this model has no chat template, so there is no place"
            raise DataError(f"{why} for a system prompt: put it into the prompt")
        return text
    return chat(text, system)
