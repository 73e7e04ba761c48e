"""A hub's index of many entries: how long adding, searching, naming and updating take, and how much memory.

    python -m benchmarks.hub_index [--entries 100000]

Each step runs in a process of its own, as a command would, so that its peak memory is its own. Times are seconds of the step
within the process, without the start of Python, beside those of the processor, which a busy machine does not lengthen; searches
are medians of 9, the first one beside them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from steer_plugins.hub import index as indexes
from steer_plugins.hub.hub import Hub
from steer_plugins.hub.publish import Folder, draft, own_key
from steer_plugins.hub.schema import canonical, entry_of, sort_key
from steer_plugins.steering.vector import ModelIdentity, SteeringVector
from steer_plugins.store.library import Library
from steer_plugins.store.pulled import Ref
from steer_plugins.store.vectorfile import write_vector

MODELS = [ModelIdentity("llama", 4, 8, f"{i:064x}", f"{i:064x}", name=f"Tiny Llama {i}") for i in range(20)]
WORDS = "calm bright terse formal curious careful playful sombre direct gentle precise vivid modest bold dry warm".split()


def entries_like(card: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Sorted entries with words, models and curves as real ones have them; only the first has files."""
    rng = np.random.default_rng(0)
    key = own_key(Path(os.environ["STEER_LIBRARY"]) / "hub").public
    curve = [
        {"strength": round(s, 3), "score": round(0.7 * s, 4), "score_se": 0.1234, "perplexity": 1.2345}
        for s in np.linspace(-1, 1, 9)
    ]
    for number in range(count):
        words = rng.choice(WORDS, 12)
        sha256 = f"{number:064x}"
        yield entry_of(
            {
                **card,
                "name": f"owner{number // 40:05d}/{words[0]}-{words[1]}-{number % 40:02d}",
                "model": MODELS[number % len(MODELS)].to_dict(),
                "description": " ".join(words),
                "tags": sorted({str(word) for word in words[:3]}),
                "calibration": {
                    "objective": "mood", "unit": "score", "n": 20, "dose": 0.31, "effect": 1.5, "effect_se": 0.1, "curve": curve,
                },
                "files": {"vector": {"sha256": sha256, "size": 20_000, "type": "safetensors"}},
            },
            Ref(sha256, 3000, "json"),
            key,
        )  # fmt: skip


def build(count: int, there: str) -> None:
    """The folder of the hub: one real entry, and ``count - 1`` that only the index knows."""
    folder = Path(there)
    key = own_key(Path(os.environ["STEER_LIBRARY"]) / "hub", make=True)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "v.safetensors"
        vector = SteeringVector("mood", {(1, "resid_post"): np.ones(8)}, identity=MODELS[0])
        write_vector(vector, path)
        card = draft("ann/mood", {"vector": path}, licence="Apache-2.0", version="1")
        Folder(folder, key).publish(card, {"vector": path})
    index = indexes.read_index(folder / "index.json", "it")
    entries = sorted([*index.entries, *entries_like(card, count - 1)], key=sort_key)
    Folder(folder, key)._write({**index.header, "count": count}, map(canonical, entries), None)


def publish(count: int, there: str) -> None:
    """One more version."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "v.safetensors"
        write_vector(SteeringVector("mood", {(1, "resid_post"): np.ones(8)}, identity=MODELS[0]), path)
        card = draft("ann/mood", {"vector": path}, licence="Apache-2.0")
        Folder(Path(there), own_key(Path(os.environ["STEER_LIBRARY"]) / "hub")).publish(card, {"vector": path})


def add(count: int, there: str) -> None:
    Hub(Library()).add(there, name="big")


def update(count: int, there: str) -> None:
    assert Hub(Library()).update() == ["big"]


def search(count: int, there: str) -> dict[str, float]:
    """What people type: one word, several, none that is there, and with a model."""
    hub, out = Hub(Library()), {}
    for label, words, model in (
        ("one word", ["terse"], None),
        ("three words", ["terse", "warm", "owner0"], None),
        ("with a model", ["terse"], MODELS[3]),
        ("nothing", ["qwertyuiop"], None),
        ("everything", [], MODELS[3]),
    ):
        times, cpu = [], []
        for _ in range(9):
            start, used = time.perf_counter(), time.process_time()
            hub.search(words, identity=model)
            times.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
        out |= {label: median(times), f"{label}, processor": median(cpu), f"{label}, first": times[0]}
    return out


def pull(count: int, there: str) -> None:
    """Of the one that is real; the index itself may not be opened."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith("index.json"):
            os._exit(3)

    sys.addaudithook(audit)
    Hub(Library()).pull("ann/mood")


def _run(step: Callable[..., Any], count: int, there: str, results: Any) -> None:
    start = time.perf_counter()
    found = step(count, there)
    seconds, cpu = time.perf_counter() - start, time.process_time()
    import resource

    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    results.put(
        {
            "seconds": seconds,
            "processor": cpu,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
            **(found or {}),
        }
    )


def main() -> None:
    """Run the steps and print what they took as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=100_000)
    count = parser.parse_args().entries
    context = multiprocessing.get_context("spawn")
    out: dict[str, Any] = {"entries": count}
    with tempfile.TemporaryDirectory() as root:
        os.environ["STEER_LIBRARY"] = str(Path(root) / "vectors")
        there = str(Path(root) / "there")
        for step in (build, add, search, pull, publish, update):
            results = context.Queue()
            child = context.Process(target=_run, args=(step, count, there, results))
            child.start()
            child.join()
            if child.exitcode:
                raise SystemExit(f"{step.__name__} failed with {child.exitcode}")
            out[step.__name__] = {name: round(value, 3) for name, value in results.get().items()}
            if step is build:
                out["index_mib"] = round((Path(there) / "index.json").stat().st_size / 2**20, 1)
            if step is add:
                out["table_mib"] = round(sum(p.stat().st_size for p in Path(root).rglob("*.db")) / 2**20, 1)
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
