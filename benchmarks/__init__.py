"""Developers' benchmarks: run from the project's root, as in ``python -m benchmarks.results``. They are not installed."""
