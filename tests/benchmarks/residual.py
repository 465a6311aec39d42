"""A correction of low rank after GPTQ against smaller groups and more bits, at equal bytes.

    python tests/benchmarks/residual.py --model build/smollm2 [--ranks 16 32 64] [--seeds 3]

First table: GPTQ with ``--width`` bits everywhere and EoRA of one rank, and what GPTQ alone makes
of the bytes that this took: the same bits with smaller groups, or more bits, each by an exact
knapsack. Second table: bits × rank of the correction in one search beside bits alone, and what a
run takes of these two, having run both on calibration text. Everything is measured once per seed,
which draws the calibration text.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import (
    add_text_options,
    arguments_parser,
    check_inputs,
    progress,
    report,
    table,
    write_recipe,
)
from plans import (
    Measured,
    Outcome,
    add_run_options,
    figure,
    folder,
    measured,
    recipe_sections,
    setting,
)

from moesaic.methods.base import Chain, Spec
from moesaic.orchestrator import finalists
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.search.base import Plan

CORRECTED, GROUPS, BITS = "with EoRA", "smaller groups", "more bits"
ALONE, JOINT, TAKEN = "bits alone", "bits × rank", "taken by a run"
# What is compared, way.
Case = tuple[str, str]


def gptq(bits: int, group_size: int = -1) -> dict[str, Any]:
    """An entry of a recipe."""
    options = {"bits": bits, "group_size": group_size, "act_order": True, "clip": "weighted"}
    return {"method": "gptq", **options}


def chain(*links: Mapping[str, Any]) -> Chain:
    """Entries of a recipe as a chain."""
    return tuple(
        Spec.of(link["method"], {key: link[key] for key in link if key != "method"})
        for link in links
    )


def candidates(arguments: argparse.Namespace) -> list[Any]:
    """All that is measured."""
    found: list[Any] = [gptq(bits) for bits in dict.fromkeys([*arguments.widths, *arguments.more])]
    found += [gptq(arguments.width, group) for group in arguments.groups]
    ranks = sorted({*arguments.ranks, *arguments.search_ranks})
    for bits in dict.fromkeys([*arguments.widths, arguments.width]):
        found.append([gptq(bits), {"method": "eora", "rank": ranks}])
    return found


def corrected(arguments: argparse.Namespace, bits: Sequence[int]) -> list[Chain]:
    """Chains of GPTQ and EoRA."""
    ranks = arguments.search_ranks
    return [chain(gptq(b), {"method": "eora", "rank": r}) for b in bits for r in ranks]


def plans_of(bench: Measured, arguments: argparse.Namespace) -> dict[Case, Plan]:
    """What is compared in both tables; ways that do not fit are left out."""
    width, every = arguments.width, [*arguments.widths, *arguments.more]
    alone = [chain(gptq(bits)) for bits in dict.fromkeys(every)]
    groups = [chain(gptq(width)), *(chain(gptq(width, group)) for group in arguments.groups)]
    found: dict[Case, Plan | None] = {("rank 0", "GPTQ"): bench.everywhere(groups[0])}
    for rank in arguments.ranks:
        plan = bench.everywhere(chain(gptq(width), {"method": "eora", "rank": rank}))
        name = f"rank {rank}"
        found[name, CORRECTED] = plan
        found[name, GROUPS] = bench.searched(groups, plan.bytes)
        found[name, BITS] = bench.searched(alone, plan.bytes)
    own = [chain(gptq(bits)) for bits in arguments.widths]
    both = [*own, *corrected(arguments, arguments.widths)]
    for bits in arguments.bits:
        size = int(bits * bench.weights / 8)
        found[f"{bits:g} bits", ALONE] = bench.searched(own, size)
        found[f"{bits:g} bits", JOINT] = bench.searched(both, size)
        pair = {way: found[f"{bits:g} bits", way] for way in (JOINT, ALONE)}
        found[f"{bits:g} bits", TAKEN] = taken(bench, {w: p for w, p in pair.items() if p})
    return {case: plan for case, plan in found.items() if plan is not None}


def taken(bench: Measured, plans: Mapping[str, Plan]) -> Plan | None:
    """What a run takes of several plans."""
    if len(plans) < 2:
        return next(iter(plans.values()), None)
    experiment = bench.experiment
    pieces = {name: plan_pieces(experiment, experiment.walk, p.units) for name, p in plans.items()}
    losses = finalists.divergences(experiment, bench.pool, bench.view, pieces)
    return plans[finalists.taken(plans, losses)]


def run(arguments: argparse.Namespace, place: Path, seed: int) -> dict[Case, Outcome]:
    """Every case of one seed."""
    sections = recipe_sections(arguments, seed)
    file = place / str(seed) / "residual.yaml"
    recipe = write_recipe(file, arguments, candidates(arguments), search="knapsack", **sections)
    with measured(recipe, place / str(seed) / "run") as bench:
        plans = plans_of(bench, arguments)
        outcomes = bench.outcomes({" ".join(case): plan for case, plan in plans.items()})
        return {case: outcomes[" ".join(case)] for case in plans}


def rows(found: Mapping[Case, Sequence[Outcome]], first: Mapping[str, str]) -> list[list[str]]:
    """A row per case; ``first``: what is compared → way that the others are divided by."""
    lines = []
    for (name, way), outcomes in found.items():
        if name not in first:
            continue
        base = found.get((name, first[name]), ())
        pairs = zip(outcomes, base, strict=False)
        ratio = "" if way == first[name] else figure([one.kl / other.kl for one, other in pairs])
        repaired = [
            sum(share for c, share in o.choices.items() if c and c[-1].method == "eora")
            for o in outcomes
        ]
        lines.append(
            [
                name,
                way,
                figure([o.bits for o in outcomes]),
                figure([o.perplexity for o in outcomes]),
                figure([o.kl for o in outcomes]),
                ratio,
                figure([o.predicted / o.kl for o in outcomes]),
                figure([100 * share for share in repaired]),
            ]
        )
    return lines


def verdicts(found: Mapping[Case, Sequence[Outcome]], budgets: Sequence[float]) -> list[str]:
    """Whether the joint search was ever worse than bits alone."""
    lines = []
    for bits in budgets:
        name = f"{bits:g} bits"
        alone, joint = found.get((name, ALONE)), found.get((name, JOINT))
        if not alone or not joint:
            lines.append(f"{name}: nothing fits.")
            continue
        for way in (JOINT, TAKEN):
            pairs = list(zip(alone, found[name, way], strict=True))
            worse = sum(own.kl > other.kl for other, own in pairs)
            better = sum(own.kl < other.kl for other, own in pairs)
            lines.append(
                f"{name}, {way}: worse than bits alone with {worse} of {len(pairs)} seeds, better"
                f" with {better}."
            )
    return lines


def body(arguments: argparse.Namespace, found: Mapping[Case, Sequence[Outcome]], seeds: int) -> str:
    """The report: both tables, what shows."""
    headers = ["", "", "bits per weight", "perplexity", "KL"]
    more = ["predicted / measured", "% of choices with EoRA"]
    ranks = {f"rank {rank}": CORRECTED for rank in arguments.ranks} | {"rank 0": "GPTQ"}
    budgets = {f"{bits:g} bits": ALONE for bits in arguments.bits}
    parts = [
        f"{setting(arguments, seeds)}. GPTQ with act-order, weighted clipping, one scale per row"
        " unless said otherwise. Median (least–largest) over seeds; KL in nats per token.",
        f"GPTQ with {arguments.width} bits and EoRA, and GPTQ alone in the same bytes"
        f" (groups of {arguments.groups}, or {sorted(arguments.more)} bits):",
        table([*headers, f"KL / {CORRECTED}", *more], rows(found, ranks)),
        f"One search, {arguments.widths} bits × ranks {arguments.search_ranks}:",
        table([*headers, f"KL / {ALONE}", *more], rows(found, budgets)),
        "\n".join(f"- {line}" for line in verdicts(found, arguments.bits)),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    add_run_options(parser)
    parser.add_argument("--width", type=int, default=3, help="bits that are corrected everywhere")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 32, 16, 8])
    parser.add_argument("--more", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 3.25, 3.5, 4.0])
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--search-ranks", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    arguments = parser.parse_args()
    check_inputs(arguments)
    found: dict[Case, list[Outcome]] = {}
    with folder(arguments, "residual") as place:
        for seed in range(arguments.seeds):
            progress(f"seed {seed + 1} of {arguments.seeds}")
            for case, outcome in run(arguments, Path(place), seed).items():
                found.setdefault(case, []).append(outcome)
            # After each seed: what is done is not lost if the rest takes too long.
            text = body(arguments, found, seed + 1)
            report("A correction of low rank against bits", text, arguments.write)


if __name__ == "__main__":
    main()
