"""Slicing alone: perplexity and KL to the original at several widths, both kinds of axes.

    python tests/benchmarks/slicing.py --model build/smollm2 [--hidden 0.9 0.8 0.7]

Nothing is compressed after slicing. ``--as TYPE`` measures a copy of the model that calls itself
another model type: llama takes only widths that its heads divide, mistral, which computes the same,
takes any.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from common import (
    add_text_options,
    arguments_parser,
    check_inputs,
    progress,
    report,
    scratch,
    table,
    write_recipe,
)
from plans import figure

from moesaic.orchestrator.run import run_recipe


def renamed(model: Path, model_type: str, folder: Path) -> Path:
    """A copy of a model folder that calls itself ``model_type``."""
    shutil.copytree(model, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if not key.endswith("_bias")}
    config |= {"model_type": model_type, "architectures": [], "sliding_window": None}
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    parser.add_argument("--hidden", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--as", dest="model_type", default="", metavar="TYPE")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--heldout-sequences", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    check_inputs(arguments)
    name = arguments.model.name
    rows: list[list[str]] = []
    with scratch("slicing") as place:
        if arguments.model_type:
            own = Path(place) / "model"
            arguments.model = renamed(arguments.model, arguments.model_type, own)
        for hidden in arguments.hidden:
            for shortcuts in (False, True):
                found: list[dict[str, Any]] = []
                for seed in range(arguments.seeds):
                    progress(f"hidden {hidden:g}, shortcuts {shortcuts}, seed {seed}")
                    recipe = write_recipe(
                        Path(place) / f"{hidden:g}-{shortcuts}-{seed}.yaml",
                        arguments,
                        [],
                        {
                            "sequences": arguments.sequences,
                            "length": arguments.length,
                            "seed": seed,
                        },
                        slice={"method": "slicegpt", "hidden": hidden, "shortcuts": shortcuts},
                        budget={"bits_per_weight": 16},
                        compute={"dtype": "float32", "workers": arguments.workers},
                        evaluation={
                            "texts": [{"file": str(p.resolve())} for p in arguments.heldout],
                            "sequences": arguments.heldout_sequences,
                            "length": arguments.length,
                        },
                    )
                    output = recipe.with_suffix("")
                    found.append(dict(run_recipe(recipe, output, ("evaluate",))["scores"]))
                if not rows:
                    rows.append(row("original", "", [one["dense"] for one in found]))
                axes = "shortcuts" if shortcuts else "shared"
                rows.append(row(f"{hidden:g}", axes, [one["plan"] for one in found]))
    text = (
        f"{name}{f' as {arguments.model_type}' if arguments.model_type else ''}:"
        f" {arguments.sequences} × {arguments.length} calibration tokens,"
        f" {arguments.heldout_sequences} × {arguments.length} held-out tokens, float32,"
        f" {arguments.seeds} seed(s), median (least–largest). KL to the original in nats per"
        " token.\n\n"
    )
    headers = ["hidden", "axes", "bytes", "perplexity", "KL"]
    report("Slicing alone", text + table(headers, rows), arguments.write)


def row(hidden: str, axes: str, scores: list[dict[str, Any]]) -> list[str]:
    """A line of the table from the scores of every seed."""
    perplexity, kl = (figure([float(s[key]) for s in scores]) for key in ("perplexity", "kl"))
    return [hidden, axes, f"{int(scores[0]['bytes']):,}", perplexity, kl]


if __name__ == "__main__":
    main()
