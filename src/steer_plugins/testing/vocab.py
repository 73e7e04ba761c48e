"""A small byte-level BPE vocabulary in the style of GPT-2, trained here on a few lines of our own text.

Every byte has a token, so any text can be encoded and comes back unchanged; a few hundred merges make common
English words one token, so prompts are short and what a random model writes can be read.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

# Token types of the GGUF format (tokenizer.ggml.token_type).
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4

N_WORD_PIECES = 496  # merged tokens beside the 256 bytes

# Only word frequencies matter. The first lines are repeated below to weigh the small words of the language.
_SMALL_WORDS = """
the of and to in is that it for was on are with as you be this have not but they from at by we can or an will
one all there what when which your how their if up out them then she he so some would make like into time has
"""
_TEXT = """
The morning was bright and the garden was full of birds. She opened the window, smiled at the warm light and said
that it would be a wonderful day. They walked along the river together, laughing about small things, and everyone
they met was friendly and glad to see them. In the evening the rain came down on the grey town. The old house was
cold and quiet, the fire had gone out, and he felt tired and alone while the wind moved through the empty rooms.
A database keeps an index so that a question can be answered without reading every row of a table. The computer
looks for the key, follows the pointer and returns the record. Writing is slower because each change has to update
the index too. A short answer is often better than a long one: say what is needed, then stop. Please explain how a
bridge carries weight, why the sky is blue, where rivers begin, and what makes bread rise in the oven. People have
always told stories about the sea, the mountains and the stars. Some of these stories are sad, others are happy,
and most of them teach us something about how to live. Numbers, letters and words are only marks on paper until
someone reads them. The system prompt tells the assistant who it should be; the user asks a question; the model
thinks about the problem step by step and then gives its final answer. First find the right place, next measure the
distance, after that write down the result and check it again. Water, earth, air and fire; north, south, east and
west; red, green, yellow, black and white; spring, summer, autumn and winter. I think therefore I am, you know, but
we could also try something different tomorrow. Yes, of course! No, thank you. Hello, my dear friend, how are you?
"""


def byte_alphabet() -> list[str]:
    """The printable character that stands for each of the 256 byte values in a GPT-2 style vocabulary.

    Printable Latin-1 characters stand for themselves; the other bytes take U+0100, U+0101, ... in order
    (so a space is written ``Ġ``).
    """
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(value if value in itself else next(spare)) for value in range(256)]


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in id order, their GGUF types, the merges ("left right", best first) and which ids should stay silent.

    ``muted`` holds the ids of control tokens and of bytes that are not printable ASCII: a random model that never
    prefers them writes plain text and does not stop after a few tokens.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    muted: tuple[int, ...]

    def id_of(self, token: str) -> int:
        """The id of a token given as it is stored (raises ``ValueError`` when there is none)."""
        return self.tokens.index(token)


@lru_cache(maxsize=1)
def _pieces() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(byte tokens followed by the merged tokens, the merges), from plain BPE training on the text above."""
    alphabet = byte_alphabet()
    text = f"{_SMALL_WORDS * 2} {_TEXT}".replace("\n", " ")
    counts: Counter[str] = Counter(re.findall(r" ?[A-Za-z]+", text))
    words = {tuple(alphabet[byte] for byte in word.encode()): count for word, count in sorted(counts.items())}

    tokens, merges = list(alphabet), []
    known = set(tokens)
    while len(tokens) < 256 + N_WORD_PIECES:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        # Ties are broken by the text of the pair, so the result does not depend on dictionary order.
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(f"{left} {right}")
        if left + right not in known:
            known.add(left + right)
            tokens.append(left + right)
        words = {_join(word, left, right): count for word, count in words.items()}
    return tuple(tokens), tuple(merges)


def _join(word: tuple[str, ...], left: str, right: str) -> tuple[str, ...]:
    out: list[str] = []
    for symbol in word:
        if symbol == right and out and out[-1] == left:
            out[-1] = left + right
        else:
            out.append(symbol)
    return tuple(out)


def vocabulary(control: tuple[str, ...], user_defined: tuple[str, ...] = ()) -> Vocabulary:
    """The shared bytes and word pieces followed by an architecture's own special tokens."""
    pieces, merges = _pieces()
    alphabet = byte_alphabet()
    unprintable = [value for value in range(256) if not (0x20 <= value < 0x7F or value == 0x0A)]
    muted = [pieces.index(alphabet[value]) for value in unprintable]
    first_special = len(pieces)
    tokens = pieces + control + user_defined
    return Vocabulary(
        tokens=tokens,
        types=(NORMAL,) * len(pieces) + (CONTROL,) * len(control) + (USER_DEFINED,) * len(user_defined),
        merges=merges,
        muted=(*muted, *range(first_special, len(tokens))),
    )
