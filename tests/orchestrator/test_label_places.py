"""Names of points: none hides a point or another name, all are inside, and near their points."""

import itertools
import random

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moesaic.orchestrator.label_places import Label, place_labels


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_names_hide_no_point_and_no_other_name(seed: int, logarithmic: bool) -> None:
    generator = random.Random(seed)
    points = [(generator.uniform(1, 2), generator.uniform(0.01, 1)) for _ in range(40)]
    # Three of them stand close together.
    points += [(1.5, 0.5), (1.503, 0.505), (1.506, 0.5)]
    labels = [Label(f"a long name, {n}", *points[n]) for n in (0, 1, 2, 40, 41, 42)]
    figure = Figure(figsize=(7.6, 4.6))
    axes = figure.add_subplot()
    axes.scatter(*zip(*points, strict=True))
    if logarithmic:
        axes.set_yscale("log")
    names = place_labels(figure, axes, labels, points, size=8)
    FigureCanvasAgg(figure).draw()
    assert sorted(name.get_text() for name in names) == sorted(label.text for label in labels)
    boxes = [name.get_bbox_patch().get_window_extent() for name in names]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    inside = axes.get_window_extent()
    for box in boxes:
        assert all(inside.contains(*corner) for corner in box.corners())
        assert not any(box.contains(*axes.transData.transform(point)) for point in points)


def test_points_of_one_place_share_a_name() -> None:
    figure = Figure()
    axes = figure.add_subplot()
    axes.set_xlim(0, 3)
    axes.set_ylim(0, 3)
    labels = [Label("as predicted", 1, 1), Label("even", 2, 2), Label("greedy", 1, 1)]
    names = place_labels(figure, axes, labels, [(1, 1), (2, 2)])
    assert [name.get_text() for name in names] == ["as predicted, greedy", "even"]
    assert [name.xy for name in names] == [(1, 1), (2, 2)]
