"""The scorers, on answers written by hand, right and wrong; and the task data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from steer_plugins.bench import pycode
from steer_plugins.bench.tasks import (
    Family,
    Scored,
    Task,
    builtin_families,
    data_lines,
    read_choices,
    read_functions,
    reading_ease,
    reference,
    score_code,
    score_docs,
    score_style,
)
from steer_plugins.errors import DataError
from steer_plugins.training.traits import bundled_traits, load_trait

FAMILIES = {family.name: family for family in builtin_families()}


def task(family: str, name: str) -> Task:
    return next(t for t in FAMILIES[family].tasks if t.id == name or t.prompt == name)


# ---- data ----


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_large_enough(name: str) -> None:
    family = FAMILIES[name]
    assert len(family.tasks) >= 60 and len({t.prompt for t in family.tasks}) == len(family.tasks)


def test_no_task_is_a_prompt_of_a_trait() -> None:
    asked = {t.prompt.casefold() for name in ("style", "advice", "faults") for t in FAMILIES[name].tasks}
    for name in bundled_traits():
        trait = load_trait(name)
        assert not asked & {p.casefold() for p in (*trait.train_prompts, *trait.heldout_prompts)}, name


def test_references_pass_their_checks() -> None:
    for function in read_functions():
        space: dict[str, Any] = {}
        exec(reference(function), space)
        assert len(function["checks"]) >= 2 and function["purpose"] and len(function["names"] + function["facts"]) >= 3
        for check in function["checks"]:
            assert eval(check, space), check


def test_purposes_hold_their_facts() -> None:
    """A documentation as good as the function's own description keeps all facts: none is out of reach."""
    for t in FAMILIES["docs"].tasks:
        names = " and ".join(t.data["names"])
        text = f"The function with these names, {names}: {t.data['purpose']} " + " ".join(group[0] for group in t.data["facts"])
        assert score_docs(t, text, False).success == 1.0, t.id


def test_choices() -> None:
    choices = read_choices()
    assert len(choices) >= 40 and all(len(endings) == 4 == len(set(endings)) for _, endings in choices)
    assert len(data_lines("neutral.txt")) >= 16 and not any(line.startswith("# ") for line in data_lines("style.txt"))


def test_families_are_checked() -> None:
    with pytest.raises(DataError, match="no tasks"):
        Family("x", (), score_style, "", 8)
    with pytest.raises(DataError, match="two tasks of one id"):
        Family("x", (Task("a", "1"), Task("a", "2")), score_style, "", 8)


# ---- code ----

RIGHT = {
    "fenced": "Sure!\n\n```python\ndef clamp(x, low, high):\n    return max(low, min(high, x))\n```\nIt clamps.",
    "bare": "def clamp(x, low, high):\n    # keep it\n    if x < low:\n        return low\n    return high if x > high else x\n",
    "body": "```\n    return max(low, min(high, x))\n```",
    "flat body": "return max(low, min(high, x))",
    "prose after": "def clamp(x, low, high):\n    return max(low, min(high, x))\n\nThis function clamps x.",
    "other names": "```python\nimport math\n\ndef clamp(value, lo, hi):\n    return sorted((lo, value, hi))[1]\n```",
    "second block": "Use:\n```\npip install x\n```\nand\n```py\ndef clamp(x, low, high):\n    return max(low, min(high, x))\n```",
    "unclosed": "```python\ndef clamp(x, low, high):\n    return max(low, min(high, x))",
}
WRONG = {
    "other result": "```python\ndef clamp(x, low, high):\n    return min(low, max(high, x))\n```",
    "nothing": "",
    "prose": "The function clamps a number.",
    "no syntax": "```python\ndef clamp(x, low, high)\n    return x\n```",
    "stub": '```python\ndef clamp(x, low, high):\n    """Return x."""\n```',
    "pass": "def clamp(x, low, high):\n    pass\n",
    "other function": "```python\ndef limit(x, low, high):\n    return max(low, min(high, x))\n```",
    "raises": "def clamp(x, low, high):\n    raise ValueError\n",
    "exits": "import sys\ndef clamp(x, low, high):\n    return 0\nsys.exit(0)\n",
    "exits hard": "```python\nimport os\ndef clamp(x, low, high):\n    os._exit(0)\n```",
    "reads": "```python\ninput()\ndef clamp(x, low, high):\n    return max(low, min(high, x))\n```",
}


@pytest.mark.parametrize("answer", RIGHT)
def test_right_code(answer: str) -> None:
    found = score_code(task("code", "clamp"), RIGHT[answer], True)
    assert found.success == 1.0 and found.measures["lines"] >= 2


@pytest.mark.parametrize("answer", WRONG)
def test_wrong_code(answer: str) -> None:
    assert score_code(task("code", "clamp"), WRONG[answer], True).success == 0.0


def test_without_run_code_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pycode, "run_checks", lambda *a, **k: pytest.fail("it ran"))
    clamp = task("code", "clamp")
    assert score_code(clamp, RIGHT["fenced"], False).success == 1.0
    assert score_code(clamp, WRONG["other result"], False).success == 1.0  # it is Python, which is all that is looked at
    for answer in ("nothing", "prose", "no syntax", "stub", "pass", "other function"):
        assert score_code(clamp, WRONG[answer], False).success == 0.0, answer


def test_comment_density() -> None:
    assert score_code(task("code", "clamp"), RIGHT["bare"], False).measures["comments"] == pytest.approx(1 / 5)
    assert pycode.comment_density("x = '# no comment'\n") == 0.0
    assert pycode.comment_density("# a\n# b\n\n") == 1.0 and pycode.comment_density("x = (") == 0.0
    assert pycode.comment_density("") == 0.0


def test_code_is_run_without_the_environment_in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STEER_API_KEY", "secret")
    monkeypatch.chdir(tmp_path)
    code = "import os\nopen('made', 'w').close()\nfound = dict(os.environ)\n"
    assert pycode.run_checks(code, ["'STEER_API_KEY' not in found"])
    assert list(tmp_path.iterdir()) == []
    assert not pycode.run_checks(code, ["'STEER_API_KEY' in found"])


def test_code_that_does_not_end_is_ended() -> None:
    assert not pycode.run_checks("while True:\n    pass\n", ["True"], seconds=0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may not limit the address space")
def test_memory_is_limited() -> None:
    assert not pycode.run_checks("x = bytearray(1 << 31)\n", ["len(x) > 0"])
    assert pycode.run_checks("x = bytearray(1 << 20)\n", ["len(x) > 0"])


# ---- documentation ----


def test_right_documentation() -> None:
    clamp = task("docs", "clamp")
    text = (
        "## clamp\n\nKeeps a number inside limits.\n\n- `x`: the number\n- `low`: the minimum\n- `high`: the maximum\n\n"
        "Returns x, or the limit that it would cross."
    )
    found = score_docs(clamp, text, False)
    assert found.success == 1.0 and found.measures["structure"] == 4.0 and found.measures["words"] > 15


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("clamp x low high minimum maximum.", 0.0),  # too short to be a documentation
        ("This is a function that does something useful for everyone who calls it.", 0.0),
        ("```python\ndef clamp(x, low, high):\n    # minimum and maximum of all that is possible here\n    return x\n```", 0.0),
        ("The function clamp takes x and returns it when it is inside of the two limits.", 2 / 6),
        ("The function clamp takes x, low and high, and gives something back in any case.", 4 / 6),
        ("Clamp takes x, low and high. The result is never below low, never above high.", 1.0),
        ("The clamping of boxes: lowest and highest shelves, at least and at most everything", 2 / 6),
    ],
)
def test_documentation_keeps_a_share_of_the_facts(text: str, share: float) -> None:
    assert score_docs(task("docs", "clamp"), text, False).success == pytest.approx(share)


def test_signs_are_facts_too() -> None:
    mask = task("docs", "mask")
    text = "The function mask replaces the characters of text by * and keeps the last visible ones of it."
    assert score_docs(mask, text, False).success == 1.0


def test_reading_ease() -> None:
    easy, hard = "The cat sat. The dog ran. It was fun.", "Organisational considerations necessitate comprehensive documentation."
    assert reading_ease(easy) > 90 > 0 > reading_ease(hard) and reading_ease("") == 0.0
    assert reading_ease("The cat sat on the mat.") == pytest.approx(206.835 - 1.015 * 6 - 84.6)


# ---- conversation ----


@pytest.mark.parametrize(
    ("text", "success"),
    [
        ("I love spring, when everything grows.", 1.0),
        ("Autumn.", 1.0),
        ("My favourite season is winter!", 1.0),
        ("What is your favourite season?", 0.0),
        ("I am a language model and like numbers.", 0.0),
        ("An offspring is a child.", 0.0),
        ("", 0.0),
    ],
)
def test_style_is_about_the_question(text: str, success: float) -> None:
    assert score_style(task("style", "What is your favourite season?"), text, False).success == success


def test_style_measures() -> None:
    season = task("style", "What is your favourite season?")
    found = score_style(season, "Maybe spring. I think it might be the best of them all.", False)
    assert found.measures["words"] == 12.0 and found.measures["hedges"] == pytest.approx(100 * 3 / 12)
    assert score_style(season, "Spring brings joy and happy laughter.", False).measures["mood"] > 0
    assert score_style(season, "Winter, full of grief and despair.", False).measures["mood"] < 0
    assert score_style(season, "", False) == Scored(0.0, {"words": 0.0, "hedges": 0.0, "mood": 0.0, "formality": 0.0})
