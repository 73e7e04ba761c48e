"""The register of an English text: official phrases and long words, against contractions, slang and exclamations."""

from __future__ import annotations

import re

from .fluency import words
from .lexical import Lexicon

_LEXICON = Lexicon(
    "accordingly|additional|additionally|advise|pursuant|hereby|herein|thereof|therefore|thus|hence|moreover|furthermore|"
    "consequently|nevertheless|notwithstanding|subsequently|respectively|regarding|concerning|with regard to|"
    "with respect to|in accordance with|in order to|in addition|in light of|on behalf of|prior to|due to|shall|must be|"
    "may be|should you|would like to|would be grateful|would appreciate|i would|we would|it is necessary|necessary|"
    "it is important|it is essential|essential|we regret|regret|sincere*|gratitude|grateful|appreciat*|respectful*|respect|"
    "kindly|please note|please do not|do not hesitate|hesitate|further notice|further information|further|inform*|notif*|"
    "notice|announce*|request*|require*|provide*|submit*|confirm*|receive*|obtain*|ensure*|assist*|attend*|commence*|"
    "conclude*|consider*|determine*|establish*|facilitate*|indicate*|participat*|committee|board|regulation*|requirement*|"
    "agreement|documentation|application|applicant|parties|deadline|extension|resignation|decision|proposal|approved|"
    "procedure|individual|individuals|esteemed|distinguished|honoured|honored|honorable|dear sir|dear madam|sir or madam|"
    "madam|ladies and gentlemen|mr|mrs|ms|dr|yours faithfully|yours sincerely|sincerely|faithfully|best regards|cordially|"
    "thank you for|convenience|currently|effective|significant*|appropriate*|available|unavailable|consequence*|"
    "inconvenience|correspondence",
    "hey|hi|hi there|hiya|yo|yeah|yep|yup|nah|nope|ok|okay|gonna|wanna|gotta|gimme|lemme|kinda|sorta|dunno|ain't|y'all|cuz|"
    "'cause|lol|omg|haha|hehe|wow|oops|ugh|yay|whoa|phew|dude|bro|buddy|pal|mate|guy|guys|folks|kid|kids|mom|dad|cool|"
    "awesome|super|totally|crazy|nuts|crap|damn|hell|heck|stuff|thingy|bunch|a bunch|tons of|a ton|lots of|loads of|a lot|"
    "pretty much|really|just|so cool|no way|no worries|no problem|what's up|how's it going|hang out|chill|grab|grab a bite|"
    "freak*|mess up|messed up|screw*|hook up|catch you later|see ya|bye|cheers|thanks|thanks a bunch|sorry|anyway|anyways|"
    "well|you know|i mean|guess|i guess|like it|feel like|boring|weird|dumb|big deal|let's|the best|check it out|check out|"
    "right",
    neutral_words=30,
)  # fmt: skip
_CONTRACTION = re.compile(r"\b\w+(?:n't|'(?:m|re|ve|ll|d|s))\b")
# of a person or a thing that is named: not a contraction for sure
_POSSESSIVE = re.compile(
    r"(?<!\bit)(?<!\bhe)(?<!\bshe)(?<!\bthat)(?<!\bwhat)(?<!\bhow)(?<!\bthere)(?<!\bhere)(?<!\bwho)(?<!\blet)'s$"
)
_LONG = 9
_EMOJI = re.compile("[\u2600-\u27bf\U0001f300-\U0001faff]|[:;]-?[)(DP]")


def score_formality(text: str) -> float:
    """The formality of ``text``, -1 (casual) to 1 (formal); 0.0 for text without a sign of either.

    Counts different phrases of official and of casual English (:class:`~.lexical.Lexicon`). Contractions, exclamation marks
    and emoticons count as casual; words of nine letters and more as formal, a third each.
    """
    plain = text.replace("\u2019", "'").casefold()
    contractions = {c for c in _CONTRACTION.findall(plain) if not _POSSESSIVE.search(c)}
    loud = min(2, plain.count("!")) * 0.5 + min(2, len(_EMOJI.findall(text)))
    long = {w.casefold() for w in words(text) if len(w) >= _LONG and w.isalpha()}
    return _LEXICON.balance(text, positive=len(long) / 3, negative=len(contractions) + loud)
