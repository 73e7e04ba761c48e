"""What can be shared; light to import, for the command line."""

from __future__ import annotations

KINDS = ("vector", "gate", "sae", "trait", "preset")
"""The kinds of a hub's items."""
