"""Which terms act at which token of a sequence: scopes become sets of terms by position."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import SpecError
from ..steering.terms import Steering
from ..steering.vector import scope_range


class Phases:
    """Follows a sequence of tokens through thinking and answer, by the template's own tags.

    Args:
        n_prompt: number of prompt tokens.
        open_tag: token id of ``<think>``, None when the model has none.
        close_tag: token id of ``</think>``.
    """

    def __init__(self, prompt: Sequence[int], open_tag: int | None, close_tag: int | None) -> None:
        self.n_prompt = len(prompt)
        self._open, self._close = open_tag, close_tag
        self.thinking = False
        for token in prompt:
            self.feed(token)

    def feed(self, token: int) -> None:
        """Take note of the token that is about to be computed."""
        if self._open is not None and token == self._open:
            self.thinking = True
        elif self._close is not None and token == self._close:
            self.thinking = False


class ScopeMap:
    """Maps (position, phase) to the indices of the terms that act there.

    ``response`` starts at the last prompt token, because that token produces the first sampled one. Position 0 is a sink
    token and is left alone by every scope but an explicit range.

    Raises:
        SpecError: scope ``thinking`` for a model without thinking tags.
    """

    def __init__(self, steering: Steering, n_prompt: int, *, has_thinking: bool) -> None:
        self._n_prompt = n_prompt
        self._scopes: list[tuple[str, tuple[int, int | None] | None]] = []
        for term in steering.terms:
            scope = term.effective_scope
            if scope == "thinking" and not has_thinking:
                raise SpecError(f"Scope 'thinking' of '{term.vector.name}' needs a model with <think> tags: use response or all.")
            self._scopes.append((scope, scope_range(scope)))

    def decides(self, position: int) -> int:
        """Which token of the response (from 0) the state at a position decides; 0 before the response."""
        return max(0, position - max(1, self._n_prompt - 1))

    def active(self, position: int, thinking: bool) -> tuple[int, ...]:
        """Indices of the terms that act at a position; ``thinking`` is the phase that the token there begins or is in."""
        in_response = position >= max(1, self._n_prompt - 1)
        result = []
        for i, (scope, window) in enumerate(self._scopes):
            if window is not None:
                acts = position >= window[0] and (window[1] is None or position <= window[1])
            elif scope == "all":
                acts = position >= 1
            elif scope == "prompt":
                acts = position >= 1 and not in_response
            elif scope == "response":
                acts = in_response
            elif scope == "thinking":
                acts = in_response and thinking
            else:
                acts = in_response and not thinking
            if acts:
                result.append(i)
        return tuple(result)
