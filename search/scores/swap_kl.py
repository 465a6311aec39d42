"""KL of single-unit swaps: the model is run with one unit compressed and all others dense.

Exact for one unit, and needs a run of the text for each unit and candidate. What is measured is a
unit, so of a bank all experts under one chain at once; its KL is shared out among its members in
proportion to what the gradients predict for them (to the output error, where there are none).
"""

from moesaic.search.features import Features, Floats

NEEDS = frozenset({"swap_kl"})


def score(features: Features) -> Floats:
    """Measured KL of every pair, nats per token."""
    return features["swap_kl"]
