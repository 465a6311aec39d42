"""A run during which something breaks again and again, beside one that nobody disturbs.

    python tests/benchmarks/chaos.py [--faults 60] [--seed 1] [--model FOLDER] [--between 5]

Three local nodes with a worker of one thread each; workers, nodes and the driver are killed,
workers suspended, slowed to a tenth and left without memory, files of the store truncated and
removed, writes fail, the store is full (``tests/chaos.py``).
Both runs must leave the same checkpoint. Without ``--model`` a tiny one is made; ``random_moe.py``
makes larger ones, which are only rounded to nearest. With ``--cut`` two of the nodes are in network
namespaces and are cut off by the network as well, for up to so many seconds, and come back
(``tests/namespaces.py``); that needs root and ``ip``. ``--all-stages`` slices the model first,
offers pruned experts and corrections, refines the plan and evaluates it.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    ROOT,
    arguments_parser,
    progress,
    report,
    scratch,
    table,
    watch,
)

sys.path.insert(0, str(ROOT))

from tests.chaos import SHARES, Chaos, Outcome, Pace, faults_of  # noqa: E402
from tests.namespaces import NettedChaos  # noqa: E402
from tests.orchestrator.projects import make_model_folder, make_recipe  # noqa: E402

CUT = "node cut off"
MOESAIC = [sys.executable, "-m", "moesaic.orchestrator.cli"]
# What a run may do besides calibrating, measuring and assembling.
ALL_STAGES: dict[str, Any] = {
    "slice": {"method": "slicegpt", "hidden": 48, "shortcuts": True},
    "candidates": [
        {"method": "rtn", "bits": [3, 8], "group_size": 16},
        [
            {"method": "reap", "keep": [0.5, 0.75]},
            {"method": "gptq", "bits": 4, "group_size": 16},
            {"method": "eora", "rank": 2},
        ],
    ],
    "refine": {"method": "evolve", "generations": 4},
}
# Bounds of stragglers and deadlines follow the size of the tasks: those of a large model take long.
LARGE = Pace(suspended=30.0, unwritable=5.0, straggler=10.0, deadline=120.0, first=600.0, slow=0.0)


def parsed() -> argparse.Namespace:
    parser = arguments_parser(__doc__)
    parser.add_argument("--faults", type=int, default=60, help="how many (default 60)")
    parser.add_argument("--seed", type=int, default=1, help="of the faults (default 1)")
    parser.add_argument("--model", type=Path, help="model folder (default: a tiny one)")
    parser.add_argument(
        "--between", type=float, default=2.0, help="seconds between faults, at most (default 2)"
    )
    parser.add_argument(
        "--limit", type=float, default=3600.0, help="seconds for all of it (default 3600)"
    )
    parser.add_argument(
        "--cut",
        type=float,
        default=0.0,
        help="seconds that a node is cut off, at most (default: never)",
    )
    parser.add_argument("--all-stages", action="store_true", help="slice, prune, refine, evaluate")
    parser.add_argument(
        "--memory-per-worker", help="compute.memory_per_worker of both runs, such as '3 GB'"
    )
    return parser.parse_args()


def stage(arguments: argparse.Namespace) -> str:
    """How far runs go."""
    return "run" if arguments.all_stages else "assemble"


def recipe(folder: Path, model: Path, arguments: argparse.Namespace, **compute: Any) -> Path:
    """The same work in a folder of its own."""
    changes: dict[str, Any] = {"compute": {"workers": None, "cpus_per_worker": 1, **compute}}
    if arguments.memory_per_worker:
        changes["compute"]["memory_per_worker"] = arguments.memory_per_worker
    if arguments.all_stages:
        changes |= ALL_STAGES
    if arguments.model:
        changes["calibration"] = {"sequences": 24, "length": 64, "gradient_sequences": 2}
        changes["compute"]["dtype"] = "auto"
        # Statistics and gradients decide between these; they are made as fast as files are written.
        changes["candidates"] = [{"method": "rtn", "bits": [3, 4], "group_size": 64}]
        changes["baselines"] = {}
    return make_recipe(folder, model, **changes)


def checkpoint(folder: Path) -> dict[str, bytes]:
    """Plan and checkpoint, without the card, which names the folder."""
    files = [folder / "run" / "plan.json", *(folder / "run" / "model").iterdir()]
    return {file.name: file.read_bytes() for file in files if file.name != "README.md"}


def disturbed(folder: Path, model: Path, arguments: argparse.Namespace) -> Outcome:
    pace = LARGE if arguments.model else Pace()
    pace = Pace(**{**vars(pace), "between": arguments.between, "cut": arguments.cut})
    kind, more = (NettedChaos, {CUT: 4}) if arguments.cut else (Chaos, {})
    with (
        tempfile.TemporaryDirectory(prefix="ch", dir="/tmp", ignore_cleanup_errors=True) as short,
        kind(Path(short), folder / "store", arguments.seed, pace) as chaos,
    ):
        file = recipe(folder, model, arguments, address=chaos.address)
        command = [stage(arguments), str(file), "--output", str(folder / "run")]
        faults = faults_of(arguments.seed, arguments.faults, more)
        return chaos.run([command], faults, arguments.limit)


def main() -> int:
    arguments = parsed()
    with scratch("chaos") as name:
        folder = Path(name)
        model = arguments.model
        if model is None:
            model = make_model_folder(folder / "tiny", "qwen3_moe")
        progress("undisturbed")
        file = recipe(folder / "whole", model.resolve(), arguments)
        command = [*MOESAIC, stage(arguments), str(file), "--output", str(folder / "whole" / "run")]
        usage = watch(command, folder / "whole.log")
        progress(f"disturbed, {arguments.faults} faults")
        outcome = disturbed(folder / "disturbed", model.resolve(), arguments)
        same = checkpoint(folder / "whole") == checkpoint(folder / "disturbed")
    counts = outcome.counts()
    rows = [[kind, counts[kind]] for kind in (*SHARES, *([CUT] if arguments.cut else []))]
    killed = outcome.endings.count("killed")
    place = f"{folder / 'disturbed'}/"
    stopped = [line.replace(place, "") for line in outcome.endings if line != "killed"]
    text = (
        f"{counts.total()} faults in {outcome.seconds:.0f} s, seed {arguments.seed}; undisturbed,"
        f" with a Ray of its own: {usage.seconds:.0f} s. The driver was killed {killed} time(s) and"
        f" stopped by itself {len(stopped)} time(s). The checkpoint is"
        f" {'byte-identical' if same else 'NOT the same'}.\n\n"
    )
    text += table(["fault", "times"], rows)
    if stopped:
        text += "\n\nWhy it stopped:\n\n" + "\n".join(f"- `{line[:300]}`" for line in stopped)
    report("Chaos", text, arguments.write)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
