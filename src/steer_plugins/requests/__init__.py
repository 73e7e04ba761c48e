"""Steerings as engines of others take them: the exact fields of a request, and the files that it names.

>>> from steer_plugins.requests import easysteer
>>> client.chat.completions.create(..., extra_body=easysteer(engine.steering("mood:0.6"), folder="/vectors"))  # doctest: +SKIP
"""

from .files import FILES, export, file_name
from .translate import easysteer, hotwire

__all__ = ["FILES", "easysteer", "export", "file_name", "hotwire"]
