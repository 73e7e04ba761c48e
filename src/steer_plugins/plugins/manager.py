"""Finds plugins and asks them what they bring. Built-ins are loaded by the same path as anyone's.

``STEER_PLUGINS`` pins the installed plugins that are loaded (names of entry points, separated by commas; empty: only
the built-ins). ``STEER_TRACE_PLUGINS=1`` writes each hook call to stderr. A plugin that fails to load or to register is
named in a :class:`PluginWarning` and left out; everything else goes on.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import pluggy

from ..errors import SteerError
from . import hookspecs

ENTRY_POINT_GROUP = "steer_plugins"

#: Built-in commands: command name -> plugin module, imported only when the command is needed: starting stays quick.
COMMAND_PLUGINS = {
    name: f"steer_plugins.cli.{name.replace('-', '_')}"
    for name in (
        "build doctor demo train train-gate generate chat read inspect show plot convert".split()
        + "calibrate sae discover diff export hub serve worker mcp ds4 proxy bench textgen plugins".split()
    )
}
#: Built-in plugins that bring methods, formats and metrics.
DEFAULT_PLUGINS = ("steer_plugins.plugins.builtin",)

Kind = Literal["methods", "formats", "metrics", "tasks", "reporters"]


class PluginWarning(UserWarning):
    """A plugin could not be used; the message is one sentence that names it."""


@dataclass(frozen=True)
class PluginInfo:
    """A plugin that was found: where it comes from, the hooks it implements, and why it is not used, if so."""

    name: str
    source: str  # "built-in", or "distribution version"
    hooks: tuple[str, ...] = ()
    error: str | None = None


class Manager:
    """One set of plugins. Programs use the one that :func:`manager` returns; tests make their own."""

    def __init__(self) -> None:
        self.pm = pluggy.PluginManager("steer_plugins")
        self.pm.add_hookspecs(hookspecs)
        self._sources: dict[str, str] = {}
        self._errors: dict[str, str] = {}
        self._registries: dict[str, dict[str, Any]] = {}
        self._installed_loaded = False
        self._lock = threading.RLock()
        if os.environ.get("STEER_TRACE_PLUGINS", "0") not in ("", "0"):
            self.pm.add_hookcall_monitoring(_trace, lambda outcome, name, impls, kwargs: None)

    def load(self, modules: Iterable[str]) -> None:
        """Import built-in plugin modules that are not loaded yet. An error in one is a bug and is raised."""
        with self._lock:
            for module in modules:
                if not self.pm.has_plugin(module):
                    self.pm.register(importlib.import_module(module), name=module)
                    self._sources[module] = "built-in"

    def load_installed(self) -> None:
        """Import the plugins of other distributions, once."""
        with self._lock:
            if self._installed_loaded:
                return
            self._installed_loaded = True
            found = {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINT_GROUP)}
            pinned = os.environ.get("STEER_PLUGINS")
            names = sorted(found) if pinned is None else _split(pinned)
            for name in names:
                if name not in found:
                    self._broken(name, "STEER_PLUGINS", "STEER_PLUGINS names it, but no such plugin is installed")
                    continue
                entry = found[name]
                source = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
                try:
                    self.pm.register(entry.load(), name=name)
                except (Exception, SystemExit) as error:  # a stranger's module must not take us down
                    if self.pm.has_plugin(name):
                        self.pm.unregister(name=name)
                    self._broken(name, source, _reason(error))
                else:
                    self._sources[name] = source

    def load_all(self) -> None:
        """Load every built-in and every installed plugin."""
        self.load((*COMMAND_PLUGINS.values(), *DEFAULT_PLUGINS))
        self.load_installed()

    def call(self, hook: str, plugin: str, /, **arguments: Any) -> bool:
        """Call ``hook`` of the named plugin only; False (and a warning) if it fails and is not built in."""
        others = [module for name, module in self.pm.list_name_plugin() if name != plugin and module is not None]
        try:
            self.pm.subset_hook_caller(hook, others)(**arguments)
        except (Exception, SystemExit) as error:
            if self._sources[plugin] == "built-in":
                raise
            self._broken(plugin, self._sources[plugin], f"{hook} failed, {_reason(error)}")
            return False
        return True

    def implementers(self, hook: str) -> list[str]:
        """Names of the loaded plugins that implement ``hook``, built-ins first, each group in the order of loading."""
        names = [impl.plugin_name for impl in getattr(self.pm.hook, hook).get_hookimpls()]
        order = list(self._sources)
        return sorted(names, key=lambda name: (self._sources[name] != "built-in", order.index(name)))

    def registry(self, kind: Kind) -> dict[str, Any]:
        """``{name: object}`` of everything registered for a kind. A name belongs to the plugin that took it first."""
        with self._lock:
            if kind not in self._registries:
                self.load(DEFAULT_PLUGINS)
                self.load_installed()
                collected: dict[str, Any] = {}
                for plugin in self.implementers(f"register_{kind}"):
                    mine: dict[str, Any] = {}
                    if self.call(f"register_{kind}", plugin, register=_collector(kind, collected, mine)):
                        collected.update(mine)
                self._registries[kind] = collected
            return dict(self._registries[kind])

    def find(self, kind: Kind, name: str) -> Any:
        """One entry of :meth:`registry`. Raises SteerError naming those that exist."""
        registry = self.registry(kind)
        if name not in registry:
            known = ", ".join(sorted(registry)) or "none"
            way_out = f"choose from {known}, or install the plugin that brings it"
            raise SteerError(f"there is no {kind.removesuffix('s')} named {name!r}: {way_out}")
        return registry[name]

    def infos(self) -> list[PluginInfo]:
        """Every plugin, loaded or broken, built-ins first."""
        self.load_all()
        infos = []
        for name, source in self._sources.items():
            callers = self.pm.get_hookcallers(self.pm.get_plugin(name)) or []
            infos.append(PluginInfo(name, source, tuple(sorted(c.name for c in callers)), self._errors.get(name)))
        for name, why in self._errors.items():
            if name not in self._sources:
                infos.append(PluginInfo(name, "not loaded", (), why))
        return sorted(infos, key=lambda info: (info.source != "built-in", info.name))

    def _broken(self, name: str, source: str, why: str) -> None:
        self._errors[name] = why
        warnings.warn(f"the plugin {name!r} ({source}) is not used: {why}", PluginWarning, stacklevel=3)


def _collector(kind: str, taken: dict[str, Any], mine: dict[str, Any]) -> Callable[..., None]:
    """The ``register`` that is handed to a plugin."""

    def add(name: str, thing: Any) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{name!r} is not a name for one of the {kind}")
        if name in taken or name in mine:
            raise ValueError(f"{name!r} is already registered in {kind}")
        if kind in ("metrics", "reporters") and not callable(thing):
            raise TypeError(f"the {kind.removesuffix('s')} {name!r} cannot be called")
        mine[name] = thing

    # A format carries its own name and suffixes; everything else is registered under a name.
    return (lambda item: add(item.name, item)) if kind == "formats" else add


def _reason(error: BaseException) -> str:
    """One line of bounded length, whatever the stranger's message is."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _split(pinned: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in pinned.split(",") if name.strip()))


def _trace(hook_name: str, impls: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]) -> None:
    names = ", ".join(impl.plugin_name for impl in impls)
    print(f"steer: hook {hook_name}({', '.join(sorted(arguments))}) -> {names}", file=sys.stderr)


_manager: Manager | None = None
_manager_lock = threading.Lock()


def manager() -> Manager:
    """The plugins of this process, made on first use."""
    global _manager
    with _manager_lock:
        if _manager is None:
            _manager = Manager()
        return _manager


def reset() -> None:
    """Forget the plugins of this process, so that changed environment variables or installations are seen."""
    global _manager
    with _manager_lock:
        _manager = None
