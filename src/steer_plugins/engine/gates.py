"""Deciding the gates of a steering on prompts, by reading them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..errors import SpecError
from ..steering.gate import MIN_PROMPT, Gate
from ..steering.terms import Steering
from .base import ModelInfo

Read = Callable[[Sequence[list[int]], Gate, Steering], list[npt.NDArray[np.float32]]]
"""``read(texts, gate, steering)``: for each text the state [n_embd] that the gate looks at, with the steering applied."""


def check_gates(steering: Steering, info: ModelInfo) -> None:
    """Raise SpecError for a gate that cannot be decided in this model."""
    for gate in steering.gates:
        if info.last_layer_outputs_only and gate.layer == info.n_layer - 1:
            raise SpecError(
                f"the gate {gate.vector.name!r} looks at layer {gate.layer}, which {info.architecture} computes for output "
                "tokens only: fit it at a lower layer"
            )


def decide(steering: Steering, prompts: Sequence[Sequence[int]], read: Read) -> list[Steering]:
    """The steering that each prompt (token ids) gets once its gates are decided.

    Raises:
        SpecError: a prompt that is too short.
    """
    if not steering.gates:
        return [steering.decided({})] * len(prompts)
    for prompt in prompts:
        if len(prompt) < MIN_PROMPT:
            raise SpecError(f"a gate is decided on a prompt of at least {MIN_PROMPT} tokens, this one has {len(prompt)}")
    before = steering.on_the_prompt()
    texts = [list(prompt[:-1]) for prompt in prompts]
    decisions: list[dict[tuple[str, float, str, str], bool]] = [{} for _ in prompts]
    for gate in steering.gates:
        for found, state in zip(decisions, read(texts, gate, before), strict=True):
            found[gate.key] = gate.is_open(gate.score(state))
    return [steering.decided(found) for found in decisions]
