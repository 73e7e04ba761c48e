"""When a term acts is the native planner's to say: the engines hand scopes and schedules over, and never look at them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import steer_plugins.engine

FILES = sorted(Path(steer_plugins.engine.__file__).parent.glob("*.py"))
WORDS = {"scope", "effective_scope", "default_scope", "over", "floor"}


def arithmetic(tree: ast.AST) -> Iterator[ast.expr]:
    """Expressions that compare or compute with a scope or a schedule; whether there is one may be asked."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            continue
        if isinstance(node, ast.Compare | ast.BinOp):
            names = {n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "") for n in ast.walk(node)}
            if names & WORDS:
                yield node


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_no_scope_or_schedule_arithmetic(path: Path) -> None:
    found = [f"{path.name}:{node.lineno}: {ast.unparse(node)}" for node in arithmetic(ast.parse(path.read_text("utf-8")))]
    assert not found, found


def test_the_test_can_fail() -> None:
    bad = ["scope == 'response' and p >= n", "n / schedule.over", "term.effective_scope in ('all', 'prompt')", "1 - t.floor"]
    assert all(list(arithmetic(ast.parse(text))) for text in bad)
    assert not list(arithmetic(ast.parse("schedule.over if schedule is not None else 0")))
