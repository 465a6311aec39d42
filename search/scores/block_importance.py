"""How far a block turns the hidden states, times the relative error of the output.

QuantMoE-Bench (Li et al. 2024, 2406.08155, "MoE block importance predictor") and ShortGPT (Men et
al. 2024, 2403.03853, Block Influence) take 1 − cos between hidden states before and after a block
as its importance. The former trains a small network to predict it and looks at the MoE part of a
block alone; here it is measured, over the whole block. Both rank blocks only: to tell candidates
apart, too, it is multiplied by E‖ΔW x‖² / E‖W x‖².
"""

from moesaic.search.features import Features, Floats

NEEDS = frozenset({"influence", "error"})


def score(features: Features) -> Floats:
    """Influence of the block times relative output error of every pair."""
    return features["influence"] * features["error"]
