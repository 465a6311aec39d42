"""Assembling another plan from finished pieces beside compressing its units anew, in turns.

    python tests/benchmarks/assemble.py [--runs 3]

Two GPTQ candidates are measured on every unit once. The other plan gives them to the units in
turns. *Assembling* writes its model folder from pieces of the store; *compressing anew* makes the
plan's pieces from finished calibration statistics, with workers that have opened the model. Both
exclude the start of Python and Ray. The reloading that ``moesaic assemble`` does to verify a folder
is timed apart, since either way needs it. Pieces made anew must be the same bytes.
"""

import argparse
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from common import (
    add_text_options,
    alternate,
    arguments_parser,
    check_inputs,
    median,
    progress,
    report,
    scratch,
    spread,
    table,
    write_recipe,
)

from moesaic.methods.base import Chain
from moesaic.orchestrator.assemble import assemble
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.console import View
from moesaic.orchestrator.digests import file_digest
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.stages import Calibration
from moesaic.orchestrator.verify import verify

_VERIFY_SEQUENCES, _VERIFY_LENGTH = 2, 64


class Comparison:
    """A model whose candidates are all measured, and a plan over them."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, pool: Pool, view: View) -> None:
        self.folder, self.pool, self.view = folder, pool, view
        self.arguments = arguments
        self.experiment = self._open("measured")
        progress("measuring both candidates")
        Calibration(self.experiment, pool, view, self.experiment.offers).run()
        self.plan: dict[str, Chain] = {
            unit: chains[index % len(chains)]
            for index, (unit, chains) in enumerate(self.experiment.offers.items())
        }
        self.pieces = self._pieces(self.experiment)

    def _open(self, name: str) -> Experiment:
        arguments = self.arguments
        common = {"method": "gptq", "group_size": arguments.group_size, "act_order": True}
        candidates = [{**common, "bits": bits} for bits in arguments.bits]
        size = {"sequences": arguments.sequences, "length": arguments.length}
        recipe = write_recipe(self.folder / name / "r.yaml", arguments, candidates, size)
        return Experiment(load_recipe(recipe), self.folder / name / "run")

    def _pieces(self, experiment: Experiment) -> dict[str, Path]:
        chosen = {c.name: self.plan[u.name] for u in experiment.units for c in choices(u)}
        found = plan_pieces(experiment, experiment.walk, chosen)
        return {unit: Path(path) for unit, path in found.items()}

    def assembled(self, index: int) -> float:
        """Seconds from the plan to a written folder; every piece is read and checked on the way."""
        started = time.perf_counter()
        experiment, folder = self.experiment, self.folder / "model"
        for unit, path in self._pieces(experiment).items():
            if experiment.store.get("pieces", path.stem) is None:
                raise SystemExit(f"{unit}: its piece is damaged")
        serve = experiment.recipe.serve
        assemble(experiment.model, experiment.folder, self.pieces, serve, folder, "# benchmark\n")
        return time.perf_counter() - started

    def verified(self, index: int) -> float:
        """Seconds to reload the folder and compare its logits."""
        started = time.perf_counter()
        experiment = self.experiment
        ids = torch.from_numpy(experiment.evaluation.ids[:_VERIFY_SEQUENCES, :_VERIFY_LENGTH])
        serve = experiment.recipe.serve
        checkpoint = experiment.model.checkpoint
        verify(self.folder / "model", checkpoint, self.pieces, serve, ids.long())
        return time.perf_counter() - started

    def compressed(self, index: int) -> float:
        """Seconds to make the plan's pieces in a store that has only tokens and statistics."""
        shutil.rmtree(self.folder / "anew", ignore_errors=True)
        for kind in ("ids", "stats"):
            source = self.experiment.store.root / kind
            shutil.copytree(source, self.folder / "anew" / "store" / kind)
        experiment = self._open("anew")
        _ = experiment.walk
        wanted: Mapping[str, list[Chain]] = {unit: [chain] for unit, chain in self.plan.items()}
        started = time.perf_counter()
        Calibration(experiment, self.pool, self.view, wanted).run()
        seconds = time.perf_counter() - started
        for unit, path in self._pieces(experiment).items():
            if file_digest(path) != file_digest(self.pieces[unit]):
                raise SystemExit(f"{unit}: compressed anew it has other bytes")
        return seconds


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--bits", type=int, nargs=2, default=[3, 4], metavar=("A", "B"))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=8, help="for the statistics; not timed")
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    check_inputs(arguments)
    with scratch("assemble") as name, View() as view:
        recipe = write_recipe(Path(name) / "r.yaml", arguments, [{"method": "rtn", "bits": 4}], {})
        with Pool(load_recipe(recipe).compute) as pool:
            compared = Comparison(Path(name), arguments, pool, view)
            ways = {
                "compress anew": compared.compressed,
                "assemble from pieces": compared.assembled,
                "verify (reload, compare logits)": compared.verified,
            }
            seconds: dict[str, list[float]] = alternate(ways, arguments.runs)
            workers, units = pool.size, len(compared.plan)
    rows = [[way, spread(values, 2)] for way, values in seconds.items()]
    anew, pieces, _ = (median(values) for values in seconds.values())
    rows.append(["assembling is faster by", f"{anew / pieces:.1f} ×"])
    text = (
        f"{arguments.model.name}, {units} units, GPTQ {arguments.bits[0]} and {arguments.bits[1]}"
        f" bits in turns, group {arguments.group_size}, {workers} worker(s); {arguments.runs}"
        " run(s) each; medians (least–largest). Target: at least 20 ×.\n\n"
    )
    report("Another plan from finished pieces", text + table(["", "s"], rows), arguments.write)


if __name__ == "__main__":
    main()
