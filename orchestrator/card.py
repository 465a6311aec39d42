"""The model card of a checkpoint: how it was made, how it is loaded, what it scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.methods.base import chain_text
from moesaic.orchestrator.console import figure_text
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.recipe import Recipe, portable
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
        f"`{Path(portable(recipe.model)).name}` compressed by moesaic for `{recipe.serve}`:"
        f" {plan.bytes:,} bytes of {experiment.size.dense_bytes:,}.",
        "",
        *_loading(recipe),
        "| choice | units |",
        "|---|---:|",
        *(f"| {text} | {count} |" for text, count in sorted(counts.items())),
        "",
    ]
    if scores is not None:
        lines += [*score_lines(scores), ""]
    return "\n".join([*lines, "## Recipe", "", "```yaml", recipe.to_yaml().rstrip(), "```", ""])


def score_lines(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The scores as a table in Markdown."""
    return [
        "Scores on held-out text (KL to the dense model in nats per token):",
        "",
        "| | bytes | bits per weight | perplexity | KL |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {s['bytes']:,} | {s['bits_per_weight']:.3f} |"
            f" {figure_text(s['perplexity'], 3)} | {figure_text(s['kl'], 4)} |"
            for name, s in scores.items()
        ),
    ]


def _loading(recipe: Recipe) -> list[str]:
    code = {
        "moesaic": "import moesaic\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        "transformers": "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        "vllm": 'from vllm import LLM\n\nmodel = LLM("PATH")',
    }[recipe.serve]
    return ["```python", code, "```", ""]
