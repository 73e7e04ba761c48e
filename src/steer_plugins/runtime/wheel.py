"""`steer build --wheel`: a finished runtime as a wheel, ``steer-plugins-runtime``, which pip puts where we look for it.

The import package ``steer_plugins_runtime`` is the runtime's folder (``lib``, ``bin``, ``runtime.json``) with a tiny
``__init__``. Wheels hold no links, and a library that is there under two names may be loaded twice, so each library
goes in once, under the name without a version, and whoever asks for it by another name is corrected (elf.py).
The packed files are tried out from a folder of their own before the wheel is written.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..atomic import file_sha256
from ..errors import BuildError
from .cache import RUNTIME_FILE, make_dir
from .elf import make_relative, read_dynamic
from .libraries import is_shared_library, probe
from .locate import RUNTIME_PACKAGE, WHEEL_NAME, Runtime
from .plan import BuildOptions, parse_cmake_arguments

_INIT = '''\
"""A patched llama.cpp, packed by `steer build --wheel` of steer-plugins."""

from pathlib import Path


def folder() -> Path:
    """The runtime's folder: the libraries are in its ``lib``, what it is says its ``runtime.json``."""
    return Path(__file__).resolve().parent
'''
_METADATA = """\
Metadata-Version: 2.4
Name: {name}
Version: {version}
Summary: llama.cpp with the steering patch, compiled, for steer-plugins
License-Expression: MIT AND Apache-2.0
{licences}Requires-Python: >=3.10
Description-Content-Type: text/plain

llama.cpp {llama_cpp} (as of llama-cpp-python {source}) with the patch of steer-plugins {steer}:
{patch}.
{server}. ggml: {ggml}.
"""


def portable_options(options: BuildOptions) -> BuildOptions:
    """The options of a build whose result is to run on other machines too: our own ggml, and no instructions that only
    this processor has, unless the user said otherwise."""
    if options.on is not None:
        return options
    given = parse_cmake_arguments(options.cmake_args, os.environ.get("CMAKE_ARGS", "")).definitions
    more = () if "GGML_NATIVE" in given else ("-DGGML_NATIVE=OFF",)
    return replace(options, own_ggml=True, cmake_args=(*more, *options.cmake_args))


def is_native(runtime: Runtime) -> bool:
    """Whether a runtime with a ggml of its own may use instructions that only some processors have."""
    arguments = runtime.meta.get("cmake_args")
    off = {"-DGGML_NATIVE=OFF", "-DGGML_NATIVE=0", "-DGGML_NATIVE=FALSE", "-DGGML_NATIVE=NO"}
    return runtime.ggml_mode == "own" and not any(str(word).upper() in off for word in arguments or ())


def wheel_version(meta: Mapping[str, Any]) -> str:
    """The wheel's version: llama-cpp-python's (llama.cpp's own where the sources were no release of it), and as its local
    part the hashes of the patch, e.g. ``0.3.36+p7296c8873f.s0a1b2c3d4e``."""
    label = str(meta.get("version", ""))
    match = re.fullmatch(r"(\d+(?:\.\d+)*)(?:[a-z0-9.+-]*)", label)
    release = match.group(1) if match else str(meta.get("llama_cpp") or "0")
    parts = [] if match else ["llamacpp", re.sub(r"[^a-z0-9]+", "", label.rsplit("-", 1)[-1].lower()) or "tree"]
    parts.append("p" + str(meta.get("patch") or "unknown")[:10])
    if meta.get("server_patch"):
        parts.append("s" + str(meta["server_patch"])[:10])
    return f"{release}+{'.'.join(parts)}"


def platform_tag(definitions: Mapping[str, str] | None = None) -> str:
    """The wheel's platform: this one. ``definitions`` are the cmake -D values it was built with.

    On Linux it is plain ``linux_<machine>``, which promises nothing about older systems; auditwheel can tell more.
    """
    if sys.platform == "darwin":
        # sysconfig tells what Python was built for ("universal2", an old system), not what our compiler made.
        target = (definitions or {}).get("CMAKE_OSX_DEPLOYMENT_TARGET") or platform.mac_ver()[0]
        major, _, minor = target.partition(".")
        return f"macosx_{major}_{minor.split('.')[0] or 0 if major == '10' else 0}_{platform.machine()}"
    return re.sub(r"[-.]", "_", sysconfig.get_platform())


def build_wheel(runtime: Runtime, out: Path) -> Path:
    """Pack ``runtime`` into a wheel in the folder ``out``; its path.

    Raises BuildError: ggml is outside of the runtime, a library cannot be moved or does not load from another place.
    """
    problem = runtime.problem()
    if problem or not runtime.meta:
        raise BuildError(
            f"the runtime {runtime.path} cannot be packed: {problem or f'it has no {RUNTIME_FILE}'}; `steer build --rebuild`"
        )
    if runtime.ggml_mode == "in-place":
        raise BuildError(f"the runtime {runtime.path} uses a ggml that cannot be moved; run `steer build --wheel --own-ggml`")
    version = wheel_version(runtime.meta)
    arguments = parse_cmake_arguments([word for word in runtime.meta.get("cmake_args") or () if str(word).startswith("-D")])
    tag = f"py3-none-{platform_tag(arguments.definitions)}"
    name = f"{WHEEL_NAME.replace('-', '_')}-{version}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Not in the system's folder for such things: that may be small, and may not allow programs to run.
        with tempfile.TemporaryDirectory(prefix=".steer-wheel-", dir=out) as temporary:
            root = Path(temporary)
            package = make_dir(root / RUNTIME_PACKAGE)
            _stage_runtime(runtime, package, version)
            _try(package)
            (package / "__init__.py").write_text(_INIT, encoding="utf-8")
            info = make_dir(root / f"{name}.dist-info")
            _stage_info(runtime, info, version, tag)
            partial = root.with_name(f".{name}.{os.getpid()}.part")
            try:
                _write_wheel(root, info, partial)
                os.replace(partial, out / f"{name}-{tag}.whl")
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(
            f"no wheel can be written to {out} ({error.strerror or error}); give another folder with --out"
        ) from None
    return out / f"{name}-{tag}.whl"


def _stage_runtime(runtime: Runtime, package: Path, version: str) -> None:
    """Copy libraries and server, once each and findable from anywhere, and write their runtime.json."""
    lib = make_dir(package / "lib")
    names: dict[str, str] = {}
    for source, wanted, aliases in libraries(runtime.lib_dir):
        shutil.copyfile(source, lib / wanted)
        (lib / wanted).chmod(0o755)
        names.update((alias, wanted) for alias in aliases)
    files = [lib / name for name in set(names.values())]
    if runtime.server is not None:
        place = package / runtime.server.relative_to(runtime.path)
        make_dir(place.parent)
        shutil.copyfile(runtime.server, place)
        place.chmod(0o755)
        files.append(place)
    for path in files:
        try:
            _make_relative(path, names)
        except (ValueError, OSError, subprocess.SubprocessError) as error:
            raise BuildError(f"{path.name} cannot be made to run from any folder ({str(error).splitlines()[0]})") from None
    ggml = runtime.meta.get("ggml")
    ggml = dict(ggml) if isinstance(ggml, dict) else {}
    packed = {name: file_sha256(lib / name) for name in sorted(set(names.values())) if "ggml" in name}
    meta = {
        **runtime.meta,
        # Paths of this machine mean nothing elsewhere.
        "source": runtime.meta.get("source") if runtime.meta.get("source") == "sdist" else "folder",
        "ggml": {**ggml, "source": None, "host": None, "files": packed},
        "wheel": version,
    }
    (package / RUNTIME_FILE).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def libraries(lib_dir: Path) -> list[tuple[Path, str, set[str]]]:
    """Each library of a folder once: its file, the one name it gets, and all names it goes by."""
    groups: dict[Path, set[str]] = {}
    for path in sorted(lib_dir.iterdir()):
        if is_shared_library(path.name) and path.is_file():
            groups.setdefault(path.resolve(), set()).add(path.name)
    result = []
    for path, aliases in sorted(groups.items()):
        dynamic = read_dynamic(path)
        if dynamic is not None and dynamic.soname:
            aliases.add(dynamic.soname)
        plain = [name for name in aliases if re.fullmatch(r"[^.]+(\.so|\.dylib|\.dll)", name)]
        # Libraries of others (libcudart.so.12) keep the name that they are asked for by.
        wanted = plain[0] if plain else (dynamic.soname if dynamic and dynamic.soname else min(aliases, key=len))
        result.append((path, wanted, aliases))
    return result


def _make_relative(path: Path, names: Mapping[str, str]) -> None:
    if sys.platform == "darwin":
        _make_relative_macho(path, names)
    elif sys.platform != "win32":  # Windows finds what lies beside the program
        make_relative(path, names)


def _make_relative_macho(path: Path, names: Mapping[str, str]) -> None:
    """The same for macOS, with Apple's own tools (they come with the compiler)."""

    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    changes: list[str] = []
    for line in run("otool", "-L", str(path)).splitlines()[1:]:
        old = line.strip().split(" (")[0]
        folder, _, name = old.rpartition("/")
        if folder == "@rpath" and names.get(name, name) != name:
            changes += ["-change", old, f"@rpath/{names[name]}"]
    for rpath in re.findall(r"cmd LC_RPATH\n.*\n\s+path (.+) \(offset", run("otool", "-l", str(path))):
        if not rpath.startswith("@"):
            changes += ["-delete_rpath", rpath]
    if path.suffix == ".dylib":
        changes += ["-id", f"@rpath/{path.name}"]
    if changes:
        run("install_name_tool", *changes, str(path))
        run("codesign", "--force", "--sign", "-", str(path))


def _try(package: Path) -> None:
    """Load the staged files where they are now. Raises BuildError when they do not work from there."""
    report = probe(package / "lib")
    if "error" in report or not report.get("steer"):
        raise BuildError(f"the packed libraries cannot be loaded ({report.get('error', 'they have no steering in them')})")
    outside = [path for path in report.get("loaded") or () if not Path(path).is_relative_to(package.resolve())]
    if outside:
        raise BuildError(f"the packed libraries still load {outside[0]}; run `steer build --wheel --own-ggml`")


def _stage_info(runtime: Runtime, info: Path, version: str, tag: str) -> None:
    licences = make_dir(info / "licenses")
    for path in sorted(runtime.path.glob("LICENSE*")):
        shutil.copyfile(path, licences / path.name)
    if not any(licences.iterdir()):
        raise BuildError(f"the runtime {runtime.path} has lost llama.cpp's licence, which must go along; `steer build --rebuild`")
    meta = runtime.meta
    text = _METADATA.format(
        name=WHEEL_NAME,
        version=version,
        licences="".join(f"License-File: {path.name}\n" for path in sorted(licences.iterdir())),
        llama_cpp=meta.get("llama_cpp") or "of unknown version",
        source=meta.get("version"),
        steer=meta.get("steer_plugins"),
        patch=meta.get("patch"),
        server="With llama-server" if runtime.server else "Without llama-server",
        ggml=" ".join(map(str, meta.get("cmake_args") or ())) or "default options",
    )
    (info / "METADATA").write_text(text, encoding="utf-8")
    wheel = f"Wheel-Version: 1.0\nGenerator: steer-plugins ({meta.get('steer_plugins')})\nRoot-Is-Purelib: false\nTag: {tag}\n"
    (info / "WHEEL").write_text(wheel, encoding="utf-8")


def _write_wheel(root: Path, info: Path, target: Path) -> None:
    """Zip everything below ``root`` into ``target``, with a RECORD in ``info``."""
    record = info / "RECORD"
    files = sorted(path for path in root.rglob("*") if path.is_file())
    # The metadata last, as the format recommends.
    files.sort(key=lambda path: path.is_relative_to(info))
    record.write_text("".join(_record_lines(root, files, record)), encoding="utf-8")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in [*files, record]:
            entry = zipfile.ZipInfo(path.relative_to(root).as_posix(), (1980, 1, 1, 0, 0, 0))
            entry.external_attr = (0o100755 if os.access(path, os.X_OK) else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.file_size = path.stat().st_size  # a GPU library may need the 64-bit form
            with path.open("rb") as source, archive.open(entry, "w") as out:
                shutil.copyfileobj(source, out, 1 << 20)


def _record_lines(root: Path, files: Iterable[Path], record: Path) -> Iterable[str]:
    for path in files:
        digest = base64.urlsafe_b64encode(bytes.fromhex(file_sha256(path))).rstrip(b"=").decode()
        yield f"{path.relative_to(root).as_posix()},sha256={digest},{path.stat().st_size}\n"
    yield f"{record.relative_to(root).as_posix()},,\n"
