"""A sparse autoencoder as arithmetic: from hidden states to a few active features, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..atomic import write_atomically
from ..errors import VectorError
from ..store.foreign.common import clip, load_json
from ..store.foreign.neuronpedia import place_of_hook

Floats = npt.NDArray[np.float32]

WEIGHTS = "sae_weights.safetensors"
CONFIG = "cfg.json"
ARCHITECTURES = ("standard", "topk", "jumprelu", "batchtopk")
"""Of SAELens folders whose encoder can be computed here; ``batchtopk`` is stored as ``jumprelu`` since SAELens 6."""

MAX_CODE_BYTES = 8 << 30
"""Larger weights are refused unread."""

_CHUNK = 1024
_HOOKS = {"resid_post": "hook_resid_post", "attn_out": "hook_attn_out", "ffn_out": "hook_mlp_out"}


@dataclass(frozen=True)
class SparseCode:
    """An autoencoder at one layer and site: ``z = φ(h W_enc + b_enc)``, ``ĥ = z W_dec + b_dec``.

    φ keeps what is above ``threshold`` (JumpReLU; a ReLU where all are 0) or, with ``k``, the k largest positive values.

    Attributes:
        w_enc: float32 [n_embd, n_features]; ``b_enc``: float32 [n_features]; ``threshold``: float32 [n_features].
        w_dec: float32 [n_features, n_embd]; ``b_dec``: float32 [n_embd]. Both in units of the hidden state.
        layer: 0-based block; ``site``: where in it, ``resid_post`` for the block's output.
        k: features per token of a TopK code, None for a threshold.
        notes: what the file says of its making, for people.
    """

    w_enc: Floats
    b_enc: Floats
    w_dec: Floats
    b_dec: Floats
    threshold: Floats
    layer: int
    site: str = "resid_post"
    k: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, d = self.w_dec.shape if self.w_dec.ndim == 2 else (0, 0)
        shapes = {"w_enc": (d, n), "b_enc": (n,), "b_dec": (d,), "threshold": (n,)}
        for name, shape in shapes.items():
            if n == 0 or getattr(self, name).shape != shape:
                raise VectorError(f"the autoencoder's {name} has shape {list(getattr(self, name).shape)}, not {list(shape)}")
        if self.k is not None and not 0 < self.k <= n:
            raise VectorError(f"the autoencoder keeps {self.k} of {n} features: that is not between 1 and {n}")

    @property
    def n_features(self) -> int:
        """Number of features (latents)."""
        return int(self.w_dec.shape[0])

    @property
    def n_embd(self) -> int:
        """Width of the hidden states."""
        return int(self.w_dec.shape[1])

    def encode(self, rows: npt.ArrayLike, features: Sequence[int] | None = None) -> Floats:
        """Activations of hidden states.

        Args:
            rows: [n, n_embd].
            features: only these columns; a TopK code still compares all of them.

        Returns:
            float32 [n, n_features], or [n, len(features)], zero where a feature is not active.
        """
        rows = np.asarray(rows, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.n_embd:
            raise VectorError(f"hidden states of shape {list(rows.shape)} do not fit an autoencoder of width {self.n_embd}")
        columns = slice(None) if features is None or self.k is not None else np.asarray(features, np.intp)
        parts = []
        for first in range(0, len(rows), _CHUNK):
            z = rows[first : first + _CHUNK] @ self.w_enc[:, columns] + self.b_enc[columns]
            if self.k is None:
                parts.append(np.where(z > np.maximum(self.threshold[columns], 0.0), z, np.float32(0.0)))
            else:
                kept = keep_largest(np.maximum(z, 0.0), self.k)
                parts.append(kept if features is None else kept[:, np.asarray(features, np.intp)])
        width = self.n_features if features is None else len(features)
        return np.concatenate(parts) if parts else np.zeros((0, width), np.float32)

    def decode(self, activations: Floats) -> Floats:
        """Hidden states of activations: float32 [n, n_embd]."""
        return activations @ self.w_dec + self.b_dec

    def reconstruct(self, rows: npt.ArrayLike) -> Floats:
        """``decode(encode(rows))`` in bounded memory."""
        rows = np.asarray(rows, np.float32)
        parts = [self.decode(self.encode(rows[i : i + _CHUNK])) for i in range(0, len(rows), _CHUNK)]
        return np.concatenate(parts) if parts else np.zeros_like(rows)

    # ---- files ----

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder that SAELens 6 reads (``SAE.load_from_disk``): weights, then ``cfg.json``. Raises VectorError."""
        from safetensors.numpy import save

        folder = Path(folder)
        tensors = {"W_enc": self.w_enc, "b_enc": self.b_enc, "W_dec": self.w_dec, "b_dec": self.b_dec}
        config: dict[str, Any] = {
            "architecture": "topk" if self.k is not None else "jumprelu",
            "d_in": self.n_embd,
            "d_sae": self.n_features,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {"hook_name": f"blocks.{self.layer}.{_HOOKS[self.site]}", **self.notes},
        }
        if self.k is not None:
            config["k"] = self.k
            config["rescale_acts_by_decoder_norm"] = False
        else:
            tensors["threshold"] = self.threshold
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / WEIGHTS, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))
            write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        except OSError as error:
            raise VectorError(f"cannot write the autoencoder to {folder}: {error.strerror or error}") from None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SparseCode:
        """The autoencoder in a SAELens folder. Raises VectorError with one sentence for whatever cannot be computed exactly."""
        folder = Path(folder)
        weights, config_file = folder / WEIGHTS, folder / CONFIG
        if not weights.is_file() or not config_file.is_file():
            raise VectorError(f"{folder} is not an autoencoder's folder: it needs {WEIGHTS} and {CONFIG}")
        if weights.stat().st_size > MAX_CODE_BYTES:
            raise VectorError(f"{weights} is larger than {MAX_CODE_BYTES >> 30} GiB: use an autoencoder with fewer features")
        try:
            config = load_json(config_file)
            architecture = config.get("architecture", "standard")
            if architecture not in ARCHITECTURES:
                raise VectorError(f"its architecture is {clip(architecture)}: {', '.join(ARCHITECTURES)} can be encoded")
            normalise = config.get("normalize_activations", "none")
            if normalise not in ("none", None):
                raise VectorError(f"it normalises its input by {clip(normalise)}: fold that into the weights first")
            inner = config.get("metadata")
            metadata = inner if isinstance(inner, dict) else {}
            hook = metadata.get("hook_name", config.get("hook_name", config.get("hook_point")))
            layer, site = place_of_hook(
                hook, metadata.get("hook_layer", config.get("hook_layer", config.get("hook_point_layer")))
            )
            tensors = _tensors(weights)
        except VectorError as error:
            raise VectorError(f"{folder}: {error}") from None
        w_enc, b_enc, w_dec, b_dec = (tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
        n = w_dec.shape[0]
        # Before 6.0 subtracting b_dec from the input was the default.
        if config.get("apply_b_dec_to_input", "metadata" not in config):
            b_enc = b_enc - b_dec @ w_enc
        k = config.get("k") if architecture in ("topk", "batchtopk") and "threshold" not in tensors else None
        if k is not None and (not isinstance(k, int) or isinstance(k, bool)):
            raise VectorError(f"{folder}: its k is {clip(k)}, not a whole number")
        if architecture in ("topk", "batchtopk") and k is None and "threshold" not in tensors:
            raise VectorError(f"{folder}: it says neither k nor a threshold, so which features are active is not known")
        if config.get("rescale_acts_by_decoder_norm"):
            norms = np.linalg.norm(w_dec, axis=1)
            w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms, w_dec / np.maximum(norms, 1e-12)[:, None]
        threshold = tensors.get("threshold", np.zeros(n, np.float32))
        notes = {key: value for key, value in metadata.items() if key not in ("hook_name", "hook_layer")}
        return cls(w_enc, b_enc, w_dec, b_dec, threshold, layer, site, k, notes)


def keep_largest(values: Floats, k: int) -> Floats:
    """``values`` [n, m] with all but the k largest of each row set to 0."""
    if k >= values.shape[1]:
        return values
    kept = np.argpartition(values, values.shape[1] - k, axis=1)[:, -k:]
    result = np.zeros_like(values)
    np.put_along_axis(result, kept, np.take_along_axis(values, kept, axis=1), axis=1)
    return result


def _tensors(path: Path) -> dict[str, Floats]:
    """The weights as float32, checked to be finite. Raises VectorError."""
    from safetensors import SafetensorError, safe_open

    wanted = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    try:
        with safe_open(str(path), framework="numpy") as file:
            found = {name: file.get_tensor(name).astype(np.float32) for name in wanted if name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError, OSError) as error:
        raise VectorError(f"its weights cannot be read ({str(error)[:200]})") from None
    missing = [name for name in wanted[:4] if name not in found]
    if missing:
        raise VectorError(f"its weights lack {missing[0]}")
    for name, tensor in found.items():
        if not np.isfinite(tensor).all():
            raise VectorError(f"its {name} is not finite")
    if found["W_enc"].ndim != 2 or found["W_dec"].ndim != 2:
        raise VectorError("its W_enc and W_dec are not matrices")
    return found
