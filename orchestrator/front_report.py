"""The report of a recipe with several budgets: their plans side by side, one link to each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moesaic.orchestrator.files import write_text
from moesaic.orchestrator.front_pictures import Evaluated, bytes_and_loss
from moesaic.orchestrator.fronts import FrontPoint
from moesaic.orchestrator.pictures import byte_scale, save
from moesaic.orchestrator.report import PREDICTED, captioned, page
from moesaic.orchestrator.yardsticks import Yardstick

_TEMPLATE = "front.html.j2"
_CAPTION = "Lower and further left is better; the dense model is at 0. Stars are the plans."


@dataclass(frozen=True)
class FrontSummary:
    """What a run of several budgets has to tell, besides what each plan has.

    Attributes:
        name, model, created, command, machine, serve, recipe: as of a run
            (:class:`moesaic.orchestrator.summary.RunSummary`).
        dense_bytes: of the original checkpoint.
        budgets: name → limit for the checkpoint in bytes; ``NAME/`` is the plan's folder.
        scores: ``dense``, each baseline and each budget → scores.
        losses: baseline or budget → what its plan is predicted to lose.
        predicted: points of the predicted front.
        loss_is_predicted: whether predicted losses are those of the yardstick.
        yardstick: what the model was judged by.
    """

    name: str
    model: str
    created: str
    command: str
    machine: str
    serve: str
    recipe: str
    dense_bytes: int
    budgets: Mapping[str, int]
    scores: Mapping[str, Mapping[str, Any]]
    losses: Mapping[str, float]
    predicted: Sequence[FrontPoint]
    loss_is_predicted: bool
    yardstick: Yardstick


def write_front_report(summary: FrontSummary, folder: Path) -> Path:
    """Writes ``report.html`` and ``pictures/front.png`` into a folder; returns the former."""
    loss = summary.yardstick.loss
    evaluated = [
        Evaluated(name, score["bytes"], score[loss.key], name in summary.budgets)
        for name, score in summary.scores.items()
        if name in summary.losses
    ]
    scale, unit = byte_scale(max(point.bytes for point in evaluated))
    curve = summary.predicted if summary.loss_is_predicted else ()
    budgets = list(summary.budgets.values())
    draw = partial(bytes_and_loss, evaluated, curve, budgets, loss, scale, unit)
    files = save({"front": draw}, folder / "pictures")
    caption = _CAPTION + (PREDICTED if curve else "")
    pictures = captioned({name: (path, caption) for name, path in files.items()})
    path = folder / "report.html"
    write_text(path, page(_TEMPLATE, run=summary, pictures=pictures))
    return path
