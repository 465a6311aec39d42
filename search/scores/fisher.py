"""Diagonal Fisher information times squared error, weight by weight.

½ Σ_ij E[g_i²]·E[x_j²]·ΔW_ij². The Fisher information of a weight is E[(g_i x_j)²] (as in Kim et al.
2023, SqueezeLLM, 2306.07629, section 4.1); here g and x are taken as independent, which needs no
statistics of every weight. Against ``gradient`` the correlations between inputs are missing.
"""

from moesaic.search.features import Features, Floats

NEEDS = frozenset({"fisher_error"})


def score(features: Features) -> Floats:
    """Predicted KL of every pair."""
    return features["fisher_error"]
