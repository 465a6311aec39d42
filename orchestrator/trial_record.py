"""Trials put on record in MLflow, each with its plan, when no worker waits for that."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moesaic.orchestrator.mixtures import Mixtures, sources
from moesaic.orchestrator.store import Store
from moesaic.orchestrator.study import Told
from moesaic.orchestrator.track import Tracker
from moesaic.search.base import Plan

# A plan, its pieces, and what those of them are that are no files.
Made = tuple[Plan, Mapping[str, str], Mixtures]


def trial_name(number: int) -> str:
    """What a trial is called on record."""
    return f"trial {number}"


class TrialRecord:
    """What was told and is not on record yet.

    Args:
        tracker: where to.
        store: that pieces are named in.
        made: makes the plan of a trial again, where it is not given.
    """

    def __init__(self, tracker: Tracker, store: Store, made: Callable[[Told], Made]) -> None:
        self._tracker = tracker
        self._store = store
        self._made = made
        self._waiting: list[tuple[Told, Made | None]] = []

    def add(self, told: Told, made: Made | None = None) -> None:
        """A finished trial, which waits."""
        self._waiting.append((told, made))

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def write(self, most: int | None = None) -> None:
        """Puts those that wait on record, the first ones first.

        Args:
            most: that many, not all.

        Raises:
            RunError: that could not be done; those that were not put there wait on.
        """
        left = 0 if most is None else max(0, self.waiting - most)
        while self.waiting > left:
            self._log(*self._waiting[0])
            del self._waiting[0]

    def _log(self, told: Told, made: Made | None) -> None:
        notes = told.attributes
        metrics = {name: float(v) for name, v in notes.items() if isinstance(v, int | float)}
        # One that was given up has the KL of a part of the text.
        if told.kl is not None and told.state == "complete":
            metrics["kl"] = told.kl
        params = {name: str(value) for name, value in told.values.items()}
        params |= {name: str(notes[name]) for name in ("plan", "start") if name in notes}
        self._tracker.log_trial(
            trial_name(told.number),
            params,
            metrics,
            told.steps,
            told.state,
            str(notes.get("reason", "")),
            partial(self._document, told, made) if told.state == "complete" else None,
            told.times,
        )

    def _document(self, told: Told, made: Made | None) -> dict[str, Any]:
        """A trial's plan as ``plan.json`` has it, and the files of its pieces in the store: of a
        bank that is mixed, those that its experts come from."""
        plan, pieces, mixtures = made or self._made(told)

        def within(path: str) -> str:
            return str(Path(path).relative_to(self._store.root))

        return {
            **plan.to_json(),
            "file_bytes": told.attributes["bytes"],
            "store": self._store.where,
            "pieces": {
                unit: [within(source) for source in sources(mixtures[path])]
                if path in mixtures
                else within(path)
                for unit, path in pieces.items()
            },
        }
