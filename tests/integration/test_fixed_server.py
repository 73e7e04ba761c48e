"""An unmodified llama-server with one steering for all, beside the same steering in this process."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import requests

from steer_plugins import testing
from steer_plugins.client import ServerProcess
from steer_plugins.client.fixed import fixed_flags
from steer_plugins.engine.local import LocalEngine
from steer_plugins.runtime.locate import cached_runtimes
from steer_plugins.steering.terms import Steering
from tests.engine.engines import vector

FLAGS = "--parallel 1 -c 256 --threads 1 --no-warmup -ctk f32 -ctv f32 -fa off".split()


def test_it_computes_what_the_engine_does(tmp_path: Path) -> None:
    server = next((r.stock_server for r in cached_runtimes() if r.stock_server), None)
    if server is None:
        reason = "no unmodified llama-server: run `steer build --server --stock-twin`"
        if os.environ.get("STEER_REQUIRE_STOCK") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    model = testing.write("llama", tmp_path / "tiny.gguf")[0]
    with LocalEngine(model, n_ctx=256, n_threads=1) as engine:
        steering = Steering.of(0.8 * vector(engine, (1, 2), scope="0-"))
        tokens = engine.tokenize("The weather in the old town is")
        (steered,) = engine.logprobs([(tokens, [65])], steering=steering)
        (plain,) = engine.logprobs([(tokens, [65])])
        flags = fixed_flags(steering, tmp_path)
        with ServerProcess(server) as process:
            process.start(model, [*FLAGS, *flags])
            process.wait_ready(120)
            body = {"prompt": tokens, "n_predict": 1, "n_probs": engine.info.n_vocab, "temperature": 0}
            answer = requests.post(f"{process.url}/completion", json=body, timeout=60).json()
    probs = answer["completion_probabilities"][0]["top_logprobs"]
    got = next(p["logprob"] for p in probs if p["id"] == 65)
    assert abs(float(plain[0]) - float(steered[0])) > 0.01
    np.testing.assert_allclose(got, float(steered[0]), atol=2e-3)
