"""What the pool itself costs: tasks that do nothing, on workers that are warm.

    python tests/benchmarks/scheduling.py [--tasks 10000] [--workers 2] [--runs 3]

The task is one that a run has as well: a worker lets go of a model that it does not hold.
"""

import time
from typing import Any

from common import alternate, arguments_parser, report, spread, table

from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.recipe_sections import Compute

GOAL_MILLISECONDS = 5.0


def per_task(pool: Pool, count: int, follow: bool) -> float:
    """Milliseconds per task.

    Args:
        follow: each brings the next, one chain per worker, instead of all waiting from the start.
    """
    left = count

    def task(worker: int | None) -> Task:
        def done(result: Any) -> list[Task]:
            nonlocal left
            left -= 1
            return [task(worker)] if follow and left >= pool.size else []

        return Task("resident:release", {}, "nothing", (0,), worker, done)

    first = [task(n) for n in range(pool.size)] if follow else [task(None) for _ in range(count)]
    started = time.perf_counter()
    pool.run(first)
    seconds = time.perf_counter() - started
    if left:
        raise SystemExit(f"{left} tasks were not done")
    return 1000 * seconds / count


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--tasks", type=int, default=10_000, help="tasks of a run (default 10000)")
    parser.add_argument("--workers", type=int, default=2, help="workers (default 2)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each kind (default 3)")
    arguments = parser.parse_args()
    with Pool(Compute(workers=arguments.workers)) as pool:
        per_task(pool, 10 * pool.size, follow=False)  # imports what is imported once
        runs = alternate(
            {
                "all waiting from the start": lambda _: per_task(pool, arguments.tasks, False),
                "one brings the next": lambda _: per_task(pool, arguments.tasks, True),
            },
            arguments.runs,
        )
        if pool.replaced:
            raise SystemExit(f"{pool.replaced} worker(s) died meanwhile")
    rows = [[way, spread(values, 2)] for way, values in runs.items()]
    text = (
        f"{arguments.tasks:,} tasks that do nothing on {arguments.workers} workers,"
        f" {arguments.runs} run(s) each, in turns; wall time per task, medians (least–largest)."
        f" Goal: at most {GOAL_MILLISECONDS:g} ms.\n\n"
    )
    report("Scheduling", text + table(["", "ms per task"], rows), arguments.write)


if __name__ == "__main__":
    main()
