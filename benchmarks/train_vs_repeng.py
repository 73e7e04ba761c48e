"""How long fitting takes, against repeng with transformers on the float32 weights of the same GGUF, on the same pairs.

The second half of ``steer bench speed``, alone and with a choice of pairs. Needs a Python with torch, transformers, accelerate,
gguf and repeng:

    python benchmarks/train_vs_repeng.py --repeng-python other-venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from steer_plugins.bench.costs import Costs
from steer_plugins.bench.fitting import DATA, OURS, THEIRS, bench_fitting
from steer_plugins.bench.repeng import Repeng
from steer_plugins.engine.model import LoadedModel
from steer_plugins.errors import SteerError
from steer_plugins.runtime import activate, ensure_runtime
from steer_plugins.runtime.demo_model import default_model_path


def main() -> None:
    """Print medians of seconds, on the clock and of the processor, and their ratios, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file (default: the demo model)")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--data", choices=DATA, help="prompts under system prompts, or cut openings (default: both)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--method", default="mean_difference", help="the method of steer-plugins")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeng-python", default=sys.executable, help="the Python that has torch and repeng")
    options = parser.parse_args()
    model = options.model or Path(default_model_path())
    loaded = LoadedModel(activate(ensure_runtime()), model)
    template = loaded.template
    loaded.close()
    costs = Costs((), {}, {"seed": 0})
    with Repeng(options.repeng_python, model, options.threads) as repeng:
        bench_fitting(
            costs,
            model,
            repeng,
            template=template,
            data=[options.data] if options.data else list(DATA),
            method=options.method,
            n_threads=options.threads,
            pairs=options.pairs,
            rounds=options.rounds,
            progress=lambda done, total: print(f"{done} of {total}", file=sys.stderr),
        )
    for name, measure in costs.summary()["measures"].items():
        medians = {arm: round(measure["arms"][arm]["value"], 2) for arm in (OURS, THEIRS)}
        print(json.dumps({"measure": name, **medians, "speed ratio": round(measure["arms"][OURS]["ratio"][0], 3)}))


if __name__ == "__main__":
    try:
        main()
    except SteerError as error:
        sys.exit(f"train_vs_repeng: {error}")
