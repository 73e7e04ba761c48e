"""``python -m steer_plugins_ollama``: the ``steer ollama`` commands where the package is not installed."""

import sys

from steer_plugins.cli.main import cli, main

from .plugin import ollama

if __name__ == "__main__":
    cli.add_command(ollama)
    sys.exit(main(["ollama", *sys.argv[1:]]))
