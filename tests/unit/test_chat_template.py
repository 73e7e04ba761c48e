"""Chat templates as models have them: tags of Hugging Face, no system role, parts of text, and broken ones."""

import warnings
from typing import Any

import pytest

from steer_plugins.engine.chat import ChatTemplate, check_messages, utf8
from steer_plugins.errors import DataError, ModelError, SteerWarning

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}"
)
DEAF = "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endfor %}"
)
PARTS_SELECTED = (
    "{% for m in messages %}<{{ m.role }}>{{ (m.content | selectattr('type', 'equalto', 'text') | first).text }}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}"
)


def said(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def rendered(source: str, messages: list[dict[str, str]], **more: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteerWarning)
        return ChatTemplate(source, bos="<s>", eos="</s>").render(messages, **more)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endfor %}", "<a><b>"),
        ("{%- for m in messages -%} {%- generation -%} <{{ m.content }}> {%- endgeneration -%} {%- endfor -%}", "<a><b>"),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% if 1 %}{{ m.content }}{% endif %}"
            "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "ab",
        ),
        ("{% set ns = namespace(n=0) %}{% generation %}{% set ns.n = 2 %}{% endgeneration %}{{ ns.n }}", "2"),
        ("{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m.content }}{% endfor %}", "a"),
        ("{{ 'tools' if tools is not none else 'none' }}", "none"),
        ("{{ {'a': 'ä<'} | tojson }}", '{"a": "ä<"}'),
    ],
)
def test_tags_that_templates_use(source: str, text: str) -> None:
    assert rendered(source, said("a", "b")) == text


@pytest.mark.parametrize("source", ["{% for m in %}", "{% generation %}x", "{{ x | nothing }}", "{% trans %}a{% endtrans %}"])
def test_a_broken_template_is_named_when_a_chat_is_rendered(source: str) -> None:
    template = ChatTemplate(source, bos="", eos="")  # raw prompts need none
    with pytest.raises(ModelError, match="not valid Jinja .*: give a raw prompt instead$"):
        template.render(said("a"))


@pytest.mark.parametrize("source", [GEMMA, DEAF])
@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (said("hi", system="be kind"), "<user>be kind\nhi"),
        (said("hi", "yes", "go", system="be kind"), "<user>be kind\nhi<assistant>yes<user>go"),
        ([*said("hi"), {"role": "system", "content": "be kind"}], "<user>hi\nbe kind"),
        ([{"role": "system", "content": "be kind"}], "<user>be kind"),
        (said("hi", "yes", "go"), "<user>hi<assistant>yes<user>go"),
    ],
)
def test_a_system_prompt_is_folded_where_the_template_has_no_such_role(
    source: str, messages: list[dict[str, str]], text: str
) -> None:
    given = [dict(message) for message in messages]
    assert rendered(source, messages).removeprefix("<s>") == text and messages == given


def test_folding_is_said_once_and_only_when_it_happens() -> None:
    template = ChatTemplate(GEMMA, bos="", eos="")
    template.render(said("hi"))  # pytest turns a warning into an error
    with pytest.warns(SteerWarning, match="has no system role") as caught:
        template.render(said("hi", system="be kind"))
        template.render(said("hi", system="be brief"))
    assert len(caught) == 1


def test_a_system_role_stays_where_there_is_one() -> None:
    assert ChatTemplate(CHATML, bos="", eos="").render(said("hi", system="be kind")) == "<system>be kind<user>hi<assistant>"


@pytest.mark.parametrize("source", [PARTS, PARTS_SELECTED])
def test_templates_that_take_parts_get_parts(source: str) -> None:
    assert rendered(source, said("hi", "yes", system="be kind")) == "<system>be kind<user>hi<assistant>yes"
    assert rendered(EITHER, said("hi", "yes")) == "<user>hi<assistant>yes"


def test_parts_and_no_system_role() -> None:
    source = PARTS.replace("<{{ m.role }}>", "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}<{{ m.role }}>")
    assert rendered(source, said("hi", system="be kind")) == "<user>be kind\nhi"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('Two\nlines.') }}", "refuses these messages: Two lines$"),
        ("{{ messages[0].content + 1 }}", "refuses these messages: can only concatenate"),
        ("{{ messages[7].content.x }}", "refuses these messages: "),
        ("{{ (1).__class__.__mro__ }}", "refuses these messages: "),
        ("{{ 1 // 0 }}", "refuses these messages: "),
    ],
)
def test_whatever_a_template_raises_is_one_sentence(source: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        rendered(source, said("a"))


def test_bytes_that_are_not_utf8() -> None:
    assert utf8("größe 🐝") == "größe 🐝".encode()
    with pytest.raises(DataError, match="the prompt is not UTF-8 at character 4: "):
        utf8("caf\udce9")
    with pytest.raises(DataError, match="the prompt is not UTF-8 at character 4: "):
        check_messages(said("hi", system="caf\udce9"))
