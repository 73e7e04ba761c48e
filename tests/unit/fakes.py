"""An engine without a model: hidden states, replies and log probabilities follow simple rules that tests can compute.

Tokens are code points. The hidden state of a token is the same at each layer but for a factor: ``layer + 1`` times
(mood, 1, position / 1024, 0), where mood is +1 in texts with "joy", -1 in texts with "woe", else 0. Position 0 is a sink,
1000 times as long. The reply under a steering is the number ``pull``: what the steering adds along the first axis, weighted
by layer; its log probability falls with the dose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from steer_plugins.engine.base import Activations, Engine, GenerateRequest, Generation, GenerationStream, ModelInfo
from steer_plugins.steering.terms import Steering
from steer_plugins.steering.vector import ModelIdentity

N_LAYER, N_EMBD = 10, 4
IDENTITY = ModelIdentity("llama", N_LAYER, N_EMBD, "a" * 64, "b" * 64, name="fake")


class FakeEngine(Engine):
    """``gains``: how much a layer turns into pull. ``harm``: what a unit of dose, at any layer, costs in nats per token.

    ``reply``: may replace how replies are made, ``(prompt, pull, dose, max_tokens) -> (text, finish_reason)``.
    """

    has_distributions = True

    def __init__(self, *, gains: Sequence[float] | None = None, harm: float = 1.0, chat: bool = True) -> None:
        self.info = ModelInfo(
            path="fake.gguf",
            identity=IDENTITY,
            architecture="llama",
            n_layer=N_LAYER,
            n_embd=N_EMBD,
            n_streams=1,
            n_ctx=4096,
            n_vocab=0x110000,
            sites=("resid_post",),
            last_layer_outputs_only=True,
            has_chat_template=chat,
            name="fake",
        )
        self.gains = list(gains) if gains is not None else [1.0] * N_LAYER
        self.harm = harm
        self.harm_down: float | None = None  # where the pull is negative, if it differs there
        self.reply: Any = None
        self.generated: list[GenerateRequest] = []
        self.scored: list[tuple[str, str]] = []
        self.closed = False
        self._nll: dict[str, float] = {}

    # ---- text ----

    def tokenize(self, prompt: Any, *, thinking: bool | None = None, add_generation_prompt: bool = True) -> list[int]:
        if isinstance(prompt, str):
            return [ord(c) for c in "^" + prompt]
        if prompt and isinstance(prompt[0], dict):
            text = "".join(f"<{m['role'][0]}>{m['content']}" for m in prompt)
            return self.tokenize(text + ("<a>" if add_generation_prompt else ""))
        return list(prompt)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))

    # ---- reading ----

    def _states(self, text: str, n: int, layer: int) -> np.ndarray:
        mood = ("joy" in text) - ("woe" in text)
        rows = np.zeros((n, N_EMBD), np.float32)
        rows[:, 0], rows[:, 1] = mood, 1.0
        # so that it matters which token is read
        rows[:, 2] = np.arange(n) / 1024
        rows[0] *= 1000.0
        rows[0, 3] = 1000.0
        return rows * np.float32(layer + 1)

    def _read(self, tokens: list[int], n_prompt: int, layers: Any, positions: Any, site: str) -> Activations:
        chosen = range(N_LAYER) if layers is None else layers
        n = len(tokens)
        rows = {
            "last": [n - 1],
            "all": list(range(n)),
            "mean": list(range(1, n)),
            "response_mean": list(range(n_prompt, n)),
        }[positions]
        values = {}
        for il in chosen:
            states = self._states(self.detokenize(tokens), n, il)[rows]
            values[il] = states.mean(axis=0, keepdims=True) if positions in ("mean", "response_mean") else states
        return Activations(tokens, n_prompt, [] if "mean" in positions else rows, values, site)

    def read(self, prompts: Any, *, layers: Any = None, site: str = "resid_post", positions: Any = "last", **more: Any) -> Any:
        texts = [self.tokenize(p) for p in prompts]
        return [self._read(t, len(t), layers, positions, site) for t in texts]

    def read_pairs(
        self, items: Any, *, layers: Any = None, site: str = "resid_post", positions: Any = "response_mean", **more: Any
    ) -> Any:
        found = []
        for prompt, response in items:
            tokens = self.tokenize(prompt)
            answer = [ord(c) for c in response] if isinstance(response, str) else list(response)
            found.append(self._read(tokens + answer, len(tokens), layers, positions, site))
        return found

    # ---- generating ----

    def _pull(self, steering: Any) -> tuple[float, float]:
        pull = dose = 0.0
        for term in Steering.of(steering).terms:
            for layer, site in term.keys():
                step = term.strength * term.vector.scales[layer, site]
                pull += step * self.gains[layer] * float(term.vector.directions[layer, site][0]) / (layer + 1)
                dose += abs(step) / (layer + 1)
        return pull, dose

    def generate_many(self, requests: Sequence[GenerateRequest], *, progress: Any = None) -> list[Generation]:
        replies = []
        for request in requests:
            self.generated.append(request)
            prompt = self.tokenize(request.prompt)
            pull, dose = self._pull(request.steering)
            if self.reply is not None:
                text, reason = self.reply(self.detokenize(prompt), pull, dose, request.max_tokens)
            else:
                text, reason = f"{pull:+.4f}", "length"  # no digit four times in a row when it is 0
            harm = self.harm_down if self.harm_down is not None and pull < 0 else self.harm
            self._nll[text] = 0.7 + harm * dose
            replies.append(Generation(text, [ord(c) for c in text], prompt, reason))
        return replies

    def logprobs(self, items: Any, *, steering: Any = None, **more: Any) -> list[np.ndarray]:
        """Of replies: by the dose they were made with. Of other texts: a joyful one gains what steering pulls."""
        found = []
        for prompt, answer in items:
            text = answer if isinstance(answer, str) else self.detokenize(answer)
            self.scored.append((self.detokenize(self.tokenize(prompt)), text))
            pull, _ = self._pull(steering)
            mood = ("joy" in text) - ("woe" in text)
            found.append(np.full(len(text), -self._nll.get(text, 2.0) + mood * pull))
        return found

    def distributions(self, items: Any, *, steering: Any = None, **more: Any) -> list[np.ndarray]:
        """Of a vocabulary of two, whose second token gains what steering pulls."""
        pull, _ = self._pull(steering)
        row = np.array([0.0, pull]) - np.logaddexp(0.0, pull)
        return [np.tile(row.astype(np.float32), (len(answer), 1)) for _, answer in items]

    def stream(self, request: GenerateRequest) -> GenerationStream:
        reply = self.generate_many([request])[0]

        class Stream(GenerationStream):
            result = reply

            def __iter__(self) -> Any:
                yield from (reply.text[:2], reply.text[2:])

            def steer(self, steering: Any) -> None: ...

            def cancel(self) -> None: ...

        return Stream()

    def close(self) -> None:
        self.closed = True
