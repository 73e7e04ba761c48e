"""What a model says and holds, as JSON, with its layers here or on workers: run by test_rpc.py in processes of its own.

python rpc_driver.py MODEL WORKERS     (WORKERS empty: here)
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from steer_plugins import GenerateRequest, LocalEngine, SteeringVector
from steer_plugins.steering.terms import Term

PROMPT = "The weather in the old town is"


def vector(n_embd: int, layer: int, seed: int) -> SteeringVector:
    direction = np.random.default_rng(seed).standard_normal(n_embd).astype(np.float32)
    return SteeringVector(f"v{seed}", {(layer, "resid_post"): direction}, {(layer, "resid_post"): 0.3}, default_scope="all")


def run(model: str, workers: str) -> dict[str, Any]:
    with LocalEngine(model, n_ctx=256, n_threads=1, n_parallel=8, rpc=workers or None) as engine:
        width, layers = engine.info.n_embd, range(engine.info.n_layer - 1)
        all_layers = [Term(vector(width, layer, layer), 1.0) for layer in layers]
        plain = engine.generate(PROMPT, max_tokens=24).tokens
        steered = engine.generate(PROMPT, max_tokens=24, steering=all_layers).tokens
        removed = engine.generate(PROMPT, max_tokens=24, steering=Term(vector(width, 1, 9), 1.0, op="project")).tokens
        stream = engine.stream(GenerateRequest(PROMPT, max_tokens=24, steering=None))
        for n, _ in enumerate(stream):
            if n == 8:
                stream.steer(all_layers)
        # more unlike steerings than the bank has rows at first
        many = [GenerateRequest(PROMPT, max_tokens=6, steering=Term(vector(width, 0, s), 0.5 + s / 16)) for s in range(24)]
        batch = [reply.tokens for reply in engine.generate_many(many)]
        read = engine.read([PROMPT], positions="all", steering=all_layers, layers=list(layers))[0]
    return {
        "plain": plain,
        "steered": steered,
        "removed": removed,
        "changed": stream.result.tokens,
        "batch": batch,
        "read": {str(layer): values.astype(float).tolist() for layer, values in read.values.items()},
    }


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2])))
