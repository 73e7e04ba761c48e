"""``steer``: collects the commands that plugins bring, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

import click

from .. import __version__
from ..errors import SteerError, SteerWarning
from ..plugins.manager import COMMAND_PLUGINS, Manager, PluginWarning, manager

_EPILOG = """\b
Example:
  steer generate --steer mood:0.8 "Describe a walk in the forest"
"""


class SteerGroup(click.Group):
    """A group that asks plugins for its commands: the one module for `steer NAME`, all of them for `steer --help`."""

    def __init__(self, *args: Any, plugins: Manager | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plugins = plugins
        self._asked: set[str] = set()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMAND_PLUGINS:
            self._load([COMMAND_PLUGINS[cmd_name]])
        if cmd_name not in self.commands:
            self._load(COMMAND_PLUGINS.values(), installed=True)
        return super().get_command(ctx, cmd_name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._load(COMMAND_PLUGINS.values(), installed=True)
        first = [name for name in COMMAND_PLUGINS if name in self.commands]
        return first + sorted(set(self.commands) - set(first))

    def _load(self, modules: Iterable[str], installed: bool = False) -> None:
        plugins = self._plugins or manager()
        plugins.load(modules)
        if installed:
            plugins.load_installed()
        for name in plugins.implementers("register_commands"):
            if name in self._asked:
                continue
            self._asked.add(name)
            # A group of its own for each plugin: one that fails half-way leaves nothing behind, none hides another's.
            theirs = click.Group("steer")
            if plugins.call("register_commands", name, cli=theirs):
                for command_name, command in theirs.commands.items():
                    if command_name in self.commands or COMMAND_PLUGINS.get(command_name, name) != name:
                        what = f"the command {command_name!r} of the plugin {name!r} is not used: the name is taken"
                        warnings.warn(what, PluginWarning, stacklevel=2)
                    else:
                        self.add_command(command, command_name)


@click.group(cls=SteerGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="steer", message="%(prog)s %(version)s")
def cli() -> None:
    """Steer a local language model: fit a direction to examples, then turn it up or down while the model writes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 1 (or the error's own), 2 for wrong usage, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        # A model's text may hold characters the terminal's encoding lacks; that is not a reason to stop.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("always", PluginWarning)
        warnings.simplefilter("always", SteerWarning)
        warnings.showwarning = _show_warning
        try:
            code = _run(argv)
            with contextlib.suppress(ValueError):  # closed
                sys.stdout.flush()
            return code
        except BrokenPipeError:
            return _reader_left()


def _run(argv: Sequence[str] | None) -> int:
    try:
        result = cli.main(None if argv is None else list(argv), prog_name="steer", standalone_mode=False)
        return result if isinstance(result, int) else 0  # click returns the code of ctx.exit() here
    except click.exceptions.Abort as abort:
        return 130 if isinstance(abort.__cause__, KeyboardInterrupt) else _fail("stopped", 1)
    except KeyboardInterrupt:
        return 130
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            click.echo(f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} -h' for help.\n", err=True)
        sentence = error.format_message().rstrip(".").replace(". (Did you", " (did you").replace(". Did you", ": did you")
        return _fail(sentence[:1].lower() + sentence[1:], error.exit_code)
    except SteerError as error:
        return _fail(str(error), error.exit_code, debug=error)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, a folder that may not be written
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", 1, debug=error)
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return _fail(f"this is a bug: {what} (set STEER_DEBUG=1 to see where)", 70, debug=error)


def _fail(sentence: str, code: int, debug: BaseException | None = None) -> int:
    if debug is not None and os.environ.get("STEER_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(debug)
    click.echo(f"steer: {sentence}", err=True)
    return code


def _reader_left() -> int:
    """Quietly: whoever read our output (`steer ... | head`) has seen enough."""
    # Python flushes stdout once more at exit, which would fail again.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, SteerWarning):
        click.echo(f"steer: note: {message}", err=True)
    elif issubclass(category, PluginWarning):
        click.echo(f"steer: warning: {message}", err=True)
    else:
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


if __name__ == "__main__":
    sys.exit(main())
