"""The Transformers loader of a real text-generation-webui, steered by hooks: the same numbers as the llama-server gives.

Besides what textgen_webui.py names, ``STEER_TEXTGEN_PYTHON`` has to have torch and transformers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steer_plugins.client.engine import ServerEngine
from tests.integration.textgen_webui import PROMPT, Webui, fit, needed, opened, server_port

CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, out = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
"""
WISHES = [None, "mood:1", "mood:-1?all", "mood:0.6%renorm", "!mood?0-", "mood:0.5@12-14%clamp?2-"]


@pytest.fixture(scope="module")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webui]:
    _, model, _ = needed()
    python = os.environ.get("STEER_TEXTGEN_PYTHON") or sys.executable
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode != 0:
        pytest.skip(f"{python} has no torch and transformers, as portable builds have none")
    found = Webui(tmp_path_factory.mktemp("transformers"))
    ready = os.environ.get("STEER_TEXTGEN_HF")  # the demo model as safetensors, from an earlier run
    target = found.user_data / "models" / "smollm2"
    if ready:
        target.symlink_to(Path(ready).absolute())
    else:
        command = [python, "-c", CONVERT, str(model.parent), model.name, str(target)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
    found.install()
    try:
        found.start()  # a portable webui has the llama.cpp loader only
        fit(found, "mood")
        yield found
    finally:
        found.stop()


def logits(webui: Webui, wish: Any, samplers: bool = False) -> dict[str, float]:
    body = {"prompt": "She looked out of the window and felt very", "top_logits": 40, "steering": wish, "use_samplers": samplers}
    body |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 1}
    answer = webui.post("/v1/internal/logits", body)
    assert answer.status_code == 200, answer.text
    return {token.replace("Ġ", " "): p for token, p in answer.json().items()}


def test_hooks_compute_what_the_server_computes(webui: Webui) -> None:
    with ServerEngine(f"http://127.0.0.1:{server_port(webui)}") as engine:
        assert engine.info.identity.n_layer == 30
    native = [logits(webui, wish) for wish in WISHES]
    answer = webui.post("/v1/internal/model/load", {"model_name": "smollm2", "args": {"loader": "Transformers", "cpu": True}})
    assert answer.status_code == 200, webui.tail()
    facts = webui.get("/v1/internal/steering")
    assert facts["steers"] and [one["name"] for one in facts["vectors"]] == ["mood"]
    for wish, wanted in zip(WISHES, native, strict=True):
        found = logits(webui, wish)
        shared = found.keys() & wanted.keys()
        assert len(shared) >= 30
        # the weights are the same, their arithmetic is not: 4-bit blocks times 8-bit activations there, float32 here
        assert max(abs(found[token] - wanted[token]) for token in shared) < 0.03, wish
    plain, *steered = native
    assert all(max(abs(plain.get(t, 0.0) - one.get(t, 0.0)) for t in plain) > 0.03 for one in steered)


def test_each_request_has_its_own(webui: Webui) -> None:
    wishes = [None, "mood:1", "mood:-1", None, [], "mood:0"]
    replies = [webui.chat(steering=wish) for wish in wishes]
    assert len(set(replies)) == 3 and replies[0] == replies[3] == replies[4] == replies[5]
    for wish, named in (
        ("mood?answer", "cannot tell"),
        ("mood#1", "stream"),
        ("absent", "'absent'"),
        ("mood[linear:8]", "schedule"),
    ):
        answer = webui.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "steering": wish})
        assert answer.status_code == 400 and named in answer.json()["error"]["message"]


def test_the_sliders_act_and_leave(webui: Webui) -> None:
    with opened(webui) as page:
        page.tab("Steering")
        page.expect(lambda: "through hooks" in page.text("status"))
        page.write("mood:0")
        plain = page.say(PROMPT)
        page.tab("Steering")
        page.slide(0, -1)
        page.expect(lambda: page.value("expression") == "mood:-1")
        assert page.say(PROMPT) != plain
        page.tab("Steering")
        page.press("on input")
        page.expect(lambda: not webui.get("/v1/internal/steering")["page"]["on"])
        assert page.say(PROMPT) == plain
        page.tab("Steering")
        page.press("on input")
    assert webui.chat() == webui.chat(steering=[])
