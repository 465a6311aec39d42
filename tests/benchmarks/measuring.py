"""What benchmarks of measuring by one and by two workers share: the same units, anew, in turns."""

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from common import alternate, median, report, spread, table

from moesaic.methods.base import Unit
from moesaic.orchestrator.console import View
from moesaic.orchestrator.digests import file_digest
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.stages import Calibration

GOAL = 1.7


def measured_anew(
    recipe: Path,
    kinds: tuple[str, ...],
    warm: Callable[[Unit], bool],
    wanted: Callable[[Unit], bool],
) -> tuple[float, str]:
    """Seconds that measuring some units takes with warm workers and calibration done, and a digest
    of what was left.

    Args:
        kinds: of entries that are removed from the store first.
        warm: which units are measured before, so that the workers have opened the model.
        wanted: which units are timed.
    """
    store = recipe.parent / "store"
    for kind in kinds:
        shutil.rmtree(store / kind, ignore_errors=True)
    experiment = Experiment(load_recipe(recipe), recipe.parent / "run")
    units = experiment.units
    with View() as view, Pool(experiment.recipe.compute) as pool:
        Calibration(experiment, pool, view, {}).run()
        before = {unit.name: experiment.offers[unit.name] for unit in units if warm(unit)}
        Calibration(experiment, pool, view, before).run()
        timed = {unit.name: experiment.offers[unit.name] for unit in units if wanted(unit)}
        started = time.perf_counter()
        Calibration(experiment, pool, view, timed).run()
        seconds = time.perf_counter() - started
    files = sorted(file for kind in kinds for file in (store / kind).rglob("*.safetensors"))
    return seconds, " ".join(file_digest(file) for file in files)


def compare(
    title: str, text: str, run: Callable[[int], tuple[float, str]], arguments: argparse.Namespace
) -> None:
    """Reports one worker beside two, in turns.

    Args:
        run: number of workers → seconds and digest.
        arguments: with ``runs`` and ``write``.
    """
    ways = {f"{count} worker(s)": lambda _, count=count: run(count) for count in (1, 2)}
    runs = alternate(ways, arguments.runs)
    if len({digest for found in runs.values() for _, digest in found}) != 1:
        raise SystemExit("what is left depends on the number of workers")
    seconds = {way: [run[0] for run in found] for way, found in runs.items()}
    one, two = (median(values) for values in seconds.values())
    rows = [[way, spread(values, 2)] for way, values in seconds.items()]
    rows.append(["faster by", f"{one / two:.2f} ×"])
    text = (
        f"{text}; workers of one thread; {arguments.runs} run(s) each, in turns; medians"
        f" (least–largest). Both leave the same bytes. Target: at least {GOAL} ×.\n\n"
    )
    report(title, text + table(["", "s"], rows), arguments.write)
