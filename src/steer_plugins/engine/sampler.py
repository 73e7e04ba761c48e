"""llama.cpp's own sampler chain, for one sequence."""

from __future__ import annotations

from typing import Any

from ..errors import SpecError
from .base import GenerateRequest


class Sampler:
    """Greedy at temperature 0, else penalties, top-k, top-p, min-p, temperature and a seeded draw, in that order."""

    def __init__(self, llama_cpp: Any, request: GenerateRequest, n_vocab: int) -> None:
        if not request.temperature >= 0.0:
            raise SpecError(f"temperature {request.temperature} is out of range: 0 is greedy, 1 is the model's own spread")
        c = llama_cpp
        self._c = c
        self._chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        if request.repeat_penalty != 1.0:
            c.llama_sampler_chain_add(self._chain, c.llama_sampler_init_penalties(n_vocab, 64, request.repeat_penalty, 0.0, 0.0))
        if request.temperature == 0.0:
            c.llama_sampler_chain_add(self._chain, c.llama_sampler_init_greedy())
            return
        c.llama_sampler_chain_add(self._chain, c.llama_sampler_init_top_k(request.top_k))
        c.llama_sampler_chain_add(self._chain, c.llama_sampler_init_top_p(request.top_p, 1))
        c.llama_sampler_chain_add(self._chain, c.llama_sampler_init_min_p(request.min_p, 1))
        c.llama_sampler_chain_add(self._chain, c.llama_sampler_init_temp(request.temperature))
        c.llama_sampler_chain_add(self._chain, c.llama_sampler_init_dist(request.seed & 0xFFFFFFFF))

    def sample(self, context: Any, index: int) -> int:
        """Token drawn from the logits of batch entry ``index``; it is taken note of for the penalties."""
        return int(self._c.llama_sampler_sample(self._chain, context, index))

    def close(self) -> None:
        """Free the native chain."""
        if self._chain is not None:
            self._c.llama_sampler_free(self._chain)
            self._chain = None
