"""What a vector is compared with: one that is as strong, and means nothing."""

from __future__ import annotations

import numpy as np

from ..steering.columns import Columns
from ..steering.vector import SteeringVector


def random_vector(vector: SteeringVector, seed: int) -> SteeringVector:
    """Random unit directions, and random written rows, at the same layers, sites, scales and gains; what is read stays."""
    rng = np.random.default_rng(seed)
    noise = {key: rng.standard_normal(vector.n_embd).astype(np.float32) for key in vector.directions}
    directions = {key: value / np.float32(np.linalg.norm(value)) for key, value in noise.items()}
    columns = {key: random_columns(rng, value) for key, value in vector.columns.items()}
    scales = dict(vector.scales)
    return vector.replace(name="random", directions=directions, scales=scales, columns=columns, calibration=None, provenance=None)


def random_columns(rng: np.random.Generator, columns: Columns) -> Columns:
    """The same with random written rows."""
    rows = rng.standard_normal(columns.write.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Columns(columns.read, rows, columns.gain, columns.bias, columns.knee)
