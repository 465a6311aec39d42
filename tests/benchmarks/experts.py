"""Every reducer at some shares of experts kept, with and without router calibration.

    python tests/benchmarks/experts.py --model build/large/model [--seeds 3] [--keep 0.75 0.5]

One recipe per seed has every reduction as a baseline; nothing is quantized. Its scores give
perplexity, KL to the dense model and accuracy of the next token on held-out text, before and after
the routers learnt, pooled and for each source. The seed draws calibration text and the order of
training. ``slim`` keeps all experts and the same share of their width.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import (
    add_text_options,
    arguments_parser,
    check_inputs,
    median,
    progress,
    report,
    scratch,
    table,
    write_recipe,
)

from moesaic.methods.base import Spec, options_of, reducers
from moesaic.methods.reduction import reducer_module
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.reductions import layer_shape
from moesaic.orchestrator.streaming import StreamedModel

FIGURES = ("perplexity", "kl", "accuracy")
BEFORE = "before_router_calibration"


def reductions(
    model: Path, names: Sequence[str], keeps: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Name → entry of a recipe, for all that the model's layers allow."""
    opened = StreamedModel(Checkpoint(model))
    bank = next(unit for unit in opened.units() if unit.kind == "bank")
    shape, found = layer_shape(opened, bank), {}
    for name in names:
        key = "keep" if "keep" in options_of(name).model_fields else "width"
        # Small experts: widths need not be multiples of 32.
        more = {"multiple": 8} if key == "width" else {}
        for keep in keeps:
            try:
                options = Spec.of(name, {key: keep, **more}).parsed()
                reducer_module(name).outline(shape, options)
            except ValueError as error:
                progress(f"{name} {keep:g} left out: {error}")
                continue
            found[f"{name} {keep:g}"] = {"method": name, key: keep, **more}
    return found


def named(entry: Mapping[str, Any]) -> str:
    """What a row of the table is called."""
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in entry.values())


def scores(arguments: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """The scores of one seed."""
    baselines = reductions(arguments.model, arguments.methods, arguments.keep)
    for text in arguments.also:
        entry = json.loads(text)
        baselines[named(entry)] = entry
    calibration = {"sequences": arguments.sequences, "length": arguments.length, "seed": seed}
    evaluation = {
        "texts": [{"file": str(path.resolve())} for path in arguments.heldout],
        "sequences": arguments.heldout_sequences,
        "length": arguments.length,
    }
    training = {"learning_rate": arguments.learning_rate, "epochs": arguments.epochs}
    recipe = write_recipe(
        folder / str(seed) / "recipe.yaml",
        arguments,
        [{"method": "rtn", "bits": 8, "group_size": -1}],
        calibration,
        budget={"bits_per_weight": 9.0},
        baselines=baselines,
        router_calibration={**training, "batch": arguments.batch},
        evaluation=evaluation,
        compute={"dtype": "float32"},
    )
    command = [sys.executable, "-m", "moesaic.orchestrator.cli", "evaluate", str(recipe), "--json"]
    command += ["--output", str(folder / str(seed) / "run")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)["scores"]
    return found


def cell(values: Sequence[float], digits: int) -> str:
    """Median, and half of what lies between the least and the largest."""
    half = (max(values) - min(values)) / 2
    return f"{median(values):.{digits}f} ± {half:.{digits}f}"


def body(found: Sequence[Mapping[str, Any]]) -> str:
    """The table over all seeds, and one per source."""
    digits = {"perplexity": 2, "kl": 4, "accuracy": 4}
    names = [n for n in found[0] if n not in ("dense", "plan")]
    headers = ["", "share of bytes", *FIGURES, *(f"{name}, routers trained" for name in FIGURES)]
    dense = [found[0]["dense"][name] for name in FIGURES]
    rows: list[list[str]] = [["dense", "1", *(f"{v:.4g}" for v in dense), "", "", ""]]
    for name in names:
        before = [[seed[name][BEFORE][f] for seed in found] for f in FIGURES]
        after = [[seed[name][f] for seed in found] for f in FIGURES]
        cells = [
            cell(values, digits[figure])
            for values, figure in zip([*before, *after], [*FIGURES, *FIGURES], strict=True)
        ]
        share = found[0][name]["bytes"] / found[0]["dense"]["bytes"]
        rows.append([name, f"{share:.2f}", *cells])
    text = table(headers, rows)
    sources = list(found[0]["dense"]["sources"])
    rows = [
        [name, *(cell([s[name]["sources"][k]["kl"] for s in found], 4) for k in sources)]
        for name in names
    ]
    return f"{text}\n\nKL by source, routers trained:\n\n{table(['', *sources], rows)}"


def whitening(also: Sequence[str], found: Sequence[Mapping[str, Any]]) -> str:
    """KL of whitened entries over that of the same entries without, seed by seed."""
    entries = [json.loads(text) for text in also]
    rows = []
    for entry in entries:
        plain = {**entry, "whiten": False}
        if entry.get("whiten") and plain in entries:
            pair = [(s[named(entry)][BEFORE]["kl"], s[named(plain)][BEFORE]["kl"]) for s in found]
            rows.append([named(entry), *(f"{white / other:.3f}" for white, other in pair)])
    if not rows:
        return ""
    headers = ["", *(f"seed {seed}" for seed in range(len(found)))]
    title = "KL whitened over KL plain, before routers are trained, seed by seed:"
    return f"\n\n{title}\n\n{table(headers, rows)}"


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=reducers(), metavar="NAME")
    parser.add_argument("--also", nargs="*", default=[], metavar="JSON", help="entries of a recipe")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--heldout-sequences", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    check_inputs(arguments)
    with scratch("experts") as name:
        found = []
        for seed in range(arguments.seeds):
            progress(f"seed {seed + 1} of {arguments.seeds}")
            found.append(scores(arguments, Path(name), seed))
    head = (
        f"{arguments.model.parent.name}: {arguments.sequences} × {arguments.length} calibration"
        f" tokens, {arguments.seeds} seed(s): median ± half the range. Router calibration:"
        f" {arguments.epochs} epoch(s), learning rate {arguments.learning_rate:g},"
        f" {arguments.batch} sequences per step.\n\n"
    )
    report(
        "Reducers of experts",
        head + body(found) + whitening(arguments.also, found),
        arguments.write,
    )


if __name__ == "__main__":
    main()
