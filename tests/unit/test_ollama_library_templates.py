"""TEMPLATEs in the shape of those in Ollama's library, against prompts written by hand from each model's published format."""

from __future__ import annotations

import pytest
from steer_plugins_ollama.gotemplate import Template, TemplateError

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
CHATML_TURNS = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""
CHATML_WANTED = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
)
LLAMA3 = """{{- if .System }}<|start_header_id|>system<|end_header_id|>

{{ .System }}<|eot_id|>
{{- end }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}<|start_header_id|>user<|end_header_id|>

{{ .Content }}<|eot_id|>{{ if $last }}<|start_header_id|>assistant<|end_header_id|>

{{ end }}
{{- else if eq .Role "assistant" }}<|start_header_id|>assistant<|end_header_id|>

{{ .Content }}{{ if not $last }}<|eot_id|>{{ end }}
{{- end }}
{{- end }}"""
LLAMA3_WANTED = (
    "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
MISTRAL = """{{- range $index, $_ := .Messages }}
{{- if eq .Role "user" }}[INST] {{ if and $.System (eq (len (slice $.Messages $index)) 1) }}{{ $.System }}

{{ end }}{{ .Content }}[/INST]
{{- else if eq .Role "assistant" }} {{ .Content }}</s>
{{- end }}
{{- end }}"""
GEMMA = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}<start_of_turn>user
{{ if and (eq $i 1) $.System }}{{ $.System }}

{{ end }}{{ .Content }}<end_of_turn>
{{ if $last }}<start_of_turn>model
{{ end }}
{{- else if eq .Role "assistant" }}<start_of_turn>model
{{ .Content }}{{ if not $last }}<end_of_turn>
{{ end }}
{{- end }}
{{- end }}"""
PHI = """{{ if .System }}<|system|>
{{ .System }}<|end|>
{{ end }}{{ if .Prompt }}<|user|>
{{ .Prompt }}<|end|>
{{ end }}<|assistant|>
{{ .Response }}<|end|>"""
LLAMA2 = """[INST] <<SYS>>{{ .System }}<</SYS>>

{{ .Prompt }} [/INST]
{{ .Response }}"""
ALPACA = """{{ .System }}

{{ if .Prompt }}### Instruction:
{{ .Prompt }}

{{ end }}### Response:
{{ .Response }}

"""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        pytest.param(CHATML, CHATML_WANTED, id="chatml"),
        pytest.param(CHATML_TURNS, CHATML_WANTED, id="chatml turn by turn"),
        pytest.param(LLAMA3, LLAMA3_WANTED, id="llama3"),
        pytest.param(MISTRAL, "[INST] Hi[/INST] Hello</s>[INST] Be kind.\n\nBye[/INST]", id="mistral"),
        pytest.param(
            GEMMA,
            "<start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
            "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
            id="gemma",
        ),
        pytest.param(
            PHI,
            "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|><|user|>\nBye<|end|>\n<|assistant|>\n",
            id="phi",
        ),
        pytest.param(
            LLAMA2,
            "[INST] <<SYS>>Be kind.<</SYS>>\n\nHi [/INST]\nHello[INST] <<SYS>><</SYS>>\n\nBye [/INST]\n",
            id="llama2",
        ),
        pytest.param(
            ALPACA,
            "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n\n\n### Instruction:\nBye\n\n### Response:\n",
            id="alpaca",
        ),
    ],
)
def test_library_templates(text: str, wanted: str) -> None:
    assert Template(text).prompt(CHAT) == wanted


def test_tools_in_a_template() -> None:
    """Qwen's way: the tools after the system prompt, calls in tags."""
    text = """{{- if or .System .Tools }}<|im_start|>system
{{ .System }}
{{- if .Tools }}
<tools>
{{- range .Tools }}
{"type": "function", "function": {{ .Function }}}
{{- end }}
</tools>
{{- end }}<|im_end|>
{{ end }}
{{- range $i, $_ := .Messages }}
{{- if eq .Role "assistant" }}<|im_start|>assistant
{{ if .Content }}{{ .Content }}{{ else if .ToolCalls }}<tool_call>
{{ range .ToolCalls }}{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
{{ end }}</tool_call>{{ end }}<|im_end|>
{{ else if eq .Role "tool" }}<|im_start|>user
<tool_response>{{ .Content }}</tool_response><|im_end|>
{{ else if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ end }}
{{- end }}<|im_start|>assistant
"""
    chat = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]},
        {"role": "tool", "content": "rain"},
    ]
    assert Template(text).prompt(chat, tools=[{"Function": {"name": "weather"}}]) == (
        '<|im_start|>system\n\n<tools>\n{"type": "function", "function": {"name":"weather"}}\n</tools><|im_end|>\n'
        "<|im_start|>user\nWeather?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city":"Oslo"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>rain</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("line", [1, 4, 9])
@pytest.mark.parametrize("wrong", ['{{ template "x" }}', "{{ call .F }}", "{{ .A.B( }}", "{{ urlquery .X }}"])
def test_what_is_not_understood_is_named_with_its_line(line: int, wrong: str) -> None:
    lines = LLAMA3.splitlines()
    lines.insert(line - 1, wrong)
    with pytest.raises(TemplateError) as caught:
        Template("\n".join(lines))
    assert caught.value.line == line
