"""Weights of text sources: what a loss is where some of the text counts more.

A predicted loss is a sum over tokens, so it is a sum over the sources that they come from. With a
weight for each it becomes a weighted mean over sources, of the same size as before on the whole:

    L' = L · Σ_k w_k f_k / Σ_k w_k s_k

with f_k the part of L that is source k's, and s_k the source's share of the text. Equal weights
leave every loss as it is. What loses by itself, without choices (a reduced bank), is not told apart
by source, and stays.
"""

from collections.abc import Mapping, Sequence

SOURCE = "source."


def varied(sources: Mapping[str, int]) -> list[str]:
    """The sources that have a knob: all but the largest, with which they are compared."""
    largest = max(sources, key=lambda name: sources[name], default="")
    return [name for name in sources if name != largest]


class SourceWeights:
    """What values of knobs make of losses.

    Args:
        sources: name → sequences, in the order of a measurement's shares.
        values: of knobs; a source without one has a weight of 1.
    """

    def __init__(self, sources: Mapping[str, int], values: Mapping[str, float | str]) -> None:
        weights = [float(values.get(SOURCE + name, 1.0)) for name in sources]
        self._weights: list[float] = []
        if any(weight != 1.0 for weight in weights):
            counts = list(sources.values())
            mean = sum(w * n for w, n in zip(weights, counts, strict=True)) / sum(counts)
            self._weights = [weight / mean for weight in weights]

    def factor(self, shares: Sequence[float]) -> float:
        """What a loss is multiplied with; ``shares`` are its parts by source, which sum to 1."""
        if not self._weights or not any(shares):
            return 1.0
        return sum(w * f for w, f in zip(self._weights, shares, strict=True))
