"""Model names as Ollama writes them: ``[host/][namespace/]model[:tag]``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import BadName

HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"

# The limits of Ollama itself; none of them admits a path separator, "..", or an empty part.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")


@dataclass(frozen=True)
class Name:
    """A whole name. ``str()`` is the short form that users see, with the tag and without the defaults."""

    host: str
    namespace: str
    model: str
    tag: str

    def __str__(self) -> str:
        short = f"{self.model}:{self.tag}"
        if self.host != HOST:
            return f"{self.host}/{self.namespace}/{short}"
        return short if self.namespace == NAMESPACE else f"{self.namespace}/{short}"

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """Folders and file of its manifest."""
        return self.host, self.namespace, self.model, self.tag


def parse_name(text: object) -> Name:
    """The name that a text means, with the defaults filled in.

    Raises:
        BadName: it is not a model name.
    """
    if not isinstance(text, str) or not text:
        raise BadName("model is required")
    rest = text.removeprefix("https://").removeprefix("http://")
    head, slash, last = rest.rpartition("/")
    if slash and not head:
        raise BadName(f"invalid model name: {text[:200]!r}")
    model, colon, tag = last.partition(":")
    host, _, namespace = head.rpartition("/") if head else ("", "", "")
    name = Name(host or HOST, namespace or NAMESPACE, model, tag if colon else TAG)
    fits = (
        _HOST.fullmatch(name.host)
        and _NAMESPACE.fullmatch(name.namespace)
        and _PART.fullmatch(name.model)
        and _PART.fullmatch(name.tag)
    )
    if not fits:
        raise BadName(f"invalid model name: {text[:200]!r}")
    return name
