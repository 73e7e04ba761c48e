"""``steer read``: writes the hidden states of a prompt, and of a reply, to a safetensors file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import SpecError, VectorError
from ..plugins import hookimpl
from .common import Combining, EngineOptions, FilePath, combining_options, engine_options, json_option, print_json
from .generate import make_prompt, read_prompt

if TYPE_CHECKING:
    from ..engine.base import Activations, Engine

FORMAT = "steer-activations-v1"
_NAMES = ("last", "all", "mean", "response", "response_mean")
_PART = re.compile(r"(-?[0-9]{1,9})(?:-([0-9]{1,9}))?")
_MAX_POSITIONS = 1_000_000


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer read``."""
    cli.add_command(read)


@click.command()
@click.argument("prompt")
@click.option("-o", "--out", type=FilePath(path_type=Path), required=True, metavar="FILE", help="The file to write.")
@engine_options
@click.option("--layers", metavar="LIST", help="For example 0,4,10-15 (default: all).")
@click.option("--site", default="resid_post", show_default=True, metavar="SITE", help="resid_post, attn_out or ffn_out.")
@click.option(
    "--positions", default="all", show_default=True, metavar="LIST", help="last, all, mean, response, or such as 0,5-9,-1."
)
@click.option(
    "--stream",
    type=click.Choice(["mean", "all"]),
    default="mean",
    show_default=True,
    help="For several residual streams.",
)
@click.option("-n", "--max-tokens", type=click.IntRange(min=0), default=0, show_default=True, help="Also read a reply this long.")
@click.option("-s", "--steer", multiple=True, metavar="TERMS", help="Steer while reading; may be repeated.")
@combining_options
@click.option("--system", metavar="TEXT", help="A system prompt.")
@click.option("--raw", is_flag=True, help="Use PROMPT without the chat template.")
@click.option("--thinking/--no-thinking", default=None, help="The chat template's switch for thinking.")
@click.option("--overwrite", is_flag=True, help="Replace a file of that name.")
@click.option("--force", is_flag=True, help="Accept a vector of another fine-tune of this model.")
@json_option
def read(
    prompt: str,
    out: Path,
    engine: EngineOptions,
    layers: str | None,
    site: str,
    positions: str,
    stream: str,
    max_tokens: int,
    steer: tuple[str, ...],
    combining: Combining,
    system: str | None,
    raw: bool,
    thinking: bool | None,
    overwrite: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write the hidden states that PROMPT (- reads standard input) goes through to a safetensors file.

    It holds layer.N (float32, positions x n_embd) for each layer, tokens (int32, the whole sequence) and positions
    (int32, which of them the rows belong to; empty for a mean), and says in its metadata which model they come from.

    \b
    Example:
      steer read --layers 10-15 --positions last "Describe a walk in the forest" --out acts.safetensors
    """
    from ..steering.grammar import parse_options

    terms = parse_options(steer)  # before a model is loaded for it
    where = parse_positions(positions)
    wanted = None if layers is None else parse_layer_list(layers)
    if out.is_dir() or not out.parent.is_dir():
        raise VectorError(f"{out} cannot be written: {'it is a folder' if out.is_dir() else 'its folder is missing'}")
    if out.exists() and not overwrite:
        raise VectorError(f"{out} exists: choose another file, or replace it with --overwrite")
    text = read_prompt(prompt)
    with engine.open() as opened:
        found = opened.read(
            [make_prompt(opened, text, system=system, raw=raw)],
            layers=wanted,
            site=site,
            positions=where,
            stream=stream,
            steering=combining.apply(opened.steering(terms, force=force)),
            max_tokens=max_tokens,
            thinking=thinking,
        )[0]
        write_activations(out, found, opened, stream=stream, steering=list(steer), positions=positions)
        first = next(iter(found.values.values()))
        facts: dict[str, Any] = {
            "file": str(out),
            "model": opened.info.path,
            "site": found.site,
            "layers": sorted(found.values),
            "shape": list(first.shape),
            "tokens": len(found.tokens),
            "prompt_tokens": found.n_prompt,
            "text": opened.detokenize(found.tokens[found.n_prompt :]) if max_tokens else None,
        }
    if as_json:
        print_json(facts)
    else:
        if facts["text"] is not None:
            click.echo(facts["text"])
        shape = " x ".join(map(str, facts["shape"]))
        click.echo(f"wrote {len(facts['layers'])} layers of {shape} ({facts['tokens']} tokens) to {out}")


def write_activations(
    path: Path, found: Activations, engine: Engine, *, stream: str, steering: list[str], positions: str
) -> None:
    """Write hidden states atomically; see the command for what the file holds. Raises VectorError on a full disk."""
    import numpy as np
    from safetensors.numpy import save

    from ..atomic import write_atomically

    tensors = {f"layer.{il}": np.ascontiguousarray(value, np.float32) for il, value in sorted(found.values.items())}
    tensors["tokens"] = np.asarray(found.tokens, np.int32)
    tensors["positions"] = np.asarray(found.positions, np.int32)
    facts = {
        "format": FORMAT,
        "site": found.site,
        "stream": stream,
        "n_prompt": found.n_prompt,
        "positions": positions,
        "identity": engine.info.identity.to_dict(),
        "steering": steering,
    }
    try:
        write_atomically(path, save(tensors, {"steer": json.dumps(facts)}))
    except OSError as error:
        raise VectorError(f"cannot write {path}: {error.strerror or error}") from None


def parse_layer_list(text: str) -> list[int]:
    """``0,4,10-15`` as sorted layers. Raises SpecError."""
    return sorted(set(parse_numbers(text, "--layers", "0,4,10-15", 100_000, negative=False)))


def parse_positions(text: str) -> str | list[int]:
    """A word the engine knows, or positions (``-1`` is the last). Raises SpecError."""
    if text in _NAMES:
        return text
    return parse_numbers(text, "--positions", "last, all, mean, response or 0,5-9", _MAX_POSITIONS, negative=True)


def parse_numbers(text: str, option: str, example: str, limit: int, *, negative: bool) -> list[int]:
    """``0,5-9`` as numbers, ``limit`` at most; ``option`` and ``example`` stand in the SpecError for another text."""
    found: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None or (not negative and match[1].startswith("-")):
            raise SpecError(f"{option} {text!r} cannot be read at {part.strip()!r}: write such as {example}")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first or last - first + len(found) >= limit:
            raise SpecError(f"{option} {text!r}: {part.strip()!r} is not a range of up to {limit}, lower number first")
        found += range(first, last + 1)
    return found
