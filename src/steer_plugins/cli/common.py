"""What the commands share: options, tables, JSON. Light to import: numpy and the engine come in when they are used."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import ModelError, RuntimeMissing
from ..paths import expand_path

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.base import Engine
    from ..steering.terms import Steering

F = TypeVar("F", bound=Callable[..., Any])


class FilePath(click.Path):
    """A file or folder that the user names. ``~`` is expanded, which a shell does not do in quotes and after ``=``."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        return super().convert(str(expand_path(value)), param, ctx)


#: ``--json``: the command gets ``as_json: bool``.
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")


def _set_runtime(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """What is chosen holds for the whole command, and for the processes that it starts."""
    if value is None:
        return
    before = os.environ.get("STEER_RUNTIME")

    def restore() -> None:
        if before is None:
            os.environ.pop("STEER_RUNTIME", None)
        else:
            os.environ["STEER_RUNTIME"] = before

    os.environ["STEER_RUNTIME"] = value
    context.meta[_RUNTIME] = value
    context.call_on_close(restore)


_RUNTIME = "steer_plugins.runtime"


#: ``--runtime``, of which a command need not know.
runtime_option = click.option(
    "--runtime",
    metavar="WHICH",
    expose_value=False,
    callback=_set_runtime,
    help="The llama.cpp to use: patched, stock (the unmodified one of llama-cpp-python) or a folder with libraries "
    "(default: STEER_RUNTIME, else the patched one where there is one).",
)


def model_option(command: F) -> F:
    """Adds ``--model``: the command gets ``model: str | None``; None means the demo model, see :func:`model_path`. And
    :data:`runtime_option`."""
    text = "The model, a GGUF file (default: the demo model)."
    return click.option("-m", "--model", type=FilePath(), metavar="FILE", help=text)(runtime_option(command))


@dataclass(frozen=True)
class EngineOptions:
    """What the user said about the model and how to run it; None leaves it to the engine. ``server``: where it runs already."""

    model: str | None = None
    n_ctx: int | None = None
    n_gpu_layers: int | None = None
    threads: int | None = None
    server: str | None = None
    rpc: str | None = None

    @property
    def path(self) -> Path:
        """The model file. Raises ModelError if the demo model is meant and is not there."""
        return model_path(self.model)

    def open(self, **more: Any) -> Engine:
        """A ServerEngine, or a LocalEngine on that model; ``more`` are further arguments of the latter's constructor."""
        if self.server is not None:
            from ..client.engine import ServerEngine

            return ServerEngine(self.server, api_key=os.environ.get("STEER_API_KEY") or None)
        from ..engine.local import LocalEngine

        said: dict[str, Any] = {
            "n_ctx": self.n_ctx,
            "n_gpu_layers": self.n_gpu_layers,
            "n_threads": self.threads,
            "rpc": self.rpc,
        }
        return LocalEngine(self.path, **{key: value for key, value in said.items() if value is not None}, **more)


def engine_options(command: F) -> F:
    """Adds ``--model --n-ctx --n-gpu-layers --threads --server``; the command gets them as ``engine: EngineOptions``."""

    @model_option
    @click.option("-c", "--n-ctx", type=click.IntRange(min=1), metavar="N", help="Context length in tokens.")
    @click.option("-ngl", "--n-gpu-layers", type=click.IntRange(min=-1), metavar="N", help="Layers on the GPU; -1: all.")
    @click.option("-t", "--threads", type=click.IntRange(min=1), metavar="N", help="Threads on the CPU.")
    @click.option("--rpc", metavar="HOST:PORT,...", help="Workers (`steer worker`) that hold layers of the model.")
    @click.option(
        "--server",
        metavar="URL",
        envvar="STEER_SERVER",
        help="Use the model of a running `steer serve`, such as http://127.0.0.1:8080 (or set STEER_SERVER).",
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        model: str | None,
        n_ctx: int | None,
        n_gpu_layers: int | None,
        threads: int | None,
        rpc: str | None,
        server: str | None,
        **rest: Any,
    ) -> Any:
        runtime = click.get_current_context().meta.get(_RUNTIME)
        local = {
            "--runtime": runtime,
            "--model": model,
            "--n-ctx": n_ctx,
            "--n-gpu-layers": n_gpu_layers,
            "--threads": threads,
            "--rpc": rpc,
        }
        server = _chosen_server(server, [name for name, value in local.items() if value is not None])
        return command(*args, engine=EngineOptions(model, n_ctx, n_gpu_layers, threads, server, rpc), **rest)

    return wrapped  # type: ignore[return-value]


@dataclass(frozen=True)
class Combining:
    """What the user said about several vectors that act together: ``--orthogonalise`` and ``--max-dose``."""

    orthogonal: bool = False
    max_dose: float | None = None

    def __bool__(self) -> bool:
        return self.orthogonal or self.max_dose is not None

    def apply(self, steering: Steering) -> Steering:
        """The steering to use. Raises SpecError.

        Vectors whose strength was never measured, and pairs that point along each other, are named on standard error.
        """
        import warnings

        from ..steering.combine import CorrelatedWarning, combine

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CorrelatedWarning)
            wanted = combine(steering, orthogonal=self.orthogonal, max_dose=self.max_dose)
        # removing a component has no dose; a vector fitted with --calibrate none has one relative to the residual norm
        guessed = [
            t.vector.name for t in steering if not t.is_zero and t.effective_op != "project" and t.vector.calibration is None
        ]
        for name in dict.fromkeys(guessed):
            click.echo(f"steer: note: {name!r} is not calibrated, so strength 1.0 is a guess", err=True)
        for sentence in dict.fromkeys(str(one.message) for one in caught):
            click.echo(f"steer: warning: {sentence}", err=True)
        return wanted


def _finite(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("it has to be a finite number, such as 1", context, parameter)
    return value


def combining_options(command: F) -> F:
    """Adds ``--orthogonalise`` and ``--max-dose``; the command gets them as ``combining: Combining``."""

    @click.option("--orthogonalise", is_flag=True, help="Orthogonalise each --steer vector against the earlier ones.")
    @click.option(
        "--max-dose",
        type=click.FloatRange(min=0.0, min_open=True),
        metavar="X",
        callback=_finite,
        help="Upper limit for what all vectors add together; 1 is the full effect of one.",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, orthogonalise: bool, max_dose: float | None, **rest: Any) -> Any:
        return command(*args, combining=Combining(orthogonalise, max_dose), **rest)

    return wrapped  # type: ignore[return-value]


def _chosen_server(server: str | None, local: list[str]) -> str | None:
    """The server to use; ``local`` are the options given that are about a model in this process.

    They contradict ``--server``, but win over the environment.
    """
    if not server or not local:
        return server or None
    source = click.get_current_context().get_parameter_source("server")
    if source is click.core.ParameterSource.ENVIRONMENT:
        return None
    raise click.UsageError(f"--server uses the model that runs there, so {local[0]} does not apply: leave one of them out")


def model_path(model: str | None) -> Path:
    """The file meant by ``--model``: the given one, else the demo model. Raises ModelError."""
    if model is None:
        from ..runtime import demo_model as models

        return Path(models.default_model_path())
    path = expand_path(model)
    if not path.exists():
        raise ModelError(f"there is no model file {path}")
    return path


def need_proxy() -> None:
    """Raise RuntimeMissing unless a server can stand in front of another here."""
    import importlib.util

    missing = [name for name in ("starlette", "uvicorn", "httpx") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeMissing(f"{', '.join(missing)} must be installed for this: pip install 'steer-plugins[proxy]'")


def console(stderr: bool = False) -> Console:
    """A rich console on stdout, or on stderr. Into a pipe or a file it writes plain text and cuts nothing."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 10_000, highlight=False, soft_wrap=True)


class Stages:
    """A progress bar for each stage of a long work, with the time that is left, on standard error."""

    def __enter__(self) -> Stages:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn(),
            console=console(stderr=True), transient=True,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._bars.start()
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self._bars.stop()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Rows under column names. Numbers go to the right; cells are text, never markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = [list(row) for row in rows]
    # A title of its own, since rich centres those of tables, over 10,000 columns in a pipe.
    if title:
        click.echo(title)
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(table) and all(isinstance(row[index], int | float) for row in table)
        out.add_column(Text(cell_text(column)), justify="right" if numeric else "left", overflow="fold")
    for row in table:
        out.add_row(*(Text(cell_text(cell)) for cell in row))
    console().print(out, soft_wrap=False)


def cell_text(value: object) -> str:
    """A value as people read it: four digits of a float, yes and no, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def print_json(result: Any) -> None:
    """``result`` as JSON on stdout; NaN and infinities become null, numpy scalars numbers, paths strings."""
    click.echo(json.dumps(_plain(result), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a numpy scalar or array, without importing numpy
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
