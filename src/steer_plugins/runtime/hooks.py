"""The places where llama.cpp calls our code, declared in ``cpp_patch/*.hooks`` and found in any tree.

A hook names a file, the blocks it is in (a struct, a function, a case), and an anchor: text that stands there exactly
once. Lines around it may change as they like. A place that is not found, or found twice, is told and nothing is
guessed: the wrong half of a function would compile as well.

    == src/llama-graph.cpp                     a file of the tree
    -- the output of a block                   a hook and what it is for
    in: llm_graph_context::build_cvec(         the head of a block; several go from the outside in
    replace: return «old(cur)»;                or before: or after:, whole lines; several are tried in turn
    | new(cur)                                 the text; it is indented as the anchor's line is
    optional: the tree has no such model       otherwise a file, block or anchor that is missing is a misfit

In heads and anchors a space stands for any white space, line ends too, and … for the rest of a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from ..errors import BuildError

_HOW = ("before", "after", "replace")
# What may hold a brace that opens no block, and the braces and semicolons outside of it.
_TOKEN = re.compile(
    r"""//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|'(?:\\[^'\n]*|[^'\\\n])'|[{};]""",
    re.DOTALL,
)


@dataclass(frozen=True)
class Hook:
    """One place: ``name`` says what it is for, ``within`` are the heads of its blocks, ``anchors`` pairs of how and
    where, ``text`` the lines to put there, ``optional`` why it may be missing ("": it may not)."""

    file: str
    name: str
    within: tuple[str, ...] = ()
    anchors: tuple[tuple[str, str], ...] = ()
    text: tuple[str, ...] = ()
    optional: str = ""


@dataclass(frozen=True)
class Placed:
    """What became of a hook in one tree: the 1-based ``line`` of the original, or 0 and the ``problem``."""

    hook: Hook
    line: int = 0
    problem: str = ""

    @property
    def misfit(self) -> bool:
        """Whether a hook that must be there is missing."""
        return bool(self.problem) and not self.hook.optional

    def __str__(self) -> str:
        where = f"{self.hook.file}:{self.line}" if self.line else self.hook.file
        what = f"{where}: {self.hook.name}"
        if not self.problem:
            return what
        return f"{what}: {self.problem}" + (f" (not needed where {self.hook.optional})" if self.hook.optional else "")


@dataclass
class _Draft:
    name: str
    within: list[str] = field(default_factory=list)
    anchors: list[tuple[str, str]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    optional: str = ""


def parse_hooks(name: str, content: bytes) -> tuple[Hook, ...]:
    """The hooks that a file declares. Raises BuildError naming the line that is not understood."""
    hooks: list[Hook] = []
    file = ""
    draft: _Draft | None = None

    def finish(number: int) -> None:
        if draft is None:
            return
        if not draft.anchors or not draft.text or len({how == "replace" for how, _ in draft.anchors}) > 1:
            raise BuildError(f"{name}: the hook before line {number} ({draft.name}) needs an anchor and a text")
        hooks.append(Hook(file, draft.name, tuple(draft.within), tuple(draft.anchors), tuple(draft.text), draft.optional))

    lines = content.decode("utf-8", "replace").splitlines()
    for number, line in enumerate(lines, 1):
        key, _, value = line.partition(": ")
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("== "):
            finish(number)
            file, draft = line[3:].strip(), None
            check_tree_path(name, file)
        elif line.startswith("-- ") and file:
            finish(number)
            draft = _Draft(line[3:].strip())
        elif draft is not None and (line == "|" or line.startswith("| ")):
            draft.text.append(line[2:])
        elif draft is not None and key == "in" and value.strip():
            draft.within.append(value.strip())
        elif draft is not None and key in _HOW and value.strip():
            draft.anchors.append((key, value.strip()))
        elif draft is not None and key == "optional" and value.strip():
            draft.optional = value.strip()
        else:
            raise BuildError(f"{name}:{number} is not understood ({line.strip()[:60]!r}); reinstall steer-plugins")
    finish(len(lines) + 1)
    if not hooks:
        raise BuildError(f"{name} declares no hook; reinstall steer-plugins")
    return tuple(hooks)


def check_tree_path(name: str, path: str) -> None:
    """Raise BuildError unless ``path`` is a plain relative path that stays inside the tree."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path:
        raise BuildError(f"{name} names {path!r}, which is not a path inside the llama.cpp tree")


def place_hooks(original: bytes | None, hooks: Iterable[Hook]) -> tuple[bytes | None, list[Placed]]:
    """The file with the hooks of it, keeping its own line ends, and what became of each hook. What is missing is left out.

    All anchors are looked for in the original, so hooks do not depend on one another; several at one place keep their order.
    """
    if original is None:
        return None, [Placed(hook, 0, "there is no such file") for hook in hooks]
    windows = original.count(b"\r\n") * 2 > original.count(b"\n")
    text = original.replace(b"\r\n", b"\n").decode("utf-8", "surrogateescape")
    edits: list[tuple[int, int, str]] = []
    placed: list[Placed] = []
    for hook in hooks:
        try:
            anchor, start, end, new = _edit(text, hook)
            if any(start < other_end and other_start < end for other_start, other_end, _ in edits):
                raise _Missing("another hook changes the same text")
        except _Missing as missing:
            placed.append(Placed(hook, 0, str(missing)))
            continue
        edits.append((start, end, new))
        placed.append(Placed(hook, text.count("\n", 0, anchor) + 1))
    done = 0
    parts: list[str] = []
    for start, end, new in sorted(edits, key=lambda edit: edit[:2]):
        parts += [text[done:start], new]
        done = end
    result = "".join([*parts, text[done:]])
    return result.replace("\n", "\r\n" if windows else "\n").encode("utf-8", "surrogateescape"), placed


class _Missing(Exception):
    """A block or an anchor is not there, or more than once."""


def _edit(text: str, hook: Hook) -> tuple[int, int, int, str]:
    """Where a hook's anchor is, and what changes: the text from start to end becomes new."""
    start, end = 0, len(text)
    where = "the file"
    for head in hook.within:
        blocks = _blocks(text, start, end, head)
        if len(blocks) != 1:
            raise _Missing(f"{_times(len(blocks))} {head!r} in {where}")
        (start, end), where = blocks[0], repr(head)
    missing = None
    for how, anchor in hook.anchors:
        found = list(re.finditer(_pattern(anchor), text[start:end]))
        if len(found) != 1:
            missing = missing or _Missing(f"{_times(len(found))} {anchor!r} in {where}")
            continue
        group = "here" if "here" in found[0].groupdict() else 0
        first, last = start + found[0].start(group), start + found[0].end(group)
        line = text.rfind("\n", 0, first) + 1
        indent = re.match(r"[ \t]*", text[line:]).group()  # type: ignore[union-attr]
        lines = [part if part[:1] in ("", "#") else indent + part for part in hook.text]
        if how == "replace":
            return first, first, last, "\n".join(lines)[len(indent) :]
        if how == "before":
            return first, line, line, "".join(part + "\n" for part in lines)
        after = text.find("\n", last)
        after = len(text) if after < 0 else after + 1
        return first, after, after, "".join(part + "\n" for part in lines)
    assert missing is not None
    raise missing


def _blocks(text: str, start: int, end: int, head: str) -> list[tuple[int, int]]:
    """Where a head opens a block inside text[start:end]: from the head to the block's last brace."""
    found = []
    for match in re.finditer(_pattern(head), text[start:end]):
        place = start + match.start()
        depth = 0
        for token in _TOKEN.finditer(text, start + match.end() - (match.group()[-1] == "{"), end):
            if token.group() == ";" and depth == 0:  # a declaration or a call
                break
            depth += {"{": 1, "}": -1}.get(token.group(), 0)
            if token.group() == "}" and depth <= 0:
                if depth == 0:
                    found.append((place, token.end()))
                break
    return found


def _pattern(anchor: str) -> str:
    """The regular expression of an anchor or a head."""
    words: Sequence[str] = anchor.split(" ")
    pattern = r"\s+".join(re.escape(word) for word in words if word)
    return pattern.replace("…", r"[^\n]*").replace("«", "(?P<here>").replace("»", ")")


def _times(count: int) -> str:
    return "there is no" if count == 0 else f"there are {count}"
