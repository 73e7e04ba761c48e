"""How much an English explanation helps to find a fault: causes, checks and values, against vague comfort."""

from __future__ import annotations

import re

from .lexical import Lexicon

_LEXICON = Lexicon(
    "because|cause|causes|caused by|root cause|reason is|which is why|this means|means that|due to|since|instead of|"
    "reproduc*|isolate*|bisect|breakpoint*|debug*|debugger|inspect*|print|prints|printed|log|logs|logged|logging|trace|"
    "stack trace|traceback|trigger*|check|checks|verify|confirm|compare*|comparison|measure*|test|tests|unit test*|"
    "failing test|assert*|run|rerun|execute|command|output|outputs|input|inputs|returns|return|returned|raise*|throw*|"
    "exception|error message|error code|exit code|status|line|line number|column|index|indices|loop|function|method|"
    "argument*|parameter*|variable*|value|values|type|string|integer|null|none|undefined|empty|missing|counter|condition|"
    "branch|statement|expected|actual|should be|race condition|thread|threads|deadlock|lock|timeout|times out|memory|leak|"
    "cache|buffer|overflow|port|firewall|server|query|database|schema|version|update|upgrade|install|dependency|"
    "dependencies|commit|config*|permission*|path|file|directory|encoding|first|then|next|finally|step|steps|step 1|step 2|"
    "before and after|minimal|set a|add a|verbose|fix|bug|milliseconds",
    "somehow|something|something went wrong|went wrong|somewhere|some kind of|sort of|kind of|probably|maybe|perhaps|"
    "might be|could be|hopefully|hope|i am not sure|i'm not sure|not sure|hard to say|hard to know|difficult to say|"
    "who knows|nobody knows|nobody really knows|no idea|whatever|whatever reason|for some reason|these things happen|"
    "it happens|just happens|one of those things|all sorts of|many reasons|various reasons|try again|try again later|"
    "keep trying|turn it off and on|just|later|sooner or later|after a while|some time|wait|patient|patience|"
    "it will be fine|is fine|will be okay|be okay|should be okay|it should work|will work|work itself out|works by itself|"
    "don't worry|do not worry|no worries|complicated|complex|tricky|mysterious|mystery|weird|strange|glitch|technology|"
    "computers|stuff|things|and so on|ask someone|gets better|better|usually|sometimes|in general|generally|in some cases|"
    "there are many|or something|like that|feel|luck*",
    neutral_words=30,
)  # fmt: skip
# inline code, calls, options, paths, names_with_underscores, CamelCaseErrors, numbered steps
_CODE = re.compile(
    r"`[^`\n]{1,80}`|\b\w{1,40}\(\w{0,40}\)|(?<!\S)--?[a-z][\w-]{0,30}|(?<!\S)/\w[\w./-]{0,60}|\b[a-z]{1,30}_[a-z_]{1,30}\b|"
    r"\b[A-Z][a-z]{1,20}(?:Error|Exception)\b|^\s{0,8}\d{1,2}[.)]\s",
    re.MULTILINE,
)


def score_debugging(text: str) -> float:
    """How debug-friendly ``text`` is, -1 (vague) to 1 (diagnostic); 0.0 for text without a sign of either.

    Counts different words of causes, checks and values, and pieces of code, against phrases that comfort and say nothing; see
    :class:`~.lexical.Lexicon`. Whether the cause is the right one it cannot tell.
    """
    pieces = {piece.strip() for piece in _CODE.findall(text)}
    # numbers of steps, paths and options add up in a listing: it is one listing
    return _LEXICON.balance(text, positive=min(4, len(pieces)))
