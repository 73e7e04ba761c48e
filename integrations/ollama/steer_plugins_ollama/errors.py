"""Errors with the HTTP status that Ollama's clients expect."""

from __future__ import annotations

from steer_plugins.errors import SteerError


class ApiError(SteerError):
    """An error that is answered as ``{"error": sentence}`` with a status."""

    status = 500


class BadRequest(ApiError):
    """What was asked for cannot be done as asked (400)."""

    status = 400


class NotFound(ApiError):
    """There is no such model (404)."""

    status = 404


class BadName(BadRequest):
    """Not a valid model name (400)."""


class NotSteerable(BadRequest):
    """The model has no weights that can be steered: a safetensors or cloud model (400)."""


class Unavailable(ApiError):
    """Ollama does not answer (502)."""

    status = 502


class Ending(ApiError):
    """The sidecar is being ended (503)."""

    status = 503

    def __init__(self) -> None:
        super().__init__("the sidecar is being ended")


def status_of(error: BaseException) -> int:
    """The HTTP status of an error: the user's errors are 400."""
    from steer_plugins.errors import EngineError, RuntimeMissing

    if isinstance(error, ApiError):
        return error.status
    if isinstance(error, EngineError | RuntimeMissing):
        return 500
    return 400 if isinstance(error, SteerError) else 500
