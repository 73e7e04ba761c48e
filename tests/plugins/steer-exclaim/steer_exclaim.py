"""A plugin for steer: a metric, a command that prints it, and a file format."""

import re

import click

from steer_plugins.plugins import hookimpl


def exclamation(text: str) -> float:
    """Share of sentences that end in an exclamation mark: 0 to 1."""
    ends = re.findall(r"[.!?]+", text)
    return sum("!" in end for end in ends) / len(ends) if ends else 0.0


@hookimpl
def register_metrics(register):
    register("exclamation", exclamation)


@hookimpl
def register_commands(cli):
    @cli.command()
    @click.argument("text")
    def exclaim(text):
        """Print how excited TEXT is."""
        click.echo(f"{exclamation(text):.2f}")


@hookimpl
def register_formats(register):
    # Imported here and not above: numpy would slow down every start of `steer`.
    from steer_plugins.errors import VectorError
    from steer_plugins.steering.vector import SteeringVector
    from steer_plugins.store.formats import Format

    def sniff(path):
        with open(path, "rb") as file:
            return file.read(6) == b"layer "

    def read(path):
        """`layer N`, then one number in each line."""
        first, *lines = path.read_text("utf-8").splitlines()
        try:
            direction = [float(line) for line in lines]
            return SteeringVector("textual", {(int(first.split()[1]), "resid_post"): direction})
        except ValueError as error:
            raise VectorError(f"{path}: {error}") from None

    register(Format(name="layer-text", suffixes=(".txt",), read=read, write=None, sniff=sniff))
