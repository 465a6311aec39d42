"""A recipe file to results: the stages asked for, with the record kept in MLflow."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.pipeline import Pipeline
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.store import Store


def open_experiment(recipe_file: Path, output: Path | None) -> Experiment:
    """Reads the recipe and the model's headers, draws the tokens: everything that can be wrong."""
    recipe = load_recipe(recipe_file)
    experiment = Experiment(recipe, (output or Path("runs") / recipe.name).resolve())
    _ = experiment.walk, experiment.judge
    return experiment


def run_recipe(recipe_file: Path, output: Path | None, stages: Sequence[str]) -> Mapping[str, Any]:
    """Runs stages and what they need.

    Args:
        stages: of ``calibrate``, ``measure``, ``search``, ``evaluate``, ``assemble``, ``report``.

    Returns:
        what ``--json`` prints.
    """
    started = time.monotonic()
    experiment = open_experiment(recipe_file, output)
    result: dict[str, Any] = {"name": experiment.recipe.name, "output": str(experiment.output)}
    with View() as view, Pool(experiment.recipe.compute) as pool:
        pipeline = Pipeline(experiment, pool, view)
        if tuple(stages) == ("calibrate",):
            pipeline.calibrate()
        else:
            pipeline.measure()
        if not {"calibrate", "measure"} >= set(stages):
            plan = pipeline.search()
            result["plan"] = {key: value for key, value in plan.items() if key != "units"}
        if "evaluate" in stages:
            result["scores"] = pipeline.evaluate()
        if "assemble" in stages:
            result["model"] = str(pipeline.assemble(result.get("scores")))
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def collect_garbage(
    root: Path, runs: Sequence[Path], minimum_age_seconds: float
) -> tuple[int, int]:
    """Removes what no named run uses; see :meth:`Store.gc`.

    Raises:
        UserError: the folder is no store, or a run cannot be read.
    """
    if not any((root / kind).is_dir() for kind in ("pieces", "stats", "ids")):
        raise UserError(f"{root}: is no store of moesaic")
    used: list[Path] = []
    for folder in runs:
        recipe_file = folder / "recipe.yaml"
        if not recipe_file.is_file():
            raise UserError(f"{folder}: has no recipe.yaml")
        experiment = Experiment(load_recipe(recipe_file), folder.resolve())
        if experiment.store.root.resolve() != root.resolve():
            raise UserError(f"{folder}: its store is {experiment.store.root}, not {root}")
        used += experiment.entries()
    return Store(root).gc(used, minimum_age_seconds)


def describe_machine() -> str:
    """Cores, memory and accelerators, in words."""
    import psutil
    import torch

    memory = psutil.virtual_memory().total / 2**30
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores, {memory:.0f} GiB memory, {', '.join(gpus) or 'no GPU'}"
