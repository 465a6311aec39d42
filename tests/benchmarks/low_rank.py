"""Methods of low rank, and cuts: one share everywhere, and shares that were searched, equal bytes.

    python tests/benchmarks/low_rank.py --model build/smollm2 [--removed 0.1 0.2] [--seeds 3]

For every method that leaves factors of low rank and every share removed: perplexity and KL to the
dense model on held-out text with one rank share everywhere, and with the ranks that an exact
knapsack over ``--ranks`` of the same method finds in exactly the bytes that the former took. Ranks
from shares are rounded down to multiples of 8, so more is removed than was asked for, on small
models much more; ``--exact`` takes the largest whole number for each shape instead, where all
shapes can take all of them. Everything is measured once per seed, which draws the calibration text.
``--by-error`` adds plans that were searched for the least
relative error of the outputs instead of the least predicted loss, ``--searches`` those that other
strategies find.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from common import (
    add_text_options,
    arguments_parser,
    check_inputs,
    median,
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

from moesaic.methods.base import Chain, Spec, is_whole, methods, options_of, reducers
from moesaic.methods.factors import is_factoring
from moesaic.methods.parts import cuts_parts
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.search.base import searches

# Worst to best, as papers have it for large models at a fifth removed.
EXPECTED = ("svd", "fwsvd", "asvd", "svd_llm", "modegpt")
EXPECTED_AT = 0.2
BITS = 16  # of a dense weight
# Goal for KL, searched against uniform.
GOAL = 0.8
UNIFORM, SEARCHED, BY_ERROR = "uniform", "searched", "searched by error"
# Method, share removed, way.
Case = tuple[str, float, str]
Found = Mapping[Case, Sequence[Outcome]]


def rank(text: str) -> int | float:
    """A whole number of columns, or a share, which has a point."""
    return float(text) if "." in text else int(text)


def low_rank_methods() -> list[str]:
    """Those that leave nothing but factors, those that share a base in a bank, and those that cut
    the parts of a block."""
    found = [name for name in methods() if amount(name) == "rank"]
    own = [name for name in found if is_factoring(name) or is_whole(name)]
    return [*own, *(name for name in reducers() if cuts_parts(name))]


def amount(name: str) -> str:
    """The option that says how much a method leaves."""
    return "rank" if "rank" in options_of(name).model_fields else "keep"


def uniform_rank(model: Path, method: str, removed: float) -> float:
    """The share that removes as much; a base that a bank's experts have in common counts, too, as
    do single weights that stay, with a bit for every weight that says which."""
    density = options_of(method).model_fields.get("density")
    if amount(method) == "rank" and density is not None:
        return round(max(1 - removed - density.default - 1 / BITS, 1e-3), 6)
    if not is_whole(method):
        return round(1 - removed, 6)
    units = StreamedModel(Checkpoint(model)).units()
    experts = next((next(iter(u.shapes.values()))[0] for u in units if u.kind == "bank"), 1)
    return round(max(1 - removed - 1 / experts, 1e-3), 6)


def in_groups(names: Sequence[str]) -> list[list[str]]:
    """Methods that one recipe may have: those that tie the experts of a bank stand alone."""
    free = [name for name in names if not is_whole(name)]
    return [*([free] if free else []), *([name] for name in names if is_whole(name))]


def plans_of(
    bench: Measured, arguments: argparse.Namespace, names: Sequence[str]
) -> dict[Case, Outcome]:
    """Every method, share and way of one seed."""
    plans = {}
    for name in names:
        ranks = uniform_ranks(arguments, name)
        link = partial(one_link, arguments, name)
        chains = [link(r) for r in tried_ranks(arguments, name)]
        for removed, share in ranks.items():
            if is_exact(arguments, name):
                taken = {
                    choice.name: link(whole_rank(unit.shapes[choice.member], share))
                    if unit.kind == "bank" or not is_whole(name)
                    else ()
                    for unit in bench.experiment.units
                    for choice in choices(unit)
                }
                plan = bench.problem.plan(taken)
            else:
                plan = bench.everywhere(link(share))
            plans[name, removed, UNIFORM] = plan
            ways = [(SEARCHED, False, "knapsack")]
            ways += [(BY_ERROR, True, "knapsack")] if arguments.by_error else []
            ways += [(f"{SEARCHED} by {other}", False, other) for other in arguments.searches]
            for way, by_error, search in ways:
                found = bench.searched(chains, plan.bytes, by_error, search)
                assert found is not None  # the uniform plan fits
                plans[name, removed, way] = found
    keys = {" ".join(map(str, case)): case for case in plans}
    outcomes = bench.outcomes({key: plans[case] for key, case in keys.items()})
    return {case: outcomes[key] for key, case in keys.items()}


def one_link(arguments: argparse.Namespace, name: str, much: float) -> Chain:
    """A chain of one method."""
    return (Spec.of(name, {amount(name): much, **fixed(arguments, name)}),)


def fixed(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Options that are the same everywhere: those of ``--set`` that a method has."""
    given = dict(text.split("=", 1) for text in arguments.set)
    known = options_of(name).model_fields
    return {key: yaml.safe_load(value) for key, value in given.items() if key in known}


def is_exact(arguments: argparse.Namespace, name: str) -> bool:
    """Whether uniform ranks are whole numbers for each shape."""
    return arguments.exact and amount(name) == "rank"


def whole_rank(shape: tuple[int, ...], share: float) -> int:
    """The largest rank whose factors have at most a share of the dense weights."""
    out, inputs = shape[-2:]
    return max(1, math.floor(share * out * inputs / (out + inputs) + 1e-9))


def tried_ranks(arguments: argparse.Namespace, name: str) -> list[float]:
    """All that a method is measured with."""
    found, shares = list(arguments.ranks), uniform_ranks(arguments, name).values()
    if is_exact(arguments, name):
        units = StreamedModel(Checkpoint(arguments.model)).units()
        shapes = sorted({shape for unit in units for shape in unit.shapes.values()})
        found += [whole_rank(shape, share) for share in shares for shape in shapes]
    else:
        found += shares
    return list(dict.fromkeys(found))


def uniform_ranks(arguments: argparse.Namespace, name: str) -> dict[float, float]:
    """Share removed → rank share."""
    return {r: uniform_rank(arguments.model, name, r) for r in arguments.removed}


def run(
    arguments: argparse.Namespace, place: Path, seed: int, names: Sequence[str]
) -> tuple[float, dict[Case, Outcome]]:
    """Dense perplexity, and every case of one seed and some methods."""
    candidates: list[dict[str, Any]] = []
    for name in names:
        tried = {amount(name): tried_ranks(arguments, name)}
        candidates.append({"method": name, **tried, **fixed(arguments, name)})
    file = place / str(seed) / f"{'-'.join(names)}.yaml"
    sections = recipe_sections(arguments, seed)
    recipe = write_recipe(file, arguments, candidates, search="knapsack", **sections)
    with measured(recipe, place / str(seed) / file.stem) as bench:
        return bench.dense_perplexity(), plans_of(bench, arguments, names)


def gains(found: Found, name: str, removed: float, way: str) -> list[float]:
    """KL of a way over that of uniform ranks, seed by seed."""
    pairs = zip(found[name, removed, way], found[name, removed, UNIFORM], strict=True)
    return [over(one.kl, other.kl) for one, other in pairs]


def over(one: float, other: float) -> float:
    """Their quotient; NaN over nothing, as where a plan is the dense model."""
    return one / other if other else math.nan


def rows(found: Found) -> list[list[str]]:
    """A row per case."""
    lines = []
    for (name, removed, way), outcomes in found.items():
        ratio = "" if way == UNIFORM else figure(gains(found, name, removed, way))
        lines.append(
            [
                f"{removed:.0%}",
                name,
                way,
                f"{100 * median([o.removed for o in outcomes]):.1f}",
                figure([o.perplexity for o in outcomes]),
                figure([o.kl for o in outcomes]),
                ratio,
                figure([over(o.predicted, o.kl) for o in outcomes]),
            ]
        )
    return sorted(lines, key=lambda line: float(line[0].rstrip("%")))


def order(found: Found, removed: float, way: str, names: Sequence[str]) -> list[str]:
    """Methods from the worst median perplexity to the best."""
    middle = {n: median([o.perplexity for o in found[n, removed, way]]) for n in names}
    return sorted(names, key=lambda name: -middle[name])


def verdicts(found: Found, shares: Sequence[float], names: Sequence[str]) -> list[str]:
    """What shows, a line each."""
    lines = []
    for removed in shares:
        for way in (UNIFORM, SEARCHED):
            shown = " > ".join(order(found, removed, way, names))
            lines.append(f"Perplexity at {removed:.0%}, {way}: {shown}.")
    if EXPECTED_AT in shares and set(EXPECTED) <= set(names):
        own = order(found, EXPECTED_AT, UNIFORM, EXPECTED)
        shows = "shows" if tuple(own) == EXPECTED else "does **not** show"
        wanted = " > ".join(EXPECTED)
        lines.append(f"The order {wanted} at {EXPECTED_AT:.0%} {shows} (uniform ranks).")
        for name in names:
            ratio = median(gains(found, name, EXPECTED_AT, SEARCHED))
            reached = "reached" if ratio <= GOAL else "**not reached**"
            lines.append(
                f"{name}, searched / uniform KL at {EXPECTED_AT:.0%}: {ratio:.3f};"
                f" at most {GOAL} was the goal: {reached}."
            )
    return lines


def body(
    arguments: argparse.Namespace,
    found: Found,
    dense: float,
    seeds: int,
    left_out: Mapping[str, str],
) -> str:
    """The report: dense perplexity, the table, what shows."""
    names = list(dict.fromkeys(name for name, _, _ in found))
    headers = ["asked for", "method", "ranks", "% removed", "perplexity", "KL"]
    headers += ["KL / uniform", "predicted / measured"]
    ranks = ", ".join(f"{r:g}" for r in arguments.ranks)
    lines = verdicts(found, arguments.removed, names)
    lines += [f"{name} is left out: {reason}" for name, reason in left_out.items()]
    parts = [
        f"{setting(arguments, seeds)}. Dense perplexity {dense:.4g}. Median (least–largest) over"
        " seeds; KL in nats per token; a method's plans for one share take the same bytes. Ranks to"
        f" search: {ranks}.",
        table(headers, rows(found)),
        "\n".join(f"- {line}" for line in lines),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    add_run_options(parser)
    shares = [step / 20 for step in range(1, 21)]
    parser.add_argument("--methods", nargs="+", default=low_rank_methods(), metavar="NAME")
    parser.add_argument("--removed", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--ranks", type=rank, nargs="+", default=shares, help="to be searched")
    parser.add_argument("--exact", action="store_true", help="whole ranks, no multiples of 8")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="OPTION=VALUE", help="of methods that have it"
    )
    parser.add_argument("--by-error", action="store_true")
    others = sorted(n for n in searches() if n not in ("knapsack", "uniform"))
    parser.add_argument("--searches", nargs="+", choices=others, default=[], metavar="NAME")
    arguments = parser.parse_args()
    check_inputs(arguments)
    found: dict[Case, list[Outcome]] = {}
    dense, left_out = 0.0, dict[str, str]()
    with folder(arguments, "low-rank") as place:
        for seed in range(arguments.seeds):
            for names in in_groups([n for n in arguments.methods if n not in left_out]):
                progress(f"{', '.join(names)}: seed {seed + 1} of {arguments.seeds}")
                try:
                    dense, outcomes = run(arguments, Path(place), seed, names)
                except UserError as error:
                    reason = str(error).rpartition(".yaml: ")[2]  # without the recipe's path
                    left_out |= dict.fromkeys(names, reason)
                    progress(reason)
                    continue
                for case, outcome in outcomes.items():
                    found.setdefault(case, []).append(outcome)
            # After each seed: what is done is not lost if the rest takes too long.
            text = body(arguments, found, dense, seed + 1, left_out)
            report("Methods of low rank, uniform and searched ranks", text, arguments.write)


if __name__ == "__main__":
    main()
