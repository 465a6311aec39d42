"""A score against measured losses, plan by plan."""

import pandas as pd
from matplotlib.figure import Figure

from moesaic.orchestrator.pictures import GREY, KINDS

_COLOURS = {"plans": KINDS[0], "swaps": KINDS[1]}
_NAMES = {"plans": "all units at random, near the budget", "swaps": "one unit, the others dense"}


def scatter(points: pd.DataFrame, score: str, spearman: float | None) -> Figure:
    """What a score predicts for each plan against the KL that was measured.

    Args:
        points: columns ``kind``, ``held_out``, ``kl`` and one per score.
        spearman: on held-out plans of all units.
    """
    figure = Figure(figsize=(5.6, 4.4))
    axes = figure.add_subplot()
    # A logarithm has no place for what is 0.
    above = points[(points[score] > 0) & (points["kl"] > 0)]
    for kind, colour in _COLOURS.items():
        own = above[above["kind"] == kind]
        seen = own[~own["held_out"]]
        axes.scatter(seen[score], seen["kl"], s=16, color=GREY, zorder=2)
        unseen = own[own["held_out"]]
        if len(unseen):
            label = _NAMES[kind]
            axes.scatter(unseen[score], unseen["kl"], s=18, color=colour, label=label, zorder=3)
    if len(above):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(fontsize=8, title="held out (grey: what emq was fitted to)", title_fontsize=8)
    told = "" if spearman is None else f": Spearman {spearman:.3f} on unseen plans"
    axes.set_title(f"{score}{told}")
    axes.set_xlabel("predicted, in the score's own units")
    axes.set_ylabel("measured KL (nats per token)")
    axes.grid()
    return figure
