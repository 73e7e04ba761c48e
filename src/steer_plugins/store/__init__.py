"""Vectors on disk: the user's library, the project's own file format, and those of other programs (``foreign``)."""
