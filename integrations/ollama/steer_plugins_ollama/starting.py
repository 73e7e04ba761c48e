"""Starting a llama-server for the sidecar: with which variables and flags, and why it did not start."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from .errors import ApiError, BadRequest
from .key import server_key
from .model import Model
from .options import keep_alive

#: Parts of llama.cpp's log that mean a file it has no code for, as Ollama's older layouts are.
_OLD_LAYOUT = re.compile(
    r"unknown model architecture|wrong number of tensors|missing tensor|key not found in model|unknown pre-tokenizer|"
    r"check_tensor_dims|invalid (?:vector|split)|unsupported (?:mmproj|projector)|tensor .* not found",
    re.IGNORECASE,
)
_REASON = re.compile(r"(?:error loading model|failed to apply lora adapter): (.+)")


def environment() -> dict[str, str | None]:
    """Variables for a llama-server of ours: what is set for the user's own ones would make it another than is needed here."""
    others: dict[str, str | None] = {name: None for name in os.environ if name.startswith("LLAMA_")}
    return {**others, "LLAMA_API_KEY": server_key()}


_WHERE, _WHAT = "the sidecar says where it listens", "requests name the model"
#: Flags of llama-server that are the sidecar's own business, or that make something else of a llama-server.
_REFUSED = {
    **dict.fromkeys(("--host", "--port", "--reuse-port", "--api-prefix", "--ssl-key-file", "--ssl-cert-file"), _WHERE),
    **dict.fromkeys(("--api-key", "--api-key-file"), "the sidecar has a key of its own"),
    **dict.fromkeys(("-m", "--model", "-mu", "--model-url", "-hf", "-hfr", "--hf-repo", "-hff", "--hf-file"), _WHAT),
    **dict.fromkeys(("-dr", "--docker-repo", "--models-dir", "--models-preset", "--models-max"), _WHAT),
    **dict.fromkeys(("--embedding", "--embeddings", "--rerank", "--reranking"), "it would not reply then"),
    **dict.fromkeys(("-h", "--help", "--usage", "--version", "--license"), "it would end at once"),
}


def check_flags(flags: Sequence[str]) -> None:
    """Raise BadRequest for a flag that a llama-server of the sidecar's cannot have."""
    for flag in flags:
        why = _REFUSED.get(flag.partition("=")[0])
        if why is not None:
            raise BadRequest(f"{flag} cannot be among the flags of the sidecar's llama-servers: {why}, so leave it out")


def load_timeout(environ: Mapping[str, str]) -> float:
    text = environ.get("OLLAMA_LOAD_TIMEOUT", "")
    try:
        seconds = keep_alive(text) if text else 0.0
    except ApiError:
        seconds = 0.0
    return 600.0 if not seconds else min(seconds, 24 * 3600.0)


def why_not(model: Model, sentence: str, log_text: str) -> str:
    """The sentence for a model that llama-server did not load; the reason is the one that llama.cpp logs."""
    lines = log_text.splitlines()
    said = next((found[1] for found in map(_REASON.search, lines) if found), "")
    ollamas = (model.gguf.parent.parent / "manifests").is_dir()  # in a folder of the user's own, no layout is Ollama's
    if not (ollamas and _OLD_LAYOUT.search(log_text)):
        return f"{model.name} cannot be loaded: {f'{model.gguf.name[:19]}: {said[:300]}' if said else sentence}"
    reason = said or next(line for line in lines if _OLD_LAYOUT.search(line))
    return (
        f"{model.name} cannot be loaded: this llama.cpp does not know the layout of {model.gguf.name[:19]}… "
        f"({' '.join(reason.split())[-200:]}); "
        "Ollama published some models in layouts of its own: use a GGUF from elsewhere, or run `steer build --source` on a "
        "llama.cpp tree that carries Ollama's compatibility code"
    )
