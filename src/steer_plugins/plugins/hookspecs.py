"""The hooks. A plugin implements any of them with ``hookimpl``; docs/plugins.md is the tutorial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("steer_plugins")
hookimpl = pluggy.HookimplMarker("steer_plugins")


@hookspec
def register_commands(cli: Any) -> None:
    """Add commands to the ``steer`` command line, a ``click.Group``, with ``@cli.command()`` or ``cli.add_command``."""


@hookspec
def register_methods(register: Callable[[str, object], None]) -> None:
    """Register extraction methods: ``register(name, method)``, a ``steer_plugins.training.extract.base.Method``."""


@hookspec
def register_formats(register: Callable[[Any], None]) -> None:
    """Register vector file formats: ``register(Format(...))``, a ``steer_plugins.store.formats.Format``."""


@hookspec
def register_metrics(register: Callable[[str, Callable[[str], float]], None]) -> None:
    """Register text metrics: ``register(name, score)``, where ``score(text)`` grows towards the positive pole."""


@hookspec
def register_tasks(register: Callable[[str, Any], None]) -> None:
    """Register task families of ``steer bench control``: ``register(name, family)``, a ``steer_plugins.bench.tasks.Family``."""


@hookspec
def register_reporters(register: Callable[[str, Callable[[Any], dict[str, bytes]]], None]) -> None:
    """Register reporters of benchmarks: ``register(name, reporter)``; ``reporter(report)`` gets a
    ``steer_plugins.bench.report.BenchReport`` and returns files for its folder."""
