"""The picture of refining a plan: KL of the best one by what was run for it."""

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from moesaic.orchestrator.pictures import KINDS, save
from moesaic.orchestrator.refinement import Refinement

_CAPTION = (
    "KL to the dense model on calibration text of the best plan so far, by plans run on a part of"
    " that text (evaluations). A colour per refiner; each begins with the plan that the one before"
    " it left."
)


def draw_refinement(refinement: Refinement, folder: Path) -> dict[str, tuple[Path, str]]:
    """Writes the picture into a folder; name → PNG and caption."""
    files = save({"refinement": partial(progress, refinement)}, folder)
    return {name: (path, _CAPTION) for name, path in files.items()}


def progress(refinement: Refinement) -> Figure:
    """Best KL by evaluations, refiner after refiner."""
    figure = Figure(figsize=(9, 3.4))
    axes = figure.add_subplot()
    before = 0
    for number, stage in enumerate(refinement.stages):
        # The start is there before anything was run.
        at = [before, *(before + moment.evaluations for moment in stage.trace)]
        best = [stage.start_kl, *(moment.kl for moment in stage.trace)]
        colour = KINDS[number % len(KINDS)]
        label = f"{stage.method}, {stage.tokens:,} tokens, {stage.seconds:.0f} s"
        axes.step(at, best, where="post", color=colour, linewidth=1.8, label=label)
        axes.plot(at[-1:], best[-1:], marker="o", color=colour)
        before += stage.evaluations
    axes.set_xlabel("evaluations")
    axes.set_ylabel("KL (nats per token)")
    axes.set_title("Refining the plan")
    axes.legend()
    axes.grid()
    return figure
