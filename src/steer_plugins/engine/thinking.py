"""Which tags part a model's thoughts from its answer, from the text of its chat template."""

from __future__ import annotations

import re

from ..native import Tags

_WORD = r"[\w.:-]{0,24}(?:think|thought|reason)[\w.:-]{0,24}"
_TAG = re.compile(rf"<\|?/?{_WORD}\|?>|\[/?{_WORD}\]", re.IGNORECASE)
_ENDS = re.compile(r"[</\[|]/|end", re.IGNORECASE)
_MARKS = re.compile(r"[^a-z]|start|begin|end|of", re.IGNORECASE)
_SWITCH = re.compile(r"think|reason|thought", re.IGNORECASE)
_CHANNELS = Tags(("<|channel|>analysis<|message|>",), ("<|end|>",))


def tags_of(template: str | None) -> Tags:
    """The tags of a chat template: ``<think>``, ``[THINK]``, ``<|START_THINKING|>`` and their like, or gpt-oss's channels.

    A template that speaks of thinking and has no such pair is one whose thoughts cannot be told: ``known`` is False. So it is
    without a template (None). One that does not speak of it belongs to a model that does not think.
    """
    if template is None:
        return Tags(known=False)
    if "<|channel|>" in template:
        return _CHANNELS
    opening: dict[str, str] = {}
    closing: dict[str, str] = {}
    for tag in _TAG.findall(template):
        (closing if _ENDS.search(tag) else opening).setdefault(_MARKS.sub("", tag).lower(), tag)
    pairs = sorted(opening.keys() & closing.keys())
    if pairs:
        return Tags(tuple(opening[word] for word in pairs), tuple(closing[word] for word in pairs))
    if closing and not opening:  # the reply begins with thoughts
        return Tags((), tuple(closing.values()))
    return Tags(known=not _SWITCH.search(template))
