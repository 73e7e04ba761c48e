"""What the package itself brings, registered as any plugin would. Imports wait for the call: starting stays quick."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .hookspecs import hookimpl

if TYPE_CHECKING:
    from ..formats import Format


@hookimpl
def register_formats(register: Callable[[Format], None]) -> None:
    """The package's own safetensors file."""
    from ..formats import STEER_VECTOR

    register(STEER_VECTOR)


@hookimpl
def register_methods(register: Callable[[str, object], None]) -> None:
    """The package's own extraction methods."""
    from ..extract import MeanDifference

    register(MeanDifference.name, MeanDifference())


@hookimpl
def register_metrics(register: Callable[[str, Callable[[str], float]], None]) -> None:
    """The metrics of the traits that come with the package."""
    from ..metrics import builtin_metrics

    for name, metric in builtin_metrics().items():
        register(name, metric)
