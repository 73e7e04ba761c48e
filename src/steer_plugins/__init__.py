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
    "Gate": "steer_plugins.gate",
    "GenerateRequest": "steer_plugins.engine.base",
    "Generation": "steer_plugins.engine.base",
    "Library": "steer_plugins.library",
    "LocalEngine": "steer_plugins.engine.local",
    "ModelIdentity": "steer_plugins.vector",
    "ReadRows": "steer_plugins.native",
    "Schedule": "steer_plugins.schedule",
    "ServerEngine": "steer_plugins.engine.server",
    "ServerProcess": "steer_plugins.server",
    "SteerError": "steer_plugins.errors",
    "SteeredLlama": "steer_plugins.engine.llama",
    "Steering": "steer_plugins.steering",
    "SteeringVector": "steer_plugins.vector",
    "Term": "steer_plugins.steering",
    "cap_dose": "steer_plugins.together",
    "combine": "steer_plugins.together",
    "correlations": "steer_plugins.together",
    "dose": "steer_plugins.together",
    "orthogonalise": "steer_plugins.together",
    "read_vector": "steer_plugins.vectorfile",
    "write_vector": "steer_plugins.vectorfile",
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
    from steer_plugins.engine.base import Activations, Engine, GenerateRequest, Generation
    from steer_plugins.engine.llama import SteeredLlama
    from steer_plugins.engine.local import LocalEngine
    from steer_plugins.engine.server import ServerEngine
    from steer_plugins.errors import SteerError
    from steer_plugins.gate import Gate
    from steer_plugins.library import Library
    from steer_plugins.native import AddTokens, ReadRows
    from steer_plugins.schedule import Schedule
    from steer_plugins.server import ServerProcess
    from steer_plugins.steering import Steering, Term
    from steer_plugins.together import cap_dose, combine, correlations, dose, orthogonalise
    from steer_plugins.vector import ModelIdentity, SteeringVector
    from steer_plugins.vectorfile import read_vector, write_vector


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'steer_plugins' has no attribute '{name}'")
