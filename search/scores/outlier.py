"""QuantMoE-Bench's outlier score of a weight, times its relative error.

Li et al. 2024, 2406.08155, "outlier-aware linear layer scorer": max over columns (inputs) j of
max|W_:j| / mean|W_:j|; layers with a large one are given more bits. There it ranks layers only. To
tell candidates apart, too, it is multiplied here by ‖ΔW‖² / ‖W‖².
"""

import numpy as np

from moesaic.search.features import Features, Floats

NEEDS = frozenset({"outlier", "weight_error", "weight_norm"})


def score(features: Features) -> Floats:
    """Outlier score times relative squared error of every pair."""
    norm = np.maximum(features["weight_norm"], np.finfo(np.float64).tiny)  # an expert of zeros
    return features["outlier"] * features["weight_error"] / norm
