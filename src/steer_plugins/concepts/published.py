"""Published autoencoders: a dozen layouts of the same four arrays, read without trust and turned into one :class:`SparseCode`.

Tensor names, transposition and folding follow what SAELens does for each family (``sae_lens/loading``).
What a layout leaves to its repository's name (the layer, k) is taken from the path or asked for, never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import VectorError
from ..paths import expand_path
from ..store.foreign.archive import Archive, NpyArray
from ..store.foreign.common import clip, load_json, reading
from ..store.foreign.neuronpedia import place_of_hook
from ..store.foreign.torchfile import read_tensors
from .code import CONFIG, MAX_CODE_BYTES, WEIGHTS, SparseCode

Tensors = dict[str, npt.NDArray[Any]]

_LAYER = re.compile(r"(?:^|[^a-z])(?:layers?[._]?|l)([0-9]{1,3})(?![0-9])", re.IGNORECASE)
_K = re.compile(r"L0[_-]?([0-9]{1,4})(?![0-9])", re.IGNORECASE)


@dataclass
class Raw:
    """What a layout says, before it is checked: ``w_enc`` [n_embd, n_features], ``w_dec`` [n_features, n_embd]."""

    family: str
    w_enc: npt.NDArray[Any]
    w_dec: npt.NDArray[Any]
    b_enc: npt.NDArray[Any] | None
    b_dec: npt.NDArray[Any] | None
    threshold: npt.NDArray[Any] | float | None = None
    k: int | None = None
    subtract_b_dec: bool = False
    input_scale: float = 1.0
    """What the autoencoder multiplies hidden states by before it reads them; folded into the weights."""
    place: tuple[int, str] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def read_published(path: str | Path, *, layer: int | None = None, site: str | None = None, k: int | None = None) -> SparseCode:
    """The autoencoder in a file or folder of any known family: see docs/concepts.md for the list.

    Args:
        layer: 0-based block, where the file does not say it; ``site``: ``resid_post``, ``attn_out`` or ``ffn_out``.
        k: active features of a TopK code whose file does not say it.

    Raises:
        VectorError: an unknown layout, a fact that is missing or contradicts the file, or an input rule that cannot be folded.
    """
    path = expand_path(path)
    if not path.exists():
        raise VectorError(f"there is no file or folder {path}")
    with reading(path):
        raw = _sniffed(path)
        if raw is None:
            code = SparseCode.load(path if path.is_dir() else path.parent)
            if layer is not None and layer != code.layer:
                raise VectorError(f"it is for layer {code.layer}: leave --layer out")
            return code
        return _finished(raw, path, layer, site, k)


def _sniffed(path: Path) -> Raw | None:
    """The layout's reading of it; None for a SAELens folder, which :class:`SparseCode` reads itself."""
    folder = path if path.is_dir() else path.parent
    if path.name == WEIGHTS or path.is_dir():
        config = folder / CONFIG
        if (folder / WEIGHTS).is_file() and config.is_file():
            return None
        readers: tuple[tuple[str, Callable[[Path], Raw]], ...] = (
            ("hyperparams.json", _llama_scope),
            ("ae.pt", _dictionary_learning),
            ("sae.safetensors", _sparsify),
            ("params.npz", _gemma_scope),
            ("params.safetensors", _gemma_scope_2),
            (WEIGHTS, _llama_scope_distill),
        )
        for name, reader in readers:
            if (folder / name).is_file():
                return reader(folder)
        raise VectorError(
            "no known autoencoder is in this folder: name its weights file, or see docs/concepts.md for the layouts"
        )
    if path.name in ("ae.pt", "sae.safetensors", "params.npz", "params.safetensors"):
        return _sniffed(folder)
    if path.suffix in (".pt", ".pth"):
        return _torch(path)
    raise VectorError("it is not an autoencoder of a known layout: see docs/concepts.md for them")


# ---- families ----


def _gemma_scope(folder: Path) -> Raw:
    """Gemma Scope 1: ``params.npz``; JumpReLU, b_dec not subtracted."""
    with Archive(folder / "params.npz", MAX_CODE_BYTES) as archive:
        tensors = {name.removesuffix(".npy"): NpyArray(archive, name).read() for name in archive.sizes}
    _need(tensors, "W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    if "scaling_factor" in tensors and not np.allclose(tensors["scaling_factor"], 1.0):
        raise VectorError("it has a scaling factor for each feature, which cannot be applied")
    return Raw("gemma-scope", *_four(tensors), threshold=tensors["threshold"])


def _gemma_scope_2(folder: Path) -> Raw:
    """Gemma Scope 2: ``params.safetensors`` with names in lower case, perhaps a ``config.json``."""
    tensors = {name.lower(): value for name, value in _safetensors(folder / "params.safetensors").items()}
    _need(tensors, "w_enc", "w_dec", "b_enc", "b_dec", "threshold")
    if "affine_skip_connection" in tensors:
        raise VectorError(
            "it is a transcoder with a skip connection, which predicts one site from another: it has no code of one state"
        )
    place = None
    config = load_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    hook = config.get("hf_hook_point_in")
    if hook is not None:
        match = re.fullmatch(r"model\.layers\.([0-9]{1,4})\.output", hook) if isinstance(hook, str) else None
        if not match:
            raise VectorError(f"it reads {clip(hook)}: the output of a block can be read")
        place = int(match[1]), "resid_post"
        if config.get("hf_hook_point_out", hook) != hook:
            raise VectorError("it is a transcoder, which predicts one site from another: it has no code of one state")
    named = {"W_enc": tensors["w_enc"], "W_dec": tensors["w_dec"], "b_enc": tensors["b_enc"], "b_dec": tensors["b_dec"]}
    return Raw("gemma-scope-2", *_four(named), threshold=tensors["threshold"], place=place)


def _llama_scope(folder: Path) -> Raw:
    """Llama Scope and OpenMOSS: transposed weights; input and threshold are scaled as a mean norm of √d asks for."""
    config = load_json(folder / "hyperparams.json")
    weights = folder / "checkpoints" / "final.safetensors"
    tensors = _linear(_safetensors(weights if weights.is_file() else folder / "final.safetensors"))
    scale = _scale_of(config)
    threshold = config.get("jump_relu_threshold")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise VectorError(f"its jump_relu_threshold is {clip(threshold)}, not a number")
    if config.get("hook_point_out", config.get("hook_point_in")) != config.get("hook_point_in"):
        raise VectorError("it is a transcoder, which predicts one site from another: it has no code of one state")
    place = place_of_hook(config.get("hook_point_in"))
    return Raw("llama-scope", *_four(tensors), threshold=float(threshold) * scale, input_scale=scale, place=place)


def _llama_scope_distill(folder: Path) -> Raw:
    """Llama Scope's R1 distill: ``config.json`` and thresholds as logarithms."""
    tensors = _safetensors(folder / WEIGHTS)
    if "log_jumprelu_threshold" not in tensors or not (folder / "config.json").is_file():
        raise VectorError(f"there is no {CONFIG} beside it, which says at which layer and site it acts")
    config = load_json(folder / "config.json")
    place = place_of_hook(config.get("hook_point_in"))
    threshold = np.exp(tensors["log_jumprelu_threshold"].astype(np.float64))
    return Raw("llama-scope-distill", *_four(_linear(tensors)), threshold=threshold, input_scale=_scale_of(config), place=place)


def _scale_of(config: dict[str, Any]) -> float:
    width, norms = config.get("d_model"), config.get("dataset_average_activation_norm")
    norm = norms.get("in") if isinstance(norms, dict) else None
    if not isinstance(width, int) or not isinstance(norm, int | float) or isinstance(norm, bool) or not norm > 0:
        raise VectorError("its configuration lacks d_model or dataset_average_activation_norm, by which its input is scaled")
    return math.sqrt(width) / float(norm)


def _sparsify(folder: Path) -> Raw:
    """EleutherAI's sparsify: TopK; b_dec is subtracted unless the decoder is not normalised; the folder names the layer."""
    if not (folder / CONFIG).is_file():
        raise VectorError(f"there is no {CONFIG} beside it, which says how many features are active")
    config = load_json(folder / CONFIG)
    tensors = _safetensors(folder / "sae.safetensors")
    named: dict[str, Any] = _linear(tensors) if "encoder.weight" in tensors else dict(tensors)
    if "W_dec" in tensors:
        named = {**named, "W_dec": tensors["W_dec"], "b_dec": tensors.get("b_dec", named.get("b_dec"))}
    if config.get("signed") or config.get("transcode") or config.get("skip_connection"):
        raise VectorError("it is signed or a transcoder: such a code cannot be computed here")
    match = re.search(r"layers[._](\d{1,4})(?:\.(mlp|attn|attention))?", folder.name)
    site = {None: "resid_post", "mlp": "ffn_out"}.get(match[2] if match else None, "attn_out")
    place = (int(match[1]), site) if match else None
    subtract = not config.get("normalize_decoder", False)
    return Raw("sparsify", *_four(named), k=_whole_k(config.get("k")), subtract_b_dec=subtract, place=place)


def _dictionary_learning(folder: Path) -> Raw:
    """dictionary_learning: ``config.json`` and ``ae.pt``; the trainer's class decides the activation."""
    if not (folder / "config.json").is_file():
        raise VectorError("there is no config.json beside it, which says at which layer it acts")
    trainer = load_json(folder / "config.json").get("trainer")
    if not isinstance(trainer, dict):
        raise VectorError("its config.json does not name a trainer")
    kind = trainer.get("dict_class")
    tensors = read_tensors(folder / "ae.pt", MAX_CODE_BYTES)
    named = _linear(tensors) if "encoder.weight" in tensors else dict(tensors)
    for other in ("bias", "decoder_bias"):
        if other in tensors and named.get("b_dec") is None:
            named["b_dec"] = tensors[other]
    raw = Raw("dictionary-learning", *_four(named))
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        raw.subtract_b_dec = kind == "AutoEncoder"
    elif kind in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        raw.subtract_b_dec = True
        if "threshold" in tensors and kind != "AutoEncoderTopK" and float(tensors["threshold"].ravel()[0]) >= 0:
            raw.threshold = float(tensors["threshold"].ravel()[0])
        else:
            raw.k = _whole_k(trainer.get("k"))
    elif kind == "JumpReluAutoEncoder":
        raw.threshold = tensors.get("threshold")
        raw.subtract_b_dec = bool(trainer.get("apply_b_dec_to_input", False))
        if raw.threshold is None:
            raise VectorError("its weights lack the threshold of a JumpReLU")
    else:
        raise VectorError(f"its class is {clip(kind)}, whose code cannot be computed here")
    block = trainer.get("layer")
    raw.place = (block, "resid_post") if isinstance(block, int) and not isinstance(block, bool) else None
    return raw


def _torch(path: Path) -> Raw:
    """A single ``.pt``: Qwen Scope (W_enc, W_dec), Goodfire (encoder_linear), qresearch's DeepSeek-R1 distill (encoder)."""
    tensors = read_tensors(path, MAX_CODE_BYTES)
    if "W_enc" in tensors:
        _need(tensors, "W_enc", "W_dec", "b_enc", "b_dec")
        named = dict(tensors)
        if tensors["W_enc"].ndim == 2 and tensors["W_enc"].shape[1] == tensors["b_dec"].size:
            named |= {"W_enc": tensors["W_enc"].T, "W_dec": tensors["W_dec"].T}
        found = _K.search(str(path.resolve().parent.name)) or _K.search(path.name)
        return Raw("qwen-scope", *_four(named), k=int(found[1]) if found else None, threshold=tensors.get("threshold"))
    family = "goodfire" if "encoder_linear.weight" in tensors else "linear"
    return Raw(family, *_four(_linear({name.replace("_linear", ""): value for name, value in tensors.items()})), threshold=0.0)


# ---- parts ----


def _safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError, safe_open

    if path.stat().st_size > MAX_CODE_BYTES:
        raise VectorError(f"{path.name} is larger than {MAX_CODE_BYTES >> 30} GiB")
    try:
        with safe_open(str(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError) as error:
        raise VectorError(f"its weights cannot be read ({str(error)[:200]})") from None


def _linear(tensors: Tensors) -> Tensors:
    """torch's Linear layers, whose weights are [out, in], as the four arrays."""
    _need(tensors, "encoder.weight")
    named: dict[str, Any] = {"W_enc": tensors["encoder.weight"].T, "b_enc": tensors.get("encoder.bias")}
    named["W_dec"] = tensors["decoder.weight"].T if "decoder.weight" in tensors else tensors.get("W_dec")
    named["b_dec"] = tensors.get("b_dec", tensors.get("decoder.bias"))
    return named


def _need(tensors: Tensors, *names: str) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise VectorError(f"its weights lack {missing[0]}")


def _four(tensors: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    for name in ("W_enc", "W_dec"):
        if tensors.get(name) is None:
            raise VectorError(f"its weights lack {name}")
    return tensors["W_enc"], tensors["W_dec"], tensors.get("b_enc"), tensors.get("b_dec")


def _whole_k(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise VectorError(f"its k is {clip(value)}, not a whole number from 1")
    return value


def _finished(raw: Raw, path: Path, layer: int | None, site: str | None, k: int | None) -> SparseCode:
    """Everything folded into one code in units of the hidden state."""
    w_enc, w_dec = (np.asarray(one, np.float32) for one in (raw.w_enc, raw.w_dec))
    if w_enc.ndim != 2 or w_dec.ndim != 2 or w_enc.shape != w_dec.shape[::-1]:
        raise VectorError(
            f"its W_enc is {list(w_enc.shape)} and its W_dec {list(w_dec.shape)}: one is not the other turned round"
        )
    d, n = w_enc.shape
    b_enc = np.zeros(n, np.float32) if raw.b_enc is None else np.asarray(raw.b_enc, np.float32).ravel()
    b_dec = np.zeros(d, np.float32) if raw.b_dec is None else np.asarray(raw.b_dec, np.float32).ravel()
    if b_enc.shape != (n,) or b_dec.shape != (d,):
        raise VectorError(f"its biases have {b_enc.size} and {b_dec.size} numbers, not {n} and {d}")
    for name, array in (("W_enc", w_enc), ("W_dec", w_dec), ("b_enc", b_enc), ("b_dec", b_dec)):
        if not np.isfinite(array).all():
            raise VectorError(f"its {name} is not finite")
    if raw.subtract_b_dec:
        b_enc = b_enc - b_dec @ w_enc
    threshold = np.zeros(n, np.float32) if raw.threshold is None else np.asarray(raw.threshold, np.float32).ravel()
    if threshold.size == 1:
        threshold = np.full(n, threshold[0], np.float32)
    if threshold.shape != (n,) or not np.isfinite(threshold).all():
        raise VectorError(f"its threshold has {threshold.size} numbers, not {n}, or is not finite")
    # z = φ(s·h W + b), ĥ = (z W_dec + b_dec) / s: the scale goes into the encoder and out of the decoder
    s = np.float32(raw.input_scale)
    place = _place(raw, path, layer, site)
    keep = raw.k
    if raw.family == "qwen-scope" and raw.threshold is None and keep is None and k is None:
        raise VectorError("its file does not say how many features are active: name it with --k, such as --k 50")
    if k is not None:
        if keep is not None and keep != k:
            raise VectorError(f"it keeps {keep} features: leave --k out")
        keep = k
    notes = {"family": raw.family, "file": path.name, **raw.notes}
    return SparseCode(w_enc * s, b_enc, w_dec / s, b_dec / s, threshold, *place, k=keep, notes=notes)


def _place(raw: Raw, path: Path, layer: int | None, site: str | None) -> tuple[int, str]:
    found = raw.place
    if found is None:
        for name in (path.name, path.parent.name, path.parent.parent.name):
            if match := _LAYER.search(name):
                found = int(match[1]), "resid_post"
                break
    if found is None and layer is None:
        raise VectorError("its file does not say at which layer it acts: name it with --layer, such as --layer 12")
    if found is None:
        return int(layer or 0), site or "resid_post"
    if raw.place is not None:
        for what, said, given in (("layer", found[0], layer), ("site", found[1], site)):
            if given is not None and given != said:
                raise VectorError(f"it is for {what} {said}: leave --{what} out")
    return (found[0] if layer is None else layer), (found[1] if site is None else site)
