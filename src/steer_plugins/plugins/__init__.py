"""Plugins: what they implement (``hookspecs``) and how they are found (``manager``). See docs/plugins.md."""

from .hookspecs import hookimpl, hookspec
from .manager import Manager, PluginInfo, PluginWarning, manager

__all__ = ["Manager", "PluginInfo", "PluginWarning", "hookimpl", "hookspec", "manager"]
