"""Engines: what reads, generates and scores, with steering."""

from .base import (
    Activations,
    Engine,
    GenerateRequest,
    Generation,
    GenerationStream,
    ModelInfo,
    Prompt,
)

__all__ = [
    "Activations",
    "Engine",
    "GenerateRequest",
    "Generation",
    "GenerationStream",
    "ModelInfo",
    "Prompt",
]
