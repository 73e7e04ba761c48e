"""Trait files: what is accepted, what is refused and how, and the two that come with the package."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steer_plugins.errors import DataError
from steer_plugins.metrics import builtin_metrics
from steer_plugins.training import traits
from steer_plugins.training.traits import MAX_FILE_BYTES, TRAIT_FORMAT, Trait, bundled_recipes, bundled_traits, load_trait


def example() -> dict[str, Any]:
    return {
        "format": TRAIT_FORMAT,
        "name": "formality",
        "poles": {"positive": "formal", "negative": "casual"},
        "description": "How formal it sounds.",
        "system": {"positive": ["Be formal.", "Write like a lawyer."], "negative": ["Be casual.", "Write like a pal."]},
        "train_prompts": ["Say hello.", "Ask for a pen."],
        "heldout_prompts": ["Say goodbye."],
        "metric": "formality",
    }


def write(folder: Path, data: object) -> Path:
    path = folder / "trait.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def refusal(path: str | Path) -> str:
    """The one sentence with which a trait is refused."""
    with pytest.raises(DataError) as caught:
        load_trait(path)
    message = str(caught.value)
    assert "\n" not in message and not message.endswith("."), message
    assert len(message) < 400, message
    return message


# files ------------------------------------------------------------------------------------------------------


def test_a_trait_file_is_read(tmp_path: Path) -> None:
    trait = load_trait(write(tmp_path, example()))
    assert trait.name == "formality"
    assert trait.poles == {"positive": "formal", "negative": "casual"}
    assert trait.description == "How formal it sounds."
    assert trait.metric == "formality"
    assert trait.train_prompts == ("Say hello.", "Ask for a pen.")
    assert trait.heldout_prompts == ("Say goodbye.",)
    assert trait.system_pairs == [("Be formal.", "Be casual."), ("Write like a lawyer.", "Write like a pal.")]
    assert load_trait(str(tmp_path / "trait.json")) == trait


def test_one_system_prompt_may_be_a_plain_string(tmp_path: Path) -> None:
    data = {**example(), "system": {"positive": "Be formal.", "negative": "Be casual."}}
    assert load_trait(write(tmp_path, data)).system == {"positive": ("Be formal.",), "negative": ("Be casual.",)}


def test_metric_and_description_may_be_left_out(tmp_path: Path) -> None:
    data = example()
    del data["metric"], data["description"]
    trait = load_trait(write(tmp_path, data))
    assert trait.metric is None and trait.description == ""
    assert load_trait(write(tmp_path, {**data, "metric": None})) == trait


def test_to_dict_is_the_file_again(tmp_path: Path) -> None:
    assert load_trait(write(tmp_path, example())).to_dict() == example()
    for name in bundled_traits():
        trait = load_trait(name)
        assert load_trait(write(tmp_path, trait.to_dict())) == trait
    bare = {key: value for key, value in example().items() if key != "metric"}
    assert Trait.from_dict(bare).to_dict() == bare
    trait = load_trait("mood")
    copied = trait.to_dict()
    copied["poles"]["positive"] = copied["train_prompts"][0] = copied["system"]["positive"][0] = "changed"
    assert trait == load_trait("mood")


def test_a_byte_order_mark_and_non_ascii_text_are_read(tmp_path: Path) -> None:
    data = {**example(), "train_prompts": ["Sag \u201eHallo\u201c. \U0001f600", "\u4f60\u597d"]}
    path = tmp_path / "trait.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(data, ensure_ascii=False).encode())
    assert load_trait(path).train_prompts == ("Sag \u201eHallo\u201c. \U0001f600", "\u4f60\u597d")


def test_a_bundled_name_wins_over_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mood").write_text(json.dumps(example()), encoding="utf-8")
    assert load_trait("mood").name == "mood"
    assert load_trait("./mood").name == "formality"
    assert load_trait(Path("mood")).name == "formality"


# refusals ---------------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_bundled_ones() -> None:
    message = refusal("no-such-trait")
    assert '"no-such-trait"' in message and "mood, succinctness" in message


def test_names_do_not_reach_out_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ["../trait", "data/mood", "mood.json", "", "MOOD.json"]:
        refusal(name)


def test_a_folder_and_a_path_with_a_nul_are_refused(tmp_path: Path) -> None:
    assert "not a file" in refusal(tmp_path)
    refusal("mood\0.json")
    refusal("x" * 5000)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, example())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read (Permission denied)" in refusal(path)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON (line 1, column 1)"),
        (b"{", "not JSON"),
        (b"name: mood", "not JSON"),
        (b'{"format": "steer-plugins-trait-v1",}', "not JSON"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b'{"name": "\xe9"}', "not UTF-8"),
        (b"[" * 200_000, "not a trait"),
        (b"1" * 5000, "not a trait"),
        (b'{"name": "a", "name": "b"}', '"name" twice'),
        (b'{"poles": {"positive": "a", "positive": "b"}}', '"positive" twice'),
        (b"[]", "a list"),
        (b"null", "null"),
        (b'"mood"', "a string"),
        (b"3", "a number"),
        (b"NaN", "a number"),
        (b" " * (MAX_FILE_BYTES + 1), "larger than 5 MB"),
    ],
)  # fmt: skip
def test_files_that_are_no_trait(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(raw)
    message = refusal(path)
    assert words in message and "broken.json" in message


@pytest.mark.parametrize("key", ["format", "name", "poles", "system", "train_prompts", "heldout_prompts"])
def test_missing_keys_are_named(tmp_path: Path, key: str) -> None:
    data = example()
    del data[key]
    assert f'lacks the key "{key}"' in refusal(write(tmp_path, data))


CHANGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda data: data.update(format="steer-plugins-trait-v2"), "trait-v2"),
    (lambda data: data.update(format=1), '"1"'),
    (lambda data: data.update(promts=[]), '"promts"'),
    (lambda data: data["poles"].update(neutral="so-so"), '"poles.neutral"'),
    (lambda data: data["poles"].pop("negative"), '"poles.negative"'),
    (lambda data: data["poles"].update(positive="casual"), '"casual"'),
    (lambda data: data["poles"].update(positive=["formal"]), '"poles.positive" is a list'),
    (lambda data: data["poles"].update(positive=" "), '"poles.positive" is blank'),
    (lambda data: data.update(poles=["formal", "casual"]), '"poles" is a list'),
    (lambda data: data.update(poles=None), '"poles" is null'),
    (lambda data: data["system"].update(neutral=["x"]), '"system.neutral"'),
    (lambda data: data["system"].pop("positive"), '"system.positive"'),
    (lambda data: data["system"].update(positive=["one"]), "1 prompts and system.negative 2"),
    (lambda data: data["system"].update(positive=[]), '"system.positive" is empty'),
    (lambda data: data["system"].update(positive=7), '"system.positive" is a number'),
    (lambda data: data["system"].update(positive=["a", "A "]), "twice"),
    (lambda data: data["system"].update(positive=["x", "be  CASUAL."]), "they need to differ"),
    (lambda data: data.update(system="Be formal."), '"system" is a string'),
    (lambda data: data.update(train_prompts=[]), '"train_prompts" is empty'),
    (lambda data: data.update(heldout_prompts=[]), '"heldout_prompts" is empty'),
    (lambda data: data.update(train_prompts="Say hello."), '"train_prompts" is a string'),
    (lambda data: data.update(train_prompts={"a": "b"}), '"train_prompts" is an object'),
    (lambda data: data.update(train_prompts=["x", 3]), '"train_prompts[1]" is a number'),
    (lambda data: data.update(train_prompts=["x", None]), '"train_prompts[1]" is null'),
    (lambda data: data.update(train_prompts=["x", True]), '"train_prompts[1]" is a truth value'),
    (lambda data: data.update(train_prompts=["x", "\t"]), '"train_prompts[1]" is blank'),
    (lambda data: data.update(train_prompts=["x", "a\0b"]), '"train_prompts[1]" holds a NUL'),
    (lambda data: data.update(train_prompts=["x", "\ud83d"]), '"train_prompts[1]" holds a NUL or half'),
    (lambda data: data.update(train_prompts=["Go on.", "go  on. "]), "twice"),
    (lambda data: data.update(heldout_prompts=["Go on.", "Go on."]), '"heldout_prompts" holds "Go on." twice'),
    (lambda data: data.update(heldout_prompts=["say HELLO."]), "both a training and a held-out prompt"),
    (lambda data: data.update(metric=""), '"metric" is blank'),
    (lambda data: data.update(metric=["mood"]), '"metric" is a list'),
    (lambda data: data.update(description=5), '"description" is a number'),
    (lambda data: data.update(name=5), '"name" is a number'),
    (lambda data: data.update(name=""), '"name" is blank'),
    (lambda data: data.update(name="../mood"), '"../mood"'),
    (lambda data: data.update(name="a/b"), '"a/b"'),
    (lambda data: data.update(name=".hidden"), '".hidden"'),
    (lambda data: data.update(name="dot."), '"dot."'),
    (lambda data: data.update(name="line\nbreak"), '"line break"'),
    (lambda data: data.update(name="mood\n"), '"mood"'),
    (lambda data: data.update(name="x" * 65), "up to 64"),
    (lambda data: data.update(train_prompts=["y" * 5000, "y" * 5000]), "..."),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_wrong_fields_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    data = example()
    change(data)
    message = refusal(write(tmp_path, data))
    assert words in message, message
    assert "trait.json" in message


# the bundled traits -----------------------------------------------------------------------------------------


def test_the_bundled_traits_are_these() -> None:
    assert bundled_traits() == ["caution", "creativity", "debugging", "formality", "mood", "succinctness"]
    assert traits.__all__ == sorted(traits.__all__)


@pytest.mark.parametrize("name", ["caution", "creativity", "debugging", "formality", "mood", "succinctness"])
def test_bundled_trait_data(name: str) -> None:
    trait = load_trait(name)
    assert trait.name == name == trait.metric
    assert trait.description
    metric = builtin_metrics()[name]
    assert (metric.positive, metric.negative) == (trait.poles["positive"], trait.poles["negative"])
    assert 3 <= len(trait.system_pairs) <= 5
    prompts = [*trait.train_prompts, *trait.heldout_prompts]
    assert len(trait.train_prompts) >= 40 and len(trait.heldout_prompts) >= 20
    for prompt in prompts:
        assert 3 <= len(prompt.split()) <= 16, prompt
        assert prompt == prompt.strip() and prompt[0].isupper() and prompt[-1] in ".?", prompt
        assert len(re.findall(r"[.?!]", prompt)) == 1, prompt
        # A prompt that names a pole would measure obedience to the prompt.
        assert not re.search(r"cheer|sombre|\bhapp[iy]|\bsad|gloom|joy|grief|terse|brief|detail|length|sentence", prompt), prompt


@pytest.mark.parametrize("name", ["caution", "creativity", "debugging", "formality", "mood", "succinctness"])
def test_bundled_prompts_are_varied(name: str) -> None:
    trait = load_trait(name)
    prompts = [*trait.train_prompts, *trait.heldout_prompts]
    contents = [content_words(prompt) for prompt in prompts]
    for first in range(len(prompts)):
        for second in range(first):
            shared = contents[first] & contents[second]
            overlap = len(shared) / len(contents[first] | contents[second])
            assert overlap <= 0.5, (prompts[first], prompts[second])
    openings = {" ".join(prompt.split()[:2]).casefold() for prompt in prompts}
    assert len(openings) >= 12
    # The held-out prompts begin in the ways the training prompts do.
    trained = {prompt.split()[0] for prompt in trait.train_prompts}
    assert {prompt.split()[0] for prompt in trait.heldout_prompts} <= trained


def content_words(prompt: str) -> set[str]:
    """The words that say what a prompt is about, without those that say what to do with it."""
    small = "a an the of to in on at and or is are do does i you me my your what why how it for with who that about as"
    form = "write tell describe explain give story poem short first lines diary entry was should can"
    return set(re.findall(r"[a-z']+", prompt.casefold())) - set(small.split()) - set(form.split())


def test_the_assistant_recipe() -> None:
    """It is fitted by name, and is no trait: nothing benchmarks or offers it."""
    assert bundled_recipes() == ["assistant"] and "assistant" not in bundled_traits()
    recipe = load_trait("assistant")
    assert len(set(recipe.system["negative"])) == len(set(recipe.system["positive"])) == 16
    assert len(recipe.train_prompts) == 24 and recipe.metric is None
