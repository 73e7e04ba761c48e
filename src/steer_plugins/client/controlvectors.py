"""Control vectors among the flags of llama-server, looked at before it starts.

llama.cpp logs what is wrong with such a file and serves on without it, so nobody would see that nothing is steered.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import EngineError, SteerError
from ..store.gguf import read_gguf


def check_control_vectors(args: Sequence[str], model: str | os.PathLike[str] | None) -> None:
    """Raise EngineError for a control vector that llama-server would leave out, or of which it would leave out a part.

    Args:
        args: flags of llama-server; what it refuses by itself is left to it.
        model: the GGUF file that it loads, None when only the flags say.
    """
    files = list(_named(args))
    if not files:
        return
    n_embd, n_layer = _shape(model)
    first, last = _range(args)
    width = n_embd
    for file in files:
        layers, length = _directions(file)
        if width is not None and length != width:
            what = "the states of the model" if width == n_embd else "those before it"
            raise EngineError(f"the control vector {file} has directions of {length} numbers, {what} have {width}: leave it out")
        width = length
        if n_layer is not None and layers[-1] >= n_layer:
            raise EngineError(
                f"the control vector {file} names layer {layers[-1]}, and the model has 0 to {n_layer - 1}: "
                "leave it out, or convert it with steer convert"
            )
        if not any(first <= layer and (last is None or layer <= last) for layer in layers):
            raise EngineError(
                f"--control-vector-layer-range holds none of the layers of {file}: it has {layers[0]} to {layers[-1]}"
            )


def _named(args: Sequence[str]) -> Iterator[Path]:
    for flag, value in zip(args, args[1:], strict=False):
        name = flag_name(flag)
        if name not in ("--control-vector", "--control-vector-scaled"):
            continue
        for item in next(csv.reader([value]), []):
            if name == "--control-vector-scaled":
                item, colon, scale = item.partition(":")
                if not colon or ":" in scale:
                    continue  # llama-server says what is wrong with it
                _check_scale(item, scale)
            yield Path(item)


def _check_scale(file: str, text: str) -> None:
    try:
        scale = float(text)
    except ValueError:
        return  # llama-server says so
    if not math.isfinite(scale):
        raise EngineError(f"the scale of the control vector {file} is {text}: give a finite number")


def _directions(path: Path) -> tuple[list[int], int]:
    """The layers of a file, sorted, and the length of its directions."""
    from ..store.foreign.gguftensors import read_directions

    try:
        directions = read_directions(path).directions
    except OSError as error:
        raise EngineError(f"the control vector {path} cannot be read: {error.strerror or error}") from None
    except SteerError as error:
        raise EngineError(f"the control vector {path} is not one: {error}") from None
    return sorted(directions), len(next(iter(directions.values())))


def _shape(model: str | os.PathLike[str] | None) -> tuple[int | None, int | None]:
    """(n_embd, n_layer) of a model file; None where it does not say, or cannot be read: then it does not load either."""
    if model is None:
        return None, None
    try:
        header = read_gguf(model)
        architecture = header.values.get("general.architecture")
        return header.integer(f"{architecture}.embedding_length"), header.integer(f"{architecture}.block_count")
    except (SteerError, OSError):
        return None, None


def _range(args: Sequence[str]) -> tuple[int, int | None]:
    """The layers that control vectors act on, both included; None: to the last."""
    found: tuple[int, int | None] = (1, None)
    for flag, start, end in zip(args, args[1:], args[2:], strict=False):
        if flag_name(flag) == "--control-vector-layer-range":
            try:
                found = (max(1, int(start)), int(end) if int(end) > 0 else None)
            except ValueError:
                pass  # llama-server says so
    return found


def flag_name(arg: str) -> str:
    """A flag as llama-server reads it: dashes and underscores are alike in long ones."""
    return arg.replace("_", "-") if arg.startswith("--") else arg
