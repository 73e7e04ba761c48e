"""The text-only scores, against sentences labelled by hand (before the lexicon was tuned, and not by the lexicon)."""

from __future__ import annotations

import time

import pytest

from steer_plugins import metrics
from steer_plugins.metrics import (
    Metric,
    builtin_metrics,
    early_end_share,
    ended_early,
    repeated_ngram_share,
    score_mood,
    score_succinctness,
    word_count,
    words,
)

CHEERFUL = [
    "I woke up smiling, and the whole day was full of sunshine and laughter.",
    "What a wonderful party, everyone was dancing and singing until late!",
    "We are so happy that you are coming, we can't wait to see you.",
    "The children giggled with delight as the puppy rolled in the grass.",
    "I love this little town, its bright houses and its friendly people.",
    "She opened the present and jumped for joy.",
    "It was the best holiday of my life and I enjoyed every minute.",
    "The garden is in bloom, birds are chirping, and I feel alive.",
    "Thank you so much, your letter really made my day.",
    "He whistled a merry tune on his way to the market.",
    "I never felt happier than on that morning at the lake.",
    "There is nothing sad about this story; it ends with a feast.",
    "Grandma's kitchen is warm and cosy and smells of delicious cake.",
    "They won the match and celebrated all night long.",
    "Life is beautiful, and I am grateful for every day of it.",
    "Don't worry, everything will be great!",
    "The news thrilled us all and we hugged each other.",
    "A rainbow stretched over the hills and the world seemed magical.",
]

SOMBRE = [
    "I woke up crying, and the whole day was full of gloom.",
    "Nobody came to the funeral, and the rain would not stop.",
    "I am so lonely since you left that the house feels like a grave.",
    "The old man stared at the grey wall and sighed.",
    "All my hopes are gone and nothing will ever be good again.",
    "She read the letter twice and wept bitterly.",
    "It was the worst year of my life, a year of loss and pain.",
    "The garden has withered, the birds are dead, and I feel empty.",
    "I regret every word that I said to him before he died.",
    "He trudged home through the cold, dark streets, tired of everything.",
    "I have never felt so miserable as on that evening.",
    "There is no joy in this house any more.",
    "The kitchen was bare and the children went hungry to bed.",
    "They lost the war, and the city lies in ruins.",
    "Life is meaningless, and I am weary of it.",
    "I am not happy here, and I don't enjoy my work.",
    "Despair came over her like a long shadow.",
    "My heart is heavy, for my only brother has passed away.",
]

NEUTRAL = [
    "The train leaves at nine from platform four.",
    "Water boils at one hundred degrees at sea level.",
    "She put the keys on the table and went to the office.",
    "The committee will meet again on the second Tuesday of May.",
    "A triangle has three sides and three corners.",
    "Add two eggs and stir the flour into the bowl.",
    "The letter was written in 1954 and is kept in the archive.",
    "He painted the fence and then washed the brushes.",
    "The river flows through four countries before it reaches the sea.",
    "Please find the invoice for March attached.",
    "My neighbour owns two bicycles and an old car.",
    "The library is on the left, opposite the town hall.",
]

TERSE = [
    "Yes.",
    "No, not today.",
    "Paris.",
    "Boil it for eight minutes.",
    "A mountain that spits lava.",
    "Because sunlight is scattered by air.",
    "Drink water, sleep well, walk daily.",
    "It is a kind of insect that makes honey.",
    "Call a doctor at once.",
    "Turn it off and on again, then wait.",
    "He teaches children to read and write.",
    "Rain is water that falls from clouds.",
]

MEDIUM = [
    "A volcano is an opening in the ground where hot melted rock, ash and gas come up from deep inside the earth. Some "
    "volcanoes erupt every few years, while others sleep for centuries.",
    "Put the egg in a pan of cold water and bring it to the boil. Let it cook for eight minutes, then cool it under the "
    "tap and peel it.",
    "Bread is made of flour, water, salt and yeast. The dough rests until it has risen, and is then baked in a hot oven "
    "for about forty minutes until the crust is brown.",
    "Leaves fall because trees save water and strength in the cold months. The green colour goes back into the tree, and "
    "the yellow and red that were hidden before can be seen.",
    "You can save money by writing down what you spend. Look at the list after a month, find the three largest sums that "
    "you could do without, and put that much aside on pay day.",
    "A gardener looks after plants. In spring he sows and plants, in summer he waters and weeds, in autumn he harvests "
    "and cuts back, and in winter he repairs his tools.",
    "Birds fly by pushing air down and back with their wings. Their bones are light, their breast muscles are strong, "
    "and the shape of the wing lifts them as air flows over it.",
    "Cats purr when they are content, but also when they are hurt or afraid. The sound comes from quick movements of the "
    "muscles in the throat while they breathe.",
    "To plant a tree, dig a hole twice as wide as its roots. Set the tree in, fill the hole with soil, press it down "
    "with your foot, and water it well for the first weeks.",
    "A library lends books to people who live nearby. Many also have rooms for reading, computers that anyone can use, "
    "and someone who reads stories to children on Saturdays.",
]

EXPANSIVE = [
    " ".join(MEDIUM[start : start + 4])
    + " In addition, it is worth noting that there is, of course, a good deal more to be said about each of these "
    "matters, and that what has been said so far is, generally speaking, only a first look at the subject."
    for start in range(7)
] + [
    "To begin with, it is important to note that the question has many sides, and that each of them deserves a close "
    "look. "
    + " ".join(
        f"The {place} point concerns the {topic}, which people have discussed for a very long time, in "
        "many countries and in many languages, without ever coming to a common view of it."
        for place, topic in pairs
    )
    for pairs in (
        [("first", "history"), ("second", "cost"), ("third", "weather"), ("last", "law")],
        [("first", "material"), ("second", "tools"), ("third", "time"), ("last", "place")],
        [("first", "reader"), ("second", "writer"), ("third", "book"), ("last", "press"), ("very last", "shop")],
    )
]


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def mood_label(score: float) -> str:
    return "cheerful" if score > 0.15 else "sombre" if score < -0.15 else "neutral"


# mood -------------------------------------------------------------------------------------------------------


def test_mood_agrees_with_the_labels() -> None:
    labelled = [(text, "cheerful") for text in CHEERFUL] + [(text, "sombre") for text in SOMBRE]
    labelled += [(text, "neutral") for text in NEUTRAL]
    assert len(labelled) >= 30
    wrong = [(text, label, score_mood(text)) for text, label in labelled if mood_label(score_mood(text)) != label]
    assert len(wrong) <= 0.1 * len(labelled), wrong


def test_mood_orders_cheerful_above_neutral_above_sombre() -> None:
    scored = {
        name: [score_mood(text) for text in texts]
        for name, texts in {"cheerful": CHEERFUL, "neutral": NEUTRAL, "sombre": SOMBRE}.items()
    }
    assert share([a > b for a in scored["cheerful"] for b in scored["neutral"]]) >= 0.95
    assert share([a > b for a in scored["neutral"] for b in scored["sombre"]]) >= 0.95
    assert share([a > b for a in scored["cheerful"] for b in scored["sombre"]]) >= 0.98


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("I am happy.", "cheerful"),
        ("I am sad.", "sombre"),
        ("It is a table.", "neutral"),
        ("Happiness filled the room.", "cheerful"),
        ("Sadness filled the room.", "sombre"),
        ("They were crying and sobbing.", "sombre"),
        ("They were smiling and laughing.", "cheerful"),
        ("She cried with laughter.", "cheerful"),
        ("Tears of joy ran down his face.", "cheerful"),
        ("It was terribly funny.", "cheerful"),
        ("It was incredibly sad.", "sombre"),
        ("HE WAS MISERABLE", "sombre"),
        ("a light-hearted tale", "cheerful"),
        ("What the user asked: nothing.", "neutral"),
    ],
)
def test_mood_of_plain_cases(text: str, label: str) -> None:
    assert mood_label(score_mood(text)) == label, score_mood(text)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("I am not happy.", "sombre"),
        ("I'm not very happy.", "sombre"),
        ("It isn\u2019t beautiful.", "sombre"),
        ("There was no laughter.", "sombre"),
        ("She is never sad.", "cheerful"),
        ("He went without fear or regret.", "cheerful"),
        ("He was not only happy but grateful.", "cheerful"),
        ("I have never been so happy.", "cheerful"),
        ("I couldn't be happier.", "cheerful"),
        ("I have never been so sad.", "sombre"),
        # Another clause, or too far away: nothing is flipped.
        ("No, happy days.", "cheerful"),
        ("Not rich but happy.", "cheerful"),
        ("I did not go, but I was happy.", "cheerful"),
        ("We did not take the bus home because happy people walk.", "cheerful"),
    ],
)
def test_negation(text: str, label: str) -> None:
    assert mood_label(score_mood(text)) == label, score_mood(text)


def test_negation_is_weaker_than_the_opposite_word() -> None:
    assert score_mood("I am sad.") < score_mood("I am not happy.") < 0


def test_degree_words_scale_the_mood() -> None:
    assert score_mood("I am very happy.") > score_mood("I am happy.") > score_mood("I am slightly happy.") > 0
    assert score_mood("I am deeply sad.") < score_mood("I am sad.") < score_mood("I am somewhat sad.") < 0


def test_degree_words_of_the_other_mood_do_not_count() -> None:
    assert score_mood("an awfully happy man") >= score_mood("a very happy man")


def test_mood_is_symmetric_and_bounded() -> None:
    assert score_mood("happy") == pytest.approx(-score_mood("sad"))
    assert 0 < score_mood("nice") < score_mood("bright") < score_mood("happy") < 0.65
    for text in [*CHEERFUL, *SOMBRE, *NEUTRAL, " ".join(CHEERFUL), " ".join(SOMBRE)]:
        assert -1 < score_mood(text) < 1


def test_mood_of_a_mixture_lies_between() -> None:
    mixed = " ".join(a + " " + b for a, b in zip(CHEERFUL, SOMBRE, strict=True))
    assert score_mood(" ".join(SOMBRE)) < score_mood(mixed) < score_mood(" ".join(CHEERFUL))
    assert abs(score_mood(mixed)) < 0.3


def test_mood_hardly_depends_on_length() -> None:
    filler = " ".join(f"word{letter}" for letter in "abcdefghij")
    page = f"The happy child saw the bright garden. {filler} {filler} {filler}"
    one, many = score_mood(page), score_mood(" ".join([page] * 50))
    assert 0.3 < one < many < 0.85
    assert many - one < 0.3


def test_one_word_does_not_make_a_long_neutral_text_emotional() -> None:
    long = " ".join(NEUTRAL * 5)
    assert mood_label(score_mood(long + " He was happy.")) == "neutral"


def test_a_loop_counts_its_words_once() -> None:
    assert score_mood("joy " * 20) == pytest.approx(score_mood("joy" + " x" * 19))
    loop = score_mood("We had a happy time. " * 12)
    assert loop < score_mood("We had a happy time, full of joy, laughter, sunshine, love and delight.")


@pytest.mark.parametrize("score", [score_mood, score_succinctness])
@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n", "...", "\0", "\ufeff", "\ud800", "123 456", "\u65e5\u672c\u8a9e", "e\u0301te\u0301", "\U0001f642",
     "'" * 50, "-" * 50, "\u202eabc", "n't", "so", "never", "not"],
)  # fmt: skip
def test_odd_texts_have_a_finite_score(score: object, text: str) -> None:
    assert callable(score)
    assert -1 <= score(text) <= 1


def test_mood_of_empty_and_foreign_text_is_zero() -> None:
    for text in ["", "   ", "...", "1234", "\u65e5\u672c\u8a9e\u306e\u6587", "\u041f\u0440\u0438\u0432\u0435\u0442"]:
        assert score_mood(text) == 0.0


def test_mood_reads_emoji_and_curly_apostrophes() -> None:
    assert score_mood("See you there \U0001f60a\U0001f389") > 0.3
    assert score_mood("See you there \U0001f622\U0001f494") < -0.3
    assert score_mood("\u2764\ufe0f") > 0
    assert score_mood("I don\u2019t like it, it isn\u2019t fun") == score_mood("I don't like it, it isn't fun") < 0


@pytest.mark.parametrize("score", [score_mood, score_succinctness])
def test_very_long_text_is_scored_quickly(score: object) -> None:
    assert callable(score)
    text = "The happy child was not sad, in fact it laughed. " * 20_000
    before = time.process_time()
    score(text)
    score("a" * 1_000_000)
    score("happy" * 100_000)
    score("not " * 200_000)
    assert time.process_time() - before < 20


def test_no_word_is_in_both_moods_and_every_entry_can_be_found() -> None:
    from steer_plugins.metrics import mood_lexicon as lexicon

    cheerful = {word for block in lexicon._CHEERFUL.values() for word in block.split()}
    sombre = {word for block in lexicon._SOMBRE.values() for word in block.split()}
    assert len(cheerful) >= 300 and len(sombre) >= 300
    assert not cheerful & sombre
    for word, weight in lexicon.WEIGHTS.items():
        assert word == word.casefold()
        assert score_mood(f"x {word} x") * weight > 0, word
    for entries in lexicon.PHRASES.values():
        for phrase, weight in entries:
            score = score_mood(" ".join(phrase))
            assert score == 0 if weight == 0 else score * weight > 0, phrase
    for form, base in lexicon.IRREGULAR.items():
        assert base in lexicon.WEIGHTS, form


def test_endings_are_taken_off() -> None:
    pairs = [
        ("smiled smiling smiles", "smile"), ("happier happiest happily happiness", "happy"), ("sobbed sobbing sobs", "sob"),
        ("cries cried crying", "cry"), ("sadder saddest sadly sadness", "sad"), ("gloomier gloomily", "gloomy"),
        ("terribly", "terrible"), ("joyfulness joyfully", "joyful"), ("grieving grieved", "grieve"),
        ("mother's joy's", "joy"), ("wishes kisses", "kiss"), ("wept", "weep"), ("dying died", "die"),
    ]  # fmt: skip
    for forms, base in pairs:
        assert any(score_mood(form) == pytest.approx(score_mood(base)) for form in forms.split()), base
    for forms, base in pairs:
        if base not in ("joy", "kiss"):
            for form in forms.split():
                assert score_mood(form) == pytest.approx(score_mood(base)), form


def test_words_that_only_look_like_a_form_are_neutral() -> None:
    for text in [
        "goods",
        "painting",
        "nearly",
        "single",
        "dimension",
        "wellness",
        "morning",
        "badge",
        "number",
        "career",
        "sober",
        "singer",
        "wines",
        "mister",
        "severed",
        "barely",
    ]:
        assert score_mood(text) == 0.0, text


# succinctness -----------------------------------------------------------------------------------------------


def length_label(score: float) -> str:
    return "terse" if score > 0.6 else "expansive" if score < -0.25 else "medium"


def test_succinctness_agrees_with_the_labels() -> None:
    labelled = [(text, "terse") for text in TERSE] + [(text, "medium") for text in MEDIUM]
    labelled += [(text, "expansive") for text in EXPANSIVE]
    assert len(labelled) >= 30
    wrong = [
        (text, label, score_succinctness(text)) for text, label in labelled
        if length_label(score_succinctness(text)) != label
    ]  # fmt: skip
    assert len(wrong) <= 0.1 * len(labelled), wrong


def test_succinctness_orders_terse_above_medium_above_expansive() -> None:
    terse, medium, expansive = ([score_succinctness(text) for text in texts] for texts in (TERSE, MEDIUM, EXPANSIVE))
    assert min(terse) > max(medium)
    assert min(medium) > max(expansive)


def test_succinctness_falls_strictly_with_length() -> None:
    scores = [score_succinctness("word " * count) for count in (1, 2, 5, 15, 30, 59, 60, 61, 120, 240, 1000, 5000)]
    assert all(a > b for a, b in zip(scores, scores[1:], strict=False))
    assert score_succinctness("word " * 60) == 0.0
    assert scores[0] > 0.95
    assert score_succinctness("word " * 15) == pytest.approx(-score_succinctness("word " * 240))


def test_succinctness_of_empty_text_is_that_of_one_word() -> None:
    assert score_succinctness("") == score_succinctness("...") == score_succinctness("Yes") < 1


def test_filler_phrases_cost_a_little() -> None:
    plain = "The tree is old and tall and green now"
    filled = "In other words the tree is old and tall"
    assert word_count(plain) == word_count(filled)
    assert score_succinctness(filled) < score_succinctness(plain)
    assert score_succinctness("in\n other  WORDS, it is old") == score_succinctness("in other words it is old")
    # Part of a word is no filler.
    assert score_succinctness("thusly he went") == score_succinctness("slowly he went")
    # A filler costs less than a sentence.
    assert score_succinctness(filled) > score_succinctness(plain + " and it stands in the park")


def test_succinctness_works_for_text_without_spaces() -> None:
    short, long = "\u732b\u3067\u3059\u3002", "\u732b\u306f\u53ef\u611b\u3044\u52d5\u7269\u3067\u3059\u3002" * 40
    assert score_succinctness(short) > 0.6
    assert score_succinctness(long) < -0.6


# fluency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t", []),
        ("... -- !", []),
        ("Hello, world!", ["Hello", "world"]),
        ("It's the dog's bowl", ["It's", "the", "dog's", "bowl"]),
        ("well-known and/or 3.5 (maybe)", ["well-known", "and", "or", "3.5", "maybe"]),
        ("yes\u2014no, wait...stop\u2026now", ["yes", "no", "wait", "stop", "now"]),
        ("**bold** _text_ # 1.", ["bold", "text", "1"]),
        ("\u65e5\u672cGo 2", ["\u65e5", "\u672c", "Go", "2"]),
        ("caf\u00e9 cafe\u0301", ["caf\u00e9", "cafe\u0301"]),
        ("\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e", ["\u0928\u092e\u0938\u094d\u0924\u0947", "\u0926\u0941\u0928\u093f\u092f\u093e"]),
        ("\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!", ["\u041f\u0440\u0438\u0432\u0435\u0442", "\u043c\u0438\u0440"]),
        ("\U0001f600 hi", ["hi"]),
    ],
)  # fmt: skip
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected
    assert word_count(text) == len(expected)


def test_repeated_ngram_share() -> None:
    assert repeated_ngram_share("") == 0.0
    assert repeated_ngram_share("one two three") == 0.0
    assert repeated_ngram_share("a b c d e f g h") == 0.0
    # Five 4-grams, of which "a b c d" comes a second time.
    assert repeated_ngram_share("a b c d a b c d") == pytest.approx(1 / 5)
    assert repeated_ngram_share("A b, c D. a B c d!") == pytest.approx(1 / 5)
    assert repeated_ngram_share([7] * 10) == pytest.approx(6 / 7)
    assert repeated_ngram_share([1, 2, 1, 2], n=1) == pytest.approx(0.5)
    assert repeated_ngram_share((1, 2, 1, 2, 1), n=2) == pytest.approx(0.5)
    assert repeated_ngram_share("again and again " * 300) > 0.98
    for text in [*CHEERFUL, *MEDIUM]:
        assert repeated_ngram_share(text) == 0.0
    with pytest.raises(ValueError, match="at least 1"):
        repeated_ngram_share("a b", n=0)


def test_ended_early() -> None:
    assert ended_early("stop", 0)
    assert ended_early("stop", metrics.EARLY_END_TOKENS - 1)
    assert not ended_early("stop", metrics.EARLY_END_TOKENS)
    assert not ended_early("length", 3)
    assert not ended_early("cancelled", 0)
    assert ended_early("stop", 11, fewest=12)
    assert early_end_share([]) == 0.0
    assert early_end_share([("stop", 1), ("stop", 50), ("length", 1), ("stop", 2)]) == pytest.approx(0.5)


# registry ---------------------------------------------------------------------------------------------------


def test_builtin_metrics() -> None:
    found = builtin_metrics()
    assert sorted(found) == ["caution", "creativity", "debugging", "formality", "mood", "succinctness"]
    for name, metric in found.items():
        assert isinstance(metric, Metric)
        assert metric.name == name and metric.description
        assert metric("Yes.") == metric.score("Yes.")
    assert found["mood"]("I am happy.") > 0 > found["mood"]("I am sad.")
    assert found["succinctness"]("Yes.") > 0 > found["succinctness"]("word " * 200)
    found.clear()
    assert builtin_metrics()


def test_everything_exported_is_there() -> None:
    assert metrics.__all__ == sorted(metrics.__all__)
    for name in metrics.__all__:
        assert getattr(metrics, name).__doc__
