"""Names of points in a picture, where they hide neither a point nor each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

_BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
# Distances and directions of a name from its point, the best ones first: points and degrees.
_DISTANCES = (12, 20, 30, 44, 60, 80)
_DIRECTIONS = (0, 35, -35, 90, -90, 145, -145, 180)
# Half of a marker, and what a name keeps away from markers and others.
_MARKER, _MARGIN = 6.0, 2.0


@dataclass(frozen=True)
class Label:
    """A name of a point, in the units of the axes."""

    text: str
    x: float
    y: float
    bold: bool = False

    @property
    def place(self) -> tuple[float, float]:
        return self.x, self.y


def place_labels(
    figure: Figure,
    axes: Axes,
    labels: Sequence[Label],
    points: Sequence[tuple[float, float]],
    size: float | None = None,
) -> list[Annotation]:
    """Writes names next to their points, each at the first place where it hides none of ``points``
    and no name before it; where there is none, at the one where it hides least.

    Limits and scales of the axes must be settled before. Points of one place share a label.

    Args:
        points: all that is drawn, in the units of the axes.
        size: of the letters.
    """
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    half = (_MARKER + _MARGIN) * scale
    marks = [
        Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in _pixels(axes, points)
    ]
    inside = axes.get_window_extent()
    taken: list[Bbox] = []
    found = []
    for label in _shared(labels):
        name = axes.annotate(
            label.text,
            label.place,
            xytext=(0, 0),
            textcoords="offset points",
            va="center",
            size=size,
            weight="bold" if label.bold else "normal",
            bbox=_BEHIND,
            zorder=5,
            arrowprops={"arrowstyle": "-", "color": "#9aa0a6", "linewidth": 0.7, "shrinkB": 5},
        )
        extent = name.get_window_extent()
        width, height = extent.width / scale, extent.height / scale
        ((across, up),) = _pixels(axes, [label.place])
        best: tuple[float, tuple[float, float], Bbox] | None = None
        for place in _places(width):
            left, middle = across + place[0] * scale, up + place[1] * scale
            box = Bbox.from_extents(
                left - _MARGIN * scale,
                middle - (height / 2 + _MARGIN) * scale,
                left + (width + _MARGIN) * scale,
                middle + (height / 2 + _MARGIN) * scale,
            )
            hidden = sum(_shared_area(box, other) for other in [*marks, *taken])
            hidden += 4 * (box.width * box.height - _shared_area(box, inside))
            if best is None or hidden < best[0]:
                best = hidden, place, box
            if hidden == 0:
                break
        assert best is not None, "there are places"
        name.set_position(best[1])
        taken.append(best[2])
        found.append(name)
    return found


def _places(width: float) -> list[tuple[float, float]]:
    """Left end and middle of a name of that width, from its point."""
    found = []
    for distance in _DISTANCES:
        for direction in _DIRECTIONS:
            angle = math.radians(direction)
            x, y = distance * math.cos(angle), distance * math.sin(angle)
            # To the left it ends there, straight above and below its middle is there.
            found.append((x - width * (1 - math.cos(angle)) / 2, y))
    return found


def _shared(labels: Sequence[Label]) -> list[Label]:
    """One label per place, the lowest first."""
    at: dict[tuple[float, float], list[Label]] = {}
    for label in labels:
        at.setdefault(label.place, []).append(label)
    return [
        Label(", ".join(own.text for own in there), x, y, any(own.bold for own in there))
        for (x, y), there in sorted(at.items(), key=lambda entry: entry[0][1])
    ]


def _pixels(axes: Axes, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [tuple(axes.transData.transform(point)) for point in points]


def _shared_area(one: Bbox, other: Bbox) -> float:
    common = Bbox.intersection(one, other)
    return 0.0 if common is None else float(common.width * common.height)
