"""What the Ollama sidecar costs: tokens/s and the time to the first token through it, against the llama-server behind it.

    python benchmarks/ollama_overhead.py [--rounds 15] [--tokens 128] [--model FILE] [--steering mood:0.5] [--against TREE]

Both sides are asked for the same greedy reply of the same process, in turn, in an order that changes each round; medians of the
rounds' ratios and differences are printed, with the quartiles. ``--against`` names another checkout, whose sidecar (with a
process of its own) takes part in each round. Needs a steering llama-server (`steer build`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "integrations" / "ollama"), str(ROOT)]

from steer_plugins_ollama.key import server_key  # noqa: E402

from steer_plugins.runtime.demo_model import default_model_path  # noqa: E402
from tests.integration.ollama_sidecar import sidecar  # noqa: E402

PROMPT = "Describe a walk in the forest, in a long story"


def timed(client: httpx.Client, url: str, body: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second after it, as a client sees them."""
    started = time.perf_counter()
    first, count, last = 0.0, 0, 0.0
    headers = {"Connection": "close", "Authorization": f"Bearer {server_key()}"}
    with client.stream("POST", url, json=body, headers=headers) as answer:
        answer.raise_for_status()
        for text in tokens(answer):
            last = time.perf_counter()
            first = first or last
            count += bool(text)
    return first - started, (count - 1) / (last - first)


def tokens(answer: httpx.Response) -> Iterator[str]:
    """The texts of the chunks of either program."""
    for line in answer.iter_lines():
        if not line or line == "data: [DONE]":
            continue
        found = json.loads(line.removeprefix("data: "))
        choices = found.get("choices")
        text = (choices[0]["delta"].get("content") if choices else None) if "choices" in found else found["message"]["content"]
        if text:
            yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--steering", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--against", type=Path, metavar="TREE", default=None)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = (asked.model or default_model_path()).resolve()
        (Path(folder) / "bench.modelfile").write_text(f"FROM {model}\nPARAMETER temperature 0\n")
        flags = ["-t", str(asked.threads), "-tb", "2"]
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(sidecar(Path(folder), "--folder", folder, flags=flags))
            before = None
            if asked.against is not None:
                path = os.pathsep.join(str(asked.against.resolve() / part) for part in ("src", "integrations/ollama"))
                beside = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                before = stack.enter_context(sidecar(beside, "--folder", folder, env={"PYTHONPATH": path}, flags=flags))
            run(url, before, asked)


def run(url: str, before: str | None, asked: argparse.Namespace) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    ours = {"model": "bench", "messages": messages, "options": {"num_predict": asked.tokens, "steering": asked.steering}}
    with httpx.Client(trust_env=False, timeout=600) as client:
        client.post(f"{url}/api/chat", json={**ours, "stream": False}).raise_for_status()
        (entry,) = client.get(f"{url}/api/ps").json()["models"]
        key = {"Authorization": f"Bearer {server_key()}"}
        vectors = client.get(f"{entry['steer_server']}/steering", headers=key).json()["vectors"]
        terms = [{"vector": v["name"], "strength": float(asked.steering.partition(":")[2] or 1)} for v in vectors]
        theirs = {
            **{"messages": messages, "temperature": 0, "top_p": 0.9, "min_p": 0.0, "max_tokens": asked.tokens, "stream": True},
            "steering": terms,
        }
        sides = {"sidecar": (f"{url}/api/chat", ours), "direct": (f"{entry['steer_server']}/v1/chat/completions", theirs)}
        if before is not None:
            sides["before"] = (f"{before}/api/chat", ours)
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for number in range(asked.rounds + 1):
            for name in rotated(list(sides), number):
                seen[name].append(timed(client, *sides[name]))
    pairs = list(zip(seen["sidecar"][1:], seen["direct"][1:], strict=True))  # the first round warms up
    report("tokens/s, sidecar over direct", [a[1] / b[1] for a, b in pairs], "")
    report("first token, sidecar minus direct", [(a[0] - b[0]) * 1000 for a, b in pairs], " ms")
    if before is not None:
        pairs = list(zip(seen["sidecar"][1:], seen["before"][1:], strict=True))
        report("tokens/s, sidecar over the other checkout's", [a[1] / b[1] for a, b in pairs], "")
        report("first token, sidecar minus the other checkout's", [(a[0] - b[0]) * 1000 for a, b in pairs], " ms")
    speed = statistics.median(one[1] for one in seen["direct"][1:])
    first = statistics.median(one[0] for one in seen["direct"][1:]) * 1000
    print(f"direct: {speed:.1f} tokens/s, first token {first:.1f} ms")


def rotated(names: list[str], number: int) -> list[str]:
    """Another order each round: each side is as often before as after each other."""
    at = number % len(names)
    return (names[at:] + names[:at])[:: -1 if number % 2 else 1]


def report(what: str, values: list[float], unit: str) -> None:
    low, middle, high = statistics.quantiles(values, n=4)
    print(f"{what}: {middle:.3f}{unit} (quartiles {low:.3f} to {high:.3f}, {len(values)} rounds)")


if __name__ == "__main__":
    main()
