"""Errors a user can act on: each message is one sentence that names the offender and the way out."""

from __future__ import annotations


class SteerError(Exception):
    """Anything that is wrong with what was asked for. ``str(error)`` is the whole message for the user.

    The command line prints it and exits with :attr:`exit_code`; servers turn it into a 4xx reply.
    """

    exit_code = 1


class SteerWarning(UserWarning):
    """What a user should know and what stops nothing. The command line prints it as a note."""


class VectorError(SteerError):
    """A steering vector or its file is malformed, or does not belong to the model."""


class SpecError(SteerError):
    """A steering (terms, strengths, scopes, layer windows) cannot be understood or cannot be applied exactly."""


class DataError(SteerError):
    """A pairs file, trait file or prompt list is unusable."""


class ModelError(SteerError):
    """A model file is missing, truncated, unsupported, or not the one that was meant."""


class RuntimeMissing(SteerError):
    """No patched llama.cpp can be used by this process."""


class BuildError(SteerError):
    """Building the patched llama.cpp failed."""


class EngineError(SteerError):
    """The native engine refused or failed a call."""


class HubError(SteerError):
    """What a hub offers is missing, altered, unsigned, too old, too large, or not for this model."""
