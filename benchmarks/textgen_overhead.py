"""What the Steering tab costs a reply that is not steered: the same greedy reply with the extension on, and without it.

    STEER_TEXTGEN_DIR=… STEER_TEXTGEN_PYTHON=… python benchmarks/textgen_overhead.py [--rounds 15] [--tokens 96]

Two webuis run side by side on the same llama-server program, one of them without the extension. Each round asks both for the same
reply, in an order that changes; medians of the rounds' ratios are printed, with the quartiles. Replies of the page also carry a
name, by which a moved slider finds them: the same llama-server is asked with and without one.
Needs what tests/integration/textgen_webui.py names, and a steering llama-server (`steer build`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "integrations" / "textgen_webui"), str(ROOT)]

from tests.integration.textgen_webui import PROMPT, Webui, needed, server_port  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=96)
    asked = parser.parse_args()
    _, _, runtime = needed()
    with tempfile.TemporaryDirectory() as folder:
        on, off = (Webui(Path(folder) / name, stock=runtime.server) for name in ("on", "off"))
        on.install()
        try:
            on.start("--nowebui", "--portable")
            off.start("--nowebui", "--portable", extension=False)
            run(on, off, asked)
        finally:
            on.stop()
            off.stop()


def run(on: Webui, off: Webui, asked: argparse.Namespace) -> None:
    def reply(webui: Webui) -> Callable[[], None]:
        return lambda: str(webui.chat(max_tokens=asked.tokens)) and None

    def completion(name: str) -> Callable[[], None]:
        body = {"prompt": PROMPT, "n_predict": asked.tokens, "temperature": 0, "ignore_eos": True, "stream": True}

        def ask() -> None:
            named = {"request_id": f"{name}-{time.monotonic_ns()}"} if name else {}
            url = f"http://127.0.0.1:{server_port(on)}/completion"
            with requests.post(url, json={**body, **named}, stream=True, timeout=600) as answer:
                answer.raise_for_status()
                assert sum(1 for line in answer.iter_lines() if line) > asked.tokens / 2

        return ask

    assert on.chat(max_tokens=asked.tokens) == off.chat(max_tokens=asked.tokens)
    compare("reply, extension on over off", reply(on), reply(off), asked.rounds)
    compare("reply of llama-server, with a name over without", completion("page"), completion(""), asked.rounds)


def compare(what: str, one: Callable[[], None], other: Callable[[], None], rounds: int) -> None:
    seen: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        times = {}
        for ask in (one, other) if number % 2 else (other, one):
            started = time.perf_counter()
            ask()
            times[ask] = time.perf_counter() - started
        seen.append((times[one], times[other]))
    ratios = [a / b for a, b in seen[1:]]  # the first round warms up
    low, middle, high = statistics.quantiles(ratios, n=4)
    seconds = [statistics.median(column) for column in zip(*seen[1:], strict=True)]
    print(f"{what}: {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {rounds} rounds; {seconds[0]:.3f} s and {seconds[1]:.3f} s)")


if __name__ == "__main__":
    main()
