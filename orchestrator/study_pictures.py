"""Pictures of a study: how it went, what mattered, and the front where there are two objectives."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moesaic.orchestrator.label_places import Label, place_labels
from moesaic.orchestrator.limits import Limits
from moesaic.orchestrator.pictures import BEHIND, GREY, KINDS, byte_scale, save
from moesaic.orchestrator.study import Told
from moesaic.orchestrator.summary import RunSummary, StudySummary

_BEST, _OTHERS, _BASELINE = "#D55E00", KINDS[0], "#009E73"

_CAPTIONS = {
    "study_history": "Every trial's KL to the dense model on calibration text; the line is that of"
    " the best so far within the budget and all limits. Rings: tried first. Grey crosses: given up"
    " early, with the KL on as much text as they saw.",
    "study_front": "KL on calibration text against the other objective. Blue: the trials that no"
    " other one beats in all objectives; every one of them is a plan that can be had. Rings: tried"
    " first. Diamonds: the recipe's baselines, on the same text, timed as trials are. A thin line"
    " is what the measurements predict for every size.",
}


def draw_study(
    summary: RunSummary, study: StudySummary, folder: Path
) -> dict[str, tuple[Path, str]]:
    """Writes the pictures into a folder; name → PNG and caption. Those that would be empty lack."""
    wanted: dict[str, Callable[[], Figure]] = {"study_history": partial(history, study)}
    if study.importances:
        wanted["study_importances"] = partial(importances, study)
    if len(_predicted(study)) > 2:
        wanted["study_predicted"] = partial(predicted, study)
    if study.front:
        wanted["study_front"] = partial(front, summary, study)
    files = save(wanted, folder)
    captions = _CAPTIONS | {
        "study_importances": _importances_caption(study),
        "study_predicted": _predicted_caption(study),
    }
    return {name: (path, captions[name]) for name, path in files.items()}


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
    limits = Limits(study.objectives, study.constraints)
    best: list[Told] = []
    for trial in complete:
        if limits.better(trial, best[-1] if best else None):
            best.append(trial)
        elif best:
            best.append(best[-1])
    at = [trial.number for trial in complete[len(complete) - len(best) :]]
    axes.step(at, _losses(best), where="post", color=_BEST, linewidth=1.6, zorder=2)
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


def _importances_caption(study: StudySummary) -> str:
    others = " and ".join(name for name in study.objectives if name != "kl")
    best = "among those of the least KL"
    if others:
        best = f"near the front, with little KL beside trials that have no more {others}"
    budget = (
        " The budget's own knob is left out: that more bytes lose less is no news."
        if "bytes" in study.objectives
        else ""
    )
    return (
        f"How much each knob has to do with a trial being {best} (PED-ANOVA). A knob that does"
        f" nothing near the best trials has a small share, whatever its value.{budget}"
    )


def front(summary: RunSummary, study: StudySummary) -> Figure:
    """KL against the first other objective of all complete trials, those that no other beats
    joined, and the recipe's baselines."""
    trials = _of(study, "complete")
    other = next(name for name in study.objectives if name != "kl")
    in_bytes = other == "bytes"
    scale, unit = byte_scale(max(t.figures["bytes"] for t in trials)) if in_bytes else (1.0, "ms")

    def places(some: Sequence[Told]) -> list[float]:
        return [t.figures[other] / scale for t in some]

    figure = Figure(figsize=(7.6, 4.6))
    axes = figure.add_subplot()
    beaten = [t for t in trials if t.number not in study.front]
    unbeaten = [t for t in trials if t.number in study.front]
    unbeaten.sort(key=lambda t: (t.figures[other], -t.figures["kl"]))
    axes.scatter(places(beaten), _losses(beaten), s=22, color=GREY)
    # With a third objective some of them are beaten in these two.
    joined = {"marker": "o", "markersize": 5, "zorder": 3, "color": _OTHERS}
    joined |= {"drawstyle": "steps-post"} if len(study.objectives) == 2 else {"linestyle": "none"}
    axes.plot(places(unbeaten), _losses(unbeaten), **joined)  # type: ignore[arg-type]
    best = [study.best_trial]
    axes.scatter(places(best), _losses(best), s=130, marker="*", color=_BEST, zorder=4)
    starts = [t for t in trials if "start" in t.attributes]
    axes.scatter(
        places(starts), _losses(starts), s=80, facecolors="none", edgecolors="#202124", zorder=4
    )
    labels = [
        Label(t.attributes["start"], t.figures[other] / scale, t.figures["kl"]) for t in starts
    ]
    for name, figures in study.baselines.items():
        if other in figures:
            labels.append(Label(name, figures[other] / scale, figures["kl"]))
            axes.scatter(*labels[-1].place, s=45, marker="D", color=_BASELINE, zorder=4)
    what = "latency (ms per token); star: the best trial"
    if in_bytes:
        line = {"color": "#202124", "linestyle": (0, (4, 3)), "linewidth": 1}
        axes.axvline(summary.budget_bytes / scale, **line)  # type: ignore[arg-type]
        what = f"bytes of the checkpoint ({unit}); dashed: budget; star: the best trial"
        if summary.loss_is_predicted:
            ends = axes.get_xlim()
            curve = [(p.bytes / scale, p.loss) for p in summary.predicted if p.loss > 0]
            inside = [(x, y) for x, y in curve if ends[0] <= x <= ends[1]]
            if inside:
                axes.plot(*zip(*inside, strict=True), color="#8a9099", linewidth=1.2, zorder=1)
    points = [(t.figures[other] / scale, t.figures["kl"]) for t in trials]
    points += [label.place for label in labels]
    _log_if_wide(axes, [kl for _, kl in points])
    axes.set_xlabel(what)
    axes.set_ylabel("KL (nats per token)")
    axes.set_title(f"{'Bytes' if in_bytes else 'Latency'} against loss, calibration text")
    axes.grid()
    axes.margins(0.08)
    place_labels(figure, axes, labels, points, size=8)
    return figure


def predicted(study: StudySummary) -> Figure:
    """Predicted loss of every plan, the knobs at their defaults, against what was measured."""
    points = _predicted(study)
    figure = Figure(figsize=(5.6, 4.4))
    axes = figure.add_subplot()
    losses, measured = zip(*points, strict=True)
    axes.scatter(losses, measured, s=22, color=_OTHERS, zorder=3)
    best = study.best_trial
    star = float(best.attributes["predicted_loss"]), best.figures["kl"]
    axes.scatter(*star, s=130, marker="*", color=_BEST, zorder=4)
    wide = [min(values) > 0 and max(values) > 8 * min(values) for values in (losses, measured)]
    if any(wide) and min(*losses, *measured) > 0:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel("predicted (sum of the units' losses as measured)")
    axes.set_ylabel("measured KL (nats per token)")
    axes.set_title("What was predicted, and what came of it")
    axes.grid()
    return figure


def _predicted(study: StudySummary) -> list[tuple[float, float]]:
    """Predicted loss and measured KL of every plan that was judged to the end."""
    plans = {t.attributes["plan"]: t for t in reversed(_of(study, "complete"))}
    return sorted((float(t.attributes["predicted_loss"]), t.figures["kl"]) for t in plans.values())


def _predicted_caption(study: StudySummary) -> str:
    from scipy.stats import spearmanr

    points = _predicted(study)
    if len({loss for loss, _ in points}) < 2 or len({kl for _, kl in points}) < 2:
        return ""
    rank = float(spearmanr(points).statistic)
    return (
        f"Every different plan that saw all of the text, {len(points)} of them; star: the one"
        f" taken. Spearman's rank correlation is {rank:.2f}: 1 would mean that predictions put all"
        " plans into the right order, and that there is nothing to gain by a study. Sizes differ"
        " only where bytes are an objective, which makes the order easier."
    )


def _of(study: StudySummary, state: str) -> list[Told]:
    """The trials of one state that have a KL."""
    return [trial for trial in study.trials if trial.state == state and trial.kl is not None]


def _losses(trials: Sequence[Told]) -> list[float]:
    return [trial.kl for trial in trials if trial.kl is not None]


def _log_if_wide(axes: Axes, values: list[float]) -> None:
    """A logarithmic scale where the largest value would hide the others."""
    if values and min(values) > 0 and max(values) > 8 * min(values):
        axes.set_yscale("log")
