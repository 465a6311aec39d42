"""Bytes against loss as a picture: the predicted front, and what was really evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import blended_transform_factory

from moesaic.orchestrator.fronts import FrontPoint
from moesaic.orchestrator.label_places import Label, place_labels
from moesaic.orchestrator.yardsticks import Figure

_PLAN, _CURVE = "#D55E00", "#8a9099"
_BASELINES = ["#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5f6368"]
_MARKERS = "osD^vP"


@dataclass(frozen=True)
class Evaluated:
    """A plan that was run.

    Attributes:
        name: as the picture has it.
        bytes: of its files.
        loss: measured; it may be infinite, which None says.
        searched: whether it is no baseline.
    """

    name: str
    bytes: int
    loss: float | None
    searched: bool


def bytes_and_loss(
    evaluated: Sequence[Evaluated],
    predicted: Sequence[FrontPoint],
    budgets: Sequence[int],
    loss: Figure,
    scale: float,
    unit: str,
) -> Picture:
    """Measured loss against bytes, each point with its name, over the predicted curve.

    What has no number (it was infinite) is left out. Searched plans are joined where there are
    several.

    Args:
        scale, unit: what bytes are divided by, and what that makes of them.
    """
    known = [(e, e.loss) for e in evaluated if e.loss is not None]
    figure = Picture(figsize=(7.6, 4.4))
    axes = figure.add_subplot()
    for number, (point, lost) in enumerate(known):
        ours = point.searched
        axes.scatter(
            point.bytes / scale,
            lost,
            s=130 if ours else 55,
            marker="*" if ours else _MARKERS[number % len(_MARKERS)],
            color=_PLAN if ours else _BASELINES[number % len(_BASELINES)],
            zorder=3,
        )
    searched = sorted((e.bytes / scale, lost) for e, lost in known if e.searched)
    if len(searched) > 1:
        axes.plot(*zip(*searched, strict=True), color=_PLAN, linewidth=1.4, zorder=2)
    for budget in budgets:
        line = {"color": "#202124", "linestyle": (0, (4, 3)), "linewidth": 1, "zorder": 1}
        axes.axvline(budget / scale, **line)  # type: ignore[arg-type]
    sizes = [e.bytes / scale for e, _ in known] + [budget / scale for budget in budgets]
    space = max(max(sizes) - min(sizes), 0.08 * max(sizes))
    low, high = min(sizes) - 0.14 * space, max(sizes) + 0.38 * space
    curve = [
        (p.bytes / scale, p.loss)
        for p in predicted
        if low <= p.bytes / scale <= high and p.loss > 0
    ]
    if curve:
        axes.plot(*zip(*curve, strict=True), color=_CURVE, linewidth=1.2, zorder=1)
        _name_curve(axes, curve[-1])
    _loss_axis(axes, [lost for _, lost in known] + [lost for _, lost in curve])
    axes.set_xlim(low, high)
    axes.set_xlabel(f"bytes of the checkpoint ({unit}); dashed: budget")
    axes.set_ylabel(loss.about)
    axes.set_title("Loss against bytes, held-out text")
    axes.grid()
    labels = [Label(e.name, e.bytes / scale, lost, e.searched) for e, lost in known]
    place_labels(figure, axes, labels, [label.place for label in labels])
    return figure


def _name_curve(axes: Axes, end: tuple[float, float]) -> None:
    """The curve's name at its right end, inside of the picture."""
    place = blended_transform_factory(axes.transAxes, axes.transData)
    axes.annotate(
        "predicted",
        (0.995, end[1]),
        xycoords=place,
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        size=8,
        style="italic",
        color="#5f6368",
    )


def _loss_axis(axes: Axes, losses: Sequence[float]) -> None:
    """A logarithmic scale where the largest would hide the others."""
    above = [lost for lost in losses if lost > 0]
    if len(above) == len(losses) > 0 and min(above) < max(above) / 8:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(min(above) / 1.6, max(above) * 1.6)
    else:
        axes.set_ylim(0, max([*above, 1e-9]) * 1.18)
