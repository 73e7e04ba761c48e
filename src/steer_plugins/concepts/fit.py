"""Training a sparse autoencoder with numpy: BatchTopK (arXiv 2412.06410) or TopK (arXiv 2406.04093), gradients by hand, Adam.

The recipe is SAELens' where there is one: unit decoder rows, encoder starting as the decoder's transpose, an auxiliary loss for
features that went silent, and for BatchTopK a threshold averaged over batches, with which it is stored as JumpReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..atomic import write_atomically
from ..errors import DataError, SpecError
from .code import Floats, SparseCode, keep_largest

_SILENT_TOKENS = 40_000
_AUX = 1 / 32
_THRESHOLD_DECAY = 0.95  # about 20 batches: in a short run the cut still falls while features specialise


@dataclass(frozen=True)
class CodeOptions:
    """How to train.

    Attributes:
        latents: features.
        k: active features of a token (on average, for ``batchtopk``).
        method: ``batchtopk`` or ``topk``.
        steps: batches.
        batch: tokens of one.
        learning_rate: of Adam, after 50 steps of warm-up and before a decay over the last fifth.
        seed: of the initial features and the order of tokens.
        frozen_decoder: keep the random decoder as it is and train the encoder alone: the control arm of arXiv 2602.14111.
    """

    latents: int = 2048
    k: int = 24
    method: str = "batchtopk"
    steps: int = 450
    batch: int = 1024
    learning_rate: float = 2e-3
    seed: int = 0
    frozen_decoder: bool = False

    def __post_init__(self) -> None:
        if self.method not in ("batchtopk", "topk"):
            raise SpecError(f"unknown method {self.method!r}: use batchtopk or topk")
        if not 1 <= self.k <= self.latents // 2:
            raise SpecError(f"k is {self.k}: use between 1 and half of the {self.latents} latents")
        if self.steps < 1 or self.batch < 1 or self.learning_rate <= 0:
            raise SpecError("steps, batch and learning rate have to be positive")


@dataclass
class _State:
    """Parameters and Adam's moments. In the space of centred rows scaled to a mean square of 1 for each dimension."""

    w_enc: Floats
    b_enc: Floats
    w_dec: Floats
    b_dec: Floats
    step: int = 0
    threshold: float = -1.0
    moments: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)
    silent: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


class CodeFit:
    """A training run over rows [n, n_embd] of hidden states (any float type; memory-mapped ones are read batch by batch).

    ``chosen``: indices of the rows to use. :meth:`run` does the steps that are left, so a run restored by :meth:`restore` goes on
    where it was saved, with the same batches.
    """

    def __init__(self, rows: npt.NDArray[Any], chosen: npt.NDArray[np.intp], options: CodeOptions, *, layer: int) -> None:
        if len(chosen) < options.batch // 4 or len(chosen) < 2 * options.k:
            raise DataError(f"{len(chosen)} tokens are too few to train on: give more text")
        self.options, self.layer = options, layer
        self._rows, self._chosen = rows, chosen
        some = rows[np.sort(np.random.default_rng(options.seed).choice(chosen, min(len(chosen), 8192), replace=False))]
        some = some.astype(np.float32)
        self._mean = some.mean(axis=0)
        self._scale = float(1.0 / max(np.sqrt(np.mean((some - self._mean) ** 2)), 1e-12))
        self._state = self._start((some - self._mean) * self._scale)

    def _start(self, centred: Floats) -> _State:
        o = self.options
        rng = np.random.default_rng(o.seed + 1)
        d = centred.shape[1]
        noise = rng.standard_normal((o.latents, d), np.float32)
        if o.frozen_decoder:
            w_dec = _unit(noise)
        else:
            seeds = centred[rng.integers(len(centred), size=o.latents)]
            w_dec = _unit(0.7 * _unit(seeds) + 0.7 * _unit(noise))
        # a copy: the two are trained apart
        state = _State(w_dec.T.copy(), np.zeros(o.latents, np.float32), w_dec, np.zeros(d, np.float32))
        state.silent = np.zeros(o.latents, np.int64)
        for name in ("w_enc", "b_enc", "w_dec", "b_dec"):
            value = getattr(state, name)
            state.moments[name] = (np.zeros_like(value), np.zeros_like(value))
        return state

    @property
    def step(self) -> int:
        """Steps done."""
        return self._state.step

    def run(self, progress: Callable[[int, int, float], None] | None = None) -> None:
        """Do the steps that are left. ``progress`` gets (steps done, steps in all, share of variance explained in the batch).

        Ctrl-C leaves the state after the last whole step, for :meth:`save`.
        """
        o = self.options
        while self._state.step < o.steps:
            explained = self._one_step(self._batch(self._state.step))
            if progress is not None:
                progress(self._state.step, o.steps, explained)

    def _batch(self, step: int) -> Floats:
        """Rows of a step: shuffled passes over the training rows, the same for the same seed."""
        n, b = len(self._chosen), min(self.options.batch, len(self._chosen))
        per_epoch = max(1, n // b)
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng([self.options.seed, epoch]).permutation(n)[at * b : (at + 1) * b]
        rows = self._rows[np.sort(self._chosen[order])].astype(np.float32)
        return np.asarray((rows - self._mean) * np.float32(self._scale), np.float32)

    def _one_step(self, x: Floats) -> float:
        s, o = self._state, self.options
        b = len(x)
        centred = x - s.b_dec
        pre = centred @ s.w_enc + s.b_enc
        positive = np.maximum(pre, 0.0)
        z, cut = self._active(positive)
        residual = z @ s.w_dec
        residual += s.b_dec
        residual -= x
        active = z > 0
        gradient_z = residual @ s.w_dec.T
        gradient_z *= active
        weight = np.float32(2.0 / b)
        gradients = {
            "w_dec": (z.T @ residual) * weight,
            "b_dec": residual.sum(axis=0) * weight,
        }
        s.silent += b
        s.silent[active.any(axis=0)] = 0
        dead = np.flatnonzero(s.silent > _SILENT_TOKENS)
        if len(dead) and not o.frozen_decoder:
            self._revive(dead, positive, residual, gradient_z, gradients["w_dec"], b)
        gradient_z *= weight
        gradients["w_enc"] = centred.T @ gradient_z
        gradients["b_enc"] = gradient_z.sum(axis=0)
        gradients["b_dec"] -= s.w_enc @ gradients["b_enc"]
        if o.frozen_decoder:
            del gradients["w_dec"]
        else:  # only what turns a row counts: its length is kept at 1
            g = gradients["w_dec"]
            g -= (g * s.w_dec).sum(axis=1, keepdims=True) * s.w_dec
        # Adam and the count together, so that an interrupt between them cannot leave half a step
        self._adam(gradients)
        if o.method == "batchtopk":
            s.threshold = cut if s.threshold < 0 else _THRESHOLD_DECAY * s.threshold + (1 - _THRESHOLD_DECAY) * cut
        s.step += 1
        return 1.0 - float((residual**2).sum() / max(((x - x.mean(axis=0)) ** 2).sum(), 1e-12))

    def _active(self, positive: Floats) -> tuple[Floats, float]:
        """(what is kept of a batch's activations, the smallest kept one)."""
        k = self.options.k
        if self.options.method == "topk":
            return keep_largest(positive, k), 0.0
        n = min(k * len(positive), positive.size - 1)
        cut = float(np.partition(positive.ravel(), positive.size - n)[positive.size - n])
        cut = max(cut, np.finfo(np.float32).tiny)
        return np.where(positive >= cut, positive, np.float32(0.0)), cut

    def _revive(
        self, dead: npt.NDArray[np.intp], positive: Floats, residual: Floats, gradient_z: Floats, gradient_dec: Floats, b: int
    ) -> None:
        """Let the strongest silent features explain what is left over (the auxiliary loss of arXiv 2406.04093)."""
        s = self._state
        z = keep_largest(positive[:, dead], min(len(dead), max(1, residual.shape[1] // 2)))
        error = z @ s.w_dec[dead] + residual  # what is left over is -residual
        gradient_z[:, dead] += _AUX * (error @ s.w_dec[dead].T) * (z > 0)
        gradient_dec[dead] += (z.T @ error) * np.float32(_AUX * 2.0 / b)

    def _adam(self, gradients: dict[str, Floats]) -> None:
        s, o = self._state, self.options
        t = s.step + 1
        rate = o.learning_rate * min(1.0, t / 50)
        last = max(1, o.steps // 5)
        rate *= min(1.0, (o.steps - s.step) / last)
        for name, g in gradients.items():
            m, v = s.moments[name]
            m *= 0.9
            m += np.float32(0.1) * g
            v *= 0.999
            v += np.float32(0.001) * g * g
            update = m / np.float32(1 - 0.9**t)
            update /= np.sqrt(v / np.float32(1 - 0.999**t)) + np.float32(1e-8)
            getattr(s, name).__isub__(np.float32(rate) * update)
        if "w_dec" in gradients:
            s.w_dec /= np.maximum(np.linalg.norm(s.w_dec, axis=1, keepdims=True), 1e-12)

    def result(self, notes: dict[str, Any] | None = None) -> SparseCode:
        """The code so far, folded back into units of the hidden state: its decoder rows have unit length."""
        s, o = self._state, self.options
        b_enc = (s.b_enc - (self._scale * self._mean + s.b_dec) @ s.w_enc) / self._scale
        threshold = max(s.threshold, 0.0) / self._scale if o.method == "batchtopk" else 0.0
        return SparseCode(
            w_enc=s.w_enc.copy(),
            b_enc=b_enc.astype(np.float32),
            w_dec=s.w_dec.copy(),
            b_dec=(self._mean + s.b_dec / self._scale).astype(np.float32),
            threshold=np.full(o.latents, threshold, np.float32),
            layer=self.layer,
            k=o.k if o.method == "topk" else None,
            notes=notes or {},
        )

    # ---- interruption ----

    def save(self, path: Path) -> None:
        """Keep the state for :meth:`restore`. Raises OSError."""
        from safetensors.numpy import save

        s = self._state
        tensors: dict[str, npt.NDArray[Any]] = {"silent": s.silent, "numbers": np.array([s.step, s.threshold], np.float64)}
        for name, (m, v) in s.moments.items():
            tensors |= {name: getattr(s, name), f"{name}.m": m, f"{name}.v": v}
        write_atomically(path, save(tensors))

    def restore(self, path: Path) -> bool:
        """Go on from a saved state; False if it is not one of this run (another size)."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        s = self._state
        try:
            tensors = load(path.read_bytes())
            loaded = {name: tensors[name] for name in s.moments}
            moments = {name: (tensors[f"{name}.m"], tensors[f"{name}.v"]) for name in s.moments}
            step, threshold = tensors["numbers"].tolist()
        except (OSError, SafetensorError, KeyError, ValueError):
            return False
        if any(loaded[name].shape != getattr(s, name).shape for name in loaded):
            return False
        self._state = _State(**loaded, step=int(step), threshold=float(threshold), moments=moments, silent=tensors["silent"])
        return True


def _unit(rows: Floats) -> Floats:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
