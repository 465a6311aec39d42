"""report.html: one file that holds the whole report, pictures and all."""

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moesaic.methods.base import Event
from moesaic.orchestrator.expert_pictures import draw_experts
from moesaic.orchestrator.files import write_text
from moesaic.orchestrator.pictures import byte_scale, draw, shown_width
from moesaic.orchestrator.refinement_pictures import draw_refinement
from moesaic.orchestrator.study_pictures import draw_study
from moesaic.orchestrator.summary import RunSummary

_FOLDER = Path(__file__).parent
_TEMPLATE = "report.html.j2"
# Messages shown of every kind of event.
_MESSAGES = 8

_CAPTIONS = {
    "plan": "Colour and figures are the bits per weight that the file really holds, scales and zero"
    " points included. Grey: left as it was.",
    "loss_and_bytes": "Lower and further left is better; the dense model is at 0.",
    "bytes": "“Not compressed” are embeddings, norms, routers and whatever the recipe keeps.",
    "block_losses": "What the search predicted for the units of each block, summed.",
    "expert_load": "Tokens of the calibration text that the router sent to each expert.",
}
# What that picture has besides, where losses are predicted.
PREDICTED = (
    " Marks were evaluated. The thin line is what the measurements predict: each of its points is a"
    " plan that a budget of that size would get, none of them was run."
)


def bytes_text(size: float) -> str:
    """``12.3 MB``."""
    scale, unit = byte_scale(size)
    return f"{size / scale:,.0f} {unit}" if scale == 1 else f"{size / scale:,.2f} {unit}"


def number_text(value: float | None) -> str:
    """Four significant digits, or a dash where there is no number."""
    if value is None or math.isnan(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3e}"
    return f"{value:.4g}"


def seconds_text(seconds: float) -> str:
    """``1 h 02 min``, ``3 min 20 s`` or ``4.2 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def write_report(summary: RunSummary, folder: Path) -> Path:
    """Writes ``report.html`` and ``pictures/*.png`` into a folder; returns the former."""
    pictures = draw(summary, folder / "pictures")
    experts = draw_experts(summary, folder / "pictures")
    study = {} if summary.study is None else draw_study(summary, summary.study, folder / "pictures")
    refinement = {}
    if summary.refinement is not None:
        refinement = draw_refinement(summary.refinement, folder / "pictures")
    text = render(summary, pictures, experts, study, refinement)
    path = folder / "report.html"
    write_text(path, text)
    return path


def render(
    summary: RunSummary,
    pictures: Mapping[str, Path],
    experts: Mapping[str, tuple[Path, str]],
    study: Mapping[str, tuple[Path, str]] | None = None,
    refinement: Mapping[str, tuple[Path, str]] | None = None,
) -> str:
    """The HTML with the pictures inside.

    Args:
        pictures: name → PNG.
        experts: those of experts, name → PNG and caption, the one of all layers first.
        study: those of a study, name → PNG and caption.
        refinement: those of refining the plan, name → PNG and caption.
    """
    curve = bool(summary.predicted) and summary.loss_is_predicted
    more = {"loss_and_bytes": PREDICTED} if curve else {}
    return page(
        _TEMPLATE,
        run=summary,
        plan_bytes=summary.scores.get("plan", {}).get("bytes", summary.plan.bytes),
        rows=summary.table.to_dict("records"),
        widest=summary.table["bits_per_weight"].max(),
        choices=summary.choice_bytes(summary.plan),
        columns=_extra_columns(summary),
        sources=_sources(summary),
        events=_events(summary),
        pictures=[
            (name, _inline(path), shown_width(path), _CAPTIONS[name] + more.get(name, ""))
            for name, path in pictures.items()
        ],
        expert_pictures=captioned(experts),
        study_pictures=captioned(study or {}),
        refinement_pictures=captioned(refinement or {}),
        compared=any(layer.similarity is not None for layer in summary.experts),
    )


def page(template: str, **values: Any) -> str:
    """The HTML that a template of this folder makes of some values."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {
        "bytes_text": bytes_text,
        "number": number_text,
        "seconds": seconds_text,
    }
    return environment.get_template(template).render(**values)


def captioned(pictures: Mapping[str, tuple[Path, str]]) -> list[tuple[str, str, int, str]]:
    """(name, picture as URL, width, caption) of PNGs with their captions, as templates want it."""
    return [
        (name, _inline(path), shown_width(path), caption)
        for name, (path, caption) in pictures.items()
    ]


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _extra_columns(summary: RunSummary) -> list[tuple[str, str]]:
    """(key, heading) of the scores that not every evaluation gives."""
    headings = {
        "before_router_calibration": "KL before routers learnt",
        "accuracy": "next token right",
        "tokens_per_second": "tokens/s",
        "peak_memory_bytes": "peak memory",
    }
    known = {key for score in summary.scores.values() for key in score}
    return [(key, heading) for key, heading in headings.items() if key in known]


def _sources(summary: RunSummary) -> list[tuple[str, dict[str, Any]]]:
    """(text source, name of the plan → its scores there), where there is more than one source."""
    found: dict[str, dict[str, Any]] = {}
    for name, score in summary.scores.items():
        for source, values in score.get("sources", {}).items():
            found.setdefault(source, {})[name] = values
    return list(found.items()) if len(found) > 1 else []


def _events(summary: RunSummary) -> list[tuple[str, int, list[Event]]]:
    """(kind, how often, the first few), the most frequent kind first."""
    return [
        (kind, count, [event for event in summary.events if event.kind == kind][:_MESSAGES])
        for kind, count in summary.event_counts.items()
    ]
