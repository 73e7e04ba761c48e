"""Hooks: places that are declared by the text that stands there, inside named blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_plugins.errors import BuildError
from steer_plugins.runtime.hooks import Hook, parse_hooks, place_hooks

TREE = """#include "graph.h"

struct slot {
    void release() {
        if (busy) { // not the end }
            state = "}"; /* nor { this */
            clear('{');
        }
    }

    void clear();
};

int context::decode(
        int n) {
    auto * res = begin();
    ret = OK;
    return n;
}

int context::encode() {
    auto * res = begin();
    ret = OK;
    return decode(1);
}
"""


def place(text: str, *hooks: Hook) -> str:
    result, placed = place_hooks(text.encode(), hooks)
    assert [one.problem for one in placed] == [""] * len(hooks) and result is not None
    return result.decode()


def problem(text: str, hook: Hook) -> str:
    result, (placed,) = place_hooks(text.encode(), [hook])
    assert result == text.encode() and placed.line == 0
    return placed.problem


def test_lines_go_before_and_after_with_the_anchors_indentation() -> None:
    before = Hook("f", "", ("context::encode(",), (("before", "ret = OK;"),), ("if (x) {", "    y();", "}", "", "#undef x"))
    assert place(TREE, before) == TREE.replace(
        "    ret = OK;\n    return decode", "    if (x) {\n        y();\n    }\n\n#undef x\n    ret = OK;\n    return decode"
    )
    after = Hook("f", "", ("context::decode(",), (("after", "auto * res = …"),), ("steer();",))
    assert place(TREE, after) == TREE.replace(
        "res = begin();\n    ret = OK;\n    return n", "res = begin();\n    steer();\n    ret = OK;\n    return n"
    )


def test_a_part_of_an_anchor_is_replaced() -> None:
    hook = Hook("f", "", ("context::decode(",), (("replace", "auto * res = «begin()»;"),), ("steer(begin())",))
    assert place(TREE, hook).count("    auto * res = steer(begin());\n") == 1


def test_a_space_is_any_white_space() -> None:
    text = TREE.replace("auto * res = begin();\n    ret = OK;", "auto  *  res =\n        begin();\n\n\tret = OK;")
    hook = Hook("f", "", ("context::decode( int n) {",), (("after", "auto * res = begin(); ret = OK;"),), ("x();",))
    assert "\tret = OK;\n    x();\n" in place(text, hook)


def test_braces_in_comments_and_texts_end_no_block() -> None:
    hook = Hook("f", "", ("struct slot {", "void release() {"), (("after", "clear('{');"),), ("x();",))
    assert "            clear('{');\n            x();\n        }\n" in place(TREE, hook)
    outside = Hook("f", "", ("struct slot {",), (("after", "ret = OK;"),), ("x();",))
    assert problem(TREE, outside) == "there is no 'ret = OK;' in 'struct slot {'"


def test_an_anchor_that_moved_into_another_function_is_no_anchor() -> None:
    """What context diffs with fuzz do: the hook lands in encode(), compiles, and does nothing where it matters."""
    hook = Hook("f", "", ("context::decode(",), (("before", "ret = OK;"),), ("steer();",))
    mutant = TREE.replace("    ret = OK;\n    return n;", "    return n;")
    assert problem(mutant, hook) == "there is no 'ret = OK;' in 'context::decode('"


def test_what_is_there_twice_is_not_guessed() -> None:
    assert problem(TREE, Hook("f", "", (), (("before", "ret = OK;"),), ("x();",))) == "there are 2 'ret = OK;' in the file"
    twice = TREE + TREE[TREE.index("int context::encode") :]
    hook = Hook("f", "", ("context::encode(",), (("before", "ret = OK;"),), ("x();",))
    assert problem(twice, hook) == "there are 2 'context::encode(' in the file"


def test_declarations_and_calls_are_no_blocks() -> None:
    hook = Hook("f", "", ("void clear()",), (("before", "x"),), ("x();",))
    assert problem(TREE, hook) == "there is no 'void clear()' in the file"
    hook = Hook("f", "", ("decode(",), (("after", "return n;"),), ("x();",))  # encode() calls it
    assert "return n;\n    x();\n" in place(TREE, hook)


def test_the_first_anchor_that_is_found_is_taken() -> None:
    anchors = (("before", "int n_nodes = 0;"), ("after", "ret = OK;"))
    assert "ret = OK;\n    x();\n    return n" in place(TREE, Hook("f", "", ("context::decode(",), anchors, ("x();",)))
    gone = TREE.replace("ret = OK;", "ret = FINE;")
    assert "'int n_nodes = 0;'" in problem(gone, Hook("f", "", ("context::decode(",), anchors, ("x();",)))


def test_hooks_at_one_place_keep_their_order_and_do_not_see_each_other() -> None:
    one = Hook("f", "", ("context::decode(",), (("before", "ret = OK;"),), ("ret = OK;",))
    two = Hook("f", "", ("context::decode(",), (("before", "ret = OK;"),), ("two();",))
    assert "    ret = OK;\n    two();\n    ret = OK;\n    return n;" in place(TREE, one, two)


def test_two_hooks_do_not_change_the_same_text() -> None:
    hooks = [Hook("f", "", ("context::decode(",), (("replace", "ret = OK;"),), (text,)) for text in ("a;", "b;")]
    result, placed = place_hooks(TREE.encode(), hooks)
    assert [one.problem for one in placed] == ["", "another hook changes the same text"]
    assert result is not None and b"    a;\n" in result


def test_an_optional_hook_may_be_missing() -> None:
    hook = Hook("f", "name", (), (("after", "nothing"),), ("x();",), "the tree is old")
    result, (placed,) = place_hooks(TREE.encode(), [hook])
    assert result == TREE.encode() and not placed.misfit
    assert str(placed) == "f: name: there is no 'nothing' in the file (not needed where the tree is old)"
    assert place_hooks(None, [hook])[1][0].problem == "there is no such file"


@given(st.text(alphabet="abc{};\"'/*\\\n\r ()Rx\udc80", max_size=200))
def test_any_file_comes_through(text: str) -> None:
    """Whatever a file holds, a hook that has no place leaves it as it is."""
    original = text.encode("utf-8", "surrogateescape").replace(b"\r", b"")
    hook = Hook("f", "", ("x(",), (("before", "no such anchor"),), ("y",))
    assert place_hooks(original, [hook])[0] == original


def test_line_ends_of_the_tree_are_kept() -> None:
    windows = TREE.replace("\n", "\r\n")
    hook = Hook("f", "", ("context::decode(",), (("before", "ret = OK;"),), ("x();", "y();"))
    assert place(windows, hook) == place(TREE, hook).replace("\n", "\r\n")


FILE = """# a comment
== src/a.cpp

-- one
in: void a() {
in: if (b) {
before: x: y
| text
|
|   more
-- two
optional: reason
replace: «z»
| w
== src/b.cpp
-- three
after: q
| r
"""


def test_the_file_of_hooks() -> None:
    assert parse_hooks("core.hooks", FILE.encode()) == (
        Hook("src/a.cpp", "one", ("void a() {", "if (b) {"), (("before", "x: y"),), ("text", "", "  more")),
        Hook("src/a.cpp", "two", (), (("replace", "«z»"),), ("w",), "reason"),
        Hook("src/b.cpp", "three", (), (("after", "q"),), ("r",)),
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "== a\n-- no anchor\n| x\n",
        "== a\n-- no text\nafter: x\n",
        "== a\n-- both\nafter: x\nreplace: y\n| x\n",
        "-- no file\nafter: x\n| y\n",
        "== a\nafter: no hook\n| y\n",
        "== a\n-- x\nafter:\n| y\n",
        "== a\n-- x\nunder: x\n| y\n",
        "== ../a\n-- x\nafter: x\n| y\n",
        "== /etc/a\n-- x\nafter: x\n| y\n",
        "== C:\\a\n-- x\nafter: x\n| y\n",
    ],
)
def test_what_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(BuildError, match="core.hooks"):
        parse_hooks("core.hooks", text.encode())
