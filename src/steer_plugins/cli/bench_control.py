"""``steer bench control`` and ``steer bench compare``: prompting against steering, and two such reports side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import DataError
from .bench_report import Out, report_options
from .common import EngineOptions, FilePath, console, engine_options, json_option, print_json, print_table

if TYPE_CHECKING:
    from ..bench.arms import Case
    from ..bench.control import ControlPlan
    from ..engine.base import Engine


@click.command()
@click.option("--trait", "traits", multiple=True, metavar="NAME", help="Bundled trait or trait file; may be repeated.")
@click.option("--pole", type=click.Choice(["positive", "negative"]), default="positive", show_default=True)
@click.option(
    "--family",
    "families",
    multiple=True,
    metavar="NAME",
    help="code, docs, style, advice, faults, or a plugin's (default: all).",
)
@engine_options
@click.option("--quick", is_flag=True, help="Only a few prompts of each family: for a first look; the numbers mean little.")
@click.option("--prompts", type=click.IntRange(min=2), metavar="N", help="Prompts of each family, half of them to be scored.")
@click.option("--sampled/--no-sampled", default=True, show_default=True, help="Sample replies (seeded) besides greedy ones.")
@click.option("--run-code", is_flag=True, help="Run the code the model writes, in a child process. This is not a sandbox.")
@click.option(
    "--fit", is_flag=True, help="First fit the traits that the library lacks, all bundled ones unless --trait names some."
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Traits run in parallel, each with its own engine and share of the threads; results do not change.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@report_options
@json_option
def control(
    traits: tuple[str, ...],
    pole: str,
    families: tuple[str, ...],
    engine: EngineOptions,
    quick: bool,
    prompts: int | None,
    sampled: bool,
    run_code: bool,
    fit: bool,
    jobs: int,
    seed: int,
    out: Out,
    as_json: bool,
) -> None:
    """Compare prompting with steering on the same prompts, scored without a judge model.

    The arms: plain, a system prompt, a strongly worded one, steering, steering with the prompt; and two
    controls, a random vector and one fitted to shuffled labels. The vectors come from the library (`steer train NAME`).

    \b
    Examples:
      steer bench control --quick --trait mood
      steer bench control --trait mood --trait succinctness --run-code --out report
      steer bench control --fit --jobs 2 --run-code --out report
    """
    from ..bench.control import QUICK, Control, ControlPlan
    from ..bench.report import make_report
    from ..bench.summary import SUMMARY, summary_rows
    from ..plugins import manager
    from .train import N_PARALLEL

    out.check("control")
    chosen = [manager().find("tasks", name) for name in families or manager().registry("tasks")]
    plan: ControlPlan = replace(QUICK if quick else ControlPlan(), sampled=sampled, run_code=run_code, seed=seed)
    if prompts is not None:
        plan = replace(plan, prompts=prompts)
    err = console(stderr=True)
    if engine.server is None and engine.threads is None and jobs > 1:
        engine = replace(engine, threads=max(1, (os.cpu_count() or 1) // jobs))
    with ExitStack() as stack:
        opened = stack.enter_context(engine.open(n_parallel=N_PARALLEL))
        if fit:
            _fit(opened, traits)
        helpers = [stack.enter_context(engine.open(n_parallel=N_PARALLEL)) for _ in range(1, jobs)]
        with err.status("reading") as status:
            done = 0

            def report(stage: str, n: int) -> None:
                nonlocal done
                done += n
                status.update(f"{done} texts; {stage}")

            cases = _cases([opened, *helpers], traits, 1 if pole == "positive" else -1, plan)
            results = Control(opened, cases, chosen, plan, report, helpers).run()
        found = make_report(opened, cases, chosen, plan, results, ["steer", *sys.argv[1:]])

    def show(files: list[Path]) -> None:
        if as_json:
            print_json({"manifest": found.manifest, "summary": found.summary, "files": files})
        else:
            print_table(SUMMARY, summary_rows(found.summary))

    out.deliver(found, show, as_json=as_json)


def _fit(engine: Engine, names: tuple[str, ...]) -> None:
    """Fit what is missing in the library, as `steer train NAME` does."""
    from ..store.library import Library
    from ..training.train import Training
    from ..training.traits import bundled_traits, load_trait
    from .train import run_training

    library, identity = Library(), engine.info.identity
    traits = [load_trait(name) for name in names or bundled_traits()]
    for trait in traits:
        if not library.path(trait.name, identity).is_file():
            # another process may have been quicker; both made the same
            library.put(run_training(Training(engine, trait.name, trait)), identity, overwrite=True)


def _cases(engines: Sequence[Engine], names: tuple[str, ...], sign: int, plan: ControlPlan) -> list[Case]:
    """The traits that were named, else the bundled ones that are fitted to this model. Raises as the library does."""
    from ..bench.arms import case_of
    from ..bench.workers import side_by_side
    from ..store.library import Library, missing_sentence
    from ..training.traits import bundled_traits, load_trait

    library, identity = Library(), engines[0].info.identity
    wanted = names or tuple(name for name in bundled_traits() if library.path(name, identity).is_file())
    if not wanted:
        raise DataError(missing_sentence("mood", identity))
    traits = [load_trait(name) for name in wanted]
    vectors = [library.get(trait.name, identity) for trait in traits]
    return side_by_side(
        engines,
        lambda engine, fitted: case_of(engine, *fitted, sign=sign, seed=plan.seed, n_pairs=plan.pairs),
        zip(traits, vectors, strict=True),
    )


@click.command()
@click.argument("first", metavar="A", type=FilePath(path_type=Path))
@click.argument("second", metavar="B", type=FilePath(path_type=Path))
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the bootstrap.")
@json_option
def compare(first: Path, second: Path, seed: int, as_json: bool) -> None:
    """Compare two reports of the same kind: B minus A.

    Of `steer bench control`: scores of each arm on the prompts that both have. Of `steer bench speed` and `steer bench server`:
    medians of each arm, and its ratio to the unsteered one.

    \b
    Example:
      steer bench compare before after
    """
    from ..bench.report import comparison, read_report

    a, b = read_report(first), read_report(second)
    columns, rows = comparison(a, b, seed)
    differs = sorted(key for key in a.manifest if key != "command" and a.manifest[key] != b.manifest.get(key))
    if as_json:
        result: dict[str, Any] = {
            "rows": [dict(zip(columns, row, strict=True)) for row in rows],
            "manifests_differ_in": differs,
        }
        print_json(result)
        return
    print_table(columns, rows)
    click.echo(f"The manifests differ in: {', '.join(differs)}" if differs else "The manifests agree.")
