"""The model card of a checkpoint: how it was made, how it is loaded, what it scores."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.methods.base import chain_text
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.recipe import Recipe
from moesaic.orchestrator.recipe_values import portable
from moesaic.orchestrator.redaction import redacted
from moesaic.orchestrator.yardsticks import yardstick_of
from moesaic.search.base import Plan


def model_card(
    experiment: Experiment,
    plan: Plan,
    scores: Mapping[str, Mapping[str, Any]] | None,
) -> str:
    """Text of the checkpoint's README.md: how it was made and what it scores."""
    recipe = experiment.recipe
    counts: dict[str, int] = {}
    for chain in plan.units.values():
        counts[chain_text(chain)] = counts.get(chain_text(chain), 0) + 1
    lines = [
        "---",
        "library_name: transformers",
        "tags: [moesaic, compressed]",
        "---",
        f"# {recipe.name}",
        "",
        f"{_code(Path(portable(recipe.model)).name)} compressed by moesaic for `{recipe.serve}`:"
        f" {plan.bytes:,} bytes of {experiment.sizes.size.dense_bytes:,}.",
        "",
        *_loading(recipe, experiment.model.family.yardstick.task),
        "| choice | units |",
        "|---|---:|",
        *(f"| {text} | {count} |" for text, count in sorted(counts.items())),
        "",
    ]
    if scores is not None:
        lines += [*score_lines(scores), ""]
    text = recipe.to_yaml().rstrip()
    fence = _quotes(text, 3)
    lines += ["## Recipe", "", f"{fence}yaml", text, fence, ""]
    return redacted("\n".join(lines))


def _quotes(text: str, least: int) -> str:
    """So many backticks that none of the text's end what is between two of them."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _code(text: str) -> str:
    """A name as Markdown's code, whatever it holds: names of folders may be somebody else's."""
    quotes = _quotes(text, 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{quotes}{padding}{text}{padding}{quotes}"


def score_lines(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The scores as a table in Markdown."""
    yardstick = yardstick_of(next(iter(scores.values())))
    figures = yardstick.figures
    return [
        f"Scores on held-out text ({yardstick.loss.name}: {yardstick.loss.about}):",
        "",
        f"| | bytes | bits per weight | {' | '.join(figure.name for figure in figures)} |",
        f"|---|---:|---:|{'---:|' * len(figures)}",
        *(
            f"| {name} | {s['bytes']:,} | {s['bits_per_weight']:.3f} |"
            f" {' | '.join(figure.text(s[figure.key]) for figure in figures)} |"
            for name, s in scores.items()
        ),
    ]


def _loading(recipe: Recipe, task: str) -> list[str]:
    """Lines of Python that load the checkpoint; ``task`` is the class of transformers."""
    plain = f'from transformers import {task}\n\nmodel = {task}.from_pretrained("PATH")'
    code = {
        "moesaic": f"import moesaic\n{plain}",
        "transformers": plain,
        "vllm": 'from vllm import LLM\n\nmodel = LLM("PATH")',
    }[recipe.serve]
    return ["```python", code, "```", ""]
