"""An Optuna study in a journal file, which outlives whoever works on it.

A trial is asked for, runs, and is told. Whoever stops in between enqueues the values of what runs
again and tells it FAIL, in this order, with a mark that says whose values they are: wherever that
is interrupted, no trial is lost and none is there twice. Such interrupted trials do not count.
Whoever dies leaves trials that seem to run for ever, and the next one to open the study does that.

A line that a dying process left unfinished at the end of the journal is cut off; it was never told.
One driver at a time works on a journal (:mod:`moesaic.orchestrator.study_journal`).
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any

from moesaic.orchestrator.study_importances import Importances, importances
from moesaic.orchestrator.study_journal import (
    KNOBS,
    MADE_OF,
    START,
    check_own,
    check_same,
    journal_errors,
    locked,
    mend,
    open_storage,
)
from moesaic.search.knobs import Knob, Values
from moesaic.search.samplers import make_sampler, start_params, suggest

if TYPE_CHECKING:
    import pandas as pd
    from optuna.study import Study as OptunaStudy
    from optuna.trial import FrozenTrial, Trial

JOURNAL = "journal.log"
# Complete trials that one is compared with, at least, before it is given up.
_UNPRUNED = 5
_REASON, _AGAIN, _WANTED = "reason", "again", "wanted"
_INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Asked:
    """A trial that somebody works on.

    Attributes:
        trial: Optuna's.
        values: of all knobs, those that are fixed included.
        start: name of the values, where they are among those tried first.
    """

    trial: "Trial"
    values: Values
    start: str | None

    @property
    def number(self) -> int:
        return int(self.trial.number)


@dataclass(frozen=True)
class Told:
    """A finished trial.

    Attributes:
        number: in the study.
        state: ``complete``, ``pruned`` or ``failed``.
        values: of the knobs.
        kl: nats per token, on as much text as it saw; None for a failed one.
        attributes: what else was noted: ``bytes``, ``seconds``, ``plan``, ``reason`` …
        steps: sequences seen → KL so far.
        feasible: whether it keeps to all constraints.
        times: when work on it began and when it was told, seconds since 1970.
    """

    number: int
    state: str
    values: Mapping[str, Any]
    kl: float | None
    attributes: Mapping[str, Any]
    steps: Mapping[int, float]
    feasible: bool = True
    times: tuple[float, float] | None = None

    @property
    def counts(self) -> bool:
        """Whether it may be the best: it is complete, within the budget and the constraints."""
        return self.state == "complete" and self.feasible and bool(self.attributes["fits"])

    @property
    def figures(self) -> dict[str, float]:
        """What objectives and constraints may be about, of a complete trial."""
        names = ("bytes", "latency")
        found = {name: float(self.attributes[name]) for name in names if name in self.attributes}
        return found if self.kl is None else {"kl": self.kl, **found}


def facts(
    made_of: Mapping[str, Any], knobs: Sequence[Knob], objectives: Sequence[str]
) -> dict[str, Any]:
    """All that a study is made of, as its journal has it."""
    varied = {knob.name: knob.to_json() for knob in knobs}
    whole = {**made_of, "objectives": list(objectives), KNOBS: varied}
    found: dict[str, Any] = json.loads(json.dumps(whole))
    return found


class Study:
    """One study; use as a context manager.

    Args:
        journal: its file, made if it is not there.
        name: of the study in the file.
        knobs: what is varied.
        objectives: ``kl`` and others, in the order of a trial's values.
        sampler, seed: which one, and what it starts from.
        made_of: what the losses depend on; one that went on with something else would compare what
            cannot be compared.
        starts: name → values to try first.
        resume: whether a study that is there already may be gone on with.

    Attributes:
        is_new: whether the plan of some values is not known yet; values are drawn again while not.

    Raises:
        UserError: the study is there and made of something else or not to be resumed, the journal
            is damaged, or somebody else is at work on it.
    """

    def __init__(
        self,
        journal: Path,
        name: str,
        knobs: Sequence[Knob],
        objectives: Sequence[str],
        sampler: str,
        seed: int,
        made_of: Mapping[str, Any],
        starts: Mapping[str, Values],
        resume: bool = True,
    ) -> None:
        self.journal = journal
        self.name = name
        self.knobs = list(knobs)
        self.objectives = list(objectives)
        self.sampler, self.seed = sampler, seed
        self.made_of = facts(made_of, knobs, objectives)
        self._starts = starts
        self._resume = resume
        self.is_new: Callable[[Values], bool] = lambda values: True

    def __enter__(self) -> "Study":
        with ExitStack() as held:
            held.enter_context(locked(self.journal))
            mend(self.journal)
            self._study = self._open()
            self._held = held.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def _open(self) -> "OptunaStudy":
        import optuna

        with journal_errors(self.journal):
            storage = open_storage(self.journal)
            check_own(self.journal, self.name, storage, len(self.objectives))
            study = optuna.create_study(
                storage=storage,
                study_name=self.name,
                directions=["minimize"] * len(self.objectives),
                load_if_exists=True,
            )
        known = study.user_attrs.get(MADE_OF)
        if known is None:
            # Some may be there: of a process that died here.
            there = {trial.user_attrs.get(START) for trial in study.get_trials(deepcopy=False)}
            for name, values in self._starts.items():
                params = start_params(self.knobs, values)
                if name not in there:
                    study.enqueue_trial(params, user_attrs={START: name, _WANTED: params})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that this is experimental
                study.set_metric_names(self.objectives)  # which Optuna's dashboard shows
            study.set_user_attr(MADE_OF, self.made_of)
        else:
            with journal_errors(self.journal):
                check_same(self.journal, self.name, known, self.made_of, self._resume)
                _give_back_all(study)
        # Not the same draws again after a resume.
        draws = self.seed + 7919 * len(study.get_trials(deepcopy=False))
        study.sampler = make_sampler(
            self.sampler, draws % 2**32, self.knobs, lambda values: self.is_new(values)
        )
        return study

    # Trials

    def ask(self) -> Asked:
        """The next trial: one that was enqueued, or what the sampler wants to know."""
        trial = self._study.ask()
        return Asked(trial, suggest(trial, self.knobs), trial.user_attrs.get(START))

    def note(self, asked: Asked, notes: Mapping[str, Any]) -> None:
        """Keeps something about a trial."""
        for name, value in notes.items():
            asked.trial.set_user_attr(name, value)

    def behind(self, asked: Asked, sequences: int, kl: float) -> bool:
        """Takes the KL after so many sequences; whether the trial should be given up: it is worse
        than the median of the complete ones was there.

        Optuna's median pruner is not asked. It judges a trial by its least value so far, as of a
        loss that falls while something learns. This is a mean over a text that grows: an easy
        beginning says nothing of the rest.
        """
        from optuna.trial import TrialState

        asked.trial.report(kl, sequences)
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        steps = [trial.intermediate_values for trial in complete]
        others = [there[sequences] for there in steps if sequences in there]
        return asked.start is None and len(others) >= _UNPRUNED and kl > median(others)

    def tell(
        self, asked: Asked, values: Mapping[str, float], excess: Mapping[str, float] | None = None
    ) -> None:
        """A trial that is done.

        Args:
            values: objective → value.
            excess: constraint → by how much it is exceeded; 0 or less where it is kept.
        """
        for name, value in (excess or {}).items():
            asked.trial.set_constraint(name, value)
        self._study.tell(asked.trial, [values[name] for name in self.objectives])

    def tell_pruned(self, asked: Asked) -> None:
        from optuna.trial import TrialState

        self._study.tell(asked.trial, state=TrialState.PRUNED)

    def tell_failed(self, asked: Asked, reason: str) -> None:
        from optuna.trial import TrialState

        asked.trial.set_user_attr(_REASON, reason)
        self._study.tell(asked.trial, state=TrialState.FAIL)

    def give_back(self) -> None:
        """Nobody works on any trial now: values of those that were begun come first when the study
        goes on."""
        _give_back_all(self._study)

    def told(self) -> list[Told]:
        """All finished trials that count, in order of their numbers.

        Raises:
            UserError: the journal is damaged.
        """
        from optuna.trial import TrialState

        states = {
            TrialState.COMPLETE: "complete",
            TrialState.PRUNED: "pruned",
            TrialState.FAIL: "failed",
        }
        with journal_errors(self.journal):  # a line may have been altered into another one
            return [
                self._told(frozen, states[frozen.state])
                for frozen in self._study.get_trials(deepcopy=False, states=tuple(states))
                if frozen.user_attrs.get(_REASON) != _INTERRUPTED
            ]

    def _told(self, frozen: "FrozenTrial", state: str) -> Told:
        kl = None
        if state == "complete":
            kl = frozen.values[self.objectives.index("kl")]
        elif state == "pruned" and frozen.last_step is not None:
            kl = frozen.intermediate_values[frozen.last_step]
        fixed = {knob.name: knob.default for knob in self.knobs if knob.fixed}
        hidden = (_WANTED, _AGAIN)
        notes = {name: v for name, v in frozen.user_attrs.items() if name not in hidden}
        return Told(
            number=frozen.number,
            state=state,
            values=fixed | frozen.params,
            kl=kl,
            attributes=notes,
            steps=dict(frozen.intermediate_values),
            feasible=all(excess <= 0 for excess in frozen.constraints.values()),
            times=_times(frozen),
        )

    def front(self) -> list[int]:
        """Numbers of the feasible trials that no other one beats in all objectives; the first of
        equals."""
        first: dict[tuple[float, ...], int] = {}
        for trial in sorted(self._study.best_trials, key=lambda trial: int(trial.number)):
            first.setdefault(tuple(trial.values), trial.number)
        return list(first.values())

    def get_ready(self) -> None:
        """Imports what :meth:`importances` needs while workers are busy; it takes a moment."""
        from importlib import import_module
        from threading import Thread

        Thread(target=import_module, args=("optuna.importance",), daemon=True).start()

    def importances(self, budget: str) -> Importances:
        """What :func:`importances` tells of the knobs that are not fixed. The one that is the
        budget is left out: more bytes lose less, which nobody needs to be told.

        Args:
            budget: name of that knob, where it is one.
        """
        names = [knob.name for knob in self.knobs if not knob.fixed and knob.name != budget]
        return importances(self._study, names, self.objectives)

    def table(self) -> "pd.DataFrame":
        """A row per trial: number, state, kl, what was noted, knobs."""
        rows = [
            {
                "trial": t.number,
                "state": t.state,
                "kl": t.kl,
                "feasible": t.feasible if t.state == "complete" else None,
                **t.attributes,
                **_plain(t.values),
            }
            for t in self.told()
        ]
        import pandas as pd

        return pd.DataFrame(rows)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"knob {name}": value for name, value in values.items()}


def _times(frozen: "FrozenTrial") -> tuple[float, float] | None:
    """When work on a finished trial began and ended. It may have been asked for long before: what
    counts is how long it took, where that was noted."""
    if frozen.datetime_start is None or frozen.datetime_complete is None:
        return None
    asked, ended = frozen.datetime_start.timestamp(), frozen.datetime_complete.timestamp()
    return max(asked, ended - frozen.user_attrs.get("seconds", math.inf)), ended


def _give_back_all(study: "OptunaStudy") -> None:
    """Gives back the trials that seem to run: their driver died, or stops in order."""
    from optuna.trial import TrialState

    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    there = {trial.user_attrs.get(_AGAIN) for trial in waiting}
    for unfinished in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        _give_back(study, unfinished, enqueue=unfinished.number not in there)


def _give_back(study: "OptunaStudy", unfinished: "FrozenTrial", enqueue: bool = True) -> None:
    """Enqueues the values of a trial that nobody works on, and tells it FAIL."""
    from optuna.trial import Trial, TrialState

    if enqueue:
        # One that died early may lack values that were wanted of it.
        params = {**unfinished.user_attrs.get(_WANTED, {}), **unfinished.params}
        marks = {_AGAIN: unfinished.number, _WANTED: params}
        if START in unfinished.user_attrs:
            marks[START] = unfinished.user_attrs[START]
        study.enqueue_trial(params, user_attrs=marks)
    Trial(study, unfinished._trial_id).set_user_attr(_REASON, _INTERRUPTED)
    study.tell(unfinished.number, state=TrialState.FAIL)
