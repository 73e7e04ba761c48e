"""``steer train``: fits a steering vector to a trait or to pairs of examples, and calibrates it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import DataError, SpecError, VectorError
from ..plugins import hookimpl
from .common import EngineOptions, FilePath, Stages, console, engine_options, json_option, print_json, print_table

if TYPE_CHECKING:
    from ..engine.base import Engine
    from ..steering.vector import SteeringVector
    from ..training.extract import ContrastData
    from ..training.train import Training
    from ..training.traits import Trait

_LAYERS = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")

# What imitation has no use for.
_NOT_FOR_PROMPTS = ("pairs", "trait_name", "method", "positions", "remove_neutral", "baseline", "calibrate", "scope", "target")
# What a repeated fit takes from the vector.
_OF_THE_FIT = (
    "method", "positions", "layers", "calibrate", "scope", "seed", "thinking", "remove_neutral", "baseline", "target",
)  # fmt: skip


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer train``."""
    cli.add_command(train)


@click.command()
@click.argument("name", required=False)
@click.option("--pairs", type=FilePath(), metavar="FILE", help="Contrast pairs, a JSONL file.")
@click.option("--trait", "trait_name", metavar="FILE|NAME", help="A trait file, or a trait that comes with the package.")
@click.option(
    "--from-prompt",
    metavar="TEXT|FILE",
    help="Imitate a system prompt: a text, a .txt or .md file, or a character card (.json, .png).",
)
@click.option("--against", metavar="TEXT|FILE", help="With --from-prompt: the system prompt that strength -1 imitates.")
@click.option("--rank", type=click.IntRange(0, 16), help="With --from-prompt: columns at a layer at most (default: 4).")
@engine_options
@click.option("-o", "--out", type=FilePath(path_type=Path), metavar="FILE", help="Write to FILE instead of the library.")
@click.option(
    "--method",
    default="mean_difference",
    show_default=True,
    metavar="NAME",
    help="The extraction method: mean_difference, pca_diff, pca_center, logistic_probe, lda, or a plugin's.",
)
@click.option(
    "--positions",
    type=click.Choice(["last", "response", "answer", "thinking"]),
    help="What to read: the last prompt token, the mean over the response, the end of the given answer, or the mean over the "
    "thinking tokens (default: last or response, as the examples allow).",
)
@click.option("--layers", metavar="A-B,C", help="Fit and steer these layers (default: calibration finds a window).")
@click.option("--remove-neutral", is_flag=True, help="Remove each direction's component along the neutral text.")
@click.option(
    "--baseline/--no-baseline",
    default=None,
    help="Fit three classes, with a neutral baseline between the poles (default: where the pairs have one).",
)
@click.option(
    "--calibrate",
    type=click.Choice(["none", "quick", "full"]),
    default="quick",
    show_default=True,
    help="How thoroughly to calibrate strength 1.0.",
)
@click.option("--scope", type=click.Choice(["all", "prompt", "response"]), help="Which tokens to steer (default: as calibrated).")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides which pairs are held out.")
@click.option("--thinking/--no-thinking", default=False, help="The chat template's switch for thinking.")
@click.option(
    "--for",
    "target",
    type=click.Choice(["ds4"]),
    help="Fit for DwarfStar 4, which removes, reflects or amplifies a component of ffn_out.",
)
@click.option("--again", metavar="VECTOR", help="Repeat the fit of VECTOR (a name or a file) and compare.")
@click.option("--overwrite", is_flag=True, help="Replace a vector of that name.")
@json_option
@click.pass_context
def train(
    ctx: click.Context,
    name: str | None,
    pairs: str | None,
    trait_name: str | None,
    from_prompt: str | None,
    against: str | None,
    rank: int | None,
    engine: EngineOptions,
    out: Path | None,
    method: str,
    positions: str | None,
    layers: str | None,
    remove_neutral: bool,
    baseline: bool | None,
    calibrate: str,
    scope: str | None,
    seed: int,
    thinking: bool,
    target: str | None,
    again: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fit the steering vector NAME to a model, and keep it in the library.

    It learns from a trait or from a file of pairs with, on each line, {"positive": ..., "negative": ...} with two texts or
    two chats; a third text or chat, "baseline", may stand between them. A trait that comes with the package (mood,
    succinctness and others), and the recipe assistant, need no option.

    With --from-prompt it imitates a system prompt, token by token: strength 1 does what the prompt does, and more exaggerates it.
    No examples are needed; the report says how much of the prompt's effect is reached on replies that the fit has not seen.

    With --again a vector is fitted again from the record it carries: the same model, data, method and seed give the same
    directions. The result is only written if NAME or --out is given.

    \b
    Examples:
      steer train mood
      steer train calm --pairs calm.jsonl --calibrate full
      steer train sailor --from-prompt "You are an old sailor who speaks of the sea in every answer."
      steer train mood --model deepseek-v4-flash.gguf --for ds4
      steer train mood --model other.gguf --out mood.safetensors
      steer train --again mood
    """
    from ..store.library import Library
    from ..training.train import Training, TrainOptions

    if again is not None:
        given = _given(ctx, (*_OF_THE_FIT, "from_prompt", "against", "rank"))
        if given:
            raise click.UsageError(f"--again takes --{_spelled(given[0])} from the vector: leave it out")
        _train_again(again, name, pairs, trait_name, engine, out, overwrite, as_json)
        return
    if name is None:
        raise click.UsageError("missing argument 'NAME'")
    if from_prompt is not None:
        given = _given(ctx, _NOT_FOR_PROMPTS)
        if given:
            raise click.UsageError(f"--from-prompt does not take --{_spelled(given[0])}: leave it out")
        _imitate(name, from_prompt, against, rank, layers, seed, thinking, engine, out, overwrite, as_json)
        return
    for option, value in (("against", against), ("rank", rank)):
        if value is not None:
            raise click.UsageError(f"--{option} belongs to --from-prompt: name the prompt to imitate")
    source = load_source(name, pairs, trait_name)
    options = TrainOptions(
        method=method,
        positions=positions,
        layers=None if layers is None else parse_layers(layers),
        calibrate=calibrate,
        scope=scope,
        seed=seed,
        thinking=thinking,
        remove_neutral=remove_neutral,
        baseline=baseline,
    )
    if target == "ds4":
        # as ds4's own builder does: what good and bad examples share is taken out
        options = replace(options, op="project", site="ffn_out", remove_neutral=True)
    place = Target(name, out, overwrite, Library())
    if out is not None:
        place.check(None)
    with engine.open(n_parallel=N_PARALLEL) as opened:
        place.check(opened)
        training = Training(opened, name, source, options)
        vector = run_training(training)
        path = place.write(vector, opened)
    if as_json:
        from .show import describe

        print_json({**describe(vector), "file": str(path)})
    else:
        print_report(vector, path)


def _given(ctx: click.Context, options: Sequence[str]) -> list[str]:
    """Which of these options were set, by the names of their parameters."""
    return [p for p in options if ctx.get_parameter_source(p) is not ParameterSource.DEFAULT]


def _spelled(parameter: str) -> str:
    return {"trait_name": "trait", "target": "for"}.get(parameter, parameter.replace("_", "-"))


def _imitate(
    name: str,
    prompt: str,
    against: str | None,
    rank: int | None,
    layers: str | None,
    seed: int,
    thinking: bool,
    engine: EngineOptions,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    from ..store.library import Library
    from ..training.imitate import ImitateOptions, Imitation, load_prompt

    wanted, source = load_prompt(prompt)
    other = None if against is None else load_prompt(against)[0]
    options = ImitateOptions(layers=None if layers is None else parse_layers(layers), seed=seed, thinking=thinking)
    options = options if rank is None else replace(options, rank=rank)
    target = Target(name, out, overwrite, Library())
    if out is not None:
        target.check(None)
    with engine.open(n_parallel=N_PARALLEL) as opened:
        target.check(opened)
        imitation = Imitation(opened, name, wanted, other, options)
        with Stages() as stages:
            vector = imitation.run(stages)
        vector = vector.replace(provenance={**(vector.provenance or {}), "source": source})
        path = target.write(vector, opened)
    if as_json:
        from .show import describe

        print_json({**describe(vector), "file": str(path)})
    else:
        print_shares(vector, path)


def print_shares(vector: SteeringVector, path: Path) -> None:
    """What an imitated prompt is worth, for people."""
    from ..steering.vector import layer_ranges

    record, out = vector.calibration or {}, console()
    out.print(
        f"{vector.name}: layers {layer_ranges(vector.layers)}; the prompt makes its own replies {record['gap']:.3g} nats a token "
        f"likelier. Of that gap, on {record['n']} held-out replies ({record['tokens']} tokens):",
        markup=False,
    )
    print_table(
        ("arm", "share closed", "95 % interval"),
        [(r["arm"], f"{r['share']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}") for r in record["shares"]],
    )
    best = record["shares"][0]
    if best["low"] <= 0.0:
        out.print("Note: this is hardly more than nothing; a prompt may ask for content that no edit brings.", markup=False)
    out.print(f"Written to {path}", markup=False)
    if path.suffix == ".safetensors":
        term = shlex.quote(f"{spec_of(vector, path)}:1")
        out.print(f'Try: steer generate --steer {term} "Describe a walk in the forest"', markup=False, soft_wrap=True)


def _train_again(
    again: str,
    name: str | None,
    pairs: str | None,
    trait_name: str | None,
    engine: EngineOptions,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    from ..store.library import Library
    from ..training.train import check_source, options_of, train_again

    library = Library()
    with engine.open(n_parallel=N_PARALLEL) as opened:
        vector = library.resolve(again, opened.info.identity)
        options_of(vector)
        source = source_of(vector, pairs, trait_name)
        check_source(vector, source)
        target = Target(name or vector.name, out, overwrite, library) if name is not None or out is not None else None
        if target is not None:
            target.check(opened)
        repeat = train_again(opened, vector, source, name=name)
        path = None
        if target is not None:
            # the same directions have the same calibration
            made = vector.replace(name=target.name) if repeat.identical else repeat.training.finish(repeat.fit)
            path = target.write(made, opened)
    known = [cosine for cosine in repeat.cosines.values() if cosine is not None]
    lowest = min(known) if len(known) == len(repeat.cosines) else None
    if as_json:
        print_json({"vector": vector.name, "identical": repeat.identical, "cosines": repeat.cosines, "file": path})
    elif repeat.identical:
        click.echo(f"{vector.name}: the same directions, bit for bit, at {len(repeat.cosines)} layers.")
    else:
        what = "some layers have no direction now" if lowest is None else f"the lowest cosine is {lowest:.6f}"
        click.echo(f"{vector.name}: not the same directions; {what}. Another build, machine or number of threads?")
    if path is not None and not as_json:
        click.echo(f"Written to {path}")
    if not repeat.identical:
        raise click.exceptions.Exit(1)


def source_of(vector: SteeringVector, pairs: str | None, trait_name: str | None) -> Trait | ContrastData:
    """What a vector was fitted to: as named, a trait of the package, or the pairs file of that name in this folder."""
    from ..training.traits import bundled_recipes, bundled_traits

    source = (vector.provenance or {})["source"]
    if pairs is not None or trait_name is not None:
        return load_source(vector.name, pairs, trait_name)
    if source.get("trait") in (*bundled_traits(), *bundled_recipes()):
        return load_source(source["trait"], None, source["trait"])
    file = source.get("file")
    if isinstance(file, str) and Path(file).name == file and Path(file).is_file():
        return load_source(vector.name, file, None)
    if "trait" in source:
        raise DataError(f"'{vector.name}' was fitted to the trait '{source['trait']}': name its file with --trait")
    raise DataError(f"'{vector.name}' was fitted to the pairs in '{file}', which is not here: name the file with --pairs")


#: Replies that are generated side by side while training.
N_PARALLEL = 12


class Target:
    """Where the vector goes; checked before the work and written after it."""

    def __init__(self, name: str, out: Path | None, overwrite: bool, library: Any) -> None:
        from ..steering.vector import check_name

        self.name, self.out, self.overwrite, self.library = check_name(name), out, overwrite, library

    def check(self, engine: Engine | None) -> None:
        """Raises VectorError if the vector is there already and may not be replaced, or its folder is missing."""
        if self.out is not None:
            if not self.out.parent.is_dir():
                raise VectorError(f"there is no folder {self.out.parent} to write {self.out.name} to: make it first")
            if self.out.is_dir():
                raise VectorError(f"{self.out} is a folder: name a file with --out")
            if self.out.exists() and not self.overwrite:
                raise VectorError(f"{self.out} exists: choose another file, or replace it with --overwrite")
        elif engine is not None and self.library.path(self.name, engine.info.identity).exists() and not self.overwrite:
            label = engine.info.identity.label
            raise VectorError(f"the library already has {self.name!r} for {label}: replace it with --overwrite")

    def write(self, vector: SteeringVector, engine: Engine) -> Path:
        """Write the vector and return its file."""
        if self.out is None:
            path: Path = self.library.put(vector, engine.info.identity, overwrite=self.overwrite)
            return path
        from ..store.vectorfile import write_vector

        write_vector(vector, self.out)
        return self.out


def load_source(name: str, pairs: str | None, trait_name: str | None) -> Trait | ContrastData:
    """What to learn from. Raises DataError if it is not said once, or cannot be used."""
    from ..training.extract import load_pairs
    from ..training.traits import bundled_recipes, bundled_traits, load_trait

    if pairs is not None and trait_name is not None:
        raise click.UsageError("give --pairs or --trait, not both")
    if pairs is not None:
        return load_pairs(pairs)
    if trait_name is not None:
        from ..steering.vector import is_hub_name
        from ..store.library import Library

        pulled = Library().pulled.file(trait_name, "trait") if is_hub_name(trait_name) else None
        return load_trait(pulled or trait_name)
    names = (*bundled_traits(), *bundled_recipes())
    if name not in names:
        known = ", ".join(bundled_traits())
        raise DataError(f"no trait {name!r} comes with the package ({known} do): give --pairs FILE or --trait FILE")
    return load_trait(name)


def parse_layers(text: str) -> tuple[int, ...]:
    """``A-B``, ``A``, or several of them with commas, as block indices. Raises SpecError."""
    found: set[int] = set()
    for part in text.split(","):
        match = _LAYERS.fullmatch(part.strip())
        if match is None:
            raise SpecError(f"--layers {text!r} is not a list of layers: write A-B or A,B, such as 10-15 or 8,12-14")
        lo = int(match[1])
        hi = lo if match[2] is None else int(match[2])
        if hi < lo:
            raise SpecError(f"--layers {text!r} ends before it starts: write the lower layer first")
        found.update(range(lo, hi + 1))
    return tuple(sorted(found))


def run_training(training: Training) -> SteeringVector:
    """Say what it costs, then train under a progress bar; both on stderr."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    plan = training.plan()
    err = console(stderr=True)
    model = Path(training.engine.info.path).name
    err.print(
        f"{training.name}: {len(training.data.pairs)} pairs on {model}; about {_thousands(plan.tokens)} tokens "
        f"({_thousands(plan.read)} read, {_thousands(plan.generate)} generated, {_thousands(plan.score)} scored), "
        f"about {duration(plan.seconds)}.",
        markup=False,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(training.name, total=plan.tokens)

        def report(stage: str, tokens: int) -> None:
            done = bar.tasks[task].completed + tokens
            # an estimate: a search that takes longer must not look finished
            bar.update(task, description=f"{training.name}: {stage}", completed=min(done, 0.99 * plan.tokens))

        return training.run(report)


def print_report(vector: SteeringVector, path: Path) -> None:
    """What was found, for people."""
    from ..steering.grammar import TermSpec, format_terms
    from ..steering.vector import layer_ranges

    spec = spec_of(vector, path)
    out = console()
    record = vector.calibration
    report = (vector.provenance or {}).get("report") or {}
    if report.get("window"):
        lo, hi = report["window"]
        best = max((row for row in report["layers"] if lo <= row["layer"] <= hi), key=lambda row: row.get("separation", 0.0))
        where = f"layers {lo}-{hi} tell" if hi > lo else f"layer {lo} tells"
        out.print(
            f"{vector.name}: {where} the poles apart best and most reproducibly (held-out pairs in order: "
            f"{best.get('ordered', 0.5):.0%} at layer {best['layer']}; steer show {shlex.quote(spec)} has them all).",
            markup=False,
        )
    measured = (vector.provenance or {}).get("projection")
    if vector.op == "project":
        found = "not measured" if measured is None else _projection_line(measured)
        out.print(f"{vector.name}: layers {layer_ranges(vector.layers)} at {vector.sites[0]}; {found}.", markup=False)
        if measured is not None:
            rows = [(f"{r['strength']:g}", *(f"{r[k]:.2f}" for k in _PROJECTION_COLUMNS)) for r in measured["rows"]]
            print_table(("strength", *_PROJECTION_COLUMNS), rows)
    elif record is None:
        out.print(
            f"{vector.name}: layers {layer_ranges(vector.layers)}, scope {vector.default_scope}; not calibrated, so "
            "strength 1.0 is a guess (0.3 of the residual norm).",
            markup=False,
        )
    else:
        error = f" ± {record['effect_se']:.2g}" if record["effect_se"] is not None else ""
        out.print(
            f"{vector.name}: layers {layer_ranges(vector.layers)}, scope {vector.default_scope}, strength 1.0 is a dose of "
            f"{record['dose']:.3g} median residual norms.\n"
            f"From strength -1 to 1 the {record['objective']['name']} moves by {record['effect']:.3g}{error} "
            f"{record['objective']['unit']} on {record['n']} held-out {record['objective']['of']}.",
            markup=False,
        )
        print_table(("strength", "score", "perplexity", "repeats", "early ends", "words"), _report_rows(record))
        weak = record["effect"] <= 2 * (record["effect_se"] or 0.0)
        if weak or not record["monotone"]:
            what = "hardly more than noise" if weak else "not monotone from -1 to 1"
            out.print(f"Note: this effect is {what}; clearer examples or --calibrate full may help.", markup=False)
    out.print(f"Written to {path}", markup=False)
    if vector.op == "add" and path.suffix == ".safetensors":
        term = shlex.quote(format_terms([TermSpec(spec)]) + ":1")
        out.print(f'Try: steer generate --steer {term} "Describe a walk in the forest"', markup=False, soft_wrap=True)


_PROJECTION_COLUMNS = ("score", "perplexity", "repeats")


def _projection_line(measured: dict[str, Any]) -> str:
    """What projecting was found to do."""
    error = 2 * measured["effect_se"]
    if measured["best"] is None:
        return "no strength left the text fluent"
    moves = "" if abs(measured["effect"]) > error else ", which is hardly more than noise"
    return (
        f"strength {measured['best']:g} moves the {measured['objective']} by {measured['effect']:+.3g} ± {error / 2:.2g}{moves}"
    )


def spec_of(vector: SteeringVector, path: Path) -> str:
    """What a command finds the vector by: its name where ``path`` is the library's, else the path."""
    kept = vector.identity is not None and (path.parent.name, path.stem) == (vector.identity.key, vector.name)
    return vector.name if kept else str(path)


def _report_rows(record: dict[str, Any]) -> list[tuple[object, ...]]:
    """The winner's curve: scores on the search's prompts, the guard's values where they were measured."""
    rows = []
    for row in record["rows"]:
        if row["stage"] == "curve":
            perplexity = row["perplexity"]
            cells = (f"{row['strength']:g}", row["score"], perplexity, row["repeats"], row["early_ends"], row["words"])
            rows.append(tuple(f"{c:.2f}" if isinstance(c, float) else c for c in cells))
    return rows


def duration(seconds: float) -> str:
    """``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _thousands(n: int) -> str:
    """To two digits: it is an estimate."""
    if n < 100:
        return str(n)
    digits = len(str(n)) - 2
    return f"{round(n / 10**digits) * 10**digits:,}".replace(",", " ")
