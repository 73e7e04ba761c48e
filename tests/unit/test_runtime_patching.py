"""The patch: parsing, fitting, putting it on a tree and taking it off again."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_plugins.errors import BuildError
from steer_plugins.runtime import patching
from steer_plugins.runtime.patching import DoesNotFit, PatchedTree, apply_hunks, load_patch_set, parse_diff, patch_sets

ORIGINAL = "".join(f"line {index}\n" for index in range(40))


def diff_of(path: str, old: str, new: str, context: int = 3) -> bytes:
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{path}", f"b/{path}", n=context)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines).encode()


def edited(text: str, line: int, word: str) -> str:
    return text.replace(f"line {line}\n", f"line {line}\n{word}\n")


def patch_folder(folder: Path, diff: bytes, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "core.patch").write_bytes(diff)
    for name, text in files.items():
        (folder / name.replace("__", "-").replace("_dot_", ".")).write_text(text)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> PatchedTree:
    root = tmp_path / "work" / "src"
    (root / "src").mkdir(parents=True)
    (root / "src" / "graph.cpp").write_text(ORIGINAL)
    (root / "src" / "other.cpp").write_text("untouched\n")
    return PatchedTree(root, tmp_path / "work" / "pristine")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    diff = diff_of("src/graph.cpp", ORIGINAL, edited(ORIGINAL, 20, "ours"))
    return patch_folder(tmp_path / "cpp_patch", diff, llama__steer_dot_cpp="int x;\n", llama__steer_dot_h="int y;\n")


def test_diff_at_its_own_place() -> None:
    ((path, hunks),) = parse_diff("core.patch", diff_of("src/a.cpp", ORIGINAL, edited(ORIGINAL, 7, "new")))
    assert path == "src/a.cpp"
    assert apply_hunks(path, ORIGINAL.encode(), hunks).decode() == edited(ORIGINAL, 7, "new")


def test_diff_finds_moved_lines() -> None:
    ((path, hunks),) = parse_diff("core.patch", diff_of("a", ORIGINAL, edited(edited(ORIGINAL, 7, "one"), 30, "two")))
    moved = "inserted\n" * 11 + ORIGINAL.replace("line 20\n", "line 20\nfar\nfarther\n")
    expected = edited(edited(moved, 7, "one"), 30, "two")
    assert apply_hunks(path, moved.encode(), hunks).decode() == expected
    shorter = ORIGINAL.replace("line 0\nline 1\n", "")
    assert apply_hunks(path, shorter.encode(), hunks).decode() == edited(edited(shorter, 7, "one"), 30, "two")


def test_the_nearest_of_equal_places_is_taken() -> None:
    block = "a\nb\nc\n"
    original = block + "-\n" * 10 + block + "-\n" * 10 + block
    changed = block + "-\n" * 10 + "a\nNEW\nb\nc\n" + "-\n" * 10 + block
    ((_, hunks),) = parse_diff("core.patch", diff_of("f", original, changed, context=1))
    assert apply_hunks("f", ("+\n" + original).encode(), hunks).decode() == "+\n" + changed


def test_no_fuzz() -> None:
    ((_, hunks),) = parse_diff("core.patch", diff_of("f", ORIGINAL, edited(ORIGINAL, 7, "new")))
    with pytest.raises(DoesNotFit) as caught:
        apply_hunks("f", ORIGINAL.replace("line 5\n", "line 5 \n").encode(), hunks)
    assert (caught.value.file, caught.value.line) == ("f", 6)


def test_line_ends_of_the_tree_are_kept() -> None:
    ((_, hunks),) = parse_diff("core.patch", diff_of("f", ORIGINAL, edited(ORIGINAL, 7, "new")))
    windows = ORIGINAL.replace("\n", "\r\n").encode()
    assert apply_hunks("f", windows, hunks) == edited(ORIGINAL, 7, "new").replace("\n", "\r\n").encode()


@given(st.lists(st.sampled_from("abcde"), max_size=30), st.lists(st.sampled_from("abcde"), max_size=30), st.integers(1, 3))
def test_any_diff_leads_from_old_to_new(old: list[str], new: list[str], context: int) -> None:
    before, after = ("".join(f"{word}\n" for word in words) for words in (["top", *old], ["top", *new]))
    diff = diff_of("f", before, after, context)
    if diff:
        ((_, hunks),) = parse_diff("core.patch", diff)
        assert apply_hunks("f", before.encode(), hunks).decode() == after


@pytest.mark.parametrize(
    "diff",
    [
        b"",
        b"this is no diff\n",
        b"--- a/f\n+++ b/f\n@@ -1,3 +1,4 @@\n a\n+b\n",
        b"--- a/../../f\n+++ b/../../f\n@@ -1 +1 @@\n-a\n+b\n",
        b"--- a/f\n+++ /etc/f\n@@ -1 +1 @@\n-a\n+b\n",
        b"--- a/C:\\f\n+++ b/C:\\f\n@@ -1 +1 @@\n-a\n+b\n",
        b"--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+b\n",
        b"--- a/f\n+++ b/f\n@@ -1,0 +2 @@\n+nothing says where\n",
    ],
)
def test_unusable_diffs_are_refused(diff: bytes) -> None:
    with pytest.raises(BuildError, match="core.patch"):
        parse_diff("core.patch", diff)


def test_patch_goes_on_and_off(tree: PatchedTree, folder: Path) -> None:
    before = {path: path.read_bytes() for path in tree.root.rglob("*") if path.is_file()}
    patch = load_patch_set("default", folder)
    assert sorted(tree.put(patch.plan(tree.original, False))) == ["src/graph.cpp", "src/llama-steer.cpp", "src/llama-steer.h"]
    assert (tree.root / "src/graph.cpp").read_text() == edited(ORIGINAL, 20, "ours")
    assert (tree.root / "src/llama-steer.cpp").read_text() == "int x;\n"
    tree.put({})
    assert {path: path.read_bytes() for path in tree.root.rglob("*") if path.is_file()} == before


def test_only_what_changed_is_written(tree: PatchedTree, folder: Path) -> None:
    tree.put(load_patch_set("default", folder).plan(tree.original, False))
    assert tree.put(load_patch_set("default", folder).plan(tree.original, False)) == []
    (folder / "llama-steer.cpp").write_text("int other;\n")
    assert tree.put(load_patch_set("default", folder).plan(tree.original, False)) == ["src/llama-steer.cpp"]
    (folder / "llama-steer.h").unlink()
    (folder / "core.patch").write_bytes(diff_of("src/other.cpp", "untouched\n", "touched\n"))
    written = tree.put(load_patch_set("default", folder).plan(tree.original, False))
    assert sorted(written) == ["src/graph.cpp", "src/llama-steer.h", "src/other.cpp"]
    assert (tree.root / "src/graph.cpp").read_text() == ORIGINAL
    assert not (tree.root / "src/llama-steer.h").exists()


def test_a_crash_while_patching_is_survived(tree: PatchedTree, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = load_patch_set("default", folder).plan(tree.original, False)
    calls = []

    def dying(path: Path, data: bytes) -> bool:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        path.write_bytes(data)
        return True

    monkeypatch.setattr(patching, "write_if_changed", dying)
    with pytest.raises(KeyboardInterrupt):
        tree.put(plan)
    monkeypatch.undo()
    again = PatchedTree(tree.root, tree.pristine)
    assert load_patch_set("default", folder).plan(again.original, False) == plan
    again.put({})
    assert sorted(path.name for path in (tree.root / "src").iterdir()) == ["graph.cpp", "other.cpp"]
    assert (tree.root / "src/graph.cpp").read_text() == ORIGINAL


def test_nothing_is_planned_when_one_file_does_not_fit(tree: PatchedTree, folder: Path) -> None:
    (tree.root / "src/graph.cpp").write_text(ORIGINAL.replace("line 20", "line twenty"))
    with pytest.raises(DoesNotFit, match=r"src/graph\.cpp:19: "):
        tree.choose([load_patch_set("default", folder)], False)
    assert not (tree.root / "src/llama-steer.cpp").exists()


def test_every_file_that_does_not_fit_is_listed(tree: PatchedTree, folder: Path) -> None:
    more = diff_of("src/other.cpp", "touched\n", "untouched\n") + diff_of("src/none.cpp", "a\n", "b\n")
    (folder / "core.patch").write_bytes((folder / "core.patch").read_bytes() + more)
    with pytest.raises(DoesNotFit) as caught:
        load_patch_set("default", folder).plan(tree.original, False)
    assert caught.value.places == [
        "src/other.cpp:1: the lines around it are different here",
        "src/none.cpp: there is no such file",
    ]
    assert str(caught.value).endswith("here (and in 1 more)")


def test_a_file_of_our_name_is_not_overwritten(tree: PatchedTree, folder: Path) -> None:
    (tree.root / "src/llama-steer.h").write_text("theirs")
    with pytest.raises(DoesNotFit, match="already has"):
        load_patch_set("default", folder).plan(tree.original, False)


def test_a_missing_file_is_named(tree: PatchedTree, folder: Path) -> None:
    (tree.root / "src/graph.cpp").unlink()
    with pytest.raises(DoesNotFit, match=r"src/graph\.cpp: there is no such file"):
        load_patch_set("default", folder).plan(tree.original, False)


def test_versions_override_and_the_first_that_fits_is_chosen(tree: PatchedTree, folder: Path) -> None:
    moved = ORIGINAL.replace("line 20", "line twenty")
    patch_folder(folder / "versions" / "0.9", diff_of("src/graph.cpp", moved, moved + "end\n"))
    (tree.root / "src/graph.cpp").write_text(moved)
    candidates = patch_sets("0.3.36", folder)
    assert [patch.name for patch in candidates] == ["default", "0.9"]
    assert [patch.name for patch in patch_sets("0.9", folder)] == ["0.9", "default"]
    chosen, plan = tree.choose(candidates, False)
    assert chosen.name == "0.9"
    assert plan["src/graph.cpp"].decode() == moved + "end\n"
    assert plan["src/llama-steer.cpp"] == b"int x;\n"
    assert chosen.core_hash != candidates[0].core_hash


def test_the_hash_names_the_content(folder: Path, tmp_path: Path) -> None:
    first = load_patch_set("default", folder)
    (folder / "README.md").write_text("not part of it")
    (folder / "llama-steer.cpp").write_bytes(b"int x;\r\n")  # a checkout on Windows
    os.utime(folder / "llama-steer.cpp", (1, 1))
    assert load_patch_set("default", folder).core_hash == first.core_hash
    (folder / "llama-steer.cpp").write_text("int z;\n")
    assert load_patch_set("default", folder).core_hash != first.core_hash


def test_the_server_part_is_separate(tree: PatchedTree, folder: Path) -> None:
    before = load_patch_set("default", folder)
    assert before.server_hash == ""
    (tree.root / "tools/server").mkdir(parents=True)
    (tree.root / "tools/server/server.cpp").write_text("one\n")
    (folder / "server-steer.cpp").write_text("int s;\n")
    (folder / "server.patch").write_bytes(diff_of("tools/server/server.cpp", "one\n", "one\ntwo\n"))
    patch = load_patch_set("default", folder)
    assert patch.core_hash == before.core_hash and patch.server_hash
    assert "tools/server/server.cpp" not in patch.plan(tree.original, False)
    plan = patch.plan(tree.original, True)
    assert plan["tools/server/server.cpp"] == b"one\ntwo\n" and plan["tools/server/server-steer.cpp"] == b"int s;\n"


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "nowhere"])
def test_names_of_versions_are_checked(folder: Path, name: str) -> None:
    with pytest.raises(BuildError):
        load_patch_set(name, folder)


def test_a_wrong_patch_dir_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_PATCH_DIR", str(tmp_path))
    with pytest.raises(BuildError, match="STEER_PATCH_DIR"):
        patching.patch_dir()


def test_the_projects_own_patch_is_well_formed() -> None:
    patch = load_patch_set("default", patching.patch_dir())
    assert {"src/llama-steer.h", "src/llama-steer.cpp"} <= set(patch.files(False))
    assert "src/CMakeLists.txt" in patch.changes(False)
