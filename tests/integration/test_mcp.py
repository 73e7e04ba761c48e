"""`steer mcp` in front of a real llama-server: what a tool sets is what the next reply gets, and what is read there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

pytest.importorskip("mcp.server.mcpserver", reason="steer mcp needs the extra: pip install 'steer-plugins[mcp]'")

import anyio
from mcp import Client

from steer_plugins import ServerEngine, testing
from steer_plugins.client import ServerProcess
from steer_plugins.errors import SteerError
from steer_plugins.hosting.bounds import Bounds
from steer_plugins.hosting.running import beside
from steer_plugins.hosting.session import Session
from steer_plugins.hosting.tools import make_app, make_server
from steer_plugins.runtime import find_runtime
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library


def call(url: str, tool: str, **arguments: Any) -> Any:
    async def one() -> Any:
        async with Client(f"{url}/mcp") as client:
            found = await client.call_tool(tool, arguments)
            return found.content[0].text if found.is_error else found.structured_content

    return anyio.run(one)


def test_a_model_steers_itself(tmp_path: Path) -> None:
    try:
        runtime = find_runtime(need_server=True)
    except SteerError as error:
        pytest.skip(str(error))
    if runtime is None:
        pytest.skip("no runtime with a llama-server: build one with `steer build`")
    model = testing.write("llama", tmp_path / "model.gguf")[0]
    library = Library(tmp_path / "vectors")
    body = {"prompt": "The weather in the old town is", "n_predict": 16, "temperature": 0, "return_tokens": True}
    with ServerProcess(runtime.server) as server:
        server.start(model, ["-c", "1024", "--parallel", "2", "--no-warmup"])
        server.wait_ready(120)
        with ServerEngine(server.url, library=library) as engine:
            direction = np.random.default_rng(1).standard_normal(engine.info.n_embd).astype(np.float32)
            vector = SteeringVector("mood", {(1, "resid_post"): direction}, {(1, "resid_post"): 8.0}, default_scope="response")
            library.put(vector, engine.info.identity)
            session = Session(engine, Bounds.parse(["mood:0.9"]), library, may_fit=True)  # type: ignore[arg-type]
            with beside(make_app(session, tools=make_server(session))) as url:

                def tokens(**more: Any) -> Any:
                    answer = requests.post(f"{url}/completion", json={**body, **more}, timeout=120)
                    assert answer.status_code == 200, answer.text
                    return answer.json()["tokens"]

                plain = tokens()
                assert call(url, "set_steering", steering="mood:0.9")["steering"] == "mood:0.9"
                steered = tokens()
                wanted = engine.generate(body["prompt"], max_tokens=16, steering=engine.steering("mood:0.9")).tokens
                assert steered != plain and steered[: len(wanted)] == wanted
                assert tokens(steering=[]) == plain
                assert "0.9" in call(url, "set_steering", steering="mood:1") and tokens() == steered
                assert call(url, "read_projection", text="A cold morning", vector="mood")["projections"].keys() == {"mood"}
                pairs = [{"positive": f"good {n} day", "negative": f"bad {n} night"} for n in range(6)]
                assert call(url, "fit_vector", name="day", pairs=pairs)["name"] == "day"
                assert call(url, "set_steering", steering="day:-0.5")["steering"] == "day:-0.5"
                assert tokens() != steered
                call(url, "set_steering", steering="")
                assert tokens() == plain
