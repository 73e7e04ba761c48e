"""What the package itself brings, registered as any plugin would. Imports wait for the call: starting stays quick."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .hookspecs import hookimpl

if TYPE_CHECKING:
    from ..bench.report import BenchReport
    from ..bench.tasks import Family
    from ..store.formats import Format


@hookimpl
def register_formats(register: Callable[[Format], None]) -> None:
    """The package's own safetensors file, and the formats of others."""
    from ..store.foreign import builtin_formats
    from ..store.formats import STEER_VECTOR

    for one in (STEER_VECTOR, *builtin_formats()):
        register(one)


@hookimpl
def register_methods(register: Callable[[str, object], None]) -> None:
    """The package's own extraction methods."""
    from ..training.extract import builtin_methods

    for method in builtin_methods():
        register(method.name, method)


@hookimpl
def register_metrics(register: Callable[[str, Callable[[str], float]], None]) -> None:
    """The metrics of the traits that come with the package."""
    from ..metrics import builtin_metrics

    for name, metric in builtin_metrics().items():
        register(name, metric)


@hookimpl
def register_tasks(register: Callable[[str, Family], None]) -> None:
    """The task families of ``steer bench control``."""
    from ..bench.tasks import builtin_families

    for family in builtin_families():
        register(family.name, family)


@hookimpl
def register_reporters(register: Callable[[str, Callable[[BenchReport], dict[str, bytes]]], None]) -> None:
    """The files that benchmarks write."""
    from ..bench.reporters import builtin_reporters

    for name, reporter in builtin_reporters().items():
        register(name, reporter)
