"""DeepSeek-V4-Flash's whole path on a model of its architecture: split in three, its chat format, thinking off and on.

The commands are those of docs/deepseek-v4-flash.md, on 11 MB instead of the real weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steer_plugins import testing
from steer_plugins.errors import SteerError
from steer_plugins.runtime import ensure_runtime
from steer_plugins.store.vectorfile import read_vector


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        ensure_runtime()
    except SteerError as error:
        pytest.fail(f"no runtime to test: {error}")
    folder = tmp_path_factory.mktemp("deepseek4")
    files = testing.write("deepseek4", folder / "flash.gguf", split=3)
    assert [f.name for f in files] == [f"flash-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as out:
        for weather in ("rain", "sun", "wind", "snow", "fog", "hail"):
            user = {"role": "user", "content": f"Describe the {weather}"}
            sides = {
                side: [{"role": "system", "content": f"Be {mood}."}, user]
                for side, mood in (("positive", "cheerful"), ("negative", "sombre"))
            }
            out.write(json.dumps(sides) + "\n")
    return folder


def steer(home: Path, *arguments: str, fails: bool = False) -> Any:
    env = {**os.environ, "STEER_LIBRARY": str(home / "library")}
    done = subprocess.run(
        [sys.executable, "-m", "steer_plugins", *arguments], env=env, capture_output=True, text=True, encoding="utf-8"
    )
    if fails:
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        return done.stderr.strip()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_train_library_generate(home: Path) -> None:
    model = str(home / "flash-00001-of-00003.gguf")
    common = ("--model", model, "--threads", "1", "--json")
    train = ("train", "weather", "--pairs", str(home / "pairs.jsonl"), "--calibrate", "none")
    steer(home, *train, *common)
    (stored,) = (home / "library").glob("deepseek4-6x256-*/weather.safetensors")
    vector = read_vector(stored)
    assert vector.identity is not None and vector.identity.n_streams == 4
    assert vector.sites == ["resid_post"]

    def text(*more: str, model: str = model) -> str:
        arguments = ("--model", model, "--threads", "1", "--json", "--max-tokens", "12")
        return steer(home, "generate", *arguments, *more, "Describe the rain")["text"]

    seen = {}
    for thinking in ("--no-thinking", "--thinking"):
        plain = text(thinking)
        assert text(thinking, "--steer", "weather:0") == plain
        up, down = text(thinking, "--steer", "weather:3"), text(thinking, "--steer", "weather:-3")
        assert len({plain, up, down}) == 3
        seen[thinking] = plain
    assert seen["--thinking"] != seen["--no-thinking"], "the template's switch has to reach the prompt"
    # any shard stands for the model, and a vector goes by its file as well
    again = text("--no-thinking", "--steer", f"{stored}:3", model=str(home / "flash-00002-of-00003.gguf"))
    assert again == text("--no-thinking", "--steer", "weather:3")


def test_read_and_refusals(home: Path) -> None:
    model = str(home / "flash-00003-of-00003.gguf")
    out = home / "acts.safetensors"
    for site in ("resid_post", "attn_out", "ffn_out"):
        arguments = ("--model", model, "--threads", "1", "--site", site, "--out", str(out), "--json")
        steer(home, "read", *arguments, "Describe the rain")
        assert out.stat().st_size > 0
        out.unlink()
    other = testing.write("llama", home / "other.gguf")[0]
    (stored,) = (home / "library").glob("deepseek4-*/weather.safetensors")
    said = steer(home, "generate", "--model", str(other), "--steer", f"{stored}:1", "x", fails=True)
    assert "deepseek4" in said and "\n" not in said
    (home / "flash-00002-of-00003.gguf").rename(home / "away")
    try:
        assert "flash-00002" in steer(home, "generate", "--model", model, "x", fails=True)
    finally:
        (home / "away").rename(home / "flash-00002-of-00003.gguf")
