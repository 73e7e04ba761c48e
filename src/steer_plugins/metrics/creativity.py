"""How imaginative an English text is: comparisons, images and things that come alive, against definitions."""

from __future__ import annotations

import re

from .lexical import Lexicon

_LEXICON = Lexicon(
    "imagine|picture a*|once upon a time|as if|as though|dream*|whisper*|sing|sings|singing|sang|hum|hums|humming|dance|"
    "dances|dancing|danced|sigh*|giggl*|murmur*|breathe*|breathing|sleeps|asleep|awake*|wakes|weave*|weaving|woven|stitch*|"
    "paint|paints|painted|painting|spill*|melt*|shimmer*|glitter*|glow*|glimmer*|gleam*|sparkl*|spark|sparks|flicker*|"
    "swirl*|twirl*|curl*|burst*|blossom*|bloom*|unfold*|soar*|float*|drift*|tumbl*|tiptoe*|waltz*|march|marches|marching|"
    "kiss*|hug|hugs|embrac*|velvet|silk*|silver*|golden|gold|honey|amber|emerald|crimson|crystal*|moonlight|moonlit|"
    "starlight|stardust|stars|galaxy|galaxies|universe|cosmos|cosmic|kaleidoscope*|tapestry|labyrinth|mosaic|symphony|"
    "melody|lullaby|melodies|orchestra|canvas|dragon*|unicorn*|wizard*|fairy|fairies|giant|giants|ghost*|mermaid*|phoenix|"
    "magic*|enchant*|spell|mysterious|mystical|secret|secrets|riddle*|treasure*|butterfl*|firefl*|lighthouse|castle|"
    "kingdom|pirate*|storytell*|poem|poet*|metaphor|soul|heartbeat|ancient|forgotten|endless|eternal|infinite|invisible|"
    "invented|invent|wonder|wonders|wondrous|wild|playful|mischievous|ocean of|sea of|river of|storm of|symphony of|"
    "wrapped in|dreamed",
    "is a type of|is a kind of|is a common|is a device|is an instrument|is a musical|is a tool|is a building|is an object|"
    "is a material|is a small|is a large|is used|are used|is used to|can be used|is made of|is made from|are made of|"
    "is made by|made up of|consists of|consist of|is typically|are typically|typically|usually|generally|in general|"
    "commonly|common|most common|normally|often used|such as|for example|for instance|including|includes|include|provides|"
    "provide|various|several|many types|different types|types of|is known for|known as|is defined as|refers to|is measured|"
    "are measured|in order to|is important|important|it is important|the purpose|the process|function|functions|device|"
    "material|materials|structure|object|instrument|information|available|according to|approximately|number|product|"
    "products|there are|there is|because it|that is used|it is used|it can be",
    neutral_words=40,
)  # fmt: skip
# "like a cello", "as cold as", but not "would like a cello"
_SIMILE = re.compile(r"(?<!would )(?<!you )\blike (?:an?|the|tiny|little|old|some)\s+\w+|\bas \w+ as (?:an?|the)\b")


def score_creativity(text: str) -> float:
    """The imagination of ``text``, -1 (plain) to 1 (imaginative); 0.0 for text without a sign of either.

    Counts different images, verbs that make things alive, and similes against the phrases of definitions and lists of facts;
    see :class:`~.lexical.Lexicon`. Whether an image is any good it cannot tell.
    """
    return _LEXICON.balance(text, positive=len(set(_SIMILE.findall(text.casefold()))))
