"""The part of Go's text/template that Ollama's TEMPLATE uses, for chat prompts.

Fields (``.System``, ``.Messages`` ...), variables, ``if``/``else``, ``range`` (with ``break`` and ``continue``), ``with``, pipes,
parentheses, trim markers, comments, and the functions below. ``define``, ``template``, ``block`` and method calls are
not understood: a :class:`TemplateError` names their line. Written for this purpose, since no maintained library fits: those that
wrap Go need its compiler, and the one in Python needs a newer Python than this package.
"""

from __future__ import annotations

from .nodes import TemplateError
from .template import MAX_TEMPLATE, Template

__all__ = ["MAX_TEMPLATE", "Template", "TemplateError"]
