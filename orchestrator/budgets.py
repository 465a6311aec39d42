"""A recipe with a list of budgets: calibrated and measured once, a plan for each.

OUTPUT/recipe.yaml           the recipe as resolved
OUTPUT/measurements.parquet  every unit under every candidate
OUTPUT/scores.json           dense model, baselines and every plan on held-out text
OUTPUT/front.json            bytes against loss: predicted points, and the plans
OUTPUT/report.html           the front to look at, with links to the plans' own reports
OUTPUT/2.5bpw/               a run of its own: recipe.yaml, plan.json, refine.json where it was
                             refined, scores.json, front.json, report.html, model/

A plan's folder holds all that a run with that single budget leaves but for the measurements, and
its recipe is one with that budget and the same store.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.orchestrator import fronts, stages
from moesaic.orchestrator.card import score_lines
from moesaic.orchestrator.files import disk_errors, write_json
from moesaic.orchestrator.machine import describe_machine
from moesaic.orchestrator.pipeline import BEFORE, Pipeline
from moesaic.orchestrator.recipe import Recipe
from moesaic.orchestrator.recipe_values import portable
from moesaic.orchestrator.track import Tracker
from moesaic.search.base import Plan

if TYPE_CHECKING:
    from moesaic.orchestrator.front_report import FrontSummary

# Of every plan, and of the whole, what MLflow keeps beside the record.
PLAN_FILES = ("recipe.yaml", "plan.json", "scores.json", fronts.FRONT, "report.html")
FILES = ("recipe.yaml", "scores.json", fronts.FRONT, "measurements.parquet", "report.html")
# Of a plan that was refined.
REFINED, _REFINED_PICTURE = "refine.json", Path("pictures") / "refinement.png"
# What a study leaves in the output folder, besides its journal and pictures.
STUDY_FILES = ("study.json", "trials.parquet")


def folders(recipe: Recipe, output: Path) -> list[Path]:
    """Where the plans of a recipe are."""
    if not recipe.budget.several:
        return [output]
    return [output / label for label in recipe.budget.each]


def remove_stale(recipe: Recipe, output: Path, studied: bool) -> None:
    """Removes what another run left in the folder, and this one will not write: how a plan was
    refined, a plan where there will be several, and what a study had to tell.

    Args:
        studied: whether the plan will come of a study. A study's journal stays: it can go on.
    """
    stale = [output / "plan.json"] if recipe.budget.several else []
    unrefined = [output] if recipe.budget.several else []
    if recipe.refine is None:
        unrefined += folders(recipe, output)
    for folder in unrefined:
        stale += [folder / REFINED, folder / _REFINED_PICTURE]
    if not studied:
        stale += [output / name for name in STUDY_FILES]
        stale += sorted((output / "pictures").glob("study_*.png"))
    for file in stale:
        with disk_errors(file):
            file.unlink(missing_ok=True)


class Budgets:
    """The stages after measuring, for every budget of the list.

    Args:
        whole: the pipeline that has measured.
    """

    def __init__(self, whole: Pipeline) -> None:
        self.whole = whole
        experiment = whole.experiment
        recipes = experiment.recipe.of_budgets(experiment.store.where)
        self.each = {
            label: whole.under(recipe, whole.output / label) for label, recipe in recipes.items()
        }
        self._scores: dict[str, Mapping[str, Mapping[str, Any]]] = {}

    @cached_property
    def plans(self) -> dict[str, Plan]:
        """The baselines, and each budget's plan under the budget's name."""
        found: dict[str, Plan] = {}
        for label, pipeline in self.each.items():
            found |= {_named(name, label): plan for name, plan in pipeline.plans.items()}
        baselines = {name: plan for name, plan in found.items() if name not in self.each}
        return baselines | {label: found[label] for label in self.each}

    def search(self) -> dict[str, dict[str, Any]]:
        """Writes and returns every ``plan.json``, by budget."""
        found = {label: pipeline.search() for label, pipeline in self.each.items()}
        self._write_front({})
        return found

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """Scores of the dense model, the baselines and every plan; writes them."""
        whole = self.whole
        judged = {
            label: {name: _named(name, label) for name in pipeline.judged()}
            for label, pipeline in self.each.items()
        }
        plans = {
            judged[label][name]: pieces
            for label, pipeline in self.each.items()
            for name, pieces in pipeline.judged().items()
        }
        found = stages.evaluated(whole.experiment, whole.pool, whole.view, plans)
        scores: dict[str, dict[str, Any]] = {}
        for label, pipeline in self.each.items():
            names = {"dense": "dense", **judged[label]}
            own = pipeline.scored({name: found[alias] for name, alias in names.items()})
            self._scores[label] = own
            scores |= {_named(name, label): score for name, score in own.items()}
        scores = {
            **{name: score for name, score in scores.items() if name not in self.each},
            **{label: scores[label] for label in self.each},
        }
        write_json(whole.output / "scores.json", scores)
        self._write_front(scores)
        return scores

    def assemble(self) -> dict[str, str]:
        """Budget → folder of its checkpoint."""
        for pipeline in self.each.values():
            pipeline.pieces("plan")  # while there are workers
        return {
            label: str(pipeline.assemble(self._scores.get(label)))
            for label, pipeline in self.each.items()
        }

    def report(self, scores: Mapping[str, Mapping[str, Any]]) -> Path:
        """Every plan's report, and the one that leads to them."""
        for label, pipeline in self.each.items():
            pipeline.report(self._scores[label])
        from moesaic.orchestrator.front_report import write_front_report  # and matplotlib

        return write_front_report(self._summary(scores), self.whole.output)

    def track(self, tracker: Tracker, result: Mapping[str, Any]) -> None:
        """Puts everything on record: a child run for each plan, with its checkpoint."""
        scores, output = result["scores"], self.whole.output
        tracker.log_description("\n".join(score_lines(scores)))
        tracker.log_scores(scores, self.plans)
        for label, pipeline in self.each.items():
            refined = [] if pipeline.refinement is None else [REFINED]
            files = [pipeline.output / name for name in (*PLAN_FILES, *refined)]
            tracker.log_files(files, label)
            if pipeline.refinement is not None:
                tracker.log_refinement(pipeline.refinement, label)
            tracker.log_model(Path(result["models"][label]), scores[label], label)
        # What happened before the plans is among the events of each, and so are pieces they share.
        events = (event for pipeline in self.each.values() for event in pipeline.events())
        tracker.log_events(dict.fromkeys(events))
        tracker.log_stages(self.whole.view.seconds)
        tracker.log_files(output / name for name in FILES)
        tracker.log_files(sorted((output / "pictures").glob("*.png")))

    def _write_front(self, scores: Mapping[str, Mapping[str, Any]]) -> None:
        fronts.write_front(
            self.whole.output / fronts.FRONT,
            self._largest.predicted_points,
            self.plans,
            dict(self._bits()),
            scores,
            self.whole.experiment.model.family.yardstick.loss.key,
            self.whole.predicted_loss,
        )

    @property
    def _largest(self) -> Pipeline:
        return max(self.each.values(), key=lambda pipeline: pipeline.plans["plan"].bytes)

    def _bits(self) -> Iterator[tuple[str, float]]:
        for label, pipeline in self.each.items():
            for name in pipeline.plans:
                yield _named(name, label), pipeline.bits_per_weight(name)

    def _summary(self, scores: Mapping[str, Mapping[str, Any]]) -> "FrontSummary":
        whole = self.whole
        recipe, yardstick = whole.experiment.recipe, whole.experiment.model.family.yardstick
        from moesaic.orchestrator.front_report import FrontSummary

        return FrontSummary(
            name=recipe.name,
            model=Path(portable(recipe.model)).name,
            created=time.strftime("%Y-%m-%d %H:%M"),
            command=shlex.join(["moesaic", *sys.argv[1:]]),
            machine=describe_machine(),
            serve=recipe.serve,
            recipe=recipe.to_yaml(),
            dense_bytes=whole.experiment.sizes.size.dense_bytes,
            budgets={label: pipeline.budget_bytes for label, pipeline in self.each.items()},
            scores=scores,
            losses={name: plan.loss for name, plan in self.plans.items()},
            predicted=self._largest.predicted_points,
            loss_is_predicted=whole.predicted_loss == yardstick.predicted,
            yardstick=yardstick,
        )


def _named(name: str, label: str) -> str:
    """A plan's name among those of all budgets: the searched ones are called by their budget."""
    return label + name.removeprefix("plan") if name in ("plan", f"plan{BEFORE}") else name
