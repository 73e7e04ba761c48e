"""How cautious English advice is: warnings, conditions and checks, against encouragement."""

from __future__ import annotations

from .lexical import Lexicon

_LEXICON = Lexicon(
    "be careful|careful|carefully|caution*|cautious*|be aware|beware|warn|warns|warning*|risk|risks|risky|danger*|hazard*|"
    "harm|harmful|unsafe|safe|safely|safer|safest|safety|accident*|injur*|fatal|poison*|toxic|emergenc*|worst|damage*|"
    "lose your|legal|illegal|lawyer|attorney|doctor|physician|expert|professional|specialist|electrician|advisor|adviser|"
    "consult*|seek|advice|advise|advised|recommend caution|second opinion|before you|before taking|before starting|"
    "before making|make sure|ensure|check|double-check|verify|inspect|read the|backup|back up|insurance|helmet|gloves|"
    "protective|precaution*|prepare|prepared|preparation|plan ahead|emergency plan|slowly|gradually|step by step|wait|"
    "do not|never|avoid|refrain|should not|shouldn't|would not|wouldn't|may|might|could|possibly|potential|potentially|"
    "however|unless|if in doubt|in doubt|it depends|depends on|depending on|consider|considering|think carefully|"
    "think twice|rule out|uncertain*|consequences|side effects|serious|seriously|mistake|not recommended|important to|"
    "limited|distance|responsib*|prudent*|wise|wisely|just in case|fall*",
    "go for it|just do it|do it|do it now|nothing can go wrong|nothing to lose|no need to worry|no need to|don't worry|"
    "do not worry|never mind|no worries|no problem|no risk|no fear|fearless*|bold*|brave*|dare|dares|daring|courage*|"
    "adventur*|take the leap|leap|dive in|dive right in|dive into|jump in|jump right in|jump into|plunge|go all in|all in|"
    "never look back|don't look back|don't think twice|don't think|don't hesitate|without hesitation|right now|right away|"
    "act now|at once|today|immediately|absolutely|definitely|certainly|of course|sure|for sure|yes|guarantee*|success*|"
    "amazing|incredible|fantastic|awesome|thrill*|excit*|fun|have fun|enjoy*|time of your life|seize the day|seize|"
    "follow your heart|chase*|dream*|trust yourself|trust your gut|believe in yourself|you've got this|you got this|"
    "you can do|can do anything|anything you want|unstoppable|conquer*|win|wins|winning|fortune favours|fortune favors|"
    "forget the rules|break the rules|what are you waiting for|be yourself|let go|let's go|let's do|embrace|confiden*|"
    "limitless|no limits|live a little|go big|you don't need|don't be afraid|do not be afraid|don't let fear",
    neutral_words=30,
)  # fmt: skip


def score_caution(text: str) -> float:
    """The caution of ``text``, -1 (bold) to 1 (cautious); 0.0 for text without a sign of either.

    Counts different warnings, conditions, checks and referrals to experts against encouragements; see
    :class:`~.lexical.Lexicon`. "Don't worry" is not a warning, although "do not" is.
    """
    return _LEXICON.balance(text)
