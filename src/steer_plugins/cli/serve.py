"""``steer serve``: runs llama-server with steering, with the user's vectors in it."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ..errors import EngineError, SpecError, VectorError
from ..plugins import hookimpl
from .common import Combining, FilePath, combining_options, console, json_option, model_path

if TYPE_CHECKING:
    from ..client import ServerProcess
    from ..steering.grammar import TermSpec
    from ..steering.terms import Steering
    from ..steering.vector import ModelIdentity, SteeringVector
    from ..store.library import Library

# with these llama-server finds its model by itself
_ELSEWHERE = ("-hf", "-hfr", "--hf-repo", "-mu", "--model-url", "-dr", "--docker-repo", "--models-dir", "--models-preset")


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer serve``."""
    cli.add_command(serve)


# no short options: llama-server has -m, -mg, -md, -c, -hf ..., of which click would take the first letter
@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]},
    options_metavar="[MODEL] [OPTIONS] [LLAMA-SERVER FLAGS]...",
)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="")
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen; 0.0.0.0 for everywhere."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, metavar="N", help="0 picks a free one.")
@click.option("--steering", metavar="TERMS", help='For requests without their own: "mood:0.6 + !hedging@10-20?response".')
@combining_options
@click.option("--library/--no-library", default=True, show_default=True, help="Load this model's vectors from the library.")
@click.option("--vector", "vectors", multiple=True, metavar="NAME=FILE", help="Load a vector under a name; may be repeated.")
@click.option("--rpc", metavar="HOST:PORT,...", help="Workers (`steer worker`) that hold layers of the model.")
@click.option("--force", is_flag=True, help="Accept vectors of another fine-tune of this model.")
@click.option(
    "--unmodified",
    type=FilePath(path_type=Path),
    metavar="FILE",
    help="Run FILE, a llama-server that knows nothing of steering: --steering then acts on every token of all requests.",
)
@click.option("--show-log", is_flag=True, help="Print llama-server's log on standard error.")
@json_option
def serve(
    flags: tuple[str, ...],
    host: str,
    port: int,
    steering: str | None,
    combining: Combining,
    library: bool,
    vectors: tuple[str, ...],
    rpc: str | None,
    force: bool,
    unmodified: Path | None,
    show_log: bool,
    as_json: bool,
) -> None:
    """Run llama-server with steering until Ctrl-C. MODEL is a GGUF file and comes first (default: the demo model).

    Whatever is not an option below goes to llama-server as it is: -c 8192 -ngl 99 --parallel 4. Requests name the vectors
    that act on them in their field "steering"; docs/server.md shows how.

    \b
    Examples:
      steer serve
      steer serve model.gguf -c 8192 -ngl 99 --parallel 4
      steer serve model.gguf --steering "mood:0.5" --vector calm=./calm.safetensors
    """
    from ..client import ServerProcess
    from ..runtime import ensure_runtime
    from ..runtime.rpc import check_workers, parse_workers, program
    from ..store.library import Library

    if "-h" in flags:
        click.echo(click.get_current_context().get_help())
        return
    if combining and steering is None:
        raise SpecError("--orthogonalise and --max-dose are about the vectors of --steering: give that, too")
    model, rest = split_flags(flags)
    if "--steering-dir" in (flag.replace("_", "-") for flag in rest):
        raise SpecError("--steering-dir is where this command puts the vectors itself: give each as --vector NAME=FILE")
    if unmodified is not None and not unmodified.is_file():
        raise SpecError(f"there is no llama-server {unmodified}: name the program itself with --unmodified")
    runtime = None if unmodified is not None else ensure_runtime(need_server=True)
    if rpc is not None:
        if runtime is not None:
            program(runtime)  # the back end and the program are built together
        workers = parse_workers(rpc)
        check_workers(workers)
        rest = [*rest, "--rpc", ",".join(workers)]
    binary = unmodified if runtime is None else runtime.server
    err = console(stderr=True)

    def log(line: str) -> None:
        click.echo(line, err=True)

    with (
        tempfile.TemporaryDirectory(prefix="steer-serve-") as folder,
        ServerProcess(binary, host=host, port=port or None, on_line=log if show_log else None) as server,
        _signals_as_exceptions(),
    ):
        names: list[str] = []
        if model is not None:
            staged = Staged(Path(folder), Library(), model, force=force)
            if library and unmodified is None:
                for sentence in staged.add_library():
                    err.print(f"steer: warning: {sentence}", markup=False)
            for spec in vectors:
                staged.add(spec)
            if unmodified is not None:
                rest = [*staged.fixed(steering, combining), *rest]
            else:
                rest = [*staged.flags(steering, combining), *rest]
                names = staged.names
        elif steering is not None or vectors:
            raise SpecError("--steering and --vector need a model file: name one, in place of the flag that fetches a model")
        try:
            server.start(model, rest)
            _wait_ready(server, model, quiet=as_json)
            _announce(server, model, names, as_json, fixed=unmodified is not None)
            code = None
            while code is None:
                code = server.wait(0.5)
        except _Stopped as stopped:
            click.get_current_context().exit(128 + stopped.number)
        if code != 0:
            error = EngineError(server.epitaph(code))
            error.exit_code = code
            raise error


def split_flags(flags: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The model file, and what goes to llama-server. None: the flags say that llama-server fetches a model.

    Raises:
        ModelError: there is no such file, or the demo model is meant and missing.
        click.UsageError: a flag without its value, or two models.
    """
    rest = list(flags)
    named: list[str] = []
    if rest and not rest[0].startswith("-"):
        named.append(rest.pop(0))
    for flag in ("-m", "--model"):
        while flag in rest:
            at = rest.index(flag)
            if at + 1 == len(rest):
                raise click.UsageError(f"{flag} needs a file")
            named.append(rest[at + 1])
            del rest[at : at + 2]
    if len(named) > 1:
        raise click.UsageError(f"name one model, not {' and '.join(named)}")
    if not named and any(flag in rest for flag in _ELSEWHERE):
        return None, rest
    return model_path(named[0] if named else None), rest


class Staged:
    """Vectors for a server that is about to start, as files of a folder that it loads.

    Args:
        folder: an empty folder.
        library: where names are looked up.
        model: the GGUF file.
        force: take vectors of another fine-tune.
    """

    def __init__(self, folder: Path, library: Library, model: Path, *, force: bool = False) -> None:
        from ..store.identity import identity_of_gguf

        self._folder, self._library, self._force = folder, library, force
        self._identity: ModelIdentity = identity_of_gguf(model)
        self._vectors: dict[str, SteeringVector] = {}

    @property
    def names(self) -> list[str]:
        """What users know the vectors by."""
        return list(self._vectors)

    def add_library(self) -> list[str]:
        """All vectors that the library has for the model; returns what is wrong with those that cannot be read."""
        wrong = []
        for entry in self._library.list(self._identity):
            try:
                self._write(entry.name, self._library.get(entry.name, self._identity, force=self._force))
            except VectorError as error:
                wrong.append(str(error))
        return wrong

    def add(self, spec: str) -> None:
        """``NAME=FILE``. Raises SpecError or VectorError."""
        from ..steering.vector import check_name

        name, equals, file = spec.partition("=")
        if not equals or not file:
            raise SpecError(f"--vector {spec!r} is not of the form NAME=FILE, such as calm=./calm.safetensors")
        check_name(name)
        vector = self._library.resolve(file, self._identity, force=self._force)
        self._write(name, vector.replace(name=name))  # what is said about it uses the name that the user gave it

    def _write(self, name: str, vector: SteeringVector) -> None:
        from ..store.vectorfile import write_vector

        write_vector(vector, self._folder / f"{name}.safetensors")
        self._vectors[name] = vector

    def fixed(self, steering: str | None, combining: Combining = Combining()) -> list[str]:  # noqa: B008
        """The flags that make an unmodified llama-server steer by a text of the grammar, for all requests."""
        from ..client.fixed import fixed_flags

        return fixed_flags(self._wanted(steering, combining)[2])

    def _wanted(self, steering: str | None, combining: Combining) -> tuple[list[TermSpec], dict[str, SteeringVector], Steering]:
        """A text's terms, the vectors that they name, and what both come to."""
        from ..steering.grammar import names_of, parse, steering_of

        terms = parse(steering) if steering is not None else []
        found: dict[str, SteeringVector] = {}
        for name in names_of(terms):
            known = self._vectors.get(name)
            found[name] = known if known is not None else self._library.resolve(name, self._identity, force=self._force)
        return (
            terms,
            found,
            combining.apply(steering_of(terms, found.__getitem__)),
        )  # complains of a window without directions, too

    def flags(self, steering: str | None, combining: Combining = Combining()) -> list[str]:  # noqa: B008
        """The flags that make llama-server load the folder, and steer by a text of the grammar unless a request says how."""
        from ..client.vectors import content_name, gate_name

        terms, found, wanted = self._wanted(steering, combining)
        texts = []
        for term, fit in zip(terms, wanted, strict=True):
            data: dict[str, Any] = {**term.to_json(), "strength": fit.strength}
            if term.vector not in self._vectors or fit.vector.content_hash != found[term.vector].content_hash:
                data["vector"] = self._along(content_name(fit.vector), fit.vector)
            if fit.gate is not None and term.gate not in self._vectors:
                data["gate"] = self._along(gate_name(fit.gate), fit.gate.to_vector())
            texts.append(data)
        flags = ["--steering-dir", str(self._folder)]
        return [*flags, "--steering", json.dumps(texts)] if texts else flags

    def _along(self, name: str, vector: SteeringVector) -> str:
        """Put a vector that has no name of the user's (a file's, or one made here) into the folder, under ``name``."""
        from ..store.vectorfile import write_vector

        write_vector(vector, self._folder / f"{name}.safetensors")
        return name


def _wait_ready(server: ServerProcess, model: Path | None, *, quiet: bool) -> None:
    err = console(stderr=True)
    what = model.name if model is not None else "the model"
    if err.is_terminal and not quiet:
        with err.status(f"loading {what} ...") as status:
            server.wait_ready(timeout=24 * 3600, on_wait=lambda s: status.update(f"loading {what} ... {s:.0f} s"))
        return
    if not quiet:
        err.print(f"loading {what} ...", markup=False)
    server.wait_ready(timeout=24 * 3600)


def _announce(server: ServerProcess, model: Path | None, names: list[str], as_json: bool, *, fixed: bool) -> None:
    """Where it is and how to use it, on standard output, at once: scripts wait for it."""
    if as_json:
        facts: dict[str, Any] = {"url": server.url, "model": str(model) if model else None, "device": server.device}
        click.echo(json.dumps({**facts, "vectors": names}))
    else:
        what = f"{model.name} on {server.device}" if model is not None else server.device
        click.echo(f"Serving {what} at {server.url}")
        if fixed:
            click.echo("Its steering is fixed: requests cannot change it, and nothing can be trained on this server")
        elif names:
            click.echo(f"Vectors: {', '.join(names)}")
        else:
            click.echo("No vectors for this model yet: fit one with: steer train mood")
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "Describe a walk in the forest"}]}
        if names:
            body["steering"] = [{"vector": names[0], "strength": 0.8}]
        url = f"{server.url}/v1/chat/completions"
        click.echo(f"Try:\n  curl {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}")
        click.echo("Ctrl-C ends it.")
    sys.stdout.flush()


class _Stopped(Exception):
    """A signal that asks us to end."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP clean up like Ctrl-C does, unless somebody else has a use for them (nohup)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped(number)

    before: dict[int, Any] = {}
    try:
        for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    except ValueError:
        pass  # not the main thread: signals are the business of whoever runs it
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
