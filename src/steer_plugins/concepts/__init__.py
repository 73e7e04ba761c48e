"""What a model has learned, without labels: sparse autoencoders, their features, hidden directions, differences of fine-tunes.

Features are for exploring, naming, watching and clamping. As sliders they do not beat the mean difference of a contrast (AxBench,
arXiv 2501.17148), and nothing here promises that.
"""

from __future__ import annotations

from .code import SparseCode
from .corpus import Corpus
from .index import Feature, FeatureIndex

__all__ = ["Corpus", "Feature", "FeatureIndex", "SparseCode"]
