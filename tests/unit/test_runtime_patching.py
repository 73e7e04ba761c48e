"""The patch: our files and hooks, put on a tree and taken off again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from steer_plugins.errors import BuildError
from steer_plugins.runtime import patching
from steer_plugins.runtime.patching import DoesNotFit, PatchedTree, load_patch

ORIGINAL = "".join(f"line {index};\n" for index in range(40))
PATCHED = ORIGINAL.replace("line 20;\n", "line 20;\nours\n")


def hook(file: str, anchor: str, text: str) -> str:
    return f"== {file}\n-- {text}\nafter: {anchor}\n| {text}\n"


@pytest.fixture
def tree(tmp_path: Path) -> PatchedTree:
    root = tmp_path / "work" / "src"
    (root / "src").mkdir(parents=True)
    (root / "src" / "graph.cpp").write_text(ORIGINAL)
    (root / "src" / "other.cpp").write_text("untouched\n")
    return PatchedTree(root, tmp_path / "work" / "pristine")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cpp_patch"
    folder.mkdir()
    (folder / "core.hooks").write_text(hook("src/graph.cpp", "line 20;", "ours"))
    (folder / "llama-steer.cpp").write_text("int x;\n")
    (folder / "llama-steer.h").write_text("int y;\n")
    return folder


def test_patch_goes_on_and_off(tree: PatchedTree, folder: Path) -> None:
    before = {path: path.read_bytes() for path in tree.root.rglob("*") if path.is_file()}
    patch = load_patch(folder)
    assert sorted(tree.put(patch.plan(tree.original, False))) == ["src/graph.cpp", "src/llama-steer.cpp", "src/llama-steer.h"]
    assert (tree.root / "src/graph.cpp").read_text() == PATCHED
    assert (tree.root / "src/llama-steer.cpp").read_text() == "int x;\n"
    tree.put({})
    assert {path: path.read_bytes() for path in tree.root.rglob("*") if path.is_file()} == before


def test_only_what_changed_is_written(tree: PatchedTree, folder: Path) -> None:
    tree.put(load_patch(folder).plan(tree.original, False))
    assert tree.put(load_patch(folder).plan(tree.original, False)) == []
    (folder / "llama-steer.cpp").write_text("int other;\n")
    assert tree.put(load_patch(folder).plan(tree.original, False)) == ["src/llama-steer.cpp"]
    (folder / "llama-steer.h").unlink()
    (folder / "core.hooks").write_text(hook("src/other.cpp", "untouched", "touched"))
    written = tree.put(load_patch(folder).plan(tree.original, False))
    assert sorted(written) == ["src/graph.cpp", "src/llama-steer.h", "src/other.cpp"]
    assert (tree.root / "src/graph.cpp").read_text() == ORIGINAL
    assert not (tree.root / "src/llama-steer.h").exists()


def test_a_crash_while_patching_is_survived(tree: PatchedTree, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = load_patch(folder).plan(tree.original, False)
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
    assert load_patch(folder).plan(again.original, False) == plan
    again.put({})
    assert sorted(path.name for path in (tree.root / "src").iterdir()) == ["graph.cpp", "other.cpp"]
    assert (tree.root / "src/graph.cpp").read_text() == ORIGINAL


def test_every_hook_without_a_place_is_listed(tree: PatchedTree, folder: Path) -> None:
    with (folder / "core.hooks").open("a") as file:
        file.write(hook("src/other.cpp", "touched", "one") + hook("src/none.cpp", "x", "two"))
    (tree.root / "src/other.cpp").write_text("touched\ntouched\n")
    placement = load_patch(folder).place(tree.original, False)
    assert [str(placed) for placed in placement.hooks] == [
        "src/graph.cpp:21: ours",
        "src/other.cpp: one: there are 2 'touched' in the file",
        "src/none.cpp: two: there is no such file",
    ]
    assert placement.misfits == [str(placed) for placed in placement.hooks[1:]]
    with pytest.raises(DoesNotFit, match=r"^src/other\.cpp: one: .* \(and 1 more, see `steer build --check`\)$"):
        load_patch(folder).plan(tree.original, False)


def test_a_file_of_our_name_is_not_overwritten(tree: PatchedTree, folder: Path) -> None:
    (tree.root / "src/llama-steer.h").write_text("theirs")
    with pytest.raises(DoesNotFit, match="already has"):
        load_patch(folder).plan(tree.original, False)


def test_the_hash_names_the_content(folder: Path, tmp_path: Path) -> None:
    first = load_patch(folder)
    (folder / "README.md").write_text("not part of it")
    (folder / "llama-steer.cpp").write_bytes(b"int x;\r\n")  # a checkout on Windows
    os.utime(folder / "llama-steer.cpp", (1, 1))
    assert load_patch(folder).core_hash == first.core_hash
    (folder / "llama-steer.cpp").write_text("int z;\n")
    assert load_patch(folder).core_hash != first.core_hash


def test_the_server_part_is_separate(tree: PatchedTree, folder: Path) -> None:
    before = load_patch(folder)
    assert before.server_hash == ""
    (tree.root / "tools/server").mkdir(parents=True)
    (tree.root / "tools/server/server.cpp").write_text("one\n")
    (folder / "server-steer.cpp").write_text("int s;\n")
    (folder / "server.hooks").write_text(hook("tools/server/server.cpp", "one", "two"))
    patch = load_patch(folder)
    assert patch.core_hash == before.core_hash and patch.server_hash
    assert "tools/server/server.cpp" not in patch.plan(tree.original, False)
    plan = patch.plan(tree.original, True)
    assert plan["tools/server/server.cpp"] == b"one\ntwo\n" and plan["tools/server/server-steer.cpp"] == b"int s;\n"


def test_a_wrong_patch_dir_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_PATCH_DIR", str(tmp_path))
    with pytest.raises(BuildError, match="STEER_PATCH_DIR"):
        patching.patch_dir()


def test_the_projects_own_patch_is_well_formed() -> None:
    patch = load_patch(patching.patch_dir())
    assert {"src/llama-steer.h", "src/llama-steer.cpp"} <= set(patch.files(False))
    assert "src/CMakeLists.txt" in {hook.file for hook in patch.hooks}


def test_every_file_of_ours_is_compiled() -> None:
    """A new file that no hook names would be left out of the library, or of the server."""
    patch = load_patch(patching.patch_dir())
    for hooks, files in ((patch.hooks, patch.added), (patch.server_hooks, patch.server_added)):
        listed = {line.strip() for hook in hooks if hook.file.endswith("CMakeLists.txt") for line in hook.text}
        assert {Path(path).name for path, _ in files if path.endswith(".cpp")} <= listed
