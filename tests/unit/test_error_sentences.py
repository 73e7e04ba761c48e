"""Every error sentence speaks one dialect: lower case first, no full stop, plain words. They are collected from the sources."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from steer_plugins.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")])

NAMES = ("Ollama", "Transformers")
"""Words that keep their capital wherever they stand."""

BANNED = {
    r"(?<!there )(?<!There )\b(is|are|was) no (?!longer\b|more\b)": "write 'is not a'",
    r"\bset-up\b": "write 'setup' or 'environment'",
    r"\bhas no meaning\b": "write that it cannot be combined",
    r"[.!?] [A-Z]": "write one sentence",
    r"\?$": "say what to do instead of asking",
}


def error_classes(trees: list[ast.Module]) -> set[str]:
    """Names of SteerError, of all that derive from it, and of click's."""
    bases = {
        node.name: {getattr(base, "id", "") for base in node.bases}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"SteerError", "UsageError", "BadParameter", "ClickException"}
    while more := {name for name, of in bases.items() if of & found} - found:
        found |= more
    return found


def sentences(node: ast.expr) -> Iterator[str]:
    """The texts that an expression may be, with … for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from (a + b for a in list(sentences(node.left)) or ["…"] for b in list(sentences(node.right)) or ["…"])
    elif isinstance(node, ast.IfExp):
        yield from sentences(node.body)
        yield from sentences(node.orelse)


def collected() -> list[tuple[str, str]]:
    trees = {path: ast.parse(path.read_text("utf-8")) for path in SOURCES}
    known, found = error_classes(list(trees.values())), []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in known or name in ("refuse", "_refuse"):
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                found.extend((where, text) for argument in node.args for text in sentences(argument))
    return found


def wrong(sentence: str) -> str:
    """What is wrong with an error sentence, or ""."""
    first = re.match(r"[A-Z][a-z]+|[AI] ", sentence)
    if first and first[0] not in NAMES:
        return "begins with a capital"
    if re.search(r"\.$|\w!$", sentence) and not sentence.endswith("..."):
        return "ends with a full stop"
    return next((f"{match[0]!r}: {why}" for what, why in BANNED.items() if (match := re.search(what, sentence))), "")


def test_error_sentences() -> None:
    found = collected()
    assert len(found) > 700
    assert not [f"{where}: {text!r} {wrong(text)}" for where, text in found if wrong(text)]


@pytest.mark.parametrize(
    "sentence",
    [
        "The file is missing",
        "a file is missing.",
        "'x' is no number",
        "it failed. Try again",
        "is it a server?",
        "A text is missing",
    ],
)
def test_the_check_sees_the_other_dialects(sentence: str) -> None:
    assert wrong(sentence)


@pytest.mark.parametrize("sentence", ["there is no file x", "Ollama does not answer", "--out x is not a folder", "API keys"])
def test_the_check_lets_names_and_flags_begin(sentence: str) -> None:
    assert not wrong(sentence)


@pytest.mark.parametrize("arguments", [["generate", "--nope"], ["generate"], ["nope"], ["generate", "--max-tokens", "x", "hi"]])
def test_wrong_usage_speaks_the_same_dialect(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    usage, hint, empty, sentence = capsys.readouterr().err.splitlines()
    assert usage.startswith("Usage: steer ") and hint.endswith(" -h' for help.") and not empty
    assert sentence.startswith("steer: ") and not wrong(sentence.removeprefix("steer: "))
