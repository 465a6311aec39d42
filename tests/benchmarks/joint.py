"""Experts × bits in one search beside bits only, and beside experts only at 4 bits; equal bytes.

    python tests/benchmarks/joint.py --model build/large/model [--bits 2.5 3.0] [--seeds 3]

Three recipes over one store per seed and budget: quantizers alone; reductions, each followed by 4
bits (linears have 4 bits, too, or fewer where the budget demands it); both together, every
reduction with every quantizer. KL to the dense model on held-out text, in all and for each source.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
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

WAYS = ("bits only", "experts only, then 4 bits", "experts × bits")


def candidates(arguments: argparse.Namespace, way: str) -> list[Any]:
    """Entries of a recipe."""
    quantizer = {"method": "gptq", "group_size": arguments.group_size, "act_order": True}
    quantizer |= {"clip": "weighted"}
    every = {**quantizer, "bits": arguments.widths}
    reducers = [json.loads(text) for text in arguments.reducers]
    if way == "bits only":
        return [every]
    if way == "experts only, then 4 bits":
        four = {**quantizer, "bits": 4}
        return [every, *([reducer, four] for reducer in reducers)]
    return [every, *([reducer, every] for reducer in reducers)]


def run(
    arguments: argparse.Namespace, folder: Path, seed: int, bits: float, way: str
) -> dict[str, Any] | None:
    """Score of the plan, with its choices; None where nothing fits."""
    calibration = {"sequences": arguments.sequences, "length": arguments.length, "seed": seed}
    evaluation = {
        "texts": [{"file": str(path.resolve())} for path in arguments.heldout],
        "sequences": arguments.heldout_sequences,
        "length": arguments.length,
    }
    own = candidates(arguments, way)
    recipe = write_recipe(
        folder / str(seed) / f"{WAYS.index(way)}-{bits}.yaml",
        arguments,
        own,
        {**calibration, "gradient_sequences": arguments.sequences // 2},
        budget={"bits_per_weight": bits},
        search="knapsack",
        evaluation=evaluation,
        compute={"dtype": "float32"},
    )
    command = [sys.executable, "-m", "moesaic.orchestrator.cli", "evaluate", str(recipe), "--json"]
    command += ["--output", str(folder / str(seed) / recipe.stem)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode == 2 and "too few" in done.stdout:
        return None
    if done.returncode != 0:
        raise SystemExit(done.stdout)
    plan = json.loads((folder / str(seed) / recipe.stem / "plan.json").read_text())
    found: dict[str, Any] = json.loads(done.stdout)["scores"]["plan"]
    links = [chain[0] for name, chain in plan["units"].items() if name.endswith(".0.gate")]
    names = [
        f"{link['method']} {link['options'].get('keep', link['options'].get('width'))}"
        if "bits" not in link["options"]
        else "all experts"
        for link in links
    ]
    return {**found, "choices": ", ".join(f"{n} × {c}" for c, n in Counter(names).items())}


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 3.0], help="budgets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--heldout-sequences", type=int, default=48)
    parser.add_argument(
        "--reducers",
        nargs="+",
        default=[
            '{"method": "mone", "keep": [0.875, 0.75, 0.5]}',
            '{"method": "reap", "keep": [0.875, 0.75, 0.5]}',
            '{"method": "slim", "width": [0.75, 0.5], "multiple": 8}',
        ],
        help="entries of a recipe as JSON",
    )
    arguments = parser.parse_args()
    check_inputs(arguments)
    rows = []
    with scratch("joint") as name:
        for bits in arguments.bits:
            found: dict[str, list[dict[str, Any] | None]] = {way: [] for way in WAYS}
            for seed in range(arguments.seeds):
                for way in WAYS:
                    progress(f"{bits:g} bits, seed {seed}, {way}")
                    found[way].append(run(arguments, Path(name), seed, bits, way))
            rows += lines(bits, found)
    text = (
        f"{arguments.model.parent.name}: {arguments.sequences} × {arguments.length} calibration"
        f" tokens, GPTQ with {arguments.widths} bits, group size {arguments.group_size};"
        f" {arguments.seeds} seed(s); KL in nats per token. Target: joint never above the better of"
        " the two others.\n\n"
    )
    headers = ["bits per weight", "", "KL (median)", "KL of every seed", "worst source", "banks"]
    report("Experts × bits", text + table(headers, rows), arguments.write)


def lines(bits: float, found: dict[str, list[dict[str, Any] | None]]) -> list[Sequence[object]]:
    """A row per way."""
    rows: list[Sequence[object]] = []
    for way, scores in found.items():
        known = [score for score in scores if score is not None]
        if not known:
            rows.append([bits, way, "fits nothing", "", "", ""])
            continue
        kls = [score["kl"] for score in known]
        worst = max(source["kl"] for score in known for source in score["sources"].values())
        every = ", ".join(f"{kl:.4f}" for kl in kls)
        rows.append([bits, way, f"{median(kls):.4f}", every, f"{worst:.4f}", known[0]["choices"]])
    return rows


if __name__ == "__main__":
    main()
