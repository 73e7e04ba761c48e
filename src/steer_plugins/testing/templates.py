"""Chat templates (Jinja) of the tiny models."""

from __future__ import annotations

_CHATML_TURNS = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
)

CHATML = _CHATML_TURNS + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"

CHATML_BOS = "{{- bos_token -}}" + CHATML

# With enable_thinking false the reply starts after an empty thought; otherwise the model opens <think> by itself.
CHATML_THINKING = (
    _CHATML_TURNS
    + "{%- if add_generation_prompt -%}"
    + "{{- '<|im_start|>assistant\\n' -}}"
    + "{%- if enable_thinking is defined and enable_thinking is not none and not enable_thinking -%}"
    + "{{- '<think>\\n\\n</think>\\n\\n' -}}"
    + "{%- endif -%}"
    + "{%- endif -%}"
)

# DeepSeek-V4: a closed </think> right after the assistant tag means "answer at once", an open <think> means
# "think first". Thoughts of earlier turns are dropped; those after the last user message are kept.
# `thinking` wins over `enable_thinking`; with neither the model does not think.
DEEPSEEK_V4 = """\
{%- if thinking is defined and thinking is not none -%}
  {%- set think = thinking -%}
{%- elif enable_thinking is defined and enable_thinking is not none -%}
  {%- set think = enable_thinking -%}
{%- else -%}
  {%- set think = false -%}
{%- endif -%}
{%- set found = namespace(last_user=-1, system='', user_open=false) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {%- set found.last_user = loop.index0 -%}
  {%- elif message['role'] == 'system' -%}
    {%- if found.system -%}
      {%- set found.system = found.system + '\\n\\n' + message['content'] -%}
    {%- else -%}
      {%- set found.system = message['content'] -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{{- bos_token + found.system -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {%- if found.user_open -%}{{- '\\n\\n' -}}{%- else -%}{{- '<｜User｜>' -}}{%- endif -%}
    {%- set found.user_open = true -%}
    {{- message['content'] -}}
  {%- elif message['role'] == 'assistant' -%}
    {%- set found.user_open = false -%}
    {{- '<｜Assistant｜>' -}}
    {%- if think and loop.index0 > found.last_user -%}
      {{- '<think>' -}}
      {%- if message['reasoning_content'] is defined and message['reasoning_content'] -%}
        {{- message['reasoning_content'] -}}
      {%- endif -%}
    {%- endif -%}
    {{- '</think>' + message['content'] + '<｜end▁of▁sentence｜>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<｜Assistant｜>' -}}
  {%- if think -%}{{- '<think>' -}}{%- else -%}{{- '</think>' -}}{%- endif -%}
{%- endif -%}
"""
