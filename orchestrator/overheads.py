"""What a run takes whatever its model: the stages of a tiny run, beyond the costs of its work.

The bundled model is compressed once, over a few tokens, by the command's own steps in a process of
its own. What is left when its work is taken off is starting, importing, first calls, reloading a
checkpoint, drawing and recording.
"""

import tempfile
from pathlib import Path
from typing import Any

import yaml

from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.machine import crew
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.stage_times import Left, predict_seconds
from moesaic.orchestrator.stopwatch import STAGES, timed_run

_TEXT = {"texts": [{"file": "builtin:heldout.prose.txt"}], "sequences": 2, "length": 16}
_ROUND = {"method": "rtn", "bits": 4, "group_size": -1}
_NONE = dict.fromkeys(STAGES, 0.0)


def tiny_recipe(folder: Path, threads: int) -> Path:
    """A recipe over the bundled model that has next to nothing to do.

    Args:
        threads: cores of its one worker.
    """
    recipe: dict[str, Any] = {
        "name": "tiny",
        "model": "builtin:demo",
        "serve": "moesaic",
        "search": "uniform",
        "budget": {"bits_per_weight": 8.0},
        "calibration": {**_TEXT, "shards": 1, "gradient_sequences": 1},
        "candidates": [_ROUND],
        "baselines": {"rtn": _ROUND},
        "evaluation": _TEXT,
        "compute": {
            "address": "local",
            "workers": 1,
            "cpus_per_worker": threads,
            "gpus_per_worker": 0,
        },
        "store": "store",
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


def measure_overheads(threads: int, place: Path) -> dict[str, float]:
    """Stage → seconds that do not depend on the model; takes about half a minute.

    Args:
        threads: cores of a worker.
        place: folder on the file system that runs will write to.
    """
    with tempfile.TemporaryDirectory(prefix=".moesaic-", dir=place) as name:
        folder = Path(name)
        recipe = tiny_recipe(folder, threads)
        taken = timed_run(recipe, folder / "out")
        experiment = Experiment(load_recipe(recipe), folder / "work")
        blocks = list(range(experiment.model.blocks))
        left = Left(blocks, len(blocks), experiment.offers)
        team = crew(experiment.recipe.compute, experiment.workers_per_gpu)
        work = predict_seconds(experiment, team, left, overheads=_NONE)
    return {stage: max(0.0, taken[stage].seconds - work[stage]) for stage in STAGES}
