"""Options, durations, thinking tags, addresses, the service files."""

from __future__ import annotations

import plistlib
from typing import Any

import pytest
from steer_plugins_ollama import install, llama, options
from steer_plugins_ollama.daemon import daemon_url, host_url, is_local
from steer_plugins_ollama.errors import BadRequest

from steer_plugins.errors import SteerError


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0),
        (30, 30),
        ("30", 30),
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5s", 1.5),
        ("500ms", 0.5),
        (-1, options.FOREVER),
        ("-1m", options.FOREVER),
    ],
)
def test_keep_alive(value: Any, seconds: float) -> None:
    assert options.keep_alive(value, {}) == seconds


@pytest.mark.parametrize("value", ["soon", "5 m", "5x", "", True, [], float("nan")])
def test_no_durations(value: Any) -> None:
    with pytest.raises(BadRequest, match="keep_alive"):
        options.keep_alive(value, {})


def test_keep_alive_of_the_environment() -> None:
    assert options.keep_alive(None, {}) == 300
    assert options.keep_alive(None, {"OLLAMA_KEEP_ALIVE": "1h"}) == 3600
    assert options.keep_alive(None, {"OLLAMA_KEEP_ALIVE": "nonsense"}) == 300


def test_options_of_request_model_and_ollama() -> None:
    merged = options.merged(
        {"temperature": 0.2, "stop": "x", "top_k": 3}, options.checked({"top_k": 7, "steering": "a", "unknown": 1})
    )
    fields = options.sampling(merged)
    assert (fields["temperature"], fields["top_k"], fields["top_p"], fields["stop"]) == (0.2, 7, 0.9, ["x"])
    assert (fields["n_predict"], fields["n_keep"], fields["min_p"]) == (-1, 4, 0.0)
    assert "steering" not in fields and "unknown" not in fields
    assert options.sampling({**merged, "num_predict": -2})["n_predict"] == -1


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": "hot"},
        {"top_k": True},
        {"stop": 3},
        {"stop": ["a", 3]},
        {"use_mmap": 1},
        {"top_p": float("inf")},
        [1],
        "x",
    ],
)
def test_options_of_a_wrong_type(bad: Any) -> None:
    with pytest.raises(BadRequest, match="option"):
        options.checked(bad)


def test_what_a_process_is_started_with() -> None:
    load = options.load_options({"num_ctx": 1000, "num_gpu": 5, "num_thread": 2, "use_mmap": False}, {})
    flags = load.flags(3, {"OLLAMA_KV_CACHE_TYPE": "q8_0"})
    assert flags[:4] == ["-c", "3000", "-np", "3"]
    joined = " ".join(flags)
    assert "-ngl 5" in joined and "-t 2" in joined and "-ctk q8_0" in joined and "--load-mode none" in joined
    assert options.load_options({}, {"OLLAMA_CONTEXT_LENGTH": "8192"}).n_ctx == 8192
    assert "-ngl" not in options.load_options({"num_gpu": -1}, {}).flags(1, {})
    with pytest.raises(BadRequest):
        options.load_options({"num_ctx": 1 << 40}, {})


def test_which_process_will_do() -> None:
    small, large = options.LoadOptions(1000), options.LoadOptions(2000)
    assert small.served_by(large) and not large.served_by(small)
    assert not options.LoadOptions(1000, n_gpu=5).served_by(small)
    assert small.served_by(options.LoadOptions(1000, n_gpu=5))


def split(parts: list[str], *, inside: bool = False) -> tuple[str, str]:
    splitter = llama.Splitter("<think>", "</think>", inside=inside)
    found = [splitter.feed(part, last=number == len(parts) - 1) for number, part in enumerate(parts)]
    return "".join(a for a, _ in found), "".join(t for _, t in found)


@pytest.mark.parametrize(
    ("text", "inside", "answer", "thought"),
    [
        ("<think>a b</think>\n\nc d", False, "c d", "a b"),
        ("\n<think>\na</think>c<think>x", False, "c<think>x", "a"),
        ("plain <think>x</think>", False, "plain <think>x</think>", ""),
        ("a</think>b", True, "b", "a"),
        ("a never closed </thi", True, "", "a never closed </thi"),
        ("<thi", False, "<thi", ""),
        ("<b>", False, "<b>", ""),
        ("", False, "", ""),
    ],
)
def test_thinking_tags_in_pieces_of_any_size(text: str, inside: bool, answer: str, thought: str) -> None:
    for size in range(1, len(text) + 2):
        parts = [text[i : i + size] for i in range(0, len(text), size)] or [""]
        assert split(parts, inside=inside) == (answer, thought), size


def test_thinking_does_not_wait_for_the_end() -> None:
    splitter = llama.Splitter("<think>", "</think>")
    assert splitter.feed("<think>one two") == ("", "one two")
    assert splitter.feed(" three <") == ("", " three ")


def test_messages_for_llama_server() -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    found = llama.chat_messages(
        [
            {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_name": "f"},
            {"role": "user", "content": "look", "images": ["data:image/png;base64,QUJD", "QUJD"]},
        ]
    )
    assert found[0]["tool_calls"][0]["function"]["arguments"] == '{"x": 1}' and found[0]["reasoning_content"] == "hm"
    assert found[1]["tool_call_id"] == found[0]["tool_calls"][0]["id"] and found[1]["name"] == "f"
    assert [part["image_url"]["url"] for part in found[2]["content"][1:]] == ["data:image/png;base64,QUJD"] * 2


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("10.0.0.5", "http://10.0.0.5:11434"),
        ("0.0.0.0:9999", "http://127.0.0.1:9999"),
        ("https://example.org", "https://example.org:443"),
        ("http://example.org/ollama/", "http://example.org:80/ollama"),
        ("::1", "http://[::1]:11434"),
        ("[::]:1234", "http://[::1]:1234"),
        ("127.0.0.1:11435", "http://127.0.0.1:11434"),  # that is the sidecar itself
        ("10.0.0.5:11435", "http://10.0.0.5:11435"),
    ],
)
def test_where_ollama_is(text: str, url: str) -> None:
    assert daemon_url({"OLLAMA_HOST": text}, ("127.0.0.1", 11435)) == url


def test_no_address() -> None:
    for text in ("http://a:b", "ftp://x", "a:99999999"):
        with pytest.raises(BadRequest, match="OLLAMA_HOST"):
            host_url(text)
    assert is_local("localhost") and is_local("127.0.0.9") and is_local("::1") and not is_local("example.org")


def test_systemd_unit() -> None:
    plan = install.plan(
        ["--all", "50% $x"], platform="linux", environ={"XDG_CONFIG_HOME": "/c", "OLLAMA_MODELS": "/my models", "X": "y"}
    )
    assert plan.content is not None
    text = plan.content.decode()
    assert plan.path.as_posix() == "/c/systemd/user/steer-ollama.service"
    assert '-m steer_plugins ollama serve --all "50%% $$x"\n' in text
    assert 'Environment="OLLAMA_MODELS=/my models"\n' in text and "X=y" not in text
    assert "write:" in plan.text() and "systemctl --user enable --now" in plan.text()
    with pytest.raises(SteerError, match="control"):
        install.plan(["a\nExecStart=/bin/rm"], platform="linux", environ={})


def test_launchd_agent() -> None:
    plan = install.plan(["--all"], platform="darwin", environ={"OLLAMA_HOST": "h"})
    assert plan.content is not None
    found = plistlib.loads(plan.content)
    assert found["ProgramArguments"][-3:] == ["ollama", "serve", "--all"] and found["EnvironmentVariables"] == {
        "OLLAMA_HOST": "h"
    }
    assert install.removal(platform="darwin", environ={}).content is None
    with pytest.raises(SteerError):
        install.plan([], platform="win32", environ={})


# ---- conversations that are too long ----


def test_the_oldest_messages_go_first_and_in_few_rounds() -> None:
    from steer_plugins_ollama.chat import without_oldest

    system = {"role": "system", "content": "s"}
    messages = [system, *({"role": "user", "content": f"{n:03} " + "x" * 36} for n in range(400))]
    left, rounds = messages, 0
    while (n_prompt := 20 * len(left)) > 400:  # 20 tokens each
        left = without_oldest(left, n_prompt, 400) or pytest.fail("all are gone")
        rounds += 1
    assert rounds < 20 and len(left) == 20, "as many as fit, and no more"
    assert left[0] == system and left[1:] == messages[-19:]
    assert without_oldest([system, messages[-1]], 100, 10) is None
    assert without_oldest([messages[1], system, messages[2]], 0, 0) == [system, messages[2]]


# ---- a context longer than the model's ----


def test_a_context_is_at_most_what_the_model_was_trained_on() -> None:
    assert options.load_options({"num_ctx": 100_000}, {}, 8192).n_ctx == 8192
    assert options.load_options({"num_ctx": 4096}, {}, 8192).n_ctx == 4096
    assert options.load_options({}, {"OLLAMA_CONTEXT_LENGTH": "9000"}, 2048).n_ctx == 2048
    assert options.load_options({"num_ctx": 100_000}, {}).n_ctx == 100_000
