"""The Transformers loader: the same formula through forward hooks, for one generation at a time, removed after it.

The webui holds its generation lock during a Transformers reply, so one steering is in force at a time; the reply runs in a
thread of its own, which sees what hangs on the modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from steer_plugins.errors import SpecError, SteerError, VectorError
from steer_plugins.steering.formula import edit
from steer_plugins.steering.grammar import TermSpec, steering_of
from steer_plugins.steering.terms import Steering, Term
from steer_plugins.steering.vector import SteeringVector, scope_range
from steer_plugins.store.library import Library

from . import webui, wishes
from .settings import settings

SCOPES = "all, prompt, response, or positions such as 5-20"

BLOCKS = ("model.layers", "model.language_model.layers", "language_model.model.layers", "transformer.h", "gpt_neox.layers")
"""Where models keep their decoder blocks."""

_following: list[Hooks] = []
"""Those of a reply of the page, which moved sliders change. Requests of the API keep what they began with."""


def applies() -> bool:
    """Whether the loaded model is one of the Transformers loader."""
    return webui.loader_name() == "Transformers"


def patch() -> None:
    """Wrap the webui's generation with Transformers. Nothing is imported that it has not imported itself."""
    webui.wrap(webui.module("text_generation"), "generate_reply_HF", _generate_reply)
    webui.wrap(webui.module("logits"), "_get_next_logits", _next_logits)


def _generate_reply(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate_reply_HF(question: Any, original_question: Any, state: dict[str, Any], *rest: Any, **more: Any) -> Any:
        if not webui.enabled() or not applies():
            yield from original(question, original_question, state, *rest, **more)
            return
        with _hooked_for(state) as active:
            if state.get("prompt_lookup_num_tokens"):  # then the first pass holds guesses behind the prompt
                active.n_prompt = _prompt_tokens(question, state)
            yield from original(question, original_question, state, *rest, **more)

    return generate_reply_HF


def _prompt_tokens(question: Any, state: dict[str, Any]) -> int:
    """How many tokens the webui makes of a prompt."""
    generation = webui.module("text_generation")
    limit = generation.get_max_prompt_length(state)
    return len(generation.encode(question, add_bos_token=state["add_bos_token"], truncation_length=limit)[0])


def _next_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    """With samplers it is a generation, which has its hooks already; without, the webui runs the model itself."""

    @functools.wraps(original)
    def _get_next_logits(prompt: Any, state: dict[str, Any], use_samplers: Any, *rest: Any, **more: Any) -> Any:
        if use_samplers or not webui.enabled() or not applies():
            return original(prompt, state, use_samplers, *rest, **more)
        with _hooked_for(state):
            return original(prompt, state, use_samplers, *rest, **more)

    return _get_next_logits


def _hooked_for(state: dict[str, Any]) -> AbstractContextManager[Hooks]:
    """The hooks that a generation of the webui asks for."""
    wish = wishes.wish_of(state, settings()) or []
    page = wishes.from_page(state)
    if page:
        wish = usable(wish)
    return hooked(webui.shared().model, resolve(wish), follows=page)


def usable(terms: list[TermSpec]) -> list[TermSpec]:
    """The terms that this model can have; the console names the others."""
    good, wrong = wishes.fitting(terms, check)
    for sentence in wrong:
        webui.log(f"left out: {sentence}", error=True)
    return good


def check(terms: list[TermSpec]) -> None:
    """Raise SteerError for what a hook cannot do: a vector of another shape, a scope by thinking tags, another site."""
    n_layer = len(layers_of(webui.shared().model))
    for term in resolve(terms).terms:
        check_term(term, n_layer)


def check_term(term: Term, n_layer: int) -> None:
    """As :func:`check`, for one term."""
    name = term.vector.name
    if term.effective_scope in ("thinking", "answer"):
        raise SpecError(f"{name!r} acts on {term.effective_scope}, which the Transformers loader cannot tell: use {SCOPES}")
    if term.vector.sites != ["resid_post"]:
        raise SpecError(f"{name!r} acts inside the block ({', '.join(term.vector.sites)}); hooks reach resid_post only")
    if term.gate is not None or term.schedule is not None:
        what = "a gate" if term.gate is not None else "a schedule"
        raise SpecError(f"{name!r} has {what}, which the Transformers loader cannot follow: leave it out")
    if term.stream is not None:
        raise SpecError(f"{name!r} names a stream, which models of the Transformers loader do not have")
    if term.vector.layers[-1] >= n_layer:
        raise VectorError(f"{name!r} names layer {term.vector.layers[-1]}, and this model has 0 to {n_layer - 1}")


def resolve(terms: list[TermSpec]) -> Steering:
    """The terms with their vectors. Weights in safetensors have no GGUF identity, so the shape has to do.

    Raises:
        VectorError: no vector of that name has the model's number of layers and width, or several have.
    """
    if not terms:
        return Steering()
    config = text_config(webui.shared().model)
    shape = (int(config.num_hidden_layers), int(config.hidden_size))
    return steering_of(terms, lambda name: vector_for(name, shape))


def vector_for(name: str, shape: tuple[int, int]) -> SteeringVector:
    """The library's vector of a name for a model of (n_layer, n_embd). Raises VectorError."""
    found = [
        entry
        for entry in Library().list()
        if entry.name == name and entry.identity is not None and (entry.identity.n_layer, entry.identity.n_embd) == shape
    ]
    if not found:
        raise VectorError(
            f"no vector {name!r} for a model of {shape[0]} layers and width {shape[1]}: fit it on this model's GGUF "
            f"with: steer train {name}"
        )
    if len(found) > 1:
        models = ", ".join(entry.identity.label for entry in found if entry.identity)
        raise VectorError(f"{name!r} is in the library for several models of this shape ({models}): keep one of them")
    return found[0].read()


def vectors() -> list[dict[str, Any]]:
    """What the library has for models of this shape, for the API's list."""
    if not applies():
        return []
    config = text_config(webui.shared().model)
    found = []
    for entry in Library().list():
        identity = entry.identity
        if identity and (identity.n_layer, identity.n_embd) == (config.num_hidden_layers, config.hidden_size):
            try:
                vector = entry.read()
            except SteerError:
                continue
            found.append({"name": entry.name, "layers": vector.layers, "op": vector.op, "scope": vector.default_scope})
    return found


def text_config(model: Any) -> Any:
    """The configuration of the language model, also of one that sees pictures."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def layers_of(model: Any) -> Any:
    """The list of decoder blocks.

    Raises:
        SpecError: a model that keeps its blocks where nobody would look.
    """
    for path in BLOCKS:
        found = functools.reduce(lambda at, name: getattr(at, name, None), path.split("."), model)
        if found is not None:
            return found
    raise SpecError(f"the blocks of {type(model).__name__} were not found, so it cannot be steered")


def change_running(terms: list[TermSpec]) -> None:
    """Let the running reply of the page follow, from its next token on."""
    for hooks in list(_following):
        hooks.steering = resolve(usable(terms))


class Hooks:
    """The hooks of one generation. ``steering`` may be replaced while it runs.

    ``n_prompt`` is found out by the first pass, whose tokens are the prompt, unless it is set before. With several sequences in
    a pass (beams) all are steered alike.
    """

    def __init__(self, steering: Steering) -> None:
        self.steering = steering
        self.n_prompt: int | None = None
        self.position = 0

    def hook(self, layer: int) -> Callable[..., Any]:
        """A forward hook for the block ``layer``: output [batch, tokens, n_embd], or a tuple that begins with it."""

        def steer(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            steered = self.apply(layer, hidden, first_position(kwargs, layer, self, hidden.shape[1]))
            if steered is hidden:
                return None
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        return steer

    def apply(self, layer: int, hidden: Any, start: int) -> Any:
        """``hidden`` with the formula applied where the scopes say so; itself when nothing acts there."""
        if self.n_prompt is None:
            self.n_prompt = start + hidden.shape[1]
        steering = self.steering
        if not steering:
            return hidden
        import torch

        positions = np.arange(start, start + hidden.shape[1])
        acting = [term for term in steering.terms if term.strength != 0.0 and (layer, "resid_post") in term.keys()]
        if not acting:
            return hidden
        masks = np.stack([acts(term, positions, self.n_prompt) for term in acting], axis=1).astype(np.float32)
        if not masks.any():
            return hidden
        found = edit(acting, layer)
        # float32 throughout, whatever the model computes in: a dose is small beside the hidden state
        wide = hidden.to(torch.float32)
        to = {"dtype": torch.float32, "device": hidden.device}
        write, read, bias, knee = (torch.as_tensor(x, **to) for x in (found.write, found.read, found.bias, found.knee))
        c, g = (torch.as_tensor(masks[:, found.term] * x.astype(np.float32), **to) for x in (found.c, found.g))
        z = wide @ read.T + bias
        edited = wide + (c + g * torch.where(z > knee, z, 0.0 * z)) @ write
        if found.restore:
            before, after = (x.norm(dim=-1, keepdim=True) for x in (wide, edited))
            edited = edited * torch.where(after > 0, before / after, torch.ones_like(after))
        touched = torch.as_tensor(masks.any(axis=1), device=hidden.device)[None, :, None]
        return torch.where(touched, edited.to(hidden.dtype), hidden)


def acts(term: Term, positions: np.ndarray, n_prompt: int) -> np.ndarray:
    """At which positions a term acts: bool, as ``positions``. As the engines do: ``response`` from the last prompt token."""
    scope = term.effective_scope
    window = scope_range(scope)
    if window is not None:
        lo, hi = window
        return (positions >= lo) & (positions <= (np.inf if hi is None else hi))
    in_response = positions >= max(1, n_prompt - 1)
    if scope == "response":
        return in_response
    if scope == "prompt":
        return (positions >= 1) & ~in_response
    return positions >= 1


def first_position(kwargs: dict[str, Any], layer: int, hooks: Hooks, n_tokens: int) -> int:
    """The position of the first token of a pass: from what the model says, else counted at its first block."""
    for key in ("cache_position", "position_ids"):
        value = kwargs.get(key)
        if value is not None and value.numel():
            return int(value.reshape(-1)[0])
    if layer == 0:
        hooks.position += n_tokens
    return hooks.position - n_tokens


@contextmanager
def hooked(model: Any, steering: Steering, *, follows: bool = False) -> Iterator[Hooks]:
    """Steer what runs inside. Without a steering there are no hooks, unless a live change may come (``follows``)."""
    hooks = Hooks(steering)
    handles = []
    try:
        if steering or follows:
            for layer, block in enumerate(layers_of(model)):
                handles.append(block.register_forward_hook(hooks.hook(layer), with_kwargs=True))
        if follows:
            _following.append(hooks)
        yield hooks
    finally:
        if hooks in _following:
            _following.remove(hooks)
        for handle in handles:
            handle.remove()
