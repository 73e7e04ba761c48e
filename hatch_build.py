"""A wheel made where there is a C++ compiler carries the library that steers beside an unmodified llama.cpp.

``STEER_PURE_WHEEL=1`` leaves it out. Where it is missing, it is compiled when it is needed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StockLibraryHook(BuildHookInterface):
    """Compiles it into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Nothing for an editable install: what is compiled there is kept in the cache."""
        if self.target_name != "wheel" or version == "editable" or os.environ.get("STEER_PURE_WHEEL"):
            return
        root = Path(self.root)
        spec = importlib.util.spec_from_file_location("compiling", root / "src" / "steer_plugins" / "runtime" / "compiling.py")
        assert spec is not None and spec.loader is not None
        compiling = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiling)
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++", "cl"]
        compiler = next((found for name in names if (found := shutil.which(name))), None)
        if compiler is None:
            self.app.display_warning("no C++ compiler: this wheel cannot steer an unmodified llama.cpp without one")
            return
        name = compiling.library_name(root / "cpp_patch")
        target = Path(self.directory) / "stock" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            compiling.compile_library(root / "cpp_patch", compiler, target)
        except (OSError, RuntimeError) as error:
            self.app.display_warning(f"{compiler} cannot compile {name} ({error}): this wheel goes without it")
            return
        build_data["force_include"][str(target)] = f"steer_plugins/native/{name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
