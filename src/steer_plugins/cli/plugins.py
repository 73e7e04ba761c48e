"""``steer plugins``: which plugins are there, and what each brings."""

from __future__ import annotations

import click

from ..plugins import hookimpl, manager
from .common import json_option, print_json, print_table


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer plugins``."""
    cli.add_command(plugins)


@click.command()
@json_option
def plugins(as_json: bool) -> None:
    """List the plugins and what they implement."""
    infos = manager().infos()
    if as_json:
        rows = [{"name": i.name, "source": i.source, "hooks": list(i.hooks), "error": i.error} for i in infos]
        print_json({"plugins": rows})
        return
    print_table(
        ("plugin", "from", "implements"),
        [(info.name, info.source, info.error or ", ".join(info.hooks)) for info in infos],
    )
