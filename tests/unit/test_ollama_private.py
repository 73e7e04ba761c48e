"""The llama-servers of the sidecar are its own: nobody else can ask them, and nothing meant for others reaches them."""

from __future__ import annotations

import asyncio
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import pytest
from steer_plugins_ollama import key
from steer_plugins_ollama.llama import BadRequest, LlamaServer, ServerGone
from steer_plugins_ollama.plugin import ollama
from steer_plugins_ollama.starting import environment

from .ollama_standins import StandInLlama, send_chunk, send_json, start_chunks


@pytest.fixture(autouse=True)
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own."""
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    key.server_key.cache_clear()
    yield key.key_path()
    key.server_key.cache_clear()


def fresh() -> str:
    """The key as another program would find it."""
    key.server_key.cache_clear()
    return key.server_key()


def test_a_users_key_is_made_once(own_key: Path) -> None:
    made = fresh()
    assert re.fullmatch("[0-9a-f]{64}", made) and fresh() == made
    assert [p.name for p in own_key.parent.iterdir()] == ["ollama.key"]
    if sys.platform != "win32":
        assert stat.S_IMODE(own_key.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["", "short", "\xff\xfe"])
def test_a_key_that_is_none_is_replaced(own_key: Path, text: str) -> None:
    own_key.parent.mkdir()
    own_key.write_bytes(text.encode("latin-1"))
    own_key.chmod(0o600)
    made = fresh()
    assert len(made) == 64 and fresh() == made


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_a_key_that_others_could_know_is_replaced(own_key: Path, tmp_path: Path) -> None:
    own_key.parent.mkdir()
    own_key.write_text("a" * 64)
    own_key.chmod(0o644)
    made = fresh()
    assert made != "a" * 64 and fresh() == made
    own_key.unlink()
    (tmp_path / "planted").write_text("b" * 64)
    (tmp_path / "planted").chmod(0o600)
    own_key.symlink_to(tmp_path / "planted")
    assert fresh() != "b" * 64


def test_where_no_key_can_be_kept(own_key: Path) -> None:
    own_key.parent.write_text("not a folder")
    made = key.server_key()
    assert len(made) == 64 and key.server_key() == made and fresh() != made


def test_every_request_to_a_llama_server_has_its_key() -> None:
    llama = StandInLlama()
    seen: list[str | None] = []

    def answer(handler: Any, body: bytes) -> None:
        seen.append(handler.headers.get("Authorization"))
        send_json(handler, {"tokens": []})

    for path in ("/tokenize", "/completion"):
        llama.answers[("POST", path)] = answer

    async def ask() -> None:
        server = LlamaServer(llama.url, "secret")
        await server.ask("/tokenize", {})
        assert [part async for part in server.stream("/completion", {})]
        await server.close()

    asyncio.run(ask())
    assert seen == ["Bearer secret"] * 2
    llama.close()


def test_answers_that_are_not_json_or_are_cut() -> None:
    llama = StandInLlama()

    def broken(handler: Any, body: bytes) -> None:
        start_chunks(handler, "text/event-stream")
        send_chunk(handler, b"data: {\n\n")
        send_chunk(handler, b"")

    for path in ("/tokenize", "/completion"):
        llama.answers[("POST", path)] = broken

    async def ask() -> None:
        server = LlamaServer(llama.url)
        with pytest.raises(ServerGone):
            await server.ask("/tokenize", {})
        with pytest.raises(ServerGone):
            _ = [event async for event in server.events("/completion", {})]
        llama.answers[("POST", "/completion")] = lambda h, b: send_json(h, {"error": {"code": 400, "message": "no"}}, 400)
        with pytest.raises(BadRequest, match="^no$"):
            _ = [event async for event in server.events("/completion", {})]
        await server.close()

    asyncio.run(ask())
    llama.close()


def test_variables_of_the_users_own_servers_are_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (
        "LLAMA_API_KEY",
        "LLAMA_ARG_API_PREFIX",
        "LLAMA_ARG_CTX_SIZE",
        "LLAMA_ARG_CHAT_TEMPLATE",
        "LLAMA_OFFLINE",
        "LLAMA_NEW",
    )
    for name in names:
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("GGML_CUDA_GRAPHS", "1")
    wanted = environment()
    assert {name for name in names if wanted[name] is None} == set(names) - {"LLAMA_API_KEY"}
    assert wanted["LLAMA_API_KEY"] == key.server_key() and "GGML_CUDA_GRAPHS" not in wanted


@pytest.mark.parametrize(
    "flags",
    [
        *(["--port", "1"], ["--host", "0.0.0.0"], ["--api-key", "k"], ["--api-key-file", "f"], ["--api-prefix", "/x"]),
        *(["--ssl-key-file", "k"], ["-m", "x.gguf"], ["-hf", "a/b"], ["--models-dir", "d"], ["--embeddings"], ["--port=1"]),
        *(["-t", "1", "--reranking"], ["--version"]),
    ],
)
def test_flags_that_are_the_sidecars_own(flags: list[str], tmp_path: Path) -> None:
    """Said when it starts; they ended in a wait for a server that listens elsewhere, or in one that cannot reply."""
    (tmp_path / "models").mkdir()
    runner = click.testing.CliRunner()
    result = runner.invoke(ollama, ["serve", "--port", "0", "--folder", str(tmp_path / "models"), "--", *flags])
    assert result.exit_code != 0
    name = next(flag for flag in flags if flag.startswith("-") and flag != "-t")
    assert f"{name} cannot be among the flags of the sidecar's llama-servers" in str(result.exception)
