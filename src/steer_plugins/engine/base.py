"""What every engine can do: read activations, generate with steering, score text. One interface, several back ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..steering.terms import Steering
from ..steering.vector import ModelIdentity, SteeringVector

if TYPE_CHECKING:
    from ..store.library import Library

Prompt = str | list[dict[str, str]] | list[int]
"""Raw text (special tokens are parsed), chat messages (``role``, ``content``), or token ids."""

Progress = Callable[[int, int], None]
"""Called with (done, total) while a long call runs; units are the call's own (prompts, tokens, requests)."""

POSITIONS = ("last", "all", "mean", "response", "response_mean")


@dataclass(frozen=True)
class ModelInfo:
    """What is known about a loaded model. ``n_ctx`` is the context of one request in tokens."""

    path: str
    identity: ModelIdentity
    architecture: str
    n_layer: int
    n_embd: int
    n_streams: int
    n_ctx: int
    n_vocab: int
    sites: tuple[str, ...]
    last_layer_outputs_only: bool
    has_chat_template: bool
    name: str


@dataclass
class Activations:
    """Hidden states of one prompt, read after any edit.

    Attributes:
        tokens: ids of the whole sequence.
        n_prompt: how many of them are prompt; the rest is response.
        positions: which positions the rows belong to; empty for a mean.
        values: layer -> float32 [n_rows, n_embd], or [n_rows, n_streams, n_embd] when all streams were read.
        site: where in the block.
    """

    tokens: list[int]
    n_prompt: int
    positions: list[int]
    values: dict[int, npt.NDArray[np.float32]]
    site: str


@dataclass
class Generation:
    """One reply. ``finish_reason``: ``stop`` (end of text or stop string), ``length`` or ``cancelled``."""

    text: str
    tokens: list[int]
    prompt_tokens: list[int]
    finish_reason: str


@dataclass
class GenerateRequest:
    """One request for :meth:`Engine.generate_many`. ``temperature`` 0 is greedy. ``steering``: anything ``Steering.of`` takes.

    ``probe``: vectors that ``GenerationStream.projections`` follows (:meth:`Engine.stream` only).
    """

    prompt: Prompt
    steering: Any = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = 0
    stop: Sequence[str] = field(default_factory=tuple)
    thinking: bool | None = None
    probe: Sequence[SteeringVector] = field(default_factory=tuple)


class Engine(ABC):
    """A model that can be read and steered. Use it as a context manager, or call :meth:`close`.

    All methods raise :class:`~steer_plugins.errors.SteerError` with one sentence for what a user can put right:
    a prompt longer than the context, a vector of another model, a site the architecture lacks.
    """

    info: ModelInfo
    mixed_positions: bool = False
    """Whether :meth:`read_pairs` also takes ``positions`` as a list of words, one for each item."""
    has_distributions: bool = False
    """Whether :meth:`distributions` can be asked for."""
    library: Library | None = None
    """Where :meth:`steering` looks names up; the user's own when None."""

    def steering(
        self,
        wish: Any,
        *,
        vectors: Mapping[str, SteeringVector] | None = None,
        names_only: bool = False,
        force: bool = False,
    ) -> Steering:
        """What a wish means for this model: the one way from what users write to what engines apply.

        Args:
            wish: a text of the grammar (``mood:0.6 + !hedging``), its terms (``TermSpec``, or canonical JSON), or what
                :meth:`Steering.of` takes.
            vectors: vectors that go by these names here, whatever the library has.
            names_only: refuse terms that name a file: for what strangers send.
            force: take a vector of another fine-tune of this model.

        Raises:
            SpecError: the wish is wrong, or names a file where it must not.
            MissingVector: there is no vector of such a name for this model.
            VectorError: a vector is unreadable or does not fit.
        """
        from ..steering.grammar import steering_of, terms_of
        from ..store.features import as_features
        from ..store.library import Library

        terms = terms_of(wish)
        if terms is None:
            return Steering.of(wish)
        library, given = self.library or Library(), vectors or {}

        def find(name: str) -> SteeringVector:
            if name in given:
                given[name].check_fits(self.info.identity, force=force)
                return given[name]
            return library.resolve(name, self.info.identity, names_only=names_only, force=force)

        return steering_of(as_features(terms, library.root, self.info.identity), find)

    @abstractmethod
    def tokenize(self, prompt: Prompt, *, thinking: bool | None = None, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a prompt, as :meth:`generate` would feed them (BOS where the model wants it)."""

    @abstractmethod
    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of tokens; special tokens are left out."""

    def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        """The text of each token, for display: special tokens too, as the vocabulary writes them (``<|im_start|>``).

        Bytes, since a token may end inside a character. An engine that does not know special tokens leaves them empty.
        """
        return [self.detokenize([token]).encode() for token in tokens]

    @abstractmethod
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
        """Hidden states of each prompt; ``max_tokens`` > 0 first generates a greedy reply and reads through it.

        Args:
            layers: block indices, all of them by default.
            positions: ``last``, ``all``, ``mean`` (of all but position 0), ``response``, ``response_mean``
                (tokens after the prompt), or position indices.
            stream: ``mean`` over the hyper-connection streams, or ``all`` of them.
        """

    @abstractmethod
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
        """As :meth:`read`, through given (prompt, response) pairs: the response is forced, not generated."""

    @abstractmethod
    def stream(self, request: GenerateRequest) -> GenerationStream:
        """Generate piece by piece; iterate over the result for text, ``.steer(...)`` changes it on the way."""

    @abstractmethod
    def generate_many(self, requests: Sequence[GenerateRequest], *, progress: Progress | None = None) -> list[Generation]:
        """Generate for several requests at once, each steered on its own. ``progress`` counts requests."""

    @abstractmethod
    def logprobs(
        self,
        items: Sequence[tuple[Prompt, str | list[int]]],
        *,
        steering: Any = None,
        thinking: bool | None = None,
        progress: Progress | None = None,
    ) -> list[npt.NDArray[np.float64]]:
        """Natural log probability of each continuation token, given the prompt and the tokens before it."""

    def distributions(
        self,
        items: Sequence[tuple[Prompt, str | list[int]]],
        *,
        steering: Any = None,
        thinking: bool | None = None,
        progress: Progress | None = None,
    ) -> list[npt.NDArray[np.float32]]:
        """Natural log probabilities of the whole vocabulary at each continuation token: float32 [n_tokens, n_vocab] an item.

        Four bytes for each entry of the vocabulary and token: ask for few texts at a time.

        Raises:
            EngineError: this engine tells those of given tokens only (:attr:`has_distributions` is False).
        """
        raise EngineError("this engine tells the log probabilities of given tokens only: use the model in this process")

    @abstractmethod
    def close(self) -> None:
        """Free the model. The engine cannot be used afterwards."""

    def generate(
        self,
        prompt: Prompt,
        *,
        steering: Any = None,
        on_piece: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Generation:
        """Generate one reply; ``options`` are the other fields of :class:`GenerateRequest`."""
        stream = self.stream(GenerateRequest(prompt=prompt, steering=steering, **options))
        for piece in stream:
            if on_piece is not None:
                on_piece(piece)
        return stream.result

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class GenerationStream(ABC):
    """A reply that is being generated: iterate for pieces of text; ``result`` is complete when the iterator ends.

    ``projections``: for each vector of ``GenerateRequest.probe``, by name, the projection of the hidden state that produced the
    newest token, over the vector's dose at strength 1, averaged over its places: one more is what strength 1 adds.
    """

    result: Generation
    projections: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def __iter__(self) -> Iterator[str]: ...

    @abstractmethod
    def steer(self, steering: Any) -> None:
        """Replace the steering from the next token on. Tokens already computed stay as they are."""

    @abstractmethod
    def cancel(self) -> None:
        """Stop after the current token; ``result.finish_reason`` becomes ``cancelled``."""


def as_steering(value: Any) -> Steering:
    """``Steering.of``, under a name that reads well where requests are taken apart."""
    return Steering.of(value)
