"""Relative error of the output: what methods that work layer by layer make small.

E‖ΔW x‖² / E‖W x‖² (the objective of GPTQ, Frantar et al. 2022, 2210.17323, section 3, relative to
the output). All layers and all experts count alike, however much the model depends on them.
"""

from moesaic.search.features import Features, Floats

NEEDS = frozenset({"error"})


def score(features: Features) -> Floats:
    """Relative squared output error of every pair."""
    return features["error"]
