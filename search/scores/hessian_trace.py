"""HAWQ-V2: mean eigenvalue of a weight's Hessian times its squared error.

Dong et al. 2019, 1911.03852: Ω = Σ (Tr(H)/n)·‖ΔW‖², n the number of weights. There
the trace is estimated from Hessian-vector products; here the Hessian is the K-FAC one, E[g gᵀ] ⊗
E[x xᵀ], whose trace is E‖g‖²·E‖x‖² exactly. With ½ it is a KL in nats per token, if errors are
spread over a weight without regard to where it is sensitive.
"""

from moesaic.search.features import Features, Floats

NEEDS = frozenset({"gradient_norm", "trace", "parameters", "weight_error"})


def score(features: Features) -> Floats:
    """Predicted KL of every pair."""
    trace = features["gradient_norm"] * features["trace"]
    return 0.5 * trace / features["parameters"] * features["weight_error"]
