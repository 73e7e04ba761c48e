"""Activation steering for llama.cpp and GGUF models: add a direction to the hidden state while the model thinks.

>>> from steer_plugins import LocalEngine, Library
>>> engine = LocalEngine()                                     # the default model, or a path to a GGUF
>>> mood = Library().get("mood", engine.info.identity)
>>> engine.generate("Once upon a time", steering=0.8 * mood).text
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names are loaded when they are used: importing the package must not pull llama.cpp into a process that only reads a file.
_HOMES = {
    "Activations": "steer_plugins.engine.base",
    "AddTokens": "steer_plugins.native",
    "Engine": "steer_plugins.engine.base",
    "Gate": "steer_plugins.steering.gate",
    "GenerateRequest": "steer_plugins.engine.base",
    "Generation": "steer_plugins.engine.base",
    "Library": "steer_plugins.store.library",
    "LocalEngine": "steer_plugins.engine.local",
    "ModelIdentity": "steer_plugins.steering.vector",
    "ReadRows": "steer_plugins.native",
    "Schedule": "steer_plugins.steering.schedule",
    "ServerEngine": "steer_plugins.client.engine",
    "ServerProcess": "steer_plugins.client",
    "SteerError": "steer_plugins.errors",
    "SteeredLlama": "steer_plugins.engine.llama",
    "Steering": "steer_plugins.steering.terms",
    "SteeringVector": "steer_plugins.steering.vector",
    "Term": "steer_plugins.steering.terms",
    "cap_dose": "steer_plugins.steering.combine",
    "combine": "steer_plugins.steering.combine",
    "correlations": "steer_plugins.steering.combine",
    "dose": "steer_plugins.steering.combine",
    "orthogonalise": "steer_plugins.steering.combine",
    "read_vector": "steer_plugins.store.vectorfile",
    "write_vector": "steer_plugins.store.vectorfile",
}

__all__ = [
    "Activations",
    "AddTokens",
    "Engine",
    "Gate",
    "GenerateRequest",
    "Generation",
    "Library",
    "LocalEngine",
    "ModelIdentity",
    "ReadRows",
    "Schedule",
    "ServerEngine",
    "ServerProcess",
    "SteerError",
    "SteeredLlama",
    "Steering",
    "SteeringVector",
    "Term",
    "cap_dose",
    "combine",
    "correlations",
    "dose",
    "orthogonalise",
    "read_vector",
    "write_vector",
]

if TYPE_CHECKING:
    from .client import ServerProcess
    from .client.engine import ServerEngine
    from .engine.base import Activations, Engine, GenerateRequest, Generation
    from .engine.llama import SteeredLlama
    from .engine.local import LocalEngine
    from .errors import SteerError
    from .native import AddTokens, ReadRows
    from .steering.combine import cap_dose, combine, correlations, dose, orthogonalise
    from .steering.gate import Gate
    from .steering.schedule import Schedule
    from .steering.terms import Steering, Term
    from .steering.vector import ModelIdentity, SteeringVector
    from .store.library import Library
    from .store.vectorfile import read_vector, write_vector


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'steer_plugins' has no attribute '{name}'")
