"""The planner by itself: compiled alone, without llama.cpp, and held against the rules written a second time."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from steer_plugins.errors import SpecError
from steer_plugins.native import SCHEDULES, SCOPE_RANGE, SCOPES, Plan, PlanTerm, PlanVector, Segment, Tags
from steer_plugins.native.plan import declare
from tests.scopes import acts, factor

SOURCE = Path(__file__).parents[2] / "cpp_patch" / "llama-steer-plan.cpp"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

THINK = Tags(open=("<think>",), close=("</think>",), generation_prompt="<|im_start|>assistant\n")
PLAIN = Tags()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The planner as a library of its own: one file, the C++ library and nothing else."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("plan") / "plan.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-DLLAMA_STEER_PLAN_ALONE"]
    subprocess.run([COMPILER, *flags, str(SOURCE), "-o", str(path)], check=True)
    return declare(ctypes.CDLL(str(path)))


def term(scope: str = "response", strength: float = 1.0, kind: str = "constant", over: int = 0, floor: float = 0.0) -> PlanTerm:
    first, dash, last = scope.partition("-")
    where: dict[str, Any] = {"scope": SCOPES.get(scope, SCOPE_RANGE)}
    if dash:
        where |= {"first": int(first), "last": int(last) if last else -1}
    return PlanTerm(strength=strength, schedule=SCHEDULES[kind], over=over, floor=floor, name="mood", **where)


def strengths(plan: Plan | list[Segment], position: int) -> tuple[float, ...]:
    """What a plan gives a position."""
    segments = plan.segments() if isinstance(plan, Plan) else plan
    (found,) = [s for s in segments if s.first <= position and (s.end < 0 or position < s.end)]
    return found.strengths


SCOPES_TRIED = ["all", "prompt", "response", "thinking", "answer", "0-", "0-0", "1-1", "3-9", "7-", "40-60"]


@pytest.mark.parametrize("seed", range(40))
def test_against_the_rules(library: ctypes.CDLL, seed: int) -> None:
    """Random terms, prompts and replies that open and close thinking, token by token."""
    rng = random.Random(seed)
    n_prompt = rng.choice([0, 1, 2, 3, 8, 20])
    wishes: list[tuple[str, float, str, int, float]] = []
    for _ in range(rng.randint(1, 5)):
        scope, strength = rng.choice(SCOPES_TRIED), rng.choice([1.0, -0.5, 2.0, 0.0])
        if scope == "prompt" or rng.random() < 0.5:
            wishes.append((scope, strength, "constant", 0, 0.0))
        else:
            over, floor = rng.choice([1, 2, 7, 64, 65, 130, 4096]), rng.choice([0.0, 0.25, 1.0])
            wishes.append((scope, strength, rng.choice(["linear", "cosine"]), over, floor))
    terms = [term(*wish) for wish in wishes]
    plan = Plan(library, terms, max(0, n_prompt - 1), THINK)
    thinking, text = False, ""
    phases = []
    for position in range(n_prompt, n_prompt + 60):
        piece = rng.choice(["word ", "<think>", "</think>", "<th", "ink>", "</thi", "nk>", "<", "x"])
        text += piece
        plan.feed(position, piece.encode())
        ends = {tag: text.rfind(tag) + len(tag) if tag in text else -1 for tag in ("<think>", "</think>")}
        thinking = ends["<think>"] > ends["</think>"]
        assert plan.thinking is thinking
        phases.append(thinking)
    segments = plan.segments()
    assert segments[0].first == 0 and segments[-1].end == -1
    assert all(a.end == b.first for a, b in zip(segments, segments[1:], strict=False)), "no gaps"
    for position in [*range(n_prompt + 60), 100, 1000, 5000]:
        phase = phases[min(position - n_prompt, 59)] if position >= n_prompt else False
        n = position - max(1, n_prompt - 1)
        expected = tuple(
            s * factor(kind, over, floor, n) if acts(scope, position, n_prompt, thinking=phase) else 0.0
            for scope, s, kind, over, floor in wishes
        )
        assert strengths(segments, position) == pytest.approx(expected, abs=1e-15), (position, wishes)


def test_only_the_template_opens_thinking(library: ctypes.CDLL) -> None:
    """The planner never sees a prompt, so a message that speaks of a tag changes nothing; the generation prompt does."""
    opened = Tags(("<think>",), ("</think>",), "<|im_start|>assistant\n<think>\n")
    closed = Tags(("<think>",), ("</think>",), "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    for tags, thinking in [(THINK, False), (opened, True), (closed, False)]:
        plan = Plan(library, [term("answer"), term("thinking", 2.0)], 5, tags)
        assert plan.tracks and plan.thinking is thinking
        assert strengths(plan, 5) == ((0.0, 2.0) if thinking else (1.0, 0.0))
        assert strengths(plan, 4) == (0.0, 0.0)
    # a tag that only ends thinking: the reply begins with it, unless the template has ended it
    plan = Plan(library, [term("answer")], 5, Tags((), ("</think>",), "<|assistant|>"))
    assert plan.thinking
    assert plan.feed(6, b"hm") is False
    assert plan.feed(7, b"</think>") is True
    assert [strengths(plan, p) for p in (6, 7)] == [(0.0,), (1.0,)]
    assert not Plan(library, [term("answer")], 5, Tags((), ("</think>",), "<|assistant|></think>")).thinking


@pytest.mark.parametrize(
    "end, thinking",
    [
        ("a<think>", True),
        ("a<think>\n", True),
        ("a<think>\n\n</think>\n\n", False),
        ("what does <think> mean", False),
        ("<think>.", False),
        ("", False),
        ("think>", False),
    ],
)
def test_of_a_raw_prompt_only_its_end_counts(library: ctypes.CDLL, end: str, thinking: bool) -> None:
    for opening in ("<think>", "<think>\n"):
        tags = Tags((opening,), ("</think>",), prompt_end=end)
        assert Plan(library, [term("answer")], 5, tags).thinking is thinking
    assert not Plan(library, [], 5, Tags(("<think>",), ("</think>",), generation_prompt="", prompt_end="<think>")).thinking
    assert Plan(library, [], 5, Tags((), ("</think>",), prompt_end=end)).thinking is not end.endswith("</think>\n\n")


def test_tool_calls_are_no_answer(library: ctypes.CDLL) -> None:
    tags = Tags(("[THINK]",), ("[/THINK]",), "", tool_open=("<tool_call>",), tool_close=("</tool_call>",))
    plan = Plan(library, [term("answer"), term("response", 2.0)], 3, tags)
    for position, piece in enumerate(["Well ", "<tool_", "call>", "{}", "</tool_call>", "so"], start=4):
        plan.feed(position, piece.encode())
    assert [strengths(plan, p)[0] for p in range(4, 10)] == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert [strengths(plan, p)[1] for p in range(2, 5)] == [0.0, 2.0, 2.0]
    whole = Plan(library, [term("answer")], 3, Tags(all_tools=True))
    assert strengths(whole, 4) == (0.0,)


def test_a_change_goes_on_in_the_phase_of_the_reply(library: ctypes.CDLL) -> None:
    plan = Plan(library, [term("response")], 4, THINK)
    plan.feed(5, b"<think>")
    plan.change(7, [term("thinking", 3.0), term("answer", 5.0), term("response", 1.0, "linear", 8)])
    assert plan.segments()[0].first == 7
    assert strengths(plan, 7) == (3.0, 0.0, 1 - 3 / 8)
    assert plan.feed(9, b"</think>") is True
    assert strengths(plan, 8)[:2] == (3.0, 0.0) and strengths(plan, 9)[:2] == (0.0, 5.0)
    before = plan.segments()
    with pytest.raises(SpecError, match="project takes -1 to 3"):
        plan.change(12, [PlanTerm(strength=100.0, op=1)])
    assert plan.segments() == before, "an error changes nothing"


def test_the_shapes_of_schedules(library: ctypes.CDLL) -> None:
    def along(kind: str, over: int, floor: float = 0.0) -> list[float]:
        plan = Plan(library, [term("response", 1.0, kind, over, floor)], 9, PLAIN)
        return [strengths(plan.segments(), 9 + n)[0] for n in range(over + 2)]

    assert along("linear", 4) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert along("linear", 4, 0.5)[1] == 0.875
    assert along("cosine", 4)[1] == pytest.approx((1 + 0.5**0.5) / 2)
    assert along("cosine", 4, 0.5)[2] == pytest.approx(0.75)
    for kind in ("linear", "cosine"):
        values = along(kind, 300, 0.1)
        assert values[0] == 1.0 and values[300] == values[301] == 0.1
        assert all(a >= b for a, b in zip(values, values[1:], strict=False))


def test_segments_are_few(library: ctypes.CDLL) -> None:
    """A schedule has at most 64 steps, whatever its length, and many schedules at once are refused before any work."""
    for over in (1, 63, 64, 65, 520, 4096):
        plan = Plan(library, [term("response", 1.0, "linear", over)], 9, PLAIN)
        held = [s for s in plan.segments() if s.first >= 9]
        assert 2 <= len(held) <= 65 and strengths(plan, 9) == (1.0,)
        assert strengths(plan, 9 + over) == (0.0,) and strengths(plan, 9 + over - 1)[0] > 0.0
    plan = Plan(library, [term("response", 1.0, "linear", 1000)] * 256, 9, PLAIN)
    assert len(plan.segments()) <= 66
    with pytest.raises(SpecError, match="change the steering at [0-9]+ places, 1024 are the limit"):
        Plan(library, [term("response", 1.0, "linear", 64 * k) for k in range(1, 65)], 9, PLAIN)
    assert Plan(library, [], 0, None).segments() == [Segment(0, -1, ())]


VECTOR = PlanVector("ab", [1, 3], [0, 0], [[1.0, 0.0], [0.0, 1.0]], [2.5, 1e3])  # type: ignore[arg-type]

REFUSED: list[tuple[str, PlanTerm, Tags | None, str]] = [
    ("nan", PlanTerm(strength=float("nan")), PLAIN, "not a finite number"),
    ("inf", PlanTerm(strength=float("-inf")), PLAIN, "not a finite number"),
    ("percent", PlanTerm(strength=100.0, op=1, name="mood"), PLAIN, "the strength of mood is 100: project takes -1 to 3"),
    ("-1.01", PlanTerm(strength=-1.01, op=1), PLAIN, "project takes -1 to 3"),
    ("1e30", PlanTerm(vector=VECTOR, strength=1e30, name="mood"), PLAIN, "strength 1e[+]30 of mood is too large at layer 1"),
    ("1e13", PlanTerm(vector=VECTOR, strength=1e13, op=2), PLAIN, "too large at layer 3: a dose of 1e[+]15 is the limit"),
    ("renorm", PlanTerm(vector=VECTOR, strength=-1e13, op=3), PLAIN, "too large at layer 3"),
    ("op", PlanTerm(op=6), PLAIN, "op 6"),
    ("scope", PlanTerm(scope=9), PLAIN, "scope 9"),
    ("range", PlanTerm(scope=SCOPE_RANGE, first=5, last=3), PLAIN, "positions 5 to 3"),
    ("below 0", PlanTerm(scope=SCOPE_RANGE, first=-1), PLAIN, "positions -1 to -1"),
    ("last -2", PlanTerm(scope=SCOPE_RANGE, first=0, last=-2), PLAIN, "positions 0 to -2"),
    ("schedule", PlanTerm(schedule=3), PLAIN, "schedule 3"),
    ("over 0", term("response", 1.0, "linear", 0), PLAIN, "over 0 tokens: 1 to 4096"),
    ("over 4097", term("response", 1.0, "cosine", 4097), PLAIN, "over 4097 tokens"),
    ("floor", term("response", 1.0, "linear", 4, 1.5), PLAIN, "the floor of the schedule of mood is 1.5"),
    ("floor nan", term("response", 1.0, "linear", 4, float("nan")), PLAIN, "floor"),
    ("of a prompt", term("prompt", 1.0, "linear", 4), PLAIN, "cannot have one with scope prompt"),
    ("no tags", term("thinking"), PLAIN, "scope 'thinking' of mood needs a model with thinking tags: use response or all"),
    ("thinking unknown", term("thinking"), None, "scope 'thinking' of mood cannot be followed here"),
    ("answer unknown", term("answer"), Tags(known=False), "scope 'answer' of mood cannot be followed here"),
    ("empty tag", term(), Tags(open=("",)), "a tag that opens thinking is empty"),
]


@pytest.mark.parametrize("wish, tags, message", [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_applied_is_refused(library: ctypes.CDLL, wish: PlanTerm, tags: Tags | None, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        Plan(library, [PlanTerm(), wish], 3, tags)
    sentence = str(caught.value)
    assert sentence[0].islower() and not sentence.endswith(".") and "\n" not in sentence


def test_the_ends_of_what_is_allowed(library: ctypes.CDLL) -> None:
    for strength in (-1.0, 0.0, 1.0, 2.0, 3.0):
        Plan(library, [PlanTerm(strength=strength, op=1)], 3, PLAIN)
    Plan(library, [PlanTerm(vector=VECTOR, strength=1e12)], 3, PLAIN)
    Plan(library, [term("thinking", 0.0), term("answer", 0.0)], 3, None)  # what is off needs no tags
    Plan(library, [PlanTerm()] * 256, 3, PLAIN)
    with pytest.raises(SpecError, match="0 to 256 terms, not 257"):
        Plan(library, [PlanTerm()] * 257, 3, PLAIN)
    with pytest.raises(SpecError, match="cannot end at position -1"):
        Plan(library, [], -1, PLAIN)
    with pytest.raises(SpecError, match="no text of 1 bytes at position -1"):
        Plan(library, [], 0, PLAIN).feed(-1, b"x")
    assert Plan(library, [PlanTerm(scope=SCOPE_RANGE, first=2**31 - 1, last=2**31 - 1)], 3, PLAIN).segments()[-1].strengths == (
        1.0,
    )
