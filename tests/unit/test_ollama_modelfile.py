"""The Modelfile language with its line numbers, and steering texts that add or override."""

from __future__ import annotations

import pytest
from steer_plugins_ollama import expression, modelfile
from steer_plugins_ollama.errors import BadRequest
from steer_plugins_ollama.modelfile import ModelfileError
from steer_plugins_ollama.names import parse_name

from steer_plugins.errors import SpecError
from steer_plugins.steering.grammar import parse

WHOLE = '''\ufeff# a comment
FROM llama3.2:1b\r
TEMPLATE """{{ if .System }}<s>{{ .System }}
{{ end }}{{ .Prompt }}"""
system "You are
 brief."
ADAPTER ./lora.gguf
DRAFT ./draft.gguf
RENDERER qwen3
PARSER qwen3
REQUIRES v0.14.0
PARAMETER steering "mood:0.6 + succinctness:-0.3"
PARAMETER steering !hedging
PARAMETER temperature 0.3
PARAMETER num_ctx 4096
PARAMETER use_mmap false
PARAMETER stop "a b"
PARAMETER stop </s>
PARAMETER f16_kv true
MESSAGE user Is a # sign here a comment?
MESSAGE assistant """No, "it" is not."""
LICENSE first
LICENSE """second
line"""'''


def test_whole_language() -> None:
    found = modelfile.parse(WHOLE)
    assert found.source == "llama3.2:1b" and found.source_line == 2
    assert found.template == "{{ if .System }}<s>{{ .System }}\n{{ end }}{{ .Prompt }}"
    assert found.system == "You are\n brief."
    assert found.adapters == [("./lora.gguf", 7)] and found.drafts == [("./draft.gguf", 8)]
    assert (found.renderer, found.parser, found.requires) == ("qwen3", "qwen3", "0.14.0")
    assert found.steering == ["mood:0.6 + succinctness:-0.3", "!hedging"]
    assert found.parameters == {"temperature": 0.3, "num_ctx": 4096, "use_mmap": False, "stop": ["a b", "</s>"]}
    assert found.ignored == ["f16_kv"]
    assert found.messages == [
        {"role": "user", "content": "Is a # sign here a comment?"},
        {"role": "assistant", "content": 'No, "it" is not.'},
    ]
    assert found.licenses == ["first", "second\nline"]


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("FROM x\nPARAMETER steering mood:", 2, "character 6"),
        ("FROM x\n\n# c\nPARAMETER nosuch 1", 4, "unknown parameter 'nosuch'"),
        ("FROM x\nPARAMETER temperature hot", 2, "a number, not 'hot'"),
        ("FROM x\nPARAMETER num_ctx 1.5", 2, "a whole number"),
        ("FROM x\nPARAMETER temperature 1e999", 2, "a number"),
        ("FROM x\nPARAMETER use_mmap maybe", 2, "true or false"),
        ("FROM x\nPARAMETER temperature", 2, "no value"),
        ("FROM x\nMESSAGE robot hi", 2, "not 'robot'"),
        ("FROM x\nSTEER mood", 2, "unknown instruction 'STEER'"),
        ("FROM\n", 1, "FROM has no value"),
        ('FROM x\nSYSTEM """never\nclosed\n', 2, "never closed"),
        ("FROM x\nREQUIRES soon", 2, "not a version"),
        ('FROM x\nTEMPLATE """a\nb {{ nope }}"""\nPARAMETER steering a', 3, "function nope"),
        ("SYSTEM hi", 0, "no FROM"),
    ],
)
def test_errors_name_their_line(text: str, line: int, part: str) -> None:
    with pytest.raises(ModelfileError) as caught:
        modelfile.parse(text)
    assert caught.value.line == line and part in str(caught.value)
    if line:
        assert f"line {line}:" in str(caught.value)


def test_a_template_without_steering_is_ollamas_business() -> None:
    assert modelfile.parse('FROM x\nTEMPLATE "{{ nope }}"').template == "{{ nope }}"


@pytest.mark.parametrize("text", ["plain", " spaced ", 'with "quotes"', "two\nlines", 'two\n"quoted" lines', ""])
def test_render_is_read_back(text: str) -> None:
    written = modelfile.render(
        "./x.gguf",
        system=text or None,
        parameters={"steering": "mood:0.5", "stop": ["a", " b"], "use_mmap": True, "temperature": 0.5},
        messages=[{"role": "user", "content": text}],
    )
    found = modelfile.parse(written)
    assert (found.system or "") == text
    assert found.messages == [{"role": "user", "content": text}]
    assert found.parameters == {"stop": ["a", " b"], "use_mmap": True, "temperature": 0.5}


def terms(text: str) -> expression.Terms:
    return tuple(parse(text))


@pytest.mark.parametrize(
    ("base", "text", "result"),
    [
        (None, "mood:0.6", "mood:0.6"),
        ("mood:0.6", "kind", "kind"),
        ("mood:0.6", "+ kind:0.5", "mood:0.6 + kind:0.5"),
        ("mood:0.6", "+kind - calm", "mood:0.6 + kind + calm:-1"),
        ("mood:0.6", "", ""),
        (None, "+ kind", "kind"),
    ],
)
def test_a_leading_plus_adds(base: str | None, text: str, result: str) -> None:
    assert expression.combine(None if base is None else terms(base), text) == terms(result)


def test_lines_of_one_model_add_up() -> None:
    base = terms("base")
    assert expression.combine_lines(base, ["mood:0.6", "kind"]) == terms("mood:0.6 + kind")
    assert expression.combine_lines(base, ["+ mood:0.6", "kind"]) == terms("base + mood:0.6 + kind")
    assert expression.combine_lines(base, []) == base


def test_lines_that_begin_with_a_minus_add_up() -> None:
    assert expression.combine_lines(None, ["mood:0.6", "-calm:0.5"]) == terms("mood:0.6 + calm:-0.5")


def test_carrier_line() -> None:
    assert expression.of_license("steering: mood:0.6 + a") == "mood:0.6 + a"
    assert expression.of_license(expression.as_license("a + b")) == "a + b"
    assert expression.of_license("The MIT License, steering: nothing") is None


@pytest.mark.parametrize("value", [3, True, {"a": 1}, [1, "a"], ["mood", 3]])
def test_a_request_brings_text_or_terms(value: object) -> None:
    with pytest.raises((BadRequest, SpecError)):
        expression.of_request(value, None)


def test_requests_open_no_files() -> None:
    for text in ('"/etc/passwd"', '"../x.safetensors":0.5', '"a\\\\b"'):
        with pytest.raises(SpecError, match="file"):
            expression.of_request(text, None)
    assert expression.of_request([{"vector": "mood", "strength": 0.5}], terms("x")) == terms("mood:0.5")
    assert expression.of_request(None, terms("x")) == terms("x")
    assert expression.of_request("", terms("x")) == ()


@pytest.mark.parametrize(
    ("text", "short", "parts"),
    [
        ("llama3.2", "llama3.2:latest", ("registry.ollama.ai", "library", "llama3.2", "latest")),
        ("me/calm:v2", "me/calm:v2", ("registry.ollama.ai", "me", "calm", "v2")),
        ("host.org:5000/ns/m:t", "host.org:5000/ns/m:t", ("host.org:5000", "ns", "m", "t")),
        ("registry.ollama.ai/library/m", "m:latest", ("registry.ollama.ai", "library", "m", "latest")),
    ],
)
def test_names(text: str, short: str, parts: tuple[str, ...]) -> None:
    name = parse_name(text)
    assert str(name) == short and name.parts == parts


@pytest.mark.parametrize("text", ["", None, 3, "../x", "a/../b", "..", "a:..", "a b", "/a", "a/", "x" * 200, "a:b:c", "h/n/m/x"])
def test_names_never_become_paths(text: object) -> None:
    with pytest.raises(BadRequest):
        parse_name(text)
