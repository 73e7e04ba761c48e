"""A drop-in for ``llama_cpp.Llama`` whose calls take ``steering=``. Importing this module loads the library that is steered."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import native
from ..errors import EngineError
from ..runtime import activate, ensure_runtime
from ..steering.terms import Steering
from ..steering.vector import ModelIdentity
from ..store.identity import identity_of_gguf
from .base import as_steering
from .model import steering_of
from .steered import UNKNOWN_EDIT, SequenceSteering, SteeredContext
from .thinking import tags_of

llama_cpp = activate(ensure_runtime())
_Llama: Any = llama_cpp.Llama  # a name that exists only after the line above has chosen the library

_EDITS = "steer_edits"


@dataclass
class _Facts:
    identity: ModelIdentity
    steer: native.SteerInfo
    tags: native.Tags
    model: Any

    def token_text(self, token: int) -> bytes:
        return bytes(self.model.token_to_piece(token, special=True))


@contextmanager
def _steerable(architecture: str) -> Iterator[list[tuple[native.Steering, Any]]]:
    """Contexts that this thread makes meanwhile can be steered; gives (steering of the model, what was prepared) for each.

    ``Llama`` makes its context itself, and an unmodified library has to be told of the callback before.
    """
    low = llama_cpp.llama_cpp
    original, thread = low.llama_init_from_model, threading.get_ident()
    made: list[tuple[native.Steering, Any]] = []

    def init(model: Any, params: Any) -> Any:
        if threading.get_ident() == thread:
            steering = steering_of(llama_cpp, model, architecture)
            made.append((steering, steering.prepare(params)))
        return original(model, params)

    low.llama_init_from_model = init
    try:
        yield made
    finally:
        low.llama_init_from_model = original


class SteeredLlama(_Llama):
    """``llama_cpp.Llama`` with a ``steering=`` argument on ``__call__``, ``create_completion``, ``create_chat_completion`` and
    ``generate``: a vector, a term, a ``Steering``, a list of these, or None.

    A cached prefix is kept only as far as token and edit agree, so a reply never builds on states that another steering
    left behind. Saved states and ``set_cache`` follow the same rule. A draft model is refused with steering.
    Where the loaded library has no patch, it is steered from outside, and ``n_ubatch`` becomes ``n_batch``.

    Raises:
        SteerError: the architecture is not supported, or a vector belongs to another model.
    """

    def __init__(self, model_path: str, **kwargs: Any) -> None:
        identity = identity_of_gguf(Path(model_path))
        with _steerable(identity.architecture) as made:
            super().__init__(model_path, **kwargs)
        self._steering, prepared = made[0]
        self._facts = _Facts(
            identity=identity,
            steer=self._steering.info,
            tags=tags_of(self.metadata.get("tokenizer.chat_template")),
            model=self._model,
        )
        self._context = SteeredContext(self._facts, self._steering.attach(prepared, self._ctx.ctx))
        self._ctx.decode = self._decode
        self._edits: list[int] = []  # edit id of each token in the cache
        self._wish: Steering = Steering()
        self._live: list[Steering] = []

    def _decode(self, batch: Any) -> None:
        code = self._context.steer.decode(llama_cpp, batch.batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def close(self) -> None:
        """As ``Llama.close``."""
        super().close()
        if (context := self.__dict__.pop("_context", None)) is not None:
            context.steer.close()
            self._steering.close()

    @property
    def identity(self) -> ModelIdentity:
        """Which model this is, for the vectors that belong to it."""
        return self._facts.identity

    # ---- calls that take steering ----

    def __call__(self, *args: Any, steering: Any = None, **kwargs: Any) -> Any:
        """As ``Llama.__call__``, steered."""
        return self._steered(super().__call__, steering, args, kwargs)

    def create_completion(self, *args: Any, steering: Any = None, **kwargs: Any) -> Any:
        """As ``Llama.create_completion``, steered. Inside another steered call, that call's steering stays in force."""
        if steering is None:
            return super().create_completion(*args, **kwargs)
        return self._steered(super().create_completion, steering, args, kwargs)

    def create_chat_completion(self, *args: Any, steering: Any = None, **kwargs: Any) -> Any:
        """As ``Llama.create_chat_completion``, steered."""
        return self._steered(super().create_chat_completion, steering, args, kwargs)

    def _steered(self, call: Any, steering: Any, args: Any, kwargs: Any) -> Any:
        wish = as_steering(steering)
        before, self._wish = self._wish, wish
        try:
            result = call(*args, **kwargs)
        finally:
            self._wish = before
        return self._steered_iterator(result, wish) if isinstance(result, Iterator) else result

    def _steered_iterator(self, chunks: Iterator[Any], wish: Steering) -> Iterator[Any]:
        # a streamed call does its work while it is iterated, long after the call itself returned
        while True:
            before, self._wish = self._wish, wish
            try:
                chunk = next(chunks)
            except StopIteration:
                return
            finally:
                self._wish = before
            yield chunk

    def steer(self, steering: Any) -> None:
        """Replace the steering of the running reply from its next token on (between two chunks of a streamed call)."""
        self._live.append(as_steering(steering))

    # ---- how it is applied ----

    def generate(self, tokens: Sequence[int], *args: Any, steering: Any = None, reset: bool = True, **kwargs: Any) -> Generator:
        """As ``Llama.generate``, steered."""
        wish = self._wish if steering is None else as_steering(steering)
        if wish and self.draft_model is not None:
            raise EngineError("a draft model cannot be used with steering: load the model without draft_model")
        past = [] if reset else [int(t) for t in self._input_ids]
        prompt = past + [int(t) for t in tokens]
        self._live.clear()
        plan = SequenceSteering(self._context, wish, prompt)
        if reset:
            self._drop_stale(prompt, plan.edits())
        self._context.clear_ranges(0)
        plan.apply(0)

        inner = super().generate(tokens, *args, reset=reset, **kwargs)
        seen = list(prompt)
        sent: Any = None
        while True:
            try:
                token = inner.send(sent) if sent is not None else next(inner)
            except StopIteration:
                return
            sent = yield token
            changed = bool(self._live)
            while self._live:
                plan = SequenceSteering(self._context, self._live.pop(0), prompt)
                for earlier in seen[len(prompt) :]:
                    plan.feed(earlier)
            if plan.feed(token) or changed:
                plan.apply(0, len(seen))
            seen.append(token)

    def _drop_stale(self, prompt: list[int], edits: list[int]) -> None:
        """Cut the cache where its tokens were computed under another edit than the prompt asks for."""
        n = min(int(self.n_tokens), len(prompt))
        held = self._input_ids
        keep = 0
        while keep < n and held[keep] == prompt[keep] and self._edits[keep] == edits[keep] != UNKNOWN_EDIT:
            keep += 1
        if keep < n and held[keep] == prompt[keep]:
            if keep == 0 or not self._ctx.kv_cache_seq_rm(-1, keep, -1):
                self.reset()
                self._ctx.kv_cache_clear()
                keep = 0
            self.n_tokens: int = keep
            self._requires_eval = True
        del self._edits[keep:]

    def eval(self, tokens: Sequence[int]) -> None:
        """As ``Llama.eval``; remembers the edit of each token and proves that steered layers fired."""
        first = int(self.n_tokens)
        try:
            super().eval(tokens)
        except RuntimeError as error:
            raise EngineError(f"{error}: {self._context.steer.error()}") from None
        positions = range(first, int(self.n_tokens))
        del self._edits[first:]
        self._edits += [self._context.edit_of(0, p) for p in positions]
        self._context.check_decoded()

    def save_state(self) -> Any:
        """As ``Llama.save_state``; the state remembers the edits of its tokens."""
        state = super().save_state()
        setattr(state, _EDITS, list(self._edits[: int(self.n_tokens)]))
        return state

    def load_state(self, state: Any) -> None:
        """As ``Llama.load_state``; tokens of a state that a plain ``Llama`` saved count as unsteered."""
        super().load_state(state)
        self._edits = list(getattr(state, _EDITS, [0] * int(self.n_tokens)))
