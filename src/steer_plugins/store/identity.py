"""Which model a GGUF file holds, from its header and its norm weights, without loading it."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from ..errors import ModelError
from ..steering.vector import ModelIdentity
from .gguf import MAX_ENTRIES, GGUFHeader, read_gguf

_SHARD = re.compile(r"(?P<stem>.*)-(?P<no>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


def identity_of_gguf(path: str | os.PathLike[str]) -> ModelIdentity:
    """The identity of the model in a GGUF file; of a split model, any of its shards will do.

    Reads the header and the norm tensors only: under a second for a vocabulary of 129,000 tokens. Layers of a
    multi-token-prediction head (``nextn_predict_layers``) are not counted: they are not steered. Raises ModelError.
    """
    shards = shards_of(path)
    headers = [read_gguf(shard) for shard in shards]
    _check_split(headers)
    first = headers[0]
    architecture = first.values.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ModelError(f"{first.path} names no general.architecture, so it is not a model or is damaged")
    n_layer = first.integer(f"{architecture}.block_count") - first.integer(f"{architecture}.nextn_predict_layers", 0)
    n_embd = first.integer(f"{architecture}.embedding_length")
    n_streams = first.integer(f"{architecture}.hyper_connection.count", 1)
    if min(n_layer, n_embd, n_streams) < 1 or n_layer > 100_000:
        shape = f"{n_layer} layers of {n_embd} numbers in {n_streams} streams"
        raise ModelError(f"{first.path} claims {shape}, so it is damaged")
    if first.tokens_sha256 is None:
        raise ModelError(f"{first.path} has no token list (tokenizer.ggml.tokens), so it is not a language model")
    norms = {name: data for header in headers for name, data in header.norms.items()}
    digest = hashlib.sha256()
    for name in sorted(norms):
        digest.update(name.encode() + norms[name])
    name = first.values.get("general.name", "")
    return ModelIdentity(
        architecture=architecture,
        n_layer=n_layer,
        n_embd=n_embd,
        tokens_sha256=first.tokens_sha256,
        norms_sha256=digest.hexdigest(),
        name="".join(c for c in name if c.isprintable())[:200].strip() if isinstance(name, str) else "",
        n_streams=n_streams,
    )


def shards_of(path: str | os.PathLike[str]) -> list[Path]:
    """All files of the model that ``path`` is or is a shard of, in order; the first one is what a loader is given.

    Raises ModelError if the file, or another shard, is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelError(f"{path} is a folder: give the .gguf file in it")
    if not path.is_file():
        raise ModelError(f"there is no model file {path}")
    match = _SHARD.fullmatch(path.name)
    if not match:
        return [path]
    no, count = int(match["no"]), int(match["count"])
    if not 1 <= no <= count:
        raise ModelError(f"{path} is named as shard {no} of {count}: rename it as it was downloaded")
    shards = [path.with_name(f"{match['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    for shard in shards:
        if not shard.is_file():
            raise ModelError(f"the model {path} is split in {count} files, and {shard.name} is missing beside it")
    return shards


def _check_split(headers: list[GGUFHeader]) -> None:
    first = headers[0]
    declared = first.integer("split.count", 1, most=MAX_ENTRIES) or 1
    if declared != len(headers):
        raise ModelError(
            f"{first.path} is part of a model in {declared} files, but its name gives {len(headers)}: "
            "keep the names -00001-of-0000N.gguf"
        )
    if declared == 1:
        return
    names: set[str] = set()
    for index, header in enumerate(headers):
        if header.integer("split.no") != index or header.integer("split.count") != declared:
            raise ModelError(f"{header.path} is not shard {index + 1} of {declared}: its header says otherwise")
        if not names.isdisjoint(header.tensors):
            raise ModelError(f"{header.path} repeats a tensor of an earlier shard")
        names |= header.tensors.keys()
    total = first.values.get("split.tensors.count", len(names))
    if total != len(names):
        raise ModelError(f"{first.path} and its shards hold {len(names)} tensors, not {total!r:.40}")
