"""Pictures of a run, each one function from the summary to a figure.

Colours are safe for the colour-blind: cividis for amounts, purple–orange about a middle, and the
palette of Okabe and Ito for kinds. Nothing here uses pyplot, so nothing is shared between threads.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, MaxNLocator

from moesaic.orchestrator.files import write_atomically
from moesaic.orchestrator.front_pictures import Evaluated, bytes_and_loss
from moesaic.orchestrator.summary import RunSummary, module_names

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.edgecolor": "#9aa0a6",
    "axes.labelcolor": "#3c4043",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#3c4043",
    "ytick.color": "#3c4043",
    "grid.color": "#e3e5e8",
    "text.color": "#202124",
    "axes.axisbelow": True,
}
# Of the files; shown at _SCREEN_DPI, so that they are sharp on fine screens.
_DPI = 160
_SCREEN_DPI = 100
GREY = "#c4c7cc"
KINDS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
_PLAN = "#D55E00"
_BASELINES = ["#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5f6368"]
_MARKERS = "osD^vP"
# Behind text that may lie on a line.
BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
OUTLINE = [withStroke(linewidth=3, foreground="#202124")]
_BIT_TICKS = [0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32]


def byte_scale(largest: float) -> tuple[float, str]:
    """Divisor and unit in which ``largest`` bytes is a handy number."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if largest >= 1000**power:
            return float(1000**power), unit
    return 1.0, "bytes"


def plan_map(summary: RunSummary) -> Figure:
    """Modules × blocks; colour is the bits per weight that the file holds."""
    names = module_names(summary.units)
    modules = list(dict.fromkeys(names[unit.name] for unit in summary.units))
    blocks = sorted({unit.block for unit in summary.units})
    bits = np.full((len(modules), len(blocks)), np.nan)
    for unit in summary.units:
        size = summary.measured(summary.plan, unit).bytes
        cell = modules.index(names[unit.name]), blocks.index(unit.block)
        bits[cell] = size * 8 / unit.parameters
    width = min(0.62, max(0.13, 11.0 / len(blocks)))  # of a cell, inches
    figure = Figure(figsize=(2.6 + max(3.2, width * len(blocks)), 1.3 + 0.36 * len(modules)))
    axes = figure.add_subplot()
    low, high = float(np.nanmin(bits)), float(np.nanmax(bits))
    least, most = min(low, high / 1.3), max(high, low * 1.3)
    norm = LogNorm(least, most)
    axes.set_facecolor("#eceef1")
    image = axes.imshow(bits, cmap="cividis", norm=norm, aspect="auto", interpolation="nearest")
    if width >= 0.3:
        for (row, column), value in np.ndenumerate(bits):
            if np.isfinite(value):
                colour = "white" if norm(value) < 0.55 else "black"
                points = 7.5 if width > 0.36 else 6
                text = f"{value:.3g}"
                axes.text(column, row, text, ha="center", va="center", size=points, color=colour)
    cells(axes, modules, blocks, width)
    axes.set_xlabel("transformer block")
    axes.set_title("The plan: stored bits per weight")
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    ticks = [t for t in _BIT_TICKS if least <= t <= most]
    ticks = ticks if len(ticks) > 1 else [least, most]
    bar.locator, bar.formatter = FixedLocator(ticks), FixedFormatter([f"{t:.3g}" for t in ticks])
    bar.update_ticks()
    bar.ax.minorticks_off()
    bar.set_label("bits per weight")
    bar.outline.set_visible(False)
    return figure


def cells(axes: Axes, rows: Sequence[object], columns: Sequence[object], width: float) -> None:
    """Labels and white lines of a table of cells ``width`` inches wide."""
    axes.set_yticks(range(len(rows)), [str(row) for row in rows])
    room = 0.24 if len(columns) <= 100 else 0.32
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 500) if width * s >= room)
    shown = range(0, len(columns), step)
    axes.set_xticks(list(shown), [str(columns[i]) for i in shown])
    axes.set_xticks(np.arange(-0.5, len(columns)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    axes.grid(which="minor", color="white", linewidth=1 if width > 0.2 else 0.4)
    axes.tick_params(which="both", length=0)
    axes.set_axisbelow(False)
    axes.spines[:].set_visible(False)


def part_bytes(summary: RunSummary) -> Figure:
    """Stacked bars of bytes by kind of module: original, baselines, plan."""
    bars = {"dense": summary.part_bytes(None)}
    bars |= {name: summary.part_bytes(plan) for name, plan in summary.plans.items()}
    largest = max(sum(parts.values()) for parts in bars.values())
    scale, unit = byte_scale(largest)
    figure = Figure(figsize=(9, 1.7 + 0.42 * len(bars)))
    axes = figure.add_subplot()
    left = np.zeros(len(bars))
    for number, part in enumerate(bars["dense"]):
        values = np.array([parts[part] for parts in bars.values()]) / scale
        colour = GREY if part == "not compressed" else KINDS[number % len(KINDS)]
        label = part.replace("_", " ")
        axes.barh(range(len(bars)), values, left=left, height=0.66, color=colour, label=label)
        left += values
    for row, total in enumerate(left):
        text = f"{total:,.3g} {unit}"
        axes.text(total + left.max() * 0.012, row, text, va="center", size=8.5, bbox=BEHIND)
    budget = summary.budget_bytes / scale
    axes.axvline(budget, color="#202124", linestyle=(0, (4, 3)), linewidth=1)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, left.max() * 1.13)
    axes.set_xlabel(f"bytes of the checkpoint ({unit}); dashed: budget, {budget:,.4g} {unit}")
    axes.set_title("Bytes by kind of module")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def loss_and_bytes(summary: RunSummary) -> Figure:
    """Measured loss against bytes for plan and baselines, over the predicted front."""
    loss = summary.yardstick.loss
    evaluated = [
        Evaluated(name, summary.scores[name]["bytes"], summary.scores[name][loss.key], ours)
        for name in summary.plans
        for ours in [name == "plan"]
        if name in summary.scores
    ]
    largest = max([point.bytes for point in evaluated], default=summary.budget_bytes)
    predicted = summary.predicted if summary.loss_is_predicted else ()
    return bytes_and_loss(evaluated, predicted, [summary.budget_bytes], loss, *byte_scale(largest))


def block_losses(summary: RunSummary) -> Figure:
    """Predicted loss of every block, plan and baselines."""
    figure = Figure(figsize=(9, 3.4))
    axes = figure.add_subplot()
    for number, (name, plan) in enumerate(summary.plans.items()):
        losses = summary.block_losses(plan)
        ours = name == "plan"
        axes.plot(
            list(losses),
            list(losses.values()),
            marker="*" if ours else _MARKERS[number % len(_MARKERS)],
            markersize=8 if ours else 4,
            linewidth=2 if ours else 1.1,
            color=_PLAN if ours else _BASELINES[number % len(_BASELINES)],
            zorder=3 if ours else 2,
            label=name,
        )
    predicted = f"predicted {summary.yardstick.loss.heading}"
    axes.set_ylabel(predicted if summary.loss_is_predicted else "relative output error")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("transformer block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Where the loss comes from")
    axes.grid(axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def expert_load(summary: RunSummary) -> Figure:
    """Experts × blocks; colour is the load against an even share, × a starved expert."""
    blocks = sorted(summary.expert_load)
    most = max(len(summary.expert_load[block]) for block in blocks)
    shares = np.full((len(blocks), most), np.nan)
    marks = []
    for row, block in enumerate(blocks):
        load = np.asarray(summary.expert_load[block], dtype=float)
        even = max(load.mean(), 1e-9)
        shares[row, : len(load)] = np.log2(np.maximum(load / even, 2.0**-10))
        marks += [(expert, row) for expert in summary.starved(block)]
    width = min(0.4, max(0.06, 9.0 / most))
    height = min(0.34, max(0.1, 8.0 / len(blocks)))
    size = 2.4 + max(3.6, width * most), 1.5 + max(0.9, height * len(blocks))
    figure = Figure(figsize=size)
    axes = figure.add_subplot()
    axes.set_facecolor("#eceef1")
    colours = Normalize(-3, 3)
    image = axes.imshow(shares, cmap="PuOr_r", norm=colours, aspect="auto", interpolation="nearest")
    cells(axes, blocks, range(most), width)
    if height < 0.18:
        axes.set_yticks(range(0, len(blocks), 5), [str(block) for block in blocks[::5]])
    if marks:
        across, down = zip(*marks, strict=True)
        area = (min(width, height) * 72 * 0.45) ** 2
        axes.scatter(across, down, marker="x", s=area, color="white", path_effects=OUTLINE)
    axes.set_xlabel(f"expert (× marks the {len(marks)} with fewer tokens than inputs)")
    axes.set_ylabel("transformer block")
    axes.set_title("Expert load: tokens against an even share")
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05, extend="both")
    bar.set_ticks(range(-3, 4))
    bar.formatter = FuncFormatter(lambda x, _: f"×{2**x:g}" if x >= 0 else f"÷{2**-x:g}")
    bar.update_ticks()
    bar.outline.set_visible(False)
    return figure


_PICTURES: dict[str, Callable[[RunSummary], Figure]] = {
    "plan": plan_map,
    "loss_and_bytes": loss_and_bytes,
    "bytes": part_bytes,
    "block_losses": block_losses,
    "expert_load": expert_load,
}


def draw(summary: RunSummary, folder: Path) -> dict[str, Path]:
    """Writes the pictures into a folder.

    Returns:
        name → PNG. ``expert_load`` only where there are experts, ``loss_and_bytes`` only where
        something was evaluated.
    """
    wanted = dict(_PICTURES)
    if not summary.expert_load:
        del wanted["expert_load"]
    if not any(name in summary.scores for name in summary.plans):
        del wanted["loss_and_bytes"]
    return save({name: partial(picture, summary) for name, picture in wanted.items()}, folder)


def save(pictures: Mapping[str, Callable[[], Figure]], folder: Path) -> dict[str, Path]:
    """Draws pictures one after another into a folder; returns name → PNG."""
    files = {}
    with rc_context(STYLE):
        for name, picture in pictures.items():
            files[name] = folder / f"{name}.png"
            write_atomically(files[name], partial(_save, picture()))
    return files


def shown_width(picture: Path) -> int:
    """Width at which a picture's text has its intended size, in CSS pixels."""
    height_and_width: tuple[int, ...] = imread(picture).shape
    return height_and_width[1] * _SCREEN_DPI // _DPI


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=_DPI, bbox_inches="tight", facecolor="white")
