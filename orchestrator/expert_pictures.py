"""Pictures of expert layers: who is like whom, what became of each, and what they are used for.

One picture shows what became of every expert of every layer. At most :data:`SHOWN` layers, evenly
spread, have one of their own: all its panels have a row per old expert, ordered so that those of a
cluster lie together and like clusters side by side.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from moesaic.orchestrator.pictures import GREY, KINDS, OUTLINE, cells, save
from moesaic.orchestrator.summary import LayerExperts, RunSummary

# Layers that have a picture of their own.
SHOWN = 12
# Text sources that are told apart; the rest are taken together.
_SOURCES = 6
# What became of an expert, in the order of the colours.
KEPT, MERGED, CONSTANT, DROPPED = range(4)
_FATES = ["stays", "merged with others", "a constant in its place", "dropped"]
_FATE_COLOURS = ["#d6dade", "#0072B2", "#CC79A7", "#D55E00"]
# Neighbouring clusters are told apart by two shades.
_MERGED = [_FATE_COLOURS[MERGED], "#56B4E9"]
_BEFORE, _AFTER = "#3c4043", "#E69F00"
_TREE = "#9aa0a6"
# Rows at least so high, in inches, are labelled.
_LABELLED = 0.12
# With more rows than this, bars stand without edges.
_MANY = 40
# More than any distance 1 - cosine.
_APART = 4.0


def fates(layer: LayerExperts) -> NDArray[np.int64]:
    """What became of each old expert."""
    found = np.full(layer.count, DROPPED)
    for group in layer.clusters:
        found[list(group)] = MERGED if len(group) > 1 else KEPT
    for group in layer.constants:
        found[list(group)] = CONSTANT
    return found


def groups(layer: LayerExperts) -> list[list[int]]:
    """The clusters, and by themselves the experts that are in none."""
    known = {expert for group in layer.clusters for expert in group}
    alone = [[expert] for expert in range(layer.count) if expert not in known]
    return [list(group) for group in layer.clusters] + alone


def tree(layer: LayerExperts) -> NDArray[np.float64] | None:
    """Average linkage of the outputs' distances 1 - cosine, as SciPy has it; clusters come first.

    None where there is no similarity, or a single expert.
    """
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    if layer.similarity is None or layer.count < 2:
        return None
    label = np.empty(layer.count, dtype=np.int64)
    for number, group in enumerate(groups(layer)):
        label[group] = number
    distance = np.clip(1 - (layer.similarity + layer.similarity.T) / 2, 0, 2)
    # Across clusters all are so far apart that each cluster is joined before any two of them are.
    distance += _APART * (label[:, None] != label)
    np.fill_diagonal(distance, 0)
    joins: NDArray[np.float64]
    joins = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    joins[:, 2] -= _APART * (joins[:, 2] >= _APART)
    return joins


def order(layer: LayerExperts, joins: NDArray[np.float64] | None) -> list[int]:
    """Old experts as the rows have them: clusters together, and as the tree has them."""
    if joins is None:
        return [expert for group in sorted(groups(layer)) for expert in group]
    from scipy.cluster.hierarchy import leaves_list

    return [int(expert) for expert in leaves_list(joins)]


def spans(layer: LayerExperts, rows: Sequence[int]) -> list[tuple[int, int, list[int]]]:
    """(first row, number of rows, old experts) of each group, from the top."""
    place = {expert: row for row, expert in enumerate(rows)}
    found = [(min(place[e] for e in group), len(group), group) for group in groups(layer)]
    return sorted(found)


def use(layer: LayerExperts) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """Sources, their shares of each group's tokens ``[sources, groups]``, and of all tokens.

    The largest sources stand by themselves, the others together. A group that no token reached has
    zeros. Groups are in the order of :func:`groups`.
    """
    load, names = layer.load.astype(float), list(layer.sources)
    if len(names) > _SOURCES:
        largest = sorted(np.argsort(-load.sum(1), kind="stable")[: _SOURCES - 1])
        rest = [source for source in range(len(names)) if source not in largest]
        names = [names[source] for source in largest] + [f"{len(rest)} others"]
        load = np.vstack([load[largest], load[rest].sum(0)])
    by_group = np.stack([load[:, group].sum(1) for group in groups(layer)], axis=1)
    total = load.sum(1)
    return names, by_group / np.maximum(by_group.sum(0), 1), total / max(total.sum(), 1)


def inside_and_between(layer: LayerExperts) -> tuple[float | None, float | None]:
    """Mean cosine of two experts of one cluster, and of two of different ones."""
    if layer.similarity is None:
        return None, None
    label = np.empty(layer.count, dtype=np.int64)
    for number, group in enumerate(groups(layer)):
        label[group] = number
    same = label[:, None] == label
    off = ~np.eye(layer.count, dtype=bool)
    means = [layer.similarity[off & mask] for mask in (same, ~same)]
    inside, between = (float(values.mean()) if len(values) else None for values in means)
    return inside, between


def chosen_layers(layers: Sequence[LayerExperts]) -> list[LayerExperts]:
    """At most :data:`SHOWN` layers, evenly spread, the first and the last among them."""
    places = np.linspace(0, len(layers) - 1, min(SHOWN, len(layers))).round().astype(int)
    return [layers[place] for place in places]


def overview(layers: Sequence[LayerExperts]) -> Figure:
    """Experts × layers; colour is what became of the expert."""
    most = max(layer.count for layer in layers)
    shown = np.full((len(layers), most), np.nan)
    for row, layer in enumerate(layers):
        shown[row, : layer.count] = fates(layer)
    cell = min(0.36, max(0.03, 6.5 / most)), min(0.3, max(0.15, 8.0 / len(layers)))
    width, height = max(2.6, cell[0] * most), cell[1] * len(layers)
    figure = Figure(figsize=(width + 1.2, height + 1.4))
    axes = _panel(figure, 0.6, 1.0, width, height)
    axes.imshow(
        shown,
        cmap=ListedColormap(_FATE_COLOURS),
        norm=Normalize(-0.5, len(_FATES) - 0.5),
        aspect="auto",
        interpolation="nearest",
    )
    cells(axes, [layer.block for layer in layers], range(most), cell[0])
    for row, layer in enumerate(layers):
        if cell[0] >= 0.12:
            _marks(axes, layer.dropped, [row] * len(layer.dropped), min(cell), DROPPED, "white")
        axes.text(most - 0.5, row, f"  {_left(layer)}", va="center", size=8)
    axes.set_xlabel("expert")
    axes.set_ylabel("transformer block")
    axes.set_title("What the plan makes of the experts")
    axes.legend(
        handles=_fate_handles(layers),
        ncols=len(_FATES),
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(-0.01, -0.5 / height),
    )
    return figure


def _panel(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches."""
    whole = figure.get_figwidth(), figure.get_figheight()
    return figure.add_axes(
        (left / whole[0], bottom / whole[1], width / whole[0], height / whole[1])
    )


def _left(layer: LayerExperts) -> str:
    """What is left of a layer, in words."""
    if not layer.reduction:
        return f"all {layer.count} experts"
    count = len(layer.constants)
    more = f" and {count} constant{'s' * (count > 1)}" if count else ""
    return f"{len(layer.clusters)} of {layer.count} experts{more}, {layer.reduction}"


def _fate_handles(layers: Sequence[LayerExperts]) -> list[Patch]:
    present = sorted({int(fate) for layer in layers for fate in fates(layer)})
    return [Patch(color=_FATE_COLOURS[fate], label=_FATES[fate]) for fate in present]


def _marks(
    axes: Axes,
    across: Sequence[float],
    down: Sequence[float],
    size: float,
    fate: int,
    colour: str,
) -> None:
    """A cross per dropped expert, a dot per one that became a constant, in cells of ``size``."""
    marker, share = ("x", 0.45) if fate == DROPPED else ("o", 0.4)
    axes.scatter(
        across,
        down,
        marker=marker,
        s=(size * 72 * share) ** 2,
        color=colour,
        path_effects=OUTLINE if size > 0.08 else None,
    )


def layer_picture(layer: LayerExperts) -> Figure:
    """One layer: tree, strip, similarity, load and use side by side, with a row per old expert."""
    joins = tree(layer)
    rows = order(layer, joins)
    height = min(3.9, max(1.7, 0.2 * layer.count))  # of the panels, inches
    cell = height / layer.count
    compared = joins is not None
    widths = {"tree": 0.8, "strip": 0.15, "matrix": height} if compared else {"strip": 0.15}
    widths |= {"load": 1.9, "use": 1.9}
    gaps = {"strip": 0.3 if cell >= _LABELLED and compared else 0.06, "matrix": 0.1}
    gaps |= {"load": 0.16, "use": 0.3}
    top = 0.75 if compared else 0.45
    figure = Figure(figsize=(11, height + 0.7 + top))
    panels, at = {}, 0.3
    for name, width in widths.items():
        at += gaps.get(name, 0)
        axes = panels[name] = _panel(figure, at, 0.7, width, height)
        axes.set_ylim(layer.count - 0.5, -0.5)
        axes.tick_params(axis="y", length=0, labelleft=False)
        axes.tick_params(axis="x", labelsize=8)
        at += width
    if joins is not None:
        _tree(panels["tree"], layer, joins, rows)
        _matrix(figure, panels["matrix"], layer, rows, cell)
    _strip(panels["strip"], layer, rows, cell)
    load = _load(panels["load"], layer, rows)
    use = _use(panels["use"], layer, rows)
    lists = {"experts": _fate_handles([layer]), "load": load, "text sources": use}
    _legends(figure, (at + 0.32) / figure.get_figwidth(), (height + 0.7), lists)
    title = f"Block {layer.block}: {_left(layer)}"
    figure.text(0.3 / 11, 1 - 0.1 / figure.get_figheight(), title, weight="bold", size=11, va="top")
    return figure


def _legends(figure: Figure, left: float, top: float, lists: Mapping[str, Sequence[Patch]]) -> None:
    """Below each other, ``top`` inches from the bottom and downwards."""
    for title, handles in lists.items():
        legend = figure.legend(
            handles=list(handles),
            title=title,
            loc="upper left",
            bbox_to_anchor=(left, top / figure.get_figheight()),
            alignment="left",
            frameon=False,
            fontsize=8,
            title_fontproperties={"size": 8, "weight": "bold"},
            handlelength=0.9,
            handletextpad=0.5,
            labelspacing=0.3,
            borderpad=0,
            borderaxespad=0,
        )
        legend.set_in_layout(True)
        top -= 0.32 + 0.165 * len(handles)


def _tree(axes: Axes, layer: LayerExperts, joins: NDArray[np.float64], rows: Sequence[int]) -> None:
    """A dendrogram that ends in the rows; joins inside a cluster are blue."""
    place = {expert: float(row) for row, expert in enumerate(rows)}
    heights = dict.fromkeys(range(layer.count), -1.0)
    label = {expert: n for n, group in enumerate(groups(layer)) for expert in group}
    lines, colours = [], []
    for step, (one, two, height, _) in enumerate(joins):
        left, right, new = int(one), int(two), layer.count + step
        # Clusters come first, whatever the distances: no join is drawn below one inside it.
        top = max(float(height), heights[left], heights[right])
        y = place[left], place[right]
        lines.append([(heights[left], y[0]), (top, y[0]), (top, y[1]), (heights[right], y[1])])
        same = label[left] == label[right] >= 0
        colours.append(_FATE_COLOURS[MERGED] if same else _TREE)
        place[new], heights[new], label[new] = sum(y) / 2, top, label[left] if same else -1
    widths = [1.6 if colour != _TREE else 0.9 for colour in colours]
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=widths))
    low, high = float(joins[:, 2].min()), max(heights.values())
    room = max(high - low, 0.02)
    axes.set_xlim(high + 0.04 * room, max(0.0, low - 0.12 * room))
    _bare(axes)
    axes.spines["bottom"].set_visible(True)
    axes.xaxis.set_major_locator(MaxNLocator(2, prune="upper"))
    axes.tick_params(axis="x", length=2)
    axes.set_xlabel("1 − cosine", size=8)


def _bare(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0)


def _strip(axes: Axes, layer: LayerExperts, rows: Sequence[int], cell: float) -> None:
    """What became of each expert; merged clusters in turn dark and light."""
    fate = fates(layer)
    colours = [_FATE_COLOURS[fate[expert]] for expert in rows]
    merged = [span for span in spans(layer, rows) if span[1] > 1]
    for number, (first, count, _) in enumerate(merged):
        colours[first : first + count] = [_MERGED[number % 2]] * count
    axes.barh(range(len(rows)), 1, height=1, color=colours, **_edges(rows))
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    _bare(axes)
    if cell >= _LABELLED:
        axes.set_yticks(range(len(rows)), [str(expert) for expert in rows])
        axes.tick_params(axis="y", labelleft=True, labelsize=8, pad=2)


def _edges(rows: Sequence[int]) -> dict[str, Any]:
    """White lines between bars, where there is room for them."""
    return {"edgecolor": "white", "linewidth": 0.8 if len(rows) <= _MANY else 0}


def _matrix(
    figure: Figure, axes: Axes, layer: LayerExperts, rows: Sequence[int], cell: float
) -> None:
    """Similarity with a frame around each merged cluster and marks at experts that went."""
    assert layer.similarity is not None
    shown = layer.similarity[np.ix_(rows, rows)]
    np.fill_diagonal(shown, np.nan)
    axes.set_facecolor(GREY)
    norm = Normalize(*cosine_range(layer))
    image = axes.imshow(shown, cmap="cividis", norm=norm, aspect="auto", interpolation="nearest")
    for first, count, _ in spans(layer, rows):
        if count > 1:
            frame = Rectangle((first - 0.5, first - 0.5), count, count, fill=False)
            frame.set(edgecolor="white", linewidth=1.3 if cell > 0.05 else 0.8)
            if cell > 0.05:
                frame.set(path_effects=OUTLINE)
            axes.add_patch(frame)
    fate = fates(layer)
    for gone in (CONSTANT, DROPPED):
        at = [row for row, expert in enumerate(rows) if fate[expert] == gone]
        _marks(axes, at, at, min(max(cell, 0.05), 0.3), gone, _FATE_COLOURS[gone])
    axes.set_xticks([])
    _bare(axes)
    axes.set_xlabel("mean cosine of outputs", size=8, labelpad=6)
    bar_axes = axes.inset_axes((0.0, 1 + 0.08 / (cell * len(rows)), 1.0, 0.1 / (cell * len(rows))))
    bar = figure.colorbar(image, cax=bar_axes, orientation="horizontal")
    bar.ax.xaxis.set_ticks_position("top")
    bar.ax.tick_params(labelsize=8, length=2)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    bar.outline.set_visible(False)


def _load(axes: Axes, layer: LayerExperts, rows: Sequence[int]) -> list[Patch]:
    """Thin bars or a line before, behind them a bar per stand-in after, as wide as its cluster.

    Returns:
        what its colours mean.
    """
    place = {expert: row for row, expert in enumerate(rows)}
    handles = [Patch(color=_BEFORE, label="before")]
    if layer.reduction:
        stand_ins = [*layer.clusters, *layer.constants]
        colours = [_AFTER] * len(layer.clusters)
        colours += [_FATE_COLOURS[CONSTANT]] * len(layer.constants)
        there = [number for number, group in enumerate(stand_ins) if group]
        axes.barh(
            [min(place[expert] for expert in stand_ins[n]) - 0.5 for n in there],
            layer.after[there],
            height=[len(stand_ins[n]) for n in there],
            align="edge",
            color=[colours[n] for n in there],
            **_edges(rows),
        )
        handles.append(Patch(color=_AFTER, label="after"))
        if layer.constants:
            handles.append(Patch(color=_FATE_COLOURS[CONSTANT], label="after, of a constant"))
    before = layer.before[list(rows)]
    if len(rows) <= _MANY:
        axes.barh(range(len(rows)), before, height=0.4, color=_BEFORE, linewidth=0)
    else:  # bars would be too thin: their ends
        edges = np.arange(len(rows) + 1) - 0.5
        axes.stairs(before, edges, orientation="horizontal", color=_BEFORE, linewidth=0.9)
    axes.axvline(1 / layer.count, color="#202124", linestyle=(0, (4, 3)), linewidth=0.8)
    axes.set_xlim(0, 1.06 * max(float(before.max()), float(layer.after.max()), 1e-9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="x")
    axes.set_xlabel("measured share of the router's choices;\ndashed: an even share before", size=8)
    return handles


def _use(axes: Axes, layer: LayerExperts, rows: Sequence[int]) -> list[Patch]:
    """Stacked bars: sources of the tokens that each cluster's experts got; lines: of all tokens.

    Returns:
        what its colours mean.
    """
    names, shares, total = use(layer)
    place = {expert: row for row, expert in enumerate(rows)}
    firsts = [min(place[expert] for expert in group) - 0.5 for group in groups(layer)]
    heights = [len(group) for group in groups(layer)]
    left = np.zeros(len(firsts))
    for number, share in enumerate(shares):
        look = {"color": KINDS[number], **_edges(rows)}
        axes.barh(firsts, share, left=left, height=heights, align="edge", **look)
        left += share
    for edge in np.cumsum(total)[:-1]:
        axes.axvline(edge, color="white", linewidth=2.2)
        axes.axvline(edge, color="#202124", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
    axes.set_xticks([0, 0.5, 1])
    axes.set_xlabel("its tokens by text source;\ndashed: all tokens of the layer", size=8)
    return [Patch(color=KINDS[n], label=_short(name)) for n, name in enumerate(names)]


def _short(name: str) -> str:
    return name if len(name) <= 30 else f"{name[:14]}…{name[-15:]}"


def cosine_range(layer: LayerExperts) -> tuple[float, float]:
    """Least and greatest cosine between two different experts."""
    assert layer.similarity is not None
    values = layer.similarity[~np.eye(layer.count, dtype=bool)]
    low, high = float(values.min()), float(values.max())
    return (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)


def caption(layer: LayerExperts) -> str:
    """What the picture of a layer shows, in a sentence or two."""
    inside, between = inside_and_between(layer)
    text = f"Block {layer.block}: {_left(layer)}."
    if inside is not None and between is not None:
        text += f" Mean cosine within clusters {inside:.2f}, between them {between:.2f}."
    elif between is not None:
        text += f" Mean cosine of two experts {between:.2f}."
    most = f"{100 * layer.before.max():.3g} %"
    if layer.reduction:
        most += f" of the choices before, {100 * layer.after.max():.3g} % after"
    else:
        most += " of the choices"
    return f"{text} The busiest expert gets {most}."


def draw_experts(summary: RunSummary, folder: Path) -> dict[str, tuple[Path, str]]:
    """Writes the pictures into a folder; those of an earlier run of other layers go.

    Returns:
        name → (PNG, caption), the overview first; empty where the run reduces no experts.
    """
    layers = chosen_layers(summary.experts) if summary.experts else []
    captions = {f"experts_block_{layer.block:03}": caption(layer) for layer in layers}
    for old in folder.glob("experts*.png"):
        if old.stem not in captions:
            old.unlink()
    if not layers:
        return {}
    pictures: dict[str, Callable[[], Figure]] = {
        "experts": partial(overview, summary.experts),
        **{
            name: partial(layer_picture, layer)
            for name, layer in zip(captions, layers, strict=True)
        },
    }
    captions = {"experts": "What became of every expert of every layer.", **captions}
    return {name: (path, captions[name]) for name, path in save(pictures, folder).items()}
