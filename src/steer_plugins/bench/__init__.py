"""Benchmarks whose arms are interleaved in one run, because machines are noisy."""
