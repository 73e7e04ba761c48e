"""Contrast data, reading and mean difference, on an engine whose hidden states can be worked out by hand."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_plugins.errors import DataError
from steer_plugins.training.extract import (
    Contrast,
    ContrastData,
    FitOptions,
    MeanDifference,
    Pair,
    Side,
    chat,
    hold_out,
    layers_to_read,
    load_pairs,
    plan_reading,
    read_contrast,
    reading,
    trait_data,
)
from steer_plugins.training.traits import load_trait
from tests.unit.fakes import N_LAYER, FakeEngine

TEXTS = '{"positive": "full of joy", "negative": "full of woe"}'
CHATS = json.dumps(
    {
        "positive": [{"role": "system", "content": "joy"}, {"role": "user", "content": "How are you?"}],
        "negative": [{"role": "system", "content": "woe"}, {"role": "user", "content": "How are you?"}],
    }
)
ANSWERS = json.dumps(
    {
        "positive": [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "oh joy"}],
        "negative": [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "oh woe"}],
    }
)


def write(path, text):
    file = path / "pairs.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def data(*pairs):
    return ContrastData("pairs", tuple(pairs), "0" * 64)


def options(**changes):
    return FitOptions(**{"layers": (0, 4), **changes})


# ---- pairs files ----


def test_texts_chats_and_answers(tmp_path):
    found = load_pairs(write(tmp_path, f"{TEXTS}\n\n  {CHATS}\r\n{ANSWERS}")).pairs
    assert [pair.line for pair in found] == [1, 3, 4]
    assert found[0].positive == Side("full of joy")
    assert found[1].negative == Side(chat("How are you?", "woe"))
    assert found[2].positive == Side(chat("How are you?"), "oh joy")
    assert [pair.same_prompt for pair in found] == [False, False, True]


def test_a_byte_order_mark_is_no_error(tmp_path):
    assert len(load_pairs(write(tmp_path, b"\xef\xbb\xbf" + TEXTS.encode())).pairs) == 1


def test_the_hash_is_that_of_the_file(tmp_path):
    first, second = load_pairs(write(tmp_path, TEXTS)), load_pairs(write(tmp_path, TEXTS + "\n"))
    assert first.pairs == second.pairs and first.sha256 != second.sha256


BAD_LINES = {
    "{": "not JSON",
    "[1]": "holds a list",
    "null": "holds null",
    "3": "holds a number",
    '{"positive": "a"}': 'lacks the side "negative"',
    '{"negative": "a"}': 'lacks the side "positive"',
    '{"positive": "a", "negative": "b", "id": 1}': 'unknown key "id"',
    '{"positive": "a", "negative": "b", "positive": "c"}': 'key "positive" twice',
    '{"positive": "a", "negative": null}': '"negative" is null',
    '{"positive": "a", "negative": 1}': '"negative" is a number',
    '{"positive": " ", "negative": "b"}': '"positive" is blank',
    '{"positive": "a", "negative": "a"}': "two equal sides",
    '{"positive": "a\\u0000", "negative": "b"}': "NUL",
    '{"positive": "a\\ud800", "negative": "b"}': "surrogate",
    '{"positive": [], "negative": "b"}': "empty chat",
    '{"positive": ["a"], "negative": "b"}': "positive, message 1",
    '{"positive": [{"role": "user"}], "negative": "b"}': "positive, message 1",
    '{"positive": [{"role": "user", "content": 1}], "negative": "b"}': "positive, message 1, content",
    '{"positive": [{"role": "assistant", "content": "a"}], "negative": "b"}': "no user's message",
    '{"positive": [{"role": "user", "content": "a"}], "negative": "b"}': "lopsided",
    ANSWERS.replace(', {"role": "assistant", "content": "oh woe"}', ""): "lopsided",
    "[" * 100_000: "flat JSON object",
    '{"positive": ' + "9" * 5000 + ', "negative": "b"}': "flat JSON object",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: BAD_LINES[line])
def test_a_bad_line_is_named(tmp_path, line):
    with pytest.raises(DataError, match="line 2: ") as caught:
        load_pairs(write(tmp_path, f"{TEXTS}\n{line}\n"))
    message = str(caught.value)
    assert BAD_LINES[line] in message
    assert len(message) < 400 and "\n" not in message


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_pairs(tmp_path, text):
    with pytest.raises(DataError, match="holds no pairs"):
        load_pairs(write(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_pairs(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="is not a file"):
        load_pairs(tmp_path)
    with pytest.raises(DataError, match="cannot be read|does not exist"):
        load_pairs("a\0b")
    with pytest.raises(DataError, match="line 2: is not UTF-8"):
        load_pairs(write(tmp_path, TEXTS.encode() + b"\n\xff"))


def test_what_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("steer_plugins.training.extract.pairs.MAX_PAIRS", 2)
    with pytest.raises(DataError, match="more than 2 pairs"):
        load_pairs(write(tmp_path, f"{TEXTS}\n" * 3))
    monkeypatch.setattr("steer_plugins.training.extract.lines.MAX_LINE_BYTES", 20)
    with pytest.raises(DataError, match="line 1: is longer"):
        load_pairs(write(tmp_path, TEXTS))
    monkeypatch.setattr("steer_plugins.training.extract.lines.MAX_FILE_BYTES", 20)
    with pytest.raises(DataError, match="is larger"):
        load_pairs(write(tmp_path, TEXTS))


@given(st.binary(max_size=200))
def test_any_bytes_give_pairs_or_a_sentence(tmp_path_factory, raw):
    file = tmp_path_factory.mktemp("any") / "pairs.jsonl"
    file.write_bytes(raw)
    with pytest.raises(DataError):
        load_pairs(file)


# ---- holding out, traits ----


def numbered(n):
    return data(*(Pair(Side(f"joy {i}"), Side(f"woe {i}"), i) for i in range(n)))


@pytest.mark.parametrize(("n", "held"), [(5, 1), (9, 1), (10, 2), (44, 8)])
def test_a_fifth_is_held_out(n, held):
    train, rest = hold_out(numbered(n), seed=3)
    assert len(rest) == held
    assert Counter((*train.pairs, *rest)) == Counter(numbered(n).pairs)
    assert list(train.pairs) == sorted(train.pairs, key=lambda pair: pair.line)


def test_the_seed_decides_which():
    assert hold_out(numbered(50), 1) == hold_out(numbered(50), 1)
    assert hold_out(numbered(50), 1) != hold_out(numbered(50), 2)


def test_too_few_pairs_to_hold_out():
    with pytest.raises(DataError, match="4 pairs are too few .* --calibrate none"):
        hold_out(numbered(4))


def test_a_trait_becomes_one_pair_for_each_training_prompt():
    trait = load_trait("mood")
    found = trait_data(trait)
    assert len(found.pairs) == len(trait.train_prompts)
    for i, pair in enumerate(found.pairs):
        positive, negative = trait.system_pairs[i % len(trait.system_pairs)]
        assert pair.positive == Side(chat(trait.train_prompts[i], positive))
        assert pair.negative == Side(chat(trait.train_prompts[i], negative))
    assert found.default_positions() == "last"


# ---- reading ----


def test_last_reads_the_last_token_of_each_side():
    pair = Pair(Side(chat("hm", "joy")), Side(chat("hmmm", "woe")))
    contrast = read_contrast(FakeEngine(), data(pair), options())
    lengths = [len(FakeEngine().tokenize(side.prompt)) for side in (pair.positive, pair.negative)]
    assert contrast.layers == [0, 4] and contrast.n_pairs == 1
    for il in (0, 4):
        assert contrast.positive[il].tolist() == [[il + 1, il + 1, (lengths[0] - 1) * (il + 1) / 1024, 0]]
        assert contrast.negative[il].tolist() == [[-il - 1, il + 1, (lengths[1] - 1) * (il + 1) / 1024, 0]]


def test_response_reads_the_mean_over_the_answer():
    prompt = chat("hm")
    n = len(FakeEngine().tokenize(prompt))
    contrast = read_contrast(FakeEngine(), data(Pair(Side(prompt, "joy!"), Side(prompt, "woe"))), options(positions="response"))
    assert contrast.positive[0][0].tolist() == [1, 1, (n + 1.5) / 1024, 0]
    assert contrast.negative[0][0].tolist() == [-1, 1, (n + 1) / 1024, 0]


def test_response_of_a_text_is_all_but_position_0():
    contrast = read_contrast(FakeEngine(), data(Pair(Side("joy"), Side("woe"))), options(positions="response"))
    assert contrast.positive[0][0].tolist() == [1, 1, 2 / 1024, 0]


def test_rows_stay_with_their_sides_when_kinds_are_mixed():
    prompt = chat("hm")
    pairs = [Pair(Side("joy"), Side("woe")), Pair(Side(prompt, "joy"), Side(prompt, "woe")), Pair(Side("joy"), Side("woe"))]
    contrast = read_contrast(FakeEngine(), data(*pairs), options(positions="response"))
    assert contrast.positive[0][:, 0].tolist() == [1, 1, 1]
    assert contrast.negative[0][:, 0].tolist() == [-1, -1, -1]
    assert contrast.positive[0][0, 2] == contrast.positive[0][2, 2] != contrast.positive[0][1, 2]


def test_missing_answers_are_generated_under_each_side_s_prompt():
    engine = FakeEngine()
    engine.reply = lambda prompt, pull, dose, n: ("yes" if "joy" in prompt else "no", "stop")
    pair = Pair(Side(chat("hm", "joy")), Side(chat("hm", "woe")))
    contrast = read_contrast(engine, data(pair), options(positions="response", response_tokens=7))
    assert [(request.prompt, request.max_tokens) for request in engine.generated] == [
        (pair.positive.prompt, 7),
        (pair.negative.prompt, 7),
    ]
    n = len(engine.tokenize(pair.positive.prompt))
    assert contrast.positive[0][0, 2] == (n + 1) / 1024 and contrast.negative[0][0, 2] == (n + 0.5) / 1024


def test_a_pair_with_an_empty_reply_is_left_out():
    engine = FakeEngine()
    engine.reply = lambda prompt, pull, dose, n: ("" if "quiet" in prompt and "woe" in prompt else "yes", "stop")
    pairs = [Pair(Side(chat(q, "joy")), Side(chat(q, "woe"))) for q in ("quiet", "loud")]
    assert read_contrast(engine, data(*pairs), options(positions="response")).n_pairs == 1
    with pytest.raises(DataError, match="answers no pair"):
        read_contrast(engine, data(pairs[0]), options(positions="response"))


def test_answer_reads_the_last_token_of_the_given_answer():
    # one opening under two personas
    pairs = [Pair(Side(chat("hm", "joy"), "I am"), Side(chat("hm", "woe"), "I am"), line=3)]
    engine = FakeEngine()
    found = read_contrast(engine, data(*pairs), options(positions="answer"))
    n = len(engine.tokenize(pairs[0].positive.prompt))
    assert found.positive[0][0].tolist() == [1, 1, (n + 3) / 1024, 0] and not engine.generated
    for pair in (Pair(Side(chat("hm", "joy")), Side(chat("hm", "woe")), line=3), Pair(Side("joy"), Side("woe"), line=3)):
        with pytest.raises(DataError, match="line 3 gives no answer"):
            read_contrast(engine, data(pair), options(positions="answer"))


@pytest.mark.parametrize(
    ("answer", "first", "count"),
    [
        ("<think>joy!</think>ok", 7, 4),
        ("so <think>joy", 10, 3),  # cut in the middle of a thought
    ],
)
def test_thinking_reads_the_mean_over_what_is_thought(answer, first, count):
    prompt = chat("hm")
    pair = Pair(Side(prompt, answer), Side(prompt, answer.replace("joy", "woe")))
    found = read_contrast(FakeEngine(), data(pair), options(positions="thinking"))
    n = len(FakeEngine().tokenize(prompt)) + first
    assert found.positive[0][0].tolist() == [1, 1, (n + (count - 1) / 2) / 1024, 0]
    assert found.negative[0][0, 0] == -1


def test_a_template_may_open_the_thought():
    pair = Pair(Side(chat("hm<think>"), "joy</think>ok"), Side(chat("hm<think>"), "woe</think>ok"))
    engine = FakeEngine()
    n = len(engine.tokenize(pair.positive.prompt))
    assert read_contrast(engine, data(pair), options(positions="thinking")).positive[0][0, 2] == (n + 1) / 1024
    closed = Pair(Side(chat("<think></think>"), "joy"), Side(chat("<think></think>"), "woe"), line=2)
    with pytest.raises(DataError, match="line 2 holds an answer without <think>"):
        read_contrast(engine, data(closed), options(positions="thinking"))


def test_thoughts_are_generated_where_they_are_missing():
    engine = FakeEngine()
    engine.reply = lambda prompt, pull, dose, n: ("<think>aha</think>" if "deep" in prompt else "no", "stop")
    pairs = [Pair(Side(chat(q, "joy")), Side(chat(q, "woe"))) for q in ("deep", "shallow")]
    found = read_contrast(engine, data(*pairs), options(positions="thinking", thinking=True))
    assert found.n_pairs == 1 and found.positive[0][0, 0] == 1
    assert all(request.thinking for request in engine.generated)
    with pytest.raises(DataError, match="the model thinks in no pair"):
        read_contrast(engine, data(pairs[1]), options(positions="thinking"))
    with pytest.raises(DataError, match="contains plain text, which has no thinking section"):
        read_contrast(engine, numbered(2), options(positions="thinking"))


def test_baselines_are_read_as_a_third_side():
    pairs = [Pair(Side("joy!"), Side("woe"), baseline=Side("hm" * (i + 1))) for i in range(3)]
    found = read_contrast(FakeEngine(), data(*pairs), options())
    assert found.baseline[4].tolist() == [[0, 5, (2 * i + 2) * 5 / 1024, 0] for i in range(3)]
    assert found.positive[0][:, 2].tolist() == [4 / 1024] * 3 and found.negative[0][:, 0].tolist() == [-1] * 3
    part = found.take(np.array([2, 0]))
    assert part.baseline[4].tolist() == [found.baseline[4][2].tolist(), found.baseline[4][0].tolist()]
    assert read_contrast(FakeEngine(), numbered(2), options()).baseline is None


def test_baselines_of_files_and_traits(tmp_path):
    line = '{"positive": "full of joy", "negative": "full of woe", "baseline": "full"}'
    found = load_pairs(write(tmp_path, f"{line}\n{line}"))
    assert found.has_baseline and found.pairs[1].baseline == Side("full")
    for lines in (f"{line}\n{TEXTS}", f"{TEXTS}\n{line}"):
        with pytest.raises(DataError, match="line 2: differs from the lines before"):
            load_pairs(write(tmp_path, lines))
    for bad in (
        '{"positive": "a", "negative": "b", "baseline": [{"role": "user", "content": "c"}]}',
        line.replace('"full"', "1"),
    ):
        with pytest.raises(DataError, match="line 1: "):
            load_pairs(write(tmp_path, bad))
    assert not load_pairs(write(tmp_path, TEXTS)).has_baseline
    trait = load_trait("mood")
    three = trait_data(trait, baseline=True)
    assert three.has_baseline and three.sha256 == trait_data(trait).sha256
    assert three.pairs[5].baseline == Side(chat(trait.train_prompts[5]))


def test_equal_prompts_cannot_be_read_at_the_last_token():
    pair = Pair(Side(chat("hm"), "joy"), Side(chat("hm"), "woe"), line=7)
    assert data(pair).default_positions() == "response"
    for call in (read_contrast, plan_reading):
        with pytest.raises(DataError, match="line 7 .* --positions response"):
            call(FakeEngine(), data(pair), options())


def test_norms_leave_out_position_0():
    engine = FakeEngine()
    # lengths by position: 1000, 1, 2, 4 times the layer's factor
    lengths = [1000, 1, 2, 4]
    engine._states = lambda text, n, layer: np.outer(lengths, [0.6, 0.8, 0, 0]).astype(np.float32) * (layer + 1)
    assert read_contrast(engine, numbered_of(3), options()).norms == {0: pytest.approx(2), 4: pytest.approx(10)}


def numbered_of(length):
    return data(Pair(Side("a" * length), Side("b" * length)))


@pytest.mark.parametrize("positions", ["last", "response"])
def test_texts_read_whole_give_the_same_rows(positions, monkeypatch):
    prompt = chat("hm")
    pairs = [Pair(Side("joy"), Side("woe"))] * 3
    if positions == "response":
        pairs = [*pairs, *[Pair(Side(prompt, "joy"), Side(prompt, "woe!!"))] * 3]
    found = []
    for count in (2, 12):
        monkeypatch.setattr(reading, "NORM_TEXTS", count)
        found.append(read_contrast(FakeEngine(), data(*pairs), options(positions=positions)))
    for il in (0, 4):
        assert found[0].positive[il].tobytes() == found[1].positive[il].tobytes()
        assert found[0].negative[il].tobytes() == found[1].negative[il].tobytes()


def test_norms_are_the_same_whatever_is_held_at_once(monkeypatch):
    whole = read_contrast(FakeEngine(), numbered(30), options())
    monkeypatch.setattr(reading, "NORM_BYTES", 1)
    assert read_contrast(FakeEngine(), numbered(30), options()).norms == whole.norms


def test_progress_ends_at_the_total():
    seen = []
    read_contrast(FakeEngine(), numbered(20), options(), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (40, 40)


def test_layers_to_read():
    assert layers_to_read(N_LAYER) == tuple(range(N_LAYER - 1))
    assert layers_to_read(N_LAYER, (3, 9)) == (3, 4, 5, 6, 7, 8, 9)
    assert layers_to_read(1) == (0,)


# ---- mean difference ----


def contrast(positive, negative, norm=1.0):
    return Contrast({3: np.float32(positive)}, {3: np.float32(negative)}, {3: norm})


def test_mean_difference_is_the_unit_vector_between_the_means():
    fit = MeanDifference().fit(contrast([[3, 0], [5, 2]], [[1, 0], [1, -6]], norm=2.0), options())
    assert fit.directions[3] == pytest.approx(np.array([3, 4]) / 5)
    assert fit.directions[3].dtype == np.float32
    assert fit.strengths[3] == pytest.approx(2.5)


def test_means_are_taken_in_float64():
    n = 3000
    positive = np.full((n, 2), 1e7, np.float32)
    negative = positive.copy()
    negative[:, 0] -= 1
    fit = MeanDifference().fit(contrast(positive, negative), options())
    assert fit.directions[3] == pytest.approx([1, 0])


def test_equal_examples_give_no_direction():
    with pytest.raises(DataError, match="read the same"):
        MeanDifference().fit(contrast([[1, 2]], [[1, 2]]), options())


def test_a_layer_that_tells_nothing_is_left_out():
    both = Contrast(
        {0: np.float32([[1, 1]]), 1: np.float32([[1, 2]])}, {0: np.float32([[1, 1]]), 1: np.float32([[1, 1]])}, {0: 1, 1: 1}
    )
    assert list(MeanDifference().fit(both, options()).directions) == [1]


def test_states_that_are_not_finite():
    with pytest.raises(DataError, match="layer 3 are not finite"):
        MeanDifference().fit(contrast([[np.nan, 1]], [[0, 0]]), options())
