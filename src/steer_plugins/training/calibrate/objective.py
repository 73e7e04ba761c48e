"""What calibration tries to move: a metric of the steered texts, or the log probability of held-out answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ...engine.base import Engine, GenerateRequest, Generation
from ...engine.base import Prompt as EnginePrompt
from ...errors import DataError
from ...metrics import reply_tokens
from ..extract.base import Pair, Side

ANSWER_TOKENS = 24
"""Length of held-out answers that have to be generated."""

OPENING_TOKENS = 6
"""A plain text has no user turn: so many of its tokens (at most a third of it) are the sweep's prompt."""

Scored = tuple[EnginePrompt, str | list[int]]
"""A prompt and the answer whose log probability is taken."""


class Objective(ABC):
    """A score for each prompt that grows towards the positive pole, and the prompts of the sweep's texts."""

    kind: str
    name: str
    unit: str
    of: str
    prompts: list[EnginePrompt]
    reply_tokens: int = 0
    """How long the sweep's texts have to be at least; 0 if nobody knows."""

    @abstractmethod
    def scores(self, engine: Engine, steering: Any, replies: Sequence[Generation], n: int) -> list[float]:
        """Up to ``n`` scores of one strength. ``replies``: what ``steering`` made of up to ``n`` of the first prompts."""

    def tokens(self, n: int) -> int:
        """Tokens that :meth:`scores` sends through the model."""
        return 0


class TextObjective(Objective):
    """A metric of the text alone."""

    kind = "metric"
    unit = "score"
    of = "prompts"

    def __init__(self, name: str, metric: Callable[[str], float], prompts: Iterable[EnginePrompt]) -> None:
        self.name = name
        self.prompts = list(prompts)
        self._metric = metric
        self.reply_tokens = reply_tokens(metric, 0)

    def scores(self, engine: Engine, steering: Any, replies: Sequence[Generation], n: int) -> list[float]:
        """The metric of each reply."""
        return [float(self._metric(reply.text)) for reply in replies]


class ContrastObjective(Objective):
    """Mean log probability per token of the positive answer minus that of the negative one, under the steering.

    Answers are scored after the pair's turns without system prompts: one that asks for a pole would hide what steering
    does. Answers that the pairs lack are generated greedily, each after its own side's prompt. Plain texts are scored from
    where they part, and their first tokens are the sweep's prompts. (The log-probability contrast of Rimsky et al.,
    "Steering Llama 2 via Contrastive Activation Addition", 2023.)
    """

    kind = "logprob-contrast"
    name = "logprob-contrast"
    unit = "nats per token"
    of = "pairs"

    def __init__(self, engine: Engine, pairs: Sequence[Pair], *, thinking: bool | None = False) -> None:
        """Raises DataError when the pairs hold nothing that could be scored."""
        self._thinking = thinking
        self._items: list[tuple[Scored, Scored]] = []
        self.prompts = []
        sides = [side for pair in pairs if _is_chat(pair) for side in (pair.positive, pair.negative)]
        answers = iter(_answers(engine, sides, thinking))
        for pair in pairs:
            if _is_chat(pair):
                scored = [(_turns(engine, side, thinking), next(answers)) for side in (pair.positive, pair.negative)]
                self._add_prompts(prompt for prompt, _ in scored)
                if all(answer for _, answer in scored):
                    self._items.append((scored[0], scored[1]))
            else:
                self._add_texts(engine, pair)
        if not self._items:
            raise DataError("none of the held-out pairs has answers that could be scored: give longer texts or answers")

    def scores(self, engine: Engine, steering: Any, replies: Sequence[Generation], n: int) -> list[float]:
        """Contrasts of the first ``n`` held-out pairs; the replies are not looked at."""
        items = [scored for pair in self._items[:n] for scored in pair]
        means = [float(one.mean()) for one in engine.logprobs(items, steering=steering, thinking=self._thinking)]
        return [positive - negative for positive, negative in zip(means[::2], means[1::2], strict=True)]

    def tokens(self, n: int) -> int:
        """See :meth:`Objective.tokens`; an answer that is text counts a token for three characters."""
        items = [scored for pair in self._items[:n] for scored in pair]
        return sum(len(p) + (len(a) // 3 if isinstance(a, str) else len(a)) for p, a in items)

    def _add_texts(self, engine: Engine, pair: Pair) -> None:
        positive, negative = engine.tokenize(pair.positive.prompt), engine.tokenize(pair.negative.prompt)
        shortest = min(len(positive), len(negative))
        if shortest < 2:
            return
        shared = 0
        while shared < shortest - 1 and positive[shared] == negative[shared]:
            shared += 1
        # without a BOS token two texts may part at once; then the first token is the prompt of each
        shared = max(shared, 1)
        self._items.append(((positive[:shared], positive[shared:]), (negative[:shared], negative[shared:])))
        self._add_prompts(text[: max(1, min(OPENING_TOKENS, len(text) // 3))] for text in (positive, negative))

    def _add_prompts(self, prompts: Iterable[EnginePrompt]) -> None:
        for prompt in prompts:
            if prompt not in self.prompts:
                self.prompts.append(prompt)


def _is_chat(pair: Pair) -> bool:
    return not isinstance(pair.positive.prompt, str)


def _turns(engine: Engine, side: Side, thinking: bool | None) -> EnginePrompt:
    """Token ids of a chat without its system prompts."""
    messages = [message for message in side.prompt if isinstance(message, dict) and message["role"] != "system"]
    return engine.tokenize(messages, thinking=thinking)


def _answers(engine: Engine, sides: Sequence[Side], thinking: bool | None) -> list[str | list[int]]:
    """Each side's answer, given or generated."""
    missing = [i for i, side in enumerate(sides) if side.response is None]
    requests = [GenerateRequest(sides[i].prompt, max_tokens=ANSWER_TOKENS, thinking=thinking) for i in missing]
    answers: list[str | list[int]] = [side.response or "" for side in sides]
    for i, reply in zip(missing, engine.generate_many(requests), strict=True):
        answers[i] = reply.tokens
    return answers
