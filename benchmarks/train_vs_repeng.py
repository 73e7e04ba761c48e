"""How long fitting takes, against repeng with transformers on the float32 weights of the same GGUF, on the same pairs.

Needs torch, transformers, accelerate, gguf, scikit-learn and repeng, which may live in a Python of their own:

    python benchmarks/train_vs_repeng.py --repeng-python other-venv/bin/python

Each round runs both, one after the other, on the same number of threads. Timed is what either does from the loaded model
to directions at all layers but the last; steer-plugins also takes norms and makes its report. Loading is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Pairs = list[tuple[str, str]]
TRAIT = ROOT / "src/steer_plugins/traits/data/mood.json"


def pairs(count: int) -> Pairs:
    """Texts in the demo model's chat format: prompts of the trait `mood` under each of its system prompts."""
    trait = json.loads(TRAIT.read_text("utf-8"))
    systems = list(zip(trait["system"]["positive"], trait["system"]["negative"], strict=True))
    prompts = trait["train_prompts"] + trait["heldout_prompts"]
    if count > len(prompts) * len(systems):
        raise SystemExit(f"There are {len(prompts) * len(systems)} different pairs at most.")

    def text(system: str, prompt: str) -> str:
        turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"
        return turns + "<|im_start|>assistant\n"

    found = [(text(p, prompt), text(n, prompt)) for prompt in prompts for p, n in systems]
    return found[:count]


STATEMENTS = (
    "The train left the station a little after noon and went along the river for most of the way",
    "My neighbour keeps bees behind the old garage and gives every family in the street a jar of honey",
    "There are three ways to get to the library and the shortest of them leads through the market",
    "Last week we painted the kitchen and put up the shelves that my brother had made in the spring",
    "People who work at night often say that the city sounds like a different place after two",
    "It takes about an hour to walk around the lake if you do not stop to look at the boats",
)


def openings(count: int) -> Pairs:
    """Texts as repeng's own examples make them: statements, cut after each word, under two personas."""

    def text(persona: str, words: list[str]) -> str:
        ask = f"Pretend you are an extremely {persona} person who makes statements about the world."
        return f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n{' '.join(words)}"

    cut = [statement.split()[:n] for statement in STATEMENTS for n in range(1, len(statement.split()) + 1)]
    if count > len(cut):
        raise SystemExit(f"There are {len(cut)} different openings at most.")
    return [(text("happy", words), text("sad", words)) for words in cut[:count]]


DATA = {"prompts": pairs, "openings": openings}


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds on the clock, and of the processor, which a busy machine disturbs less."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}


def ours(model: Path, texts: Pairs, threads: int, method: str) -> dict[str, float]:
    """Seconds that steer-plugins takes."""
    from steer_plugins.engine.local import LocalEngine
    from steer_plugins.extract import ContrastData, Pair, Side
    from steer_plugins.training import Training, TrainOptions

    data = ContrastData("pairs", tuple(Pair(Side(p), Side(n)) for p, n in texts), "0" * 64)
    with LocalEngine(model, n_threads=threads, n_parallel=12) as engine:
        training = Training(engine, "bench", data, TrainOptions(method=method, calibrate="none", positions="last"))
        return timed(training.run)


def theirs(model: Path, texts: Pairs, threads: int) -> dict[str, float]:
    """Seconds that repeng takes."""
    import torch
    from repeng import ControlVector, DatasetEntry
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    where, file = str(model.parent), model.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32).eval()
    entries = [DatasetEntry(positive=p, negative=n) for p, n in texts]
    return timed(lambda: ControlVector.train(loaded, tokenizer, entries))


def main() -> None:
    """Compare, or run one side of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file (default: the demo model)")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--data", choices=DATA, default="prompts", help="prompts under system prompts, or cut openings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--method", default="mean_difference", help="the method of steer-plugins")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeng-python", default=sys.executable, help="the Python that has torch and repeng")
    parser.add_argument("--side", choices=["ours", "repeng"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model is None:
        from steer_plugins.models import default_model_path

        options.model = Path(default_model_path())
    texts = DATA[options.data](options.pairs)
    if options.side == "ours":
        print(json.dumps(ours(options.model, texts, options.threads, options.method)))
        return
    if options.side == "repeng":
        print(json.dumps(theirs(options.model, texts, options.threads)))
        return
    found: dict[str, list[dict[str, float]]] = {"ours": [], "repeng": []}
    for _ in range(options.rounds):
        for side, python in (("ours", sys.executable), ("repeng", options.repeng_python)):
            command = [python, __file__, "--side", side, "--model", str(options.model)]
            command += [
                "--pairs",
                str(options.pairs),
                "--data",
                options.data,
                "--threads",
                str(options.threads),
                "--method",
                options.method,
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{side}: {found[side][-1]['seconds']:.2f} s, processor {found[side][-1]['cpu']:.2f} s", file=sys.stderr)
    result: dict[str, object] = {
        "data": options.data,
        "pairs": options.pairs,
        "threads": options.threads,
        "rounds": options.rounds,
    }
    for clock in ("seconds", "cpu"):
        medians = {side: statistics.median(one[clock] for one in values) for side, values in found.items()}
        result[clock] = {**{side: round(value, 2) for side, value in medians.items()}}
        result[f"ratio of {clock}"] = round(medians["ours"] / medians["repeng"], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
