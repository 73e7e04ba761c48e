"""Hubs: shared folders of vectors, as static files. Publish, search, pull, verify. docs/hub.md.

Every file but ``index.json`` is named by its sha256, and what is signed is signed by a file named after it, so that a hub works
from a folder, a git checkout, any web server or a Hugging Face repository. Nothing here runs unless a person asks for it: no
server of the project ever fetches.
"""

from __future__ import annotations

DEFAULT_INDEX = "https://hub.steer-plugins.example/"
"""The index that the project would host: a placeholder. Nothing is ever fetched from it unasked."""
