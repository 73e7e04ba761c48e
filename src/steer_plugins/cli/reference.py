"""Writes docs/cli.md from the commands' own ``--help``:  python -m steer_plugins.cli.reference docs/cli.md"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..atomic import write_atomically
from ..plugins.manager import COMMAND_PLUGINS
from .main import cli

#: Commands of the integrations that come with this distribution: name -> module that has the command under the same name. They
#: are taken from there, not from what is installed, so that the page is the same with and without other plugins.
INTEGRATIONS = {"ollama": "steer_plugins_ollama.plugin"}

HEAD = """# The command line

Made from `steer … --help` by `python -m steer_plugins.cli.reference docs/cli.md`; a test checks that it is up to date.
Exit codes: 0 done, 1 something is wrong with what was asked for (one sentence says what), 2 wrong usage, 130 Ctrl-C.
"""


def render() -> str:
    """The page, Markdown."""
    parts = [HEAD]
    for path, command in _commands():
        parts.append(f"## {path}\n\n```text\n{_help(path, command)}\n```\n")
    return "\n".join(parts)


class _Steer(click.Group):
    """``steer`` with the commands of this distribution only, in their order."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(cli, info_name="steer")
    found = {name: cli.get_command(context, name) for name in COMMAND_PLUGINS}
    found |= {name: getattr(importlib.import_module(module), name) for name, module in INTEGRATIONS.items()}
    commands = {name: command for name, command in found.items() if command is not None}
    yield "steer", _Steer("steer", commands, params=cli.params, help=cli.help, epilog=cli.epilog)
    for name, command in commands.items():
        yield f"steer {name}", command
        if isinstance(command, click.Group):
            for sub in sorted(command.commands):
                yield f"steer {name} {sub}", command.commands[sub]


def _help(path: str, command: click.Command) -> str:
    parent: click.Context | None = None
    settings: dict[str, Any] = {"terminal_width": 100, "max_content_width": 100, **cli.context_settings}
    for word in path.split()[:-1]:
        parent = click.Context(click.Group(word), info_name=word, parent=parent, **settings)
    # the command's own settings win, as when it is called
    settings |= command.context_settings
    # click keeps the help option of the first context a command sees, and that may have had other settings
    command = copy.copy(command)
    if hasattr(command, "_help_option"):
        command._help_option = None
    context = click.Context(command, info_name=path.split()[-1], parent=parent, **settings)
    lines = command.get_help(context).splitlines()
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    write_atomically(Path(sys.argv[1]), render().encode())
