"""Compiling the library that steers beside an unmodified llama.cpp: a dozen C++ files, no other library, no cmake.

Nothing of this package is imported here, as the build of the wheel uses it too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def sources_of(root: Path) -> list[Path]:
    """The files it is made of, in a ``cpp_patch`` folder: what is compiled, and the headers."""
    own = [path for path in root.iterdir() if path.name.startswith("llama-steer")]
    beside = [path for path in (root / "stock").rglob("*") if path.is_file()]
    return sorted(path for path in (*own, *beside) if path.suffix in (".h", ".cpp"))


def content_hash(root: Path) -> str:
    """sha256 (hex) over those files."""
    state = hashlib.sha256()
    for path in sources_of(root):
        data = path.read_bytes()
        state.update(f"{path.relative_to(root).as_posix()}\0{len(data)}\0".encode() + data)
    return state.hexdigest()


def library_name(root: Path) -> str:
    """What the library made of these sources is called: its name holds their hash, so that a stale one is never loaded."""
    stem = f"steer-stock-{content_hash(root)[:12]}"
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    return stem + suffix if sys.platform == "win32" else f"lib{stem}{suffix}"


def compile_library(root: Path, compiler: str, target: Path) -> None:
    """Compile and link it to ``target``, which appears whole or not at all.

    Raises:
        OSError: the compiler cannot be run, or the file cannot be written.
        RuntimeError: the compiler refused; its first error.
    """
    with tempfile.TemporaryDirectory(prefix="steer-stock-") as folder:
        units = [path for path in sources_of(root) if path.suffix == ".cpp"]
        objects = [str(Path(folder) / f"{path.stem}.o") for path in units]
        msvc = Path(compiler).stem.lower() in ("cl", "clang-cl")
        include = [str(root / "stock" / "llama"), str(root)]
        if msvc:
            flags = ["/nologo", "/std:c++17", "/O2", "/EHsc", "/MT", "/DLLAMA_STEER_PLAN_ALONE", *(f"/I{one}" for one in include)]
        else:
            flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-DLLAMA_STEER_PLAN_ALONE"]
            flags += [f"-I{one}" for one in include]

        launcher = [found] if (found := shutil.which("ccache")) and not msvc else []

        def compile_one(unit: Path, made: str) -> None:
            _run([*launcher, compiler, *flags, *(["/c", str(unit), f"/Fo{made}"] if msvc else ["-c", str(unit), "-o", made])])

        with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
            list(pool.map(compile_one, units, objects))
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        if msvc:
            _run([compiler, "/nologo", "/LD", *objects, f"/Fe{part}"])
        else:
            runtime = ["-static-libgcc", "-static-libstdc++"] if sys.platform == "linux" else []
            _run([compiler, "-shared", *runtime, *objects, "-o", str(part)])
        os.replace(part, target)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[-1] if lines else f"code {done.returncode}")
        raise RuntimeError(first.strip())
