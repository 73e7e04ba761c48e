"""The ``steer ollama`` commands. Light to import: Starlette and the rest come in when a command runs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from pathlib import Path

import click

from steer_plugins.errors import EngineError, RuntimeMissing
from steer_plugins.paths import expand_path
from steer_plugins.plugins import hookimpl

_URL = click.option(
    "--url",
    envvar="STEER_OLLAMA_HOST",
    default="http://127.0.0.1:11435",
    show_default=True,
    metavar="URL",
    help="Where the sidecar is (or set STEER_OLLAMA_HOST).",
)


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer ollama``."""
    cli.add_command(ollama)


@click.group()
def ollama() -> None:
    """Steer the models of Ollama: a sidecar that every Ollama client can talk to."""


def _need_extra() -> None:
    missing = [name for name in ("starlette", "uvicorn", "httpx") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeMissing(f"{', '.join(missing)} must be installed for this: pip install 'steer-plugins[ollama]'")


@ollama.command(options_metavar="[OPTIONS] [-- LLAMA-SERVER FLAGS]")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="")
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen; 0.0.0.0 for everywhere."
)
@click.option("--port", type=click.IntRange(0, 65535), default=11435, show_default=True, metavar="N", help="0 picks a free one.")
@click.option("--folder", type=click.Path(path_type=Path), metavar="DIR", help="Serve its GGUFs and Modelfiles without Ollama.")
@click.option("--daemon", metavar="URL", help="Where Ollama is (default: OLLAMA_HOST, else 127.0.0.1:11434).")
@click.option("--all", "serve_all", is_flag=True, help="Run unsteered models here too.")
@click.option("--debug", is_flag=True, help="Print llama-server's log too.")
def serve(
    flags: tuple[str, ...], host: str, port: int, folder: Path | None, daemon: str | None, serve_all: bool, debug: bool
) -> None:
    """Run the sidecar until Ctrl-C. Point Ollama's clients at it: OLLAMA_HOST=127.0.0.1:11435.

    Without --folder it works alongside the Ollama of this machine, on Ollama's own model files; where there is none, it serves
    the default folder and the demo model. What follows -- goes to every llama-server it starts.

    \b
    Examples:
      steer ollama serve
      steer ollama serve --folder ~/ggufs -- -ngl 99
      OLLAMA_HOST=127.0.0.1:11435 ollama run cheerful
    """
    _need_extra()
    from .daemon import host_url
    from .serving import ServeOptions, configure_logging
    from .serving import serve as run

    if folder is not None and daemon is not None:
        raise click.UsageError("--folder serves without Ollama, so --daemon does not apply: leave one of them out")
    configure_logging(debug)

    def ready(sentence: str) -> None:
        click.echo(sentence)
        sys.stdout.flush()

    wanted = ServeOptions(host, port, folder, host_url(daemon, "--daemon") if daemon else None, serve_all, flags)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended in order already
        run(wanted, ready)


@ollama.command()
@click.argument("name")
@click.option("-f", "--file", "path", type=click.Path(path_type=Path), default="Modelfile", show_default=True, metavar="FILE")
@click.option("-q", "--quantize", metavar="TYPE", help="Have Ollama quantize the model, such as q4_K_M.")
@click.option("--carry", is_flag=True, help="Store the vectors with the model, so that it does not need the library.")
@_URL
def create(name: str, path: Path, quantize: str | None, carry: bool, url: str) -> None:
    """Create the model NAME from a Modelfile that may say PARAMETER steering "mood:0.6 + succinctness:-0.3".

    The vectors are looked up in the library for that model first; a file named in quotes is stored with the model.
    It works through the sidecar, and directly with Ollama where no sidecar runs.

    \b
    Examples:
      steer ollama create cheerful -f Modelfile
      steer ollama create cheerful --carry
    """
    _need_extra()
    from .client import create as run

    for status in run(name, path, url, quantize=quantize, carry=carry):
        click.echo(status)


@ollama.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.argument("name")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[STEER TRAIN OPTIONS]...")
@click.option("--from-modelfile", is_flag=True, help="Imitate the model's own SYSTEM.")
@_URL
def train(model: str, name: str, options: tuple[str, ...], from_modelfile: bool, url: str) -> None:
    """Fit the vector NAME on the model MODEL of Ollama, as `steer train` does, and keep it in the library.

    Where the sidecar runs, its loaded copy of the weights is used.

    \b
    Examples:
      steer ollama train llama3.2 mood
      steer ollama train llama3.2 calm --pairs calm.jsonl
      steer ollama train llama3.2 sailor --from-prompt "You are an old sailor who speaks of the sea in every answer."
      steer ollama train mario mario --from-modelfile
    """
    _need_extra()
    from steer_plugins.cli.train import train as steer_train

    from .client import engine_of

    if from_modelfile:
        from .client import system_of

        options = (*options, "--from-prompt", system_of(model))
    with engine_of(model, url) as flags:
        steer_train.main([name, *flags, *options], prog_name="steer train", standalone_mode=False)


@ollama.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.argument("reference")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[STEER HUB PULL OPTIONS]...")
@click.option("--folder", type=click.Path(path_type=Path), metavar="DIR", help="MODEL is served from there, without Ollama.")
def pull(model: str, reference: str, options: tuple[str, ...], folder: Path | None) -> None:
    """Pull the vector REFERENCE (owner/name) for the model MODEL of Ollama, as `steer hub pull --model` does.

    What it does is measured on the model first. Modelfiles may say PARAMETER steering "owner/name:0.6" then.

    \b
    Examples:
      steer ollama pull llama3.2 ann/mood
      steer ollama pull smollm2 ann/mood@2 --index ours
    """
    _need_extra()
    from steer_plugins.cli.hub import pull as hub_pull

    from .serving import local_store

    file = local_store(folder).get(model).gguf
    hub_pull.main(["--model", str(file), reference, *options], prog_name="steer hub pull", standalone_mode=False)


@ollama.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[STEER MCP OPTIONS]...")
@_URL
def mcp(model: str, options: tuple[str, ...], url: str) -> None:
    """Let the model MODEL steer itself, as `steer mcp` does: its requests pass through a port on their way to the sidecar.

    \b
    Examples:
      steer ollama mcp llama3.2 --allow succinctness:0.8
    """
    _need_extra()
    from steer_plugins.cli.mcp import mcp as steer_mcp

    from .client import engine_of

    with engine_of(model, url) as flags:
        if "--server" not in flags:
            raise EngineError(f"no sidecar answers at {url}: start one with `steer ollama serve`")
        steer_mcp.main([*flags, "--to", url, *options], prog_name="steer mcp", standalone_mode=False)


def serve_options(words: tuple[str, ...]) -> list[str]:
    """Options of ``steer ollama serve``, checked, with the folder named so that it is found from anywhere.

    Raises:
        click.UsageError: they are not its options.
    """
    context = serve.make_context("steer ollama serve", list(words))
    folder = context.params["folder"]
    if folder is None:
        return list(words)
    found = [*words[: words.index("--")]] if "--" in words else list(words)
    flags = words[len(found) :]
    there = expand_path(folder).absolute()
    for number, word in enumerate(found):
        if word == "--folder":
            found[number + 1] = str(there)
        elif word.startswith("--folder="):
            found[number] = f"--folder={there}"
    return [*found, *flags]


@ollama.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.option("--remove", is_flag=True, help="Undo it.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, and do nothing.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVE OPTIONS]")
def install(yes: bool, dry_run: bool, remove: bool, as_json: bool, options: tuple[str, ...]) -> None:
    """Start the sidecar with your session: a systemd user unit, or a launchd agent on macOS.

    Prints what it will do, and asks first. What follows -- are options of `steer ollama serve`.

    \b
    Examples:
      steer ollama install
      steer ollama install --dry-run -- --all
    """
    from . import install as installing

    plan = installing.removal() if remove else installing.plan(serve_options(options))
    if as_json:
        click.echo(json.dumps(plan.describe()))
        return
    click.echo(plan.text())
    if dry_run:
        return
    if not yes:
        click.confirm("Do this?", abort=True)
    for said in plan.run():
        click.echo(said)


@ollama.command()
@click.option("--dir", "folder", type=click.Path(path_type=Path), metavar="DIR", help="Ollama's libraries (default: looked for).")
@click.option("--gpu", metavar="NAME", help="The kind of GPU, where Ollama brings several: cuda_v13, vulkan, rocm, …, or none.")
@click.option("--git", metavar="URL", help="The repository of Ollama's llama.cpp (default: llama.cpp's own).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def build(folder: Path | None, gpu: str | None, git: str | None, as_json: bool) -> None:
    """Compile the steering llama-server on Ollama's GPU libraries, from the sources of the same llama.cpp.

    \b
    Examples:
      steer ollama build
      steer ollama build --gpu cuda_v13
    """
    from steer_plugins.cli.build import run_build
    from steer_plugins.runtime import BuildOptions

    from .libraries import find_libraries

    found = find_libraries(expand_path(folder) if folder is not None else None, gpu)
    run_build(BuildOptions(on=found, git=git), as_json)
