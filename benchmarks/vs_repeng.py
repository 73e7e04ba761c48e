"""`steer bench speed` with repeng on transformers as further arms, and fits of the same pairs, all in turn.

repeng has the float32 weights of the same GGUF. It needs a Python with torch, transformers, accelerate, gguf and repeng:

    python -m benchmarks.vs_repeng --repeng-python other-venv/bin/python --out report

Prints medians of tokens a second and of seconds of a fit, on the clock and of the processor, with their ratios, as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from steer_plugins.bench.costs import Costs
from steer_plugins.bench.report import make_cost_report, write_report
from steer_plugins.bench.reporters import builtin_reporters
from steer_plugins.bench.speed import bench_speed
from steer_plugins.engine.model import LoadedModel
from steer_plugins.errors import SteerError
from steer_plugins.runtime import activate, ensure_runtime
from steer_plugins.runtime.demo_model import default_model_path

from .against_repeng import Repeng
from .fitting import DATA, bench_fitting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=24, help="rounds of each arm that decodes; 0: fits alone")
    parser.add_argument("--fit-rounds", type=int, default=3, help="fits of each side; 0: none")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--data", choices=DATA, help="prompts under system prompts, or cut openings (default: both)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--method", default="mean_difference", help="the method of steer-plugins")
    parser.add_argument("--repeng-python", default=sys.executable, help="the Python that has torch and repeng")
    parser.add_argument("--out", type=Path, help="also write a report into this folder")
    options = parser.parse_args()
    model = options.model or Path(default_model_path())
    loaded = LoadedModel(activate(ensure_runtime()), model)
    template, identity = loaded.template, loaded.identity
    with Repeng(options.repeng_python, model, options.threads) as repeng:
        costs = Costs((), {}, {"seed": 0})
        if options.rounds:
            costs = bench_speed(
                loaded, n_threads=options.threads, rounds=options.rounds, others=repeng.arms(), progress=_said("rounds")
            )
        loaded.close()
        costs.versions = repeng.versions
        if options.fit_rounds:
            bench_fitting(
                costs,
                model,
                repeng,
                template=template,
                data=[options.data] if options.data else list(DATA),
                method=options.method,
                n_threads=options.threads,
                pairs=options.pairs,
                rounds=options.fit_rounds,
                progress=_said("fits"),
            )
    report = make_cost_report("speed", costs, model, identity, sys.argv)
    for name, measure in report.summary["measures"].items():
        found = {arm: [round(one["value"], 2), round(one["ratio"][0], 3)] for arm, one in measure["arms"].items()}
        print(json.dumps({"measure": name, "base": measure["base"], "median and ratio": found}))
    if options.out is not None:
        for file in write_report(report, options.out, builtin_reporters()):
            print(f"wrote {file}", file=sys.stderr)


def _said(what: str) -> object:
    return lambda done, total: print(f"{done} of {total} {what}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except SteerError as error:
        sys.exit(f"vs_repeng: {error}")
