"""A model as a store describes it, regardless of which store it came from."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from steer_plugins.steering.grammar import TermSpec, format_terms

from .gguf import GGUFFacts, facts_of
from .names import Name

STEERING = "steering"


@dataclass(frozen=True)
class Model:
    """``gguf``: its weights; ``terms``: its own steering, combined, or None; ``vectors``: those it carries, by name;
    ``carriers``: whether the steering comes from lines of the stock CLI."""

    name: Name
    gguf: Path
    digest: str
    size: int
    modified: float
    parameters: Mapping[str, Any] = field(default_factory=dict)
    terms: tuple[TermSpec, ...] | None = None
    template: str | None = None
    system: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    licenses: tuple[str, ...] = ()
    adapters: tuple[Path, ...] = ()
    projectors: tuple[Path, ...] = ()
    vectors: Mapping[str, Path] = field(default_factory=dict)
    parent: str = ""
    carriers: bool = False

    @property
    def steering(self) -> str | None:
        """The text of its steering."""
        return None if self.terms is None else format_terms(self.terms)

    @property
    def weights(self) -> tuple[Path, tuple[Path, ...], tuple[Path, ...]]:
        """What has to be loaded: models that agree in it share a process."""
        return self.gguf, self.adapters, self.projectors

    @property
    def facts(self) -> GGUFFacts:
        """Raises ModelError."""
        return facts_of(self.gguf)

    def details(self) -> dict[str, Any]:
        """Ollama's ``details``."""
        facts = self.facts
        return {
            "parent_model": self.parent,
            "format": "gguf",
            "family": facts.architecture,
            "families": [facts.architecture],
            "parameter_size": facts.parameter_size,
            "quantization_level": facts.quantization,
        }

    def capabilities(self) -> list[str]:
        """Ollama's ``capabilities``, from the template that is used and the projector."""
        found = ["completion"]
        text = self.template or ""
        jinja = self.facts.chat_template
        if knows_tools(jinja) or ".Tools" in text:
            found.append("tools")
        if ".Suffix" in text:
            found.append("insert")
        if self.projectors or self.facts.number("vision.block_count"):
            found.append("vision")
        if thinks(jinja) or ".Thinking" in text or ".Think " in text:
            found.append("thinking")
        return found


_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


def thinks(jinja: str) -> bool:
    """Whether a chat template knows of thinking."""
    marks = r"<think>|enable_thinking|reasoning_content|<\|channel\|>|\{%-?\s*(?:el)?if (?:not )?thinking\b"
    return re.search(marks, _COMMENT.sub("", jinja)) is not None


def knows_tools(jinja: str) -> bool:
    """Whether a chat template tells the model of tools."""
    return re.search(r"\btools\b", _COMMENT.sub("", jinja)) is not None


class Store(Protocol):
    """Where models are looked up. Methods read the disk and raise SteerError."""

    def get(self, name: str) -> Model:
        """Raises NotFound, BadRequest for a bad name, ModelError for a model that cannot be read."""

    def names(self) -> list[Name]:
        """All models."""

    def blob(self, digest: str) -> Path | None:
        """A blob's file, ``digest`` being ``sha256:<hex>``."""


def rfc3339(seconds: float) -> str:
    """A time as Ollama writes it, UTC."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
