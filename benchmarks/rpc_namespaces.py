"""Layers on two workers in network namespaces with addresses and a delay of their own: are the tokens the same, what is sent?

    sudo python benchmarks/rpc_namespaces.py MODEL [--delay 0.2ms] [--rounds 7]

Linux with iproute2, as root. Prints one JSON object: whether steered and unsteered tokens equal those of one process, tokens
per second steered and not (interleaved), and bytes and packets on the wire for each token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MAIN, WORKERS = "steer-main", ("steer-w1", "steer-w2")
PORT = 50052
N_TOKENS = 32


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def make(delay: str) -> tuple[list[str], bool]:
    """A bridge in the main namespace, each worker behind a cable with the delay on both ends; their addresses,
    and whether this kernel can delay."""
    ip("netns", "add", MAIN)
    inside = ("-n", MAIN)
    ip(*inside, "link", "set", "lo", "up")
    ip(*inside, "link", "add", "br0", "type", "bridge")
    ip(*inside, "addr", "add", "10.77.0.1/24", "dev", "br0")
    ip(*inside, "link", "set", "br0", "up")
    addresses, delays = [], True
    for number, name in enumerate(WORKERS, 2):
        ip("netns", "add", name)
        ip("link", "add", f"sv{number}", "netns", MAIN, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip(*inside, "link", "set", f"sv{number}", "master", "br0", "up")
        ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")
        for namespace, device in ((MAIN, f"sv{number}"), (name, "eth0")):
            command = ["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "netem", "delay", delay]
            if subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0:
                delays = False
        addresses.append(f"10.77.0.{number}:{PORT}")
    return addresses, delays


def remove() -> None:
    for name in (MAIN, *WORKERS):
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def traffic() -> tuple[int, int]:
    """Bytes and packets of the main machine's bridge, both ways."""
    text = subprocess.run(["cat", "/proc/net/dev"], capture_output=True, text=True, check=True).stdout
    numbers = next(line.split(":")[1].split() for line in text.splitlines() if line.strip().startswith("br0:"))
    return int(numbers[0]) + int(numbers[8]), int(numbers[1]) + int(numbers[9])


def inside(model: str, workers: str, rounds: int) -> dict[str, Any]:
    """In the main namespace: one engine, steered and not in turn."""
    import numpy as np

    from steer_plugins import GenerateRequest, LocalEngine, SteeringVector
    from steer_plugins.steering.terms import Term

    prompt = "The weather in the old town is"
    with LocalEngine(model, n_ctx=256, n_threads=1, rpc=workers or None) as engine:
        rng = np.random.default_rng(0)
        layers = range(engine.info.n_layer - 1)
        rows = {(il, "resid_post"): rng.standard_normal(engine.info.n_embd).astype(np.float32) for il in layers}
        vector = SteeringVector("v", rows, dict.fromkeys(rows, 0.05), default_scope="all")
        arms: dict[str, Any] = {"plain": None, "steered": Term(vector, 1.0)}
        found: dict[str, Any] = {name: {"seconds": [], "bytes": [], "packets": []} for name in arms}
        for number in range(rounds + 1):
            for name, steering in arms.items():
                before, start = traffic() if workers else (0, 0), time.perf_counter()
                stream = engine.stream(GenerateRequest(prompt, max_tokens=N_TOKENS, steering=steering))
                for _ in stream:
                    pass
                seconds, after = time.perf_counter() - start, traffic() if workers else (0, 0)
                found[name]["tokens"] = stream.result.tokens
                if number:  # the first round makes contexts and rows
                    n = len(stream.result.tokens)
                    found[name]["seconds"].append(seconds / n)
                    found[name]["bytes"].append((after[0] - before[0]) / n)
                    found[name]["packets"].append((after[1] - before[1]) / n)
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model")
    arguments.add_argument("--delay", default="0.2ms")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--inside", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.inside is not None:
        print(json.dumps(inside(given.model, given.inside, given.rounds)))
        return
    from steer_plugins.runtime import ensure_runtime
    from steer_plugins.runtime.rpc import program

    binary = program(ensure_runtime())
    remove()
    children: list[subprocess.Popen[bytes]] = []
    try:
        addresses, delays = make(given.delay)
        for name, address in zip(WORKERS, addresses, strict=True):
            host = address.split(":")[0]
            command = ["ip", "netns", "exec", name, str(binary), "--host", host, "--port", str(PORT), "-t", "1"]
            children.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        time.sleep(2)
        here = [sys.executable, str(Path(__file__).absolute()), given.model, "--rounds", str(given.rounds), "--inside"]
        local = json.loads(subprocess.run([*here, ""], capture_output=True, check=True, text=True).stdout)
        through = ["ip", "netns", "exec", MAIN, *here, ",".join(addresses)]
        there = json.loads(subprocess.run(through, capture_output=True, check=True, text=True).stdout)
    finally:
        for child in children:
            child.terminate()
        remove()
    ratios = [p / s for p, s in zip(there["plain"]["seconds"], there["steered"]["seconds"], strict=True)]
    result: dict[str, Any] = {
        "delay": given.delay,
        "same_tokens": {arm: here_["tokens"] == there[arm]["tokens"] for arm, here_ in local.items()},
    }
    for arm, found in there.items():
        result[arm] = {
            "tokens_per_second": round(1 / statistics.median(found["seconds"]), 2),
            "bytes_per_token": round(statistics.median(found["bytes"])),
            "packets_per_token": round(statistics.median(found["packets"]), 1),
        }
    result["steered_over_plain"] = round(statistics.median(ratios), 3)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
