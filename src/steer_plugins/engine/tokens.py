"""What engines have in common that work on token ids: what to read is settled here, how it is read is theirs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from ..errors import SpecError
from .base import Activations, Engine, GenerateRequest, Progress, Prompt


class TokenEngine(Engine):
    """An engine whose texts are token ids before anything is computed."""

    def read(
        self,
        prompts: Sequence[Prompt],
        *,
        layers: Sequence[int] | None = None,
        site: str = "resid_post",
        positions: str | Sequence[int] = "last",
        stream: str = "mean",
        steering: Any = None,
        max_tokens: int = 0,
        thinking: bool | None = None,
        progress: Progress | None = None,
    ) -> list[Activations]:
        texts = [self._fitting(self.tokenize(p, thinking=thinking)) for p in prompts]
        lengths = [len(t) for t in texts]
        if max_tokens > 0:
            requests = [GenerateRequest(prompt=t, steering=steering, max_tokens=max_tokens) for t in texts]
            texts = [t + g.tokens for t, g in zip(texts, self.generate_many(requests), strict=True)]
        return self._read(list(zip(texts, lengths, strict=True)), layers, site, positions, stream, steering, progress)

    def read_pairs(
        self,
        items: Sequence[tuple[Prompt, str | list[int]]],
        *,
        layers: Sequence[int] | None = None,
        site: str = "resid_post",
        positions: str | Sequence[int] = "response_mean",
        stream: str = "mean",
        steering: Any = None,
        thinking: bool | None = None,
        progress: Progress | None = None,
    ) -> list[Activations]:
        pairs = [self._pair(item, thinking) for item in items]
        return self._read(pairs, layers, site, positions, stream, steering, progress)

    def _check_site(self, site: str) -> None:
        if site not in self.info.sites:
            raise SpecError(f"site '{site}' is not available in {self.info.architecture}: use {', '.join(self.info.sites)}")

    def _named_layers(self, layers: Sequence[int] | None, site: str, stream: str) -> list[int] | None:
        """The layers to read in order, None for all that can be; checks the site and the stream too. Raises SpecError."""
        chosen = None if layers is None else sorted({int(il) for il in layers})
        bad = [il for il in chosen or () if not 0 <= il < self.info.n_layer]
        if bad or chosen == []:
            what = f"layer {bad[0]} does not exist" if bad else "no layer was named"
            raise SpecError(f"{what}: this model has layers 0 to {self.info.n_layer - 1}")
        self._check_site(site)
        if stream not in ("mean", "all"):
            raise SpecError(f"unknown stream '{stream}': read the mean, or all")
        return chosen

    @abstractmethod
    def _fitting(self, tokens: list[int]) -> list[int]:
        """The tokens, if they fit the context. Raises DataError."""

    @abstractmethod
    def _pair(self, item: tuple[Prompt, str | list[int]], thinking: bool | None) -> tuple[list[int], int]:
        """Ids of prompt and response, and how many of them are prompt. Raises DataError."""

    @abstractmethod
    def _read(
        self,
        pairs: list[tuple[list[int], int]],
        layers: Sequence[int] | None,
        site: str,
        positions: str | Sequence[int],
        stream: str,
        steering: Any,
        progress: Progress | None,
    ) -> list[Activations]:
        """Read texts, each with its number of prompt tokens. Raises SpecError for what cannot be read."""
