"""MC-MoE: error of an expert, weighted by how often and how strongly it is used.

Huang et al. 2024, 2410.06270, "pre-loading mixed-precision quantization": φ^α·w^β·ε^γ with the
share φ of tokens routed to an expert, its mean gate w over all tokens, and the error ε of its
output; α = 1, β = 1.5, γ = 2 are the defaults of the authors' published code. There bits are shared
out within a block, among its experts as wholes, and ε is a Frobenius norm. Here blocks and members
of experts are compared with one another: ε is relative to the norm of the member's output, and φ
and w are 1 for whatever is no expert.
"""

from moesaic.search.features import Features, Floats

NEEDS = frozenset({"frequency", "gate", "error"})
_ALPHA, _BETA, _GAMMA = 1.0, 1.5, 2.0


def score(features: Features) -> Floats:
    """Weighted relative error of every pair; ``error`` is ε²."""
    used: Floats = features["frequency"] ** _ALPHA * features["gate"] ** _BETA
    return used * features["error"] ** (_GAMMA / 2)
