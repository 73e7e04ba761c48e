"""Chat templates of the cases: how a model may, or may not, tell its thoughts from its answer."""

from __future__ import annotations

from steer_plugins.testing import templates

_QUIET = "<think>\\n\\n</think>\\n\\n"  # what a model that is told not to think finds in its prompt
_TURNS = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' and message['reasoning_content'] -%}"
    "{{- OPEN + message['reasoning_content'] + CLOSE -}}"
    "{%- endif -%}"
    "{{- message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
)


def _turns(opening: str, closing: str) -> str:
    return _TURNS.replace("OPEN", repr(opening)).replace("CLOSE", repr(closing))


_BEGIN = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"

_HARMONY = (
    "{%- for message in messages -%}"
    "{{- '<|start|>' + message['role'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|channel|>final' -}}{%- endif -%}"
    "{{- '<|message|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"
    "{#- thoughts: <|channel|>analysis<|message|> ... <|end|><|start|>assistant<|channel|>final<|message|> -#}"
)

TEMPLATES = {
    "never": templates.CHATML,
    "may": _turns("<think>\n", "\n</think>\n\n")
    + _BEGIN
    + "{%- if enable_thinking is defined and not enable_thinking -%}{{- '"
    + _QUIET
    + "' -}}{%- endif -%}{%- endif -%}",
    "always": _turns("<think>\n", "\n</think>\n") + _BEGIN + "{{- '<think>\\n' -}}{%- endif -%}",
    "brackets": _turns("[THINK]", "[/THINK]") + _BEGIN + "{%- endif -%}",
    "channels": _HARMONY,
    "untold": _turns("", "")
    + "{%- if enable_thinking -%}{{- '<|im_start|>system\nThink first.<|im_end|>\n' -}}{%- endif -%}"
    + _BEGIN
    + "{%- endif -%}",
}
"""``never`` thinks; ``may`` think by itself, unless told not to; ``always`` opens thinking in the prompt; ``brackets`` writes
``[THINK]`` instead of ``<think>``; ``channels`` parts thoughts and answer as gpt-oss does; ``untold`` thinks, and nothing in the
template says where that ends."""
