"""repeng on transformers, in a Python that has them: one JSON object a line in, one out. Started by ``against_repeng.py``.

Run as ``python repeng_child.py MODEL.gguf THREADS``. Imports nothing of this package, which that Python need not have. The
weights are those of the GGUF file in float32, as transformers makes them. An answer with ``error`` is one sentence.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DOSE = 1e-3
"""As in the other arms: too small to change what the model does."""


class Child:
    """The model, wrapped by repeng while it steers, and a KV cache for each arm."""

    def __init__(self, model: Path, threads: int) -> None:
        import numpy as np
        import repeng
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch, self.repeng = torch, repeng
        where, file = str(model.parent), model.name
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=file)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32).eval()
        rng = np.random.default_rng(0)
        directions = {}
        for il in range(self.model.config.num_hidden_layers):
            v = rng.standard_normal(self.model.config.hidden_size)
            directions[il] = (v / np.linalg.norm(v)).astype(np.float32)
        self.vector = repeng.ControlVector(self.model.config.model_type, directions)
        self.caches: dict[bool, Any] = {}

    @contextmanager
    def steered(self, on: bool) -> Iterator[None]:
        """With or without repeng's wrapping of every layer; setting it up is not timed."""
        if not on:
            yield
            return
        control = self.repeng.ControlModel(self.model, list(self.vector.directions))
        control.set_control(self.vector, DOSE)
        try:
            yield
        finally:
            control.unwrap()

    def compute(self, tokens: list[int], on: bool, cache: Any) -> tuple[float, float]:
        """Seconds of one forward pass, on the clock and of the processor, its logits at the last token alone."""
        ids = self.torch.tensor([tokens])
        start, cpu = time.perf_counter(), time.process_time()
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - start, time.process_time() - cpu
        self.caches[on] = out.past_key_values
        return seconds

    def answer(self, order: dict[str, Any]) -> Any:
        """What the order asks for: ``prefill``, ``decode`` or ``train``."""
        if order["do"] == "train":
            entries = [self.repeng.DatasetEntry(positive=p, negative=n) for p, n in order["pairs"]]
            start, cpu = time.perf_counter(), time.process_time()
            self.repeng.ControlVector.train(self.model, self.tokenizer, entries)
            return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        on = bool(order["steered"])
        with self.steered(on), self.torch.inference_mode():
            if order["do"] == "prefill":
                return {"seconds": [self.compute(order["tokens"], on, None)]}
            return {"seconds": [self.compute([token], on, self.caches[on]) for token in order["tokens"]]}


def versions() -> dict[str, str]:
    """Of what is compared with."""
    from importlib import metadata

    return {name: metadata.version(name) for name in ("repeng", "transformers", "torch")}


def main() -> None:
    """Answer orders until standard input ends."""
    # Python puts this folder first, where ``repeng`` would be the module beside this one
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [place for place in sys.path if os.path.abspath(place or ".") != here]
    # what libraries print must not get between the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        child = Child(Path(sys.argv[1]), int(sys.argv[2]))
        say(versions())
        for line in sys.stdin:
            say(child.answer(json.loads(line)))
    except Exception as error:  # a stranger's library: whatever it raises becomes a sentence
        say({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})


if __name__ == "__main__":
    main()
