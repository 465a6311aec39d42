"""Gradient × actual error: what the change of each output costs; the default.

½ Σ_i E[g_i²]·E[(ΔW x)_i²]: the second-order estimate of the KL with the output gradient g and the
input taken as independent (K-FAC, Martens & Grosse 2015, 1503.05671, section 3, with the diagonal
of the gradients' factor). Correlations between inputs count, between outputs they do not. Nats per
token.
"""

from moesaic.search.features import Features, Floats

NEEDS = frozenset({"gradient"})


def score(features: Features) -> Floats:
    """Predicted KL of every pair."""
    return features["gradient"]
