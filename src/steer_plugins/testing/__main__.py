"""``python -m steer_plugins.testing ARCH PATH`` writes a tiny random model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import SteerError
from .architectures import ARCHITECTURES
from .writer import WEIGHTS, write


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, write the model and print its files; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m steer_plugins.testing",
        description="Write a tiny GGUF model with random weights, for tests. Equal arguments give equal bytes.",
    )
    parser.add_argument("arch", metavar="ARCH", help=f"one of: {', '.join(ARCHITECTURES)}")
    parser.add_argument("path", metavar="PATH", help="the file to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other weights (default 0)")
    parser.add_argument("--weights", default="f32", help=f"type of big matrices: {', '.join(WEIGHTS)} (default f32)")
    parser.add_argument("--layers", type=int, default=None, metavar="N", help="number of layers instead of the default")
    parser.add_argument("--ctx", type=int, default=2048, metavar="N", help="trained context, in tokens (default 2048)")
    parser.add_argument("--split", type=int, default=1, metavar="N", help="number of files (default 1)")
    args = parser.parse_args(argv)
    try:
        files = write(
            args.arch,
            args.path,
            seed=args.seed,
            weights=args.weights,
            n_layer=args.layers,
            n_ctx=args.ctx,
            split=args.split,
        )
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for file in files:
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
