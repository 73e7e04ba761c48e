"""Traits: data about a behaviour, good for any model. Six come with the package, and a recipe; any other is a JSON file."""

from __future__ import annotations

from .trait import MAX_FILE_BYTES, TRAIT_FORMAT, Trait, bundled_recipes, bundled_traits, load_trait

__all__ = ["MAX_FILE_BYTES", "TRAIT_FORMAT", "Trait", "bundled_recipes", "bundled_traits", "load_trait"]
