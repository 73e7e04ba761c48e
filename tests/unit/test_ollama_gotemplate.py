"""Ollama's templates: the subset of Go's language, and how a chat becomes a prompt."""

from __future__ import annotations

from typing import Any

import pytest
from steer_plugins_ollama.gotemplate import Template, TemplateError

CHATML_TURNS = (
    "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ if .Prompt }}<|im_start|>user\n"
    "{{ .Prompt }}<|im_end|>\n{{ end }}<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
)
MESSAGES = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}<u>{{ .Content }}
{{- else if eq .Role "assistant" }}<a>{{ .Content }}{{ if not $last }}</a>{{ end }}
{{- else }}<s>{{ .Content }}{{ end }}
{{- if and (ne .Role "assistant") $last }}<a>{{ end }}
{{- end }}"""
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


def show(text: str, **data: Any) -> str:
    return Template(text + "{{ .Response }}").execute({"Response": "", **data})


def test_turns_without_messages() -> None:
    assert Template(CHATML_TURNS).prompt(CHAT) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages() -> None:
    template = Template(MESSAGES)
    assert template.prompt(CHAT) == "<s>S<u>one<a>two</a><u>three<a>"
    assert template.prompt(CHAT[:3]) == "<s>S<u>one<a>two"
    assert template.prompt([CHAT[1], CHAT[3]]) == "<u>one\n\nthree<a>"  # neighbours become one


def test_a_template_without_response_ends_with_it() -> None:
    assert Template("{{ .Prompt }}!").prompt(CHAT[1:]) == "one!twothree!"


def test_the_prompt_ends_where_the_response_begins_in_a_branch() -> None:
    text = "{{ if .Prompt }}<u>{{ .Prompt }}{{ end }}{{ if .Response }}<a>{{ .Response }}</a>{{ end }}after"
    assert Template(text).prompt(CHAT[1:2]) == "<u>one"


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("a {{- .X -}} b", "axb"),
        ("a {{ .X }} b", "a x b"),
        ("{{/* no */}}y{{- /* no */ -}} z", "yz"),
        ("{{ $v := .X }}{{ if true }}{{ $v = `q` }}{{ end }}{{ $v }}", "q"),
        ("{{ range .L }}{{ if eq . 2 }}{{ continue }}{{ end }}{{ if eq . 4 }}{{ break }}{{ end }}{{ . }}{{ end }}", "13"),
        ("{{ range $k, $v := .M }}{{ $k }}={{ $v }};{{ end }}", "a=1;b=2;"),
        ("{{ range .Empty }}x{{ else }}none{{ end }}", "none"),
        ("{{ with .X }}{{ . }}{{ $.Y }}{{ end }}", "xy"),
        ("{{ .X | print | len }}", "1"),
        ("{{ or .Missing .X }}{{ and .Missing .X }}{{ not .Missing }}", "xtrue"),
        ("{{ index .L 1 }}{{ (index .O 0).Name }}{{ slice .X 0 1 }}", "2nx"),
        ("{{ if and (gt (len .L) 3) (le 1 1) (ne .X .Y) }}y{{ end }}", "y"),
        ("{{ json .M }}{{ .M }}", '{"b":2,"a":1}{"b":2,"a":1}'),
        ('{{ printf "%s-%d%%" .X 3 }}', "x-3%"),
        ('{{ if eq .X "a" "x" }}any{{ end }}', "any"),
        ('{{ "}}" }}{{ .Missing.Deeper }}', "}}"),
        ('{{ if eq .Missing "" }}zero{{ end }}', "zero"),
    ],
)
def test_language(text: str, result: str) -> None:
    data = {"X": "x", "Y": "y", "L": [1, 2, 3, 4], "M": {"b": 2, "a": 1}, "O": [{"Name": "n"}], "Empty": []}
    assert show(text, **data) == result


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("a\nb {{ template `x` }}", 2, "template"),
        ("{{ define `x` }}{{ end }}", 1, "define"),
        ("\n\n{{ nope .X }}", 3, "function nope"),
        ("{{ if .X }}\nabc", 1, "no end"),
        ("x\n{{ end }}", 2, "nothing to end"),
        ("x\n{{ else }}", 2, "nothing to end"),
        ("{{ if .X }}{{ else }}{{ else }}{{ end }}", 1, "second else"),
        ("\n{{ .X", 2, "without }}"),
        ("{{ }}", 1, "empty"),
        ("{{ .X .Y }}", 1, "not expected"),
        ("{{ (.X }}", 1, "without )"),
        ("{{ .X | .Y }}", 1, "piped"),
        ("{{ break }}", 1, "outside"),
        ("{{ ; }}", 1, "not understood"),
        ("{{ range $a, $b, $c := .X }}{{ end }}", 1, "variables"),
        ("{{" + "(" * 300 + "1" + ")" * 300 + "}}", 1, "parentheses"),
        ("{{ if .X }}" * 300 + "{{ end }}" * 300, 1, "nested"),
    ],
)
def test_what_is_not_understood_names_its_line(text: str, line: int, part: str) -> None:
    with pytest.raises(TemplateError) as caught:
        Template(text)
    assert caught.value.line == line and part in caught.value.reason


@pytest.mark.parametrize(
    "text", ["{{ len 3 }}", "{{ slice .X 5 }}", "{{ $nosuch }}", "{{ range 1.5 }}{{ end }}", "{{ lt .X 1 }}"]
)
def test_errors_while_running(text: str) -> None:
    with pytest.raises(TemplateError):
        show(text, X="x")


def test_insert_and_thinking() -> None:
    assert Template("<P>{{ .Prompt }}<S>{{ .Suffix }}<M>").insert("a", "b") == "<P>a<S>b<M>"
    template = Template(
        "{{ range .Messages }}{{ .Content }}{{ end }}{{ if and $.IsThinkSet (not $.Think) }}<no>{{ end }}{{ .ThinkLevel }}"
    )
    assert template.prompt(CHAT[1:2]) == "one"
    assert template.prompt(CHAT[1:2], think=False) == "one<no>"
    assert template.prompt(CHAT[1:2], think="high") == "onehigh"


def test_tool_calls() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    template = Template(
        "{{ range .Messages }}{{ range .ToolCalls }}{{ .Function.Name }}{{ .Function.Arguments }}{{ end }}{{ end }}"
    )
    assert template.prompt([call]) == 'f{"x":1}'
    assert {"messages", "toolcalls", "function"} <= template.uses


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{{ range 1000000000 }}{{ end }}", "too many steps"),
        ("{{ range 100000 }}{{ range 100000 }}{{ end }}{{ end }}", "too many steps"),
        ("{{ if .A }}" + "{{ else if .B }}" * 3000 + "{{ end }}", "nested too deeply"),
        ("{{ " + "9" * 5000 + " }}", "too long"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "too many parentheses"),
    ],
)
def test_a_request_cannot_keep_the_sidecar_busy(text: str, part: str) -> None:
    with pytest.raises(TemplateError, match=part):
        Template(text).prompt([{"role": "user", "content": "hi"}])
