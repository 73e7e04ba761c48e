"""Traits: data about a behaviour, good for any model. Six come with the package, any other is a JSON file."""

from __future__ import annotations

from .trait import MAX_FILE_BYTES, TRAIT_FORMAT, Trait, bundled_traits, load_trait

__all__ = ["MAX_FILE_BYTES", "TRAIT_FORMAT", "Trait", "bundled_traits", "load_trait"]
