"""Runs one `steer bench` of two checkouts in turn and compares what each says of every arm.

    git worktree add ../before COMMIT
    python benchmarks/interleaved.py ../before -- speed --rounds 2 --threads 1
    python benchmarks/interleaved.py ../before --turns 6 -- server --rounds 2

Each turn starts both, in alternating order. Printed for every arm and figure that is found in both: the median here, the median
there, and the median of their ratios within a turn (here / there: above 1 is better for speeds) with its quartiles.
Both checkouts must have been built (`steer build --server --stock-twin`); each finds its own runtime in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def run(checkout: Path, arguments: list[str]) -> dict[tuple[str, str], float]:
    """The numbers of one `steer bench`: (arm, figure) → value."""
    folders = ("src", "integrations/ollama", "integrations/textgen_webui")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(checkout / folder) for folder in folders)}
    command = [sys.executable, "-m", "steer_plugins", "bench", *arguments, "--json"]
    done = subprocess.run(command, env=environment, cwd=checkout, check=True, stdout=subprocess.PIPE)
    rows = json.loads(done.stdout)["rows"]
    return {(row["name"], key): value for row in rows for key, value in row.items() if isinstance(value, float)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("arguments", nargs="+", metavar="ARGUMENT", help="of steer bench, after --")
    options = parser.parse_args()
    turns: list[tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]] = []
    for turn in range(options.turns):
        order = [HERE, options.before.resolve()]
        said = {checkout: run(checkout, options.arguments) for checkout in (order if turn % 2 else order[::-1])}
        turns.append((said[order[0]], said[order[1]]))
        print(f"turn {turn + 1} of {options.turns}", file=sys.stderr)
    print(f"{'arm':<24}{'figure':<20}{'here':>10}{'there':>10}{'ratio':>8}  quartiles")
    for name, key in turns[0][0]:
        pairs = [(here[name, key], there[name, key]) for here, there in turns if (name, key) in here and (name, key) in there]
        if len(pairs) < 2 or any(not there for _, there in pairs):
            continue
        ratios = [here / there for here, there in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        here, there = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(f"{name:<24}{key:<20}{here:>10.3f}{there:>10.3f}{middle:>8.3f}  {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
