"""Everything that a finished run has to tell, as plain data: what report and tracking are given."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesaic.methods.base import Chain, Event, Unit, chain_text, reducing
from moesaic.orchestrator.choices import choices_in
from moesaic.orchestrator.fronts import FrontPoint
from moesaic.orchestrator.refinement import Refinement
from moesaic.orchestrator.study import Told
from moesaic.orchestrator.yardsticks import LANGUAGE, Yardstick
from moesaic.search.base import Measurement, Plan
from moesaic.search.knobs import Knob

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Outcome:
    """What a plan does to a unit, all its choices together.

    Attributes:
        text: the chain, or how many choices take which.
        bytes: stored.
        error: relative output error, the mean over the choices.
        score: predicted loss, the sum over the choices; None where no gradients were collected.
        loss: what the search minimised, the sum over the choices.
        seconds: that the compression took.
    """

    text: str
    bytes: int
    error: float
    score: float | None
    loss: float
    seconds: float


@dataclass(frozen=True)
class LayerExperts:
    """The experts of a block, and what the plan makes of them.

    Attributes:
        block: index of the transformer block.
        reduction: what the plan does to the layer, as text; empty where it leaves all experts.
        clusters: new expert → the old ones that went into it.
        constants: constant stand-in → the old experts that it stands for.
        load: tokens of the calibration text routed to each old expert, ``[sources, E]``.
        sources: names of the text sources.
        before: share of the router's choices that goes to each old expert, ``[E]``.
        after: the same for each new expert and then each constant, on the same tokens.
        similarity: mean cosine between two old experts' outputs, ``[E, E]``; None where it was not
            collected.
    """

    block: int
    reduction: str
    clusters: Sequence[Sequence[int]]
    constants: Sequence[Sequence[int]]
    load: NDArray[np.int64]
    sources: Sequence[str]
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    similarity: NDArray[np.float64] | None = None

    @property
    def count(self) -> int:
        """Number of old experts."""
        return len(self.before)

    @property
    def dropped(self) -> list[int]:
        """Old experts that nothing stands for."""
        known = {expert for group in [*self.clusters, *self.constants] for expert in group}
        return [expert for expert in range(self.count) if expert not in known]


@dataclass(frozen=True)
class StudySummary:
    """A study of plans.

    Attributes:
        journal: its file.
        objectives: ``kl``, and perhaps ``bytes`` and ``latency``.
        sampler: by name.
        knobs: what was varied.
        trials: all that count, in order.
        best: number of the best trial within the recipe's budget and the constraints.
        front: numbers of the trials that no other beats; empty with one objective.
        importances: knob → its share in what makes trials good, the largest first.
        untold: why there are none; empty where there are.
        constraints: figure → the most that was allowed.
        baselines: name → ``kl`` and ``bytes`` of the recipe's baselines on the trials' text, and
            ``latency`` where trials were timed.
    """

    journal: Path
    objectives: Sequence[str]
    sampler: str
    knobs: Sequence[Knob]
    trials: Sequence[Told]
    best: int
    front: Sequence[int]
    importances: Mapping[str, float]
    untold: str = ""
    constraints: Mapping[str, float] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def trial(self, number: int) -> Told:
        """The trial of a number."""
        return next(trial for trial in self.trials if trial.number == number)

    @property
    def best_trial(self) -> Told:
        return self.trial(self.best)

    @property
    def front_trials(self) -> list[Told]:
        """The trials of the front, the smallest first."""
        return sorted(map(self.trial, self.front), key=lambda trial: trial.figures["bytes"])

    @property
    def counts(self) -> dict[str, int]:
        """How many trials were ``complete``, ``pruned`` and ``failed``."""
        return dict(Counter(trial.state for trial in self.trials))

    @property
    def plans(self) -> int:
        """How many different plans they led to."""
        return len({t.attributes["plan"] for t in self.trials if "plan" in t.attributes})

    def to_json(self) -> dict[str, Any]:
        best, by_number = self.best_trial, {trial.number: trial for trial in self.trials}
        return {
            "journal": str(self.journal),
            "objectives": list(self.objectives),
            "sampler": self.sampler,
            "knobs": {
                knob.name: {**knob.to_json(), "meaning": knob.meaning} for knob in self.knobs
            },
            "trials": {"all": len(self.trials), **self.counts},
            "plans": self.plans,
            "best": {
                "trial": best.number,
                **_figures(best),
                "values": dict(best.values),
            },
            "constraints": dict(self.constraints),
            "front": [{"trial": n, **_figures(by_number[n])} for n in self.front],
            "baselines": {name: dict(figures) for name, figures in self.baselines.items()},
            "importances": dict(self.importances),
            **({"importances_untold": self.untold} if self.untold else {}),
        }


def _figures(trial: Told) -> dict[str, float | None]:
    """``kl``, ``bytes``, and ``latency`` where it was measured."""
    names = [name for name in ("bytes", "latency") if name in trial.attributes]
    return {"kl": trial.kl, **{name: trial.attributes[name] for name in names}}


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        name: of the run.
        model: what a person calls the model.
        created: date and time.
        command: that made the run, and makes it again.
        machine: in words.
        serve: engine that the checkpoint is for.
        recipe: text of the recipe as resolved.
        units: in model order.
        dense_unit_bytes: unit → bytes in the original checkpoint.
        dense_bytes: of the whole original checkpoint.
        budget_bytes: limit for the whole checkpoint.
        plan: the plan.
        baselines: name → plan that it is compared with.
        measurements: every unit under every chain of plan and baselines, at least.
        scores: ``dense``, ``plan`` and each baseline → ``bytes``, ``bits_per_weight``, the figures
            of the yardstick, and what else the evaluation gave; numbers but for ``sources``, text
            source → figures.
        yardstick: what the model was judged by.
        reductions: (bank or part, reducers) → what the reduction by itself takes and loses.
        owners: unit → the bank or part that is reduced where it is.
        expert_load: block → tokens routed to each expert.
        experts: every layer of experts, in model order, where the recipe reduces some.
        events: in order of time.
        stage_seconds: stage → seconds, in order of time.
        study: what was explored to find the plan, where something was.
        refinement: how the plan was refined, where it was.
        predicted: points of the predicted front, bytes rising.
    """

    name: str
    model: str
    created: str
    command: str
    machine: str
    serve: str
    recipe: str
    units: Sequence[Unit]
    dense_unit_bytes: Mapping[str, int]
    dense_bytes: int
    budget_bytes: int
    plan: Plan
    baselines: Mapping[str, Plan]
    measurements: Sequence[Measurement]
    scores: Mapping[str, Mapping[str, Any]]
    reductions: Mapping[tuple[str, Chain], Measurement] = field(default_factory=dict)
    owners: Mapping[str, str] = field(default_factory=dict)
    expert_load: Mapping[int, Sequence[int]] = field(default_factory=dict)
    experts: Sequence[LayerExperts] = ()
    events: Sequence[Event] = ()
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    yardstick: Yardstick = LANGUAGE
    study: StudySummary | None = None
    refinement: Refinement | None = None
    predicted: Sequence[FrontPoint] = ()

    @cached_property
    def plans(self) -> dict[str, Plan]:
        """The baselines and, last, ``plan``."""
        return {**self.baselines, "plan": self.plan}

    @cached_property
    def _measured(self) -> dict[tuple[str, Chain], Measurement]:
        return {(m.unit, m.chain): m for m in self.measurements}

    def measured(self, plan: Plan, unit: Unit) -> Outcome:
        """What a plan does to a unit.

        Raises:
            KeyError: one of its choices is not among the measurements.
        """
        names = [choice.name for choice in choices_in(unit, plan.units)]
        found = [self._measured[name, plan.units[name]] for name in names]
        prefix = reducing(found[0].chain)[0]
        own = self._reduction(unit.name, prefix) if prefix else None
        counts = Counter(chain_text(measurement.chain) for measurement in found)
        mixed = ", ".join(f"{count} × {text}" for text, count in counts.most_common())
        parts = found if own is None else [own, *found]
        scores = [measurement.score for measurement in parts]
        return Outcome(
            text=mixed if len(counts) > 1 else next(iter(counts)),
            bytes=sum(measurement.bytes for measurement in parts),
            error=sum(measurement.error for measurement in found) / len(found),
            score=None if None in scores else sum(score for score in scores if score is not None),
            loss=sum(measurement.loss for measurement in parts),
            seconds=sum(measurement.seconds for measurement in parts),
        )

    @cached_property
    def _first_units(self) -> dict[str, str]:
        """Bank or part → its first unit."""
        found: dict[str, str] = {}
        for unit in self.units:
            found.setdefault(self.owners.get(unit.name, unit.name), unit.name)
        return found

    def _reduction(self, unit: str, prefix: Chain) -> Measurement | None:
        """What reducing a bank or part takes and loses; told with the first unit of a part."""
        owner = self.owners.get(unit, unit)
        return self.reductions.get((owner, prefix)) if self._first_units[owner] == unit else None

    def choice_bytes(self, plan: Plan) -> dict[str, tuple[int, int]]:
        """Chain → (choices that take it, their bytes), the largest first."""
        found: dict[str, tuple[int, int]] = {}
        for name, chain in plan.units.items():
            count, size = found.get(chain_text(chain), (0, 0))
            found[chain_text(chain)] = count + 1, size + self._measured[name, chain].bytes
        return dict(sorted(found.items(), key=lambda item: (-item[1][1], item[0])))

    def part_bytes(self, plan: Plan | None) -> dict[str, int]:
        """Kind of module → bytes under a plan, or of the original; ``not compressed`` last."""
        sizes: Counter[str] = Counter()
        for unit in self.units:
            dense = self.dense_unit_bytes[unit.name]
            sizes[unit.part] += dense if plan is None else self.measured(plan, unit).bytes
        whole = self.dense_bytes if plan is None else plan.bytes
        return {**sizes, "not compressed": whole - sizes.total()}

    def block_losses(self, plan: Plan) -> dict[int, float]:
        """Block → sum of its units' predicted losses under a plan."""
        losses: dict[int, float] = {}
        for unit in self.units:
            found = self.measured(plan, unit)
            losses[unit.block] = losses.get(unit.block, 0.0) + found.loss
        return losses

    @property
    def loss_is_predicted(self) -> bool:
        """Whether losses are those of the yardstick; otherwise they are relative output errors."""
        return all(m.score is not None for m in self.measurements)

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row per unit: what the plan does to it and what that costs."""
        rows = []
        for unit in self.units:
            found = self.measured(self.plan, unit)
            rows.append(
                {
                    "unit": unit.name,
                    "block": unit.block,
                    "part": unit.part,
                    "chain": found.text,
                    "parameters": unit.parameters,
                    "bytes": found.bytes,
                    "bits_per_weight": found.bytes * 8 / unit.parameters,
                    "error": found.error,
                    self.yardstick.predicted: found.score,
                    "seconds": found.seconds,
                }
            )
        import pandas as pd

        return pd.DataFrame(rows)

    @cached_property
    def event_counts(self) -> dict[str, int]:
        """Kind → how often, the most frequent first."""
        return dict(Counter(event.kind for event in self.events).most_common())

    def starved(self, block: int) -> list[int]:
        """Experts of a block that saw fewer tokens than their inputs are wide."""
        bank = next(u for u in self.units if u.kind == "bank" and u.block == block)
        width = bank.shapes["gate"][-1]
        return [expert for expert, n in enumerate(self.expert_load[block]) if n < width]


def module_names(units: Sequence[Unit]) -> dict[str, str]:
    """Unit → short name of its module, the same in all blocks: ``q``, ``down``, ``experts``.

    Modules that share their last word keep as many words as tell them apart.
    """
    paths = {u.name: re.sub(rf"^.*?\.{u.block}\.", "", u.name, count=1) for u in units}
    words = {path: path.removesuffix("_proj").split(".") for path in dict.fromkeys(paths.values())}
    short: dict[str, str] = {}
    for path, all_words in words.items():
        for count in range(1, len(all_words) + 1):
            tail = all_words[-count:]
            if sum(other[-count:] == tail for other in words.values()) == 1:
                break
        short[path] = ".".join(tail)
    return {unit: short[path] for unit, path in paths.items()}
