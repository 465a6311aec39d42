"""Pictures of a study: how it went, what mattered, and the front where there are two objectives."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moesaic.orchestrator.pictures import BEHIND, GREY, KINDS, byte_scale, save
from moesaic.orchestrator.study import Told
from moesaic.orchestrator.summary import RunSummary, StudySummary

_BEST, _OTHERS = "#D55E00", KINDS[0]

_CAPTIONS = {
    "study_history": "Every trial's KL to the dense model on calibration text; the line is the best"
    " so far within the budget. Rings: tried first. Grey crosses: given up early, with the KL on as"
    " much text as they saw.",
    "study_importances": "How much each knob has to do with a trial being among the best"
    " (PED-ANOVA). A knob that does nothing near the best trials has a small share, whatever its"
    " value.",
    "study_front": "Bytes against KL on calibration text. The line joins the trials that no other"
    " one beats in both; every one of them is a plan that can be had at its size.",
}


def draw_study(
    summary: RunSummary, study: StudySummary, folder: Path
) -> dict[str, tuple[Path, str]]:
    """Writes the pictures into a folder; name → PNG and caption. Those that would be empty lack."""
    wanted: dict[str, Callable[[], Figure]] = {"study_history": partial(history, study)}
    if study.importances:
        wanted["study_importances"] = partial(importances, study)
    if study.front:
        wanted["study_front"] = partial(front, summary, study)
    files = save(wanted, folder)
    return {name: (path, _CAPTIONS[name]) for name, path in files.items()}


def history(study: StudySummary) -> Figure:
    """KL of every trial in order."""
    figure = Figure(figsize=(9, 3.6))
    axes = figure.add_subplot()
    complete, pruned = _of(study, "complete"), _of(study, "pruned")
    first = [t for t in complete if "start" in t.attributes]
    for trials, marker, colour in ((pruned, "x", GREY), (complete, "o", _OTHERS)):
        numbers = [t.number for t in trials]
        axes.scatter(numbers, _losses(trials), s=22, marker=marker, color=colour, zorder=3)
    numbers = [t.number for t in first]
    axes.scatter(numbers, _losses(first), s=80, facecolors="none", edgecolors="#202124", zorder=4)
    best, at = [], []
    lowest = np.inf
    for trial in complete:
        if trial.counts:
            lowest = min(lowest, *_losses([trial]))
        if lowest < np.inf:
            best.append(lowest)
            at.append(trial.number)
    axes.step(at, best, where="post", color=_BEST, linewidth=1.6, zorder=2)
    _log_if_wide(axes, _losses([*complete, *pruned]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial")
    axes.set_ylabel("KL (nats per token)")
    axes.set_title("The study, trial by trial")
    axes.grid()
    return figure


def importances(study: StudySummary) -> Figure:
    """A bar per knob."""
    names = list(study.importances)
    figure = Figure(figsize=(7, 1.2 + 0.32 * len(names)))
    axes = figure.add_subplot()
    shares = [100 * study.importances[name] for name in names]
    axes.barh(range(len(names)), shares, height=0.62, color=_OTHERS)
    for row, share in enumerate(shares):
        axes.text(share + 0.8, row, f"{share:.0f} %", va="center", size=8.5, bbox=BEHIND)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max([*shares, 1.0]) * 1.12)
    axes.set_xlabel("share of what makes trials good (%)")
    axes.set_title("Knobs by importance")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    return figure


def front(summary: RunSummary, study: StudySummary) -> Figure:
    """Bytes against KL of all complete trials, those that no other beats joined."""
    trials = _of(study, "complete")
    scale, unit = byte_scale(max(t.attributes["bytes"] for t in trials))

    def sizes(some: Sequence[Told]) -> list[float]:
        return [t.attributes["bytes"] / scale for t in some]

    figure = Figure(figsize=(7, 4.2))
    axes = figure.add_subplot()
    beaten = [t for t in trials if t.number not in study.front]
    unbeaten = [t for t in trials if t.number in study.front]
    unbeaten.sort(key=lambda t: float(t.attributes["bytes"]))
    axes.scatter(sizes(beaten), _losses(beaten), s=22, color=GREY)
    steps = {"drawstyle": "steps-post", "marker": "o", "markersize": 5, "zorder": 3}
    axes.plot(sizes(unbeaten), _losses(unbeaten), color=_OTHERS, **steps)  # type: ignore[arg-type]
    best = [study.best_trial]
    axes.scatter(sizes(best), _losses(best), s=130, marker="*", color=_BEST, zorder=4)
    budget = summary.budget_bytes / scale
    axes.axvline(budget, color="#202124", linestyle=(0, (4, 3)), linewidth=1)
    _log_if_wide(axes, _losses(trials))
    axes.set_xlabel(f"bytes of the checkpoint ({unit}); dashed: budget; star: the plan taken")
    axes.set_ylabel("KL (nats per token)")
    axes.set_title("Bytes against loss, calibration text")
    axes.grid()
    return figure


def _of(study: StudySummary, state: str) -> list[Told]:
    """The trials of one state that have a KL."""
    return [trial for trial in study.trials if trial.state == state and trial.kl is not None]


def _losses(trials: Sequence[Told]) -> list[float]:
    return [trial.kl for trial in trials if trial.kl is not None]


def _log_if_wide(axes: Axes, values: list[float]) -> None:
    """A logarithmic scale where the largest value would hide the others."""
    if values and min(values) > 0 and max(values) > 8 * min(values):
        axes.set_yscale("log")
