"""A recipe file to results: the stages asked for, with the record kept in MLflow."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.methods.base import Event, chain_text
from moesaic.orchestrator import propagate
from moesaic.orchestrator.at_work import refuse_at_work
from moesaic.orchestrator.budgets import REFINED, STUDY_FILES, Budgets, folders, remove_stale
from moesaic.orchestrator.card import score_lines
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import Mistakes, RecipeError, UserError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.files import make_folder
from moesaic.orchestrator.fronts import FRONT
from moesaic.orchestrator.machine import crew, describe_machine
from moesaic.orchestrator.model_source import ModelPlace
from moesaic.orchestrator.objects import is_url
from moesaic.orchestrator.pipeline import Pipeline
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.reach import check_cluster, check_tracking
from moesaic.orchestrator.recipe import Recipe, load_recipe
from moesaic.orchestrator.recipe_sections import CacheSection, Tune
from moesaic.orchestrator.recipe_values import local_or_url, model_name
from moesaic.orchestrator.refine import check_refine
from moesaic.orchestrator.run_folder import run_folder
from moesaic.orchestrator.runlog import run_log
from moesaic.orchestrator.scoring import check_score
from moesaic.orchestrator.shared import found_store
from moesaic.orchestrator.track import Tracker
from moesaic.orchestrator.widening import added_text, widened

if TYPE_CHECKING:
    # What only one verb needs is imported there: it takes long.
    import pandas as pd

    from moesaic.orchestrator.score_table import ScoreOptions
    from moesaic.orchestrator.tune import StudyOptions

# What a run leaves besides the checkpoint; see pipeline.py.
_FILES = (
    "recipe.yaml",
    "plan.json",
    "scores.json",
    FRONT,
    "measurements.parquet",
    "report.html",
)


def open_experiment(recipe_file: Path, output: Path | None) -> Experiment:
    """Reads the recipe and the model's headers, draws the tokens: everything that can be wrong."""
    recipe = load_recipe(recipe_file)
    folder = _output(recipe, output)
    with _naming(recipe_file):
        return _ready(Experiment(recipe, folder))


def check_recipe(
    recipe_file: Path, output: Path | None, bench: Path | None = None
) -> dict[str, Any]:
    """What a run will take (see :func:`forecast`), once nothing is wrong with the recipe.

    What only ``moesaic tune`` refuses is no mistake, but comes first among the events. Candidates
    that only a study has (``tune.knobs``) are reckoned in.

    Args:
        bench: unit costs that were measured before; by default they are measured now.

    Raises:
        UserError: naming every mistake at once; the places that the recipe names are asked, too.
    """
    from moesaic.orchestrator.forecast import forecast
    from moesaic.orchestrator.study_terms import check_tune

    recipe = load_recipe(recipe_file)
    folder = _output(recipe, output)
    mistakes, warnings = Mistakes(), []
    with _naming(recipe_file):
        studied = mistakes.attempt(partial(widened, recipe))
        recipe = studied or recipe
        experiment = mistakes.attempt(partial(Experiment, recipe, folder))
        per_gpu = 1 if experiment is None else experiment.workers_per_gpu
        mistakes.attempt(lambda: crew(recipe.compute, per_gpu))
        mistakes.attempt(lambda: check_cluster(recipe.compute))
        mistakes.attempt(lambda: check_tracking(recipe.tracking, folder.parent))
        if experiment is not None and studied is not None and recipe.tune is not None:
            tuned = experiment
            study = Mistakes()
            study.attempt(lambda: check_tune(tuned))
            # Names and values of the section itself are wrong whatever the recipe is used for.
            mistakes.found += [text for text in study.found if text.startswith("tune.")]
            warnings = [text for text in study.found if not text.startswith("tune.")]
        if experiment is not None:
            known = experiment
            mistakes.attempt(lambda: check_refine(known))
            scored = experiment
            mistakes.attempt(lambda: check_score(scored))
        if experiment is None or mistakes.found:
            raise mistakes.error()
        found = forecast(_ready(experiment), bench)
    events = [Event("no_study", f"moesaic tune will refuse this: {text}") for text in warnings]
    more = added_text(experiment)
    if more is not None:
        events.append(Event("more_candidates", f"{more}; moesaic run does without"))
    return {**found, "events": [*map(asdict, events), *found["events"]]}


@contextmanager
def _naming(recipe_file: Path) -> Iterator[None]:
    """Puts the recipe's name in front of each thing that is said about it."""
    try:
        yield
    except UserError as error:
        problems = error.args if isinstance(error, RecipeError) else [str(error)]
        text = "\n".join(f"{recipe_file}: {problem}" for problem in problems)
        raise UserError(text) from error


@contextmanager
def _started(recipe_file: Path, recipe: Recipe, folder: Path, verb: str) -> Iterator[None]:
    """A verb at work: nobody else writes its folder, its lines go into the log there."""
    with run_folder(folder, recipe), run_log(folder, verb), _naming(recipe_file):
        yield


def _output(recipe: Recipe, output: Path | None) -> Path:
    folder = recipe.folder(output).resolve()
    _check_stays("--output", folder)
    if recipe.store is not None:
        _check_stays("store", Path(recipe.store))
    make_folder(folder, "--output")
    return folder


def _check_stays(key: str, folder: Path) -> None:
    """Raises a UserError for a folder in the copy that Ray makes of a job's working directory."""
    if {"runtime_resources", "working_dir_files"} <= set(folder.parts):
        raise UserError(
            f"{key}: {folder} lies in Ray's copy of the working directory, which each node has for"
            " itself and Ray removes: give an absolute path on storage that all nodes see"
        )


def _ready(experiment: Experiment) -> Experiment:
    check_score(experiment)
    _ = experiment.walk, experiment.judge
    return experiment


def run_recipe(
    recipe_file: Path,
    output: Path | None,
    stages: Sequence[str],
    register: str | None = None,
    pool: Pool | None = None,
    view: View | None = None,
) -> Mapping[str, Any]:
    """Runs stages and what they need; with ``report`` among them, MLflow keeps the record.

    Args:
        stages: of ``calibrate``, ``measure``, ``search``, ``evaluate``, ``assemble``, ``report``
            (which needs the two before it).
        register: name in the registry, instead of the recipe's ``tracking.register_as``.
        pool: for the work, if it was made before.
        view: who is told of the stages, instead of one on stderr.

    Returns:
        what ``--json`` prints.
    """
    started = time.monotonic()
    recipe = _registered(load_recipe(recipe_file), register)
    folder = _output(recipe, output)
    result: dict[str, Any] = {"name": recipe.name, "output": str(folder)}
    if "report" in stages:
        # Opened before the model is: whatever goes wrong from here on is on record.
        with (
            _started(recipe_file, recipe, folder, "run"),
            Tracker(recipe.tracking, recipe.name, folder, run_params(recipe)) as tracker,
            _pipeline(recipe, folder, pool, view=view) as pipeline,
        ):
            result["tracking_uri"] = tracker.uri
            budgets = _run(pipeline, stages, result)
            if budgets is None:
                _track(tracker, pipeline, result)
            else:
                budgets.track(tracker, result)
    else:
        with (
            _started(recipe_file, recipe, folder, " ".join(stages)),
            _pipeline(recipe, folder, pool, view=view) as pipeline,
        ):
            _run(pipeline, stages, result)
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def _registered(recipe: Recipe, name: str | None) -> Recipe:
    """The recipe with another name for its checkpoint in the registry."""
    if name is None:
        return recipe
    try:
        model_name(name)
    except ValueError as error:
        raise UserError(f"--register: {error}") from None
    tracking = recipe.tracking.model_copy(update={"register_as": name})
    return recipe.model_copy(update={"tracking": tracking})


def tune_recipe(
    recipe_file: Path,
    output: Path | None,
    options: "StudyOptions",
    register: str | None = None,
    pool: Pool | None = None,
) -> dict[str, Any]:
    """All stages of a recipe, the search being a study (see :mod:`moesaic.orchestrator.tune`).

    Args:
        register: name in the registry, instead of the recipe's ``tracking.register_as``.
        pool: as there.

    Returns:
        as :func:`run_recipe`, and ``study``: what ``study.json`` has.
    """
    from moesaic.orchestrator.study import JOURNAL
    from moesaic.orchestrator.tune import TunedPipeline, check_study, study_id

    started = time.monotonic()
    recipe = _registered(load_recipe(recipe_file), register)
    recipe = recipe.model_copy(update={"tune": recipe.tune or Tune()})
    with _naming(recipe_file):
        recipe = widened(recipe)
    folder = _output(recipe, output)
    result: dict[str, Any] = {"name": recipe.name, "output": str(folder)}
    # More trials of a study belong to its run, also if that had finished.
    journal = options.storage or folder / JOURNAL
    make_folder(journal.parent, "--storage")
    experiment, known = None, ""
    if journal.exists():
        # One that is refused leaves the folder, and the run on record, as they are.
        with _naming(recipe_file):
            experiment = _ready(Experiment(recipe, folder))
            check_study(experiment, options)
            known = study_id(experiment, options)
    with (
        _started(recipe_file, recipe, folder, "tune"),
        Tracker(recipe.tracking, recipe.name, folder, run_params(recipe), "tune", known) as tracker,
        _pipeline(
            recipe,
            folder,
            pool,
            lambda *parts: TunedPipeline(*parts, options=options, tracker=tracker),
            lambda found: None if known else check_study(found, options),
            experiment=experiment,
        ) as pipeline,
    ):
        result["tracking_uri"] = tracker.uri
        tracker.belongs_to(study_id(pipeline.experiment, options))
        _run(pipeline, ("evaluate", "assemble", "report"), result)
        _track(tracker, pipeline, result)
        tracker.log_files(folder / name for name in STUDY_FILES)
    result["study"] = json.loads((folder / STUDY_FILES[0]).read_text(encoding="utf-8"))
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def score_recipe(
    recipe_file: Path, output: Path | None, options: "ScoreOptions", pool: Pool | None = None
) -> dict[str, Any]:
    """Compares all scores on a recipe (see :mod:`moesaic.orchestrator.score_table`).

    Args:
        pool: for the work, if it was made before.

    Returns:
        what ``score_table.json`` has, and where it is.
    """
    from moesaic.orchestrator.score_table import SCORE_FILES, ScoredPipeline, check_scores
    from moesaic.orchestrator.score_table import metrics as score_metrics

    started = time.monotonic()
    recipe = load_recipe(recipe_file)
    folder = _output(recipe, output)
    result: dict[str, Any] = {"name": recipe.name, "output": str(folder)}
    with (
        _started(recipe_file, recipe, folder, "scores"),
        Tracker(
            recipe.tracking, f"{recipe.name} scores", folder, run_params(recipe), "scores"
        ) as tracker,
        _pipeline(
            recipe,
            folder,
            pool,
            lambda *parts: ScoredPipeline(*parts, options=options),
            check_scores,
        ) as pipeline,
    ):
        assert isinstance(pipeline, ScoredPipeline), "made so above"
        result["tracking_uri"] = tracker.uri
        pipeline.slice()
        pipeline.measure()
        result |= pipeline.compare()
        tracker.log_description(f"emq: {result['emq']['text']}")
        tracker.log_metrics(score_metrics(result))
        tracker.log_stages(pipeline.view.seconds)
        tracker.log_files(folder / name for name in ("recipe.yaml", *SCORE_FILES))
        tracker.log_files(sorted((folder / "pictures").glob("score_*.png")))
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


@contextmanager
def _pipeline(
    recipe: Recipe,
    output: Path,
    begun: Pool | None,
    make: Callable[[Experiment, Pool, View], Pipeline] = Pipeline,
    check: Callable[[Experiment], None] = lambda experiment: None,
    view: View | None = None,
    experiment: Experiment | None = None,
) -> Iterator[Pipeline]:
    experiment = experiment or _ready(Experiment(recipe, output))
    check(experiment)
    check_refine(experiment)
    with view or View() as shown, begun or _pool(experiment) as pool:
        yield make(experiment, pool, shown)


def _pool(experiment: Experiment) -> Pool:
    recipe, checkpoint, model = experiment.recipe, experiment.original.checkpoint, None
    if not is_url(recipe.model):
        weights = [file.relative_to(checkpoint.path).as_posix() for file in checkpoint.files]
        code = recipe.trust_remote_code
        model = ModelPlace(experiment.folder, recipe.cache.place, weights, code)
    return Pool(recipe.compute, model, experiment.workers_per_gpu)


def _run(pipeline: Pipeline, stages: Sequence[str], result: dict[str, Any]) -> Budgets | None:
    """The stages; what there is to tell goes into ``result``.

    Returns:
        the plans of the recipe's budgets, where it has a list of them.
    """
    pipeline.slice()
    if tuple(stages) == ("calibrate",):
        pipeline.calibrate()
    else:
        pipeline.measure()
    if {"calibrate", "measure"} >= set(stages):
        return None
    recipe = pipeline.experiment.recipe
    remove_stale(recipe, pipeline.output, pipeline.studies)
    if recipe.budget.several:
        return _run_budgets(Budgets(pipeline), stages, result)
    result["plan"] = _without_units(pipeline.search())
    if "evaluate" in stages:
        result["scores"] = pipeline.evaluate()
    if "assemble" in stages:
        result["model"] = str(pipeline.assemble(result.get("scores")))
    if "report" in stages:
        result["report"] = str(pipeline.report(result["scores"]))
    return None


def _run_budgets(budgets: Budgets, stages: Sequence[str], result: dict[str, Any]) -> Budgets:
    """As :func:`_run`, once everything is measured; plans and models by budget."""
    result["plans"] = {label: _without_units(plan) for label, plan in budgets.search().items()}
    if "evaluate" in stages:
        result["scores"] = budgets.evaluate()
    if "assemble" in stages:
        result["models"] = budgets.assemble()
    if "report" in stages:
        result["report"] = str(budgets.report(result["scores"]))
    return budgets


def _without_units(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plan.items() if key != "units"}


def _track(tracker: Tracker, pipeline: Pipeline, result: Mapping[str, Any]) -> None:
    """Puts everything that a finished run has to tell on record."""
    output = pipeline.output
    tracker.log_description("\n".join(score_lines(result["scores"])))
    tracker.log_scores(result["scores"], pipeline.plans)
    tracker.log_table(_layers(pipeline))
    tracker.log_events(pipeline.events())
    tracker.log_stages(pipeline.view.seconds)
    tracker.log_files(output / name for name in _FILES)
    if pipeline.refinement is not None:
        tracker.log_refinement(pipeline.refinement)
        tracker.log_files([output / REFINED])
    tracker.log_files(sorted((output / "pictures").glob("*.png")))
    tracker.log_model(Path(result["model"]), result["scores"]["plan"])


def _layers(pipeline: Pipeline) -> "pd.DataFrame":
    """The rows of ``measurements.parquet`` that the plan chose: reductions, then every choice in
    model order."""
    import pandas as pd

    table = pd.read_parquet(pipeline.output / "measurements.parquet")
    chosen = {unit: chain_text(chain) for unit, chain in pipeline.plans["plan"].units.items()}
    chosen |= {bank: chain_text(prefix) for bank, prefix in pipeline.reduced("plan")}
    rows = table[table["chain"] == table["unit"].map(chosen)]
    return rows.drop(columns=["specs"])


def run_params(recipe: Recipe) -> dict[str, Any]:
    """What tells one run from another: recipe, machine and version, nested as the recipe is.

    Where the record is kept is left out: it changes nothing, and may hold a password.
    """
    plain = recipe.model_dump(mode="json", exclude={"tracking", "candidates", "baselines"})
    return {
        **plain,
        "candidates": {
            "count": len(recipe.candidates),
            "chains": "; ".join(map(chain_text, recipe.candidates)),
        },
        "baselines": {name: chain_text(chain) for name, chain in recipe.baselines.items()},
        "machine": describe_machine(),
        "moesaic": version("moesaic"),
    }


def collect_garbage(
    where: Path | str, runs: Sequence[Path], minimum_age_seconds: float
) -> tuple[int, int]:
    """Removes what no named run uses; see :meth:`Store.gc`.

    Raises:
        UserError: there is no store, a run cannot be read, or another one is at work.
    """
    try:
        named = local_or_url(str(where)) if is_url(str(where)) else str(where)
        store = found_store(named, CacheSection().place)
    except ValueError as error:
        raise UserError(str(error)) from None
    if store is None:
        raise UserError(f"{str(where)[:300]}: is no store of moesaic")
    used: list[Path] = []
    for folder in runs:
        recipe_file = folder / "recipe.yaml"
        if not os.path.isfile(recipe_file):
            raise UserError(f"{str(folder)[:300]}: has no recipe.yaml")
        recipe = load_recipe(recipe_file)
        with _naming(recipe_file):
            experiment = Experiment(recipe, folder.resolve())
        if not experiment.store.same_place(store):
            raise UserError(f"{folder}: its store is {experiment.store.where}, not {store.where}")
        store = experiment.store  # the paths are those of its own mirror, where it has one
        used += experiment.entries()
        for place in folders(recipe, folder):
            used += propagate.entries(experiment, place / "plan.json")
    refuse_at_work(store, runs)
    return store.gc(used, minimum_age_seconds)
