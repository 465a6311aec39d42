"""An encoder of sentences in fewer bytes: low rank and integers, cosine to its own embeddings.

    python tests/benchmarks/encoder.py --text FILE --heldout FILE [--seeds 3] [--kept 0.9 0.5]

Every method of low rank, for every share of the layers' bytes that is kept: with one rank share
everywhere, and with the ranks that an exact knapsack finds in the bytes that the former took. In
the bytes of every width of ``--bits``: round to nearest, GPTQ, and factors that are themselves in 8
bits, with searched ranks. Held-out sentences are embedded by the original and by the compressed
model; the table has the cosine of the two: mean, what one sentence in twenty is below, least.
``--seeds`` draw the calibration text; the sentences are the same for all.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    ROOT,
    add_text_options,
    arguments_parser,
    median,
    progress,
    report,
    table,
    write_recipe,
)
from plans import Measured, add_run_options, figure, folder, measured, recipe_sections

from moesaic.methods.base import Chain, Spec
from moesaic.orchestrator import stages
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.search.base import Plan

MINILM = ROOT / "build" / "minilm"
UNIFORM, SEARCHED = "uniform", "searched"
# Group of the integers, and of the factors in 8 bits (ranks are multiples of 8).
GROUP_SIZE, FACTOR_GROUP_SIZE = 32, 8
# Bytes that plans are compared at (a share kept, or a width in bits), method, ranks.
Case = tuple[str, str, str]


@dataclass(frozen=True)
class Outcome:
    """A plan on held-out sentences.

    Attributes:
        bytes: of the layers.
        kept: share of their dense bytes.
        predicted: its predicted loss.
        score: as the evaluation gives it.
    """

    bytes: int
    kept: float
    predicted: float
    score: Mapping[str, Any]


Found = dict[Case, list[Outcome]]


def low_rank(method: str, share: float) -> Chain:
    return (Spec.of(method, {"rank": share}),)


def integers(method: str, bits: int) -> Chain:
    return (Spec.of(method, {"bits": bits, "group_size": GROUP_SIZE}),)


def rounded(share: float) -> Chain:
    """Factors in 8 bits."""
    quantizer = Spec.of("gptq", {"bits": 8, "group_size": FACTOR_GROUP_SIZE})
    return (*low_rank("svd_llm", share), quantizer)


def plans_of(bench: Measured, arguments: argparse.Namespace) -> dict[Case, Plan]:
    """Every case of one seed."""
    plans: dict[Case, Plan] = {}

    def searched(case: Case, chains: Sequence[Chain], size: int) -> None:
        plan = bench.searched(chains, size)
        if plan is not None:
            plans[case] = plan

    for share in arguments.kept:
        for method in arguments.methods:
            own = plans[f"{share:.0%}", method, UNIFORM] = bench.everywhere(low_rank(method, share))
            chains = [low_rank(method, rank) for rank in ranks(arguments)]
            searched((f"{share:.0%}", method, SEARCHED), chains, own.bytes)
    for bits in arguments.bits:
        name = f"{bits} bits"
        plans[name, "rtn", UNIFORM] = bench.everywhere(integers("rtn", bits))
        own = plans[name, "gptq", UNIFORM] = bench.everywhere(integers("gptq", bits))
        chains = [rounded(share) for share in arguments.rounded_ranks]
        searched((name, "svd_llm → gptq 8", SEARCHED), chains, own.bytes)
    return plans


def ranks(arguments: argparse.Namespace) -> list[float]:
    """Shares to be searched, those of the uniform plans among them."""
    return sorted({*arguments.ranks, *arguments.kept})


def candidates(arguments: argparse.Namespace) -> list[Any]:
    """Everything that is measured, as a recipe has it."""
    shares, widths, rounded_shares = ranks(arguments), arguments.bits, arguments.rounded_ranks
    quantizer = {"method": "gptq", "bits": 8, "group_size": FACTOR_GROUP_SIZE}
    return [
        *({"method": method, "rank": shares} for method in arguments.methods),
        *({"method": m, "bits": widths, "group_size": GROUP_SIZE} for m in ("rtn", "gptq")),
        [{"method": "svd_llm", "rank": rounded_shares}, quantizer],
    ]


def run(arguments: argparse.Namespace, place: Path, seed: int) -> dict[Case, Outcome]:
    """Every case of one seed, judged."""
    sections = recipe_sections(arguments, seed)
    sections["calibration"]["gradient_sequences"] = arguments.sequences
    sections["evaluation"]["length"] = arguments.sentence_length
    file = place / str(seed) / "encoder.yaml"
    recipe = write_recipe(file, arguments, candidates(arguments), search="knapsack", **sections)
    with measured(recipe, place / str(seed) / file.stem) as bench:
        plans, experiment = plans_of(bench, arguments), bench.experiment
        names = {" ".join(case): case for case in plans}
        pieces = {
            name: plan_pieces(experiment, experiment.walk, plans[case].units)
            for name, case in names.items()
        }
        scores = stages.evaluated(experiment, bench.pool, bench.view, pieces)
        return {
            case: Outcome(
                bytes=plans[case].bytes,
                kept=plans[case].bytes / bench.dense_bytes,
                predicted=plans[case].loss,
                score=scores[name],
            )
            for name, case in names.items()
        }


def rows(found: Found) -> list[list[str]]:
    """A row per case."""
    lines = []
    for (size, method, way), outcomes in found.items():
        scores = [outcome.score for outcome in outcomes]
        ratios = [o.predicted / o.score["distance"] for o in outcomes]
        lines.append(
            [
                size,
                method,
                way,
                f"{median([o.bytes for o in outcomes]) / 1e6:.2f}",
                f"{100 * median([o.kept for o in outcomes]):.1f}",
                *(cosine([s[key] for s in scores]) for key in ("cosine", "cosine_low")),
                cosine([s["cosine_least"] for s in scores]),
                figure([s["distance"] for s in scores]),
                figure(ratios),
            ]
        )
    return lines


def cosine(values: Sequence[float]) -> str:
    """Median to four decimals, and least and largest in brackets."""
    middle, low, high = (f"{f(values):.4f}" for f in (median, min, max))
    return middle if len(values) == 1 else f"{middle} ({low}–{high})"


def verdicts(found: Found) -> list[str]:
    """What searched ranks gain, a line per share."""
    lines = []
    for (size, method, way), outcomes in found.items():
        if way == SEARCHED and (size, method, UNIFORM) in found:
            pairs = zip(outcomes, found[size, method, UNIFORM], strict=True)
            ratio = median([a.score["distance"] / b.score["distance"] for a, b in pairs])
            lines.append(f"{method} at {size}: 1 − cosine, searched / uniform ranks: {ratio:.3f}.")
    return lines


def body(arguments: argparse.Namespace, found: Found, seeds: int) -> str:
    """The report: setting, table, what shows."""
    headers = ["bytes of", "method", "ranks", "layers, MB", "% of dense"]
    headers += ["cosine", "worst 5 %", "least", "1 − cosine", "predicted / measured"]
    text = ", ".join(path.name for path in arguments.text)
    heldout = ", ".join(path.name for path in arguments.heldout)
    shares = ", ".join(f"{share:g}" for share in ranks(arguments))
    rounded_shares = ", ".join(f"{share:g}" for share in arguments.rounded_ranks)
    parts = [
        f"{arguments.model.name}: {arguments.sequences} × {arguments.length} calibration tokens"
        f" ({text}), all of them for gradients; {arguments.heldout_sequences} held-out sentences of"
        f" at most {arguments.sentence_length} tokens ({heldout}); float32; seeds: {seeds}. Median"
        " (least–largest) over seeds. Bytes are those of the layers' weights with all that is"
        " stored for them; the embedding of words stays as it is and is not counted. Integers in"
        f" groups of {GROUP_SIZE}. Rank shares to search: {shares}; in 8 bits {rounded_shares}.",
        table(headers, rows(found)),
        "\n".join(f"- {line}" for line in verdicts(found)),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    add_run_options(parser)
    parser.set_defaults(model=MINILM, sequences=256, length=64, heldout_sequences=512, workers=1)
    parser.add_argument("--sentence-length", type=int, default=128)
    parser.add_argument("--methods", nargs="+", default=["svd", "fwsvd", "asvd", "svd_llm"])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    steps = [step / 20 for step in range(6, 20)]
    parser.add_argument("--ranks", type=float, nargs="+", default=steps, help="to be searched")
    # Each is rounded by itself, while factors alone are cuts of the largest.
    steps = [step / 10 for step in range(3, 10)]
    parser.add_argument("--rounded-ranks", type=float, nargs="+", default=steps)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        raise SystemExit(f"{arguments.model}: no model there; make minilm makes build/minilm")
    found: Found = {}
    with folder(arguments, "encoder") as place:
        for seed in range(arguments.seeds):
            progress(f"seed {seed + 1} of {arguments.seeds}")
            for case, outcome in run(arguments, Path(place), seed).items():
                found.setdefault(case, []).append(outcome)
            # After each seed: what is done is not lost if the rest takes too long.
            text = body(arguments, found, seed + 1)
            report("An encoder of sentences in fewer bytes", text, arguments.write)


if __name__ == "__main__":
    main()
