"""Plans per second of evolve's inner loop: propose, keep to the budget, predict by the table.

    python tests/benchmarks/proposals.py [--units 200 6000] [--choices 8] [--runs 5]

One thread. A proposal is a level switch of a plan, led back to the budget, with its bytes and its
predicted loss; what is proposed is checked against plans that are added up anew. For comparison: an
exact knapsack over the same table. Target: at least 100,000 plans per second.
"""

import sys
import time
from pathlib import Path

import numpy as np
from common import ROOT, alternate, arguments_parser, median, report, spread, table

from moesaic.search import evolve, knapsack
from moesaic.search._points import Space

sys.path.insert(0, str(Path(ROOT)))
from tests.search.problems import realistic

GOAL = 100_000


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--units", type=int, nargs="+", default=[200, 6000])
    parser.add_argument("--choices", type=int, default=8)
    parser.add_argument("--proposals", type=int, default=4096, help="made together")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    rows, reached = [], True
    for units in arguments.units:
        given = realistic(units, arguments.choices, share=0.3)
        started = time.perf_counter()
        plan = knapsack.search(given)
        exact = time.perf_counter() - started
        space = Space(given, plan)
        point, own = space.start, space.table(space.start.picks)

        def proposed(run: int, point=point, own=own) -> float:  # type: ignore[no-untyped-def]
            rng = np.random.default_rng(run)
            started = time.perf_counter()
            made = evolve.propose(own, point.columns, rng, arguments.proposals)
            usable = made.usable()
            seconds = time.perf_counter() - started
            for number in np.flatnonzero(usable)[:20]:
                columns = made.made(number)
                assert own.size(columns) == made.size[number] <= own.limit
                assert abs(own.predicted(columns) - made.loss[number]) < 1e-9
            return float(usable.sum()) / seconds

        speeds = alternate({f"{units} units": proposed}, arguments.runs)[f"{units} units"]
        reached &= median(speeds) >= GOAL
        rows.append([units, spread([s / 1000 for s in speeds], 0), f"{exact:.3f}"])
    text = table(["units", "thousand plans per second", "exact knapsack, s"], rows)
    verdict = "reached" if reached else "**not reached**"
    text += f"\n\n- At least {GOAL:,} plans per second was the goal: {verdict}."
    report("Proposals of evolve", text, arguments.write)


if __name__ == "__main__":
    main()
