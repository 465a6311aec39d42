"""The stage that slices a model, for the pool: every place of the stream after those before it."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from moesaic.orchestrator.console import View
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.shared import exists, remove_unfinished
from moesaic.orchestrator.slice_walk import gathered
from moesaic.orchestrator.slicing import Cut
from moesaic.orchestrator.statistics import ranges

STAGE = "slice"


class Slicing:
    """Makes a sliced model where it is missing."""

    def __init__(self, cut: Cut, pool: Pool, view: View) -> None:
        self.cut, self.pool, self.view = cut, pool, view

    def run(self) -> None:
        """Does all that is missing."""
        cut, store = self.cut, self.cut.store
        parts = [p for p in range(cut.parts) if store.get("sliced", cut.part_key(p)) is None]
        places = [p for p in range(cut.places) if store.get("bases", cut.basis_key(p)) is None]
        if not parts and not places:
            return
        steps = [s for s in self._steps(places) if not gathered(cut, s)]
        total = cut.steps + cut.places + cut.parts
        self.view.stage(STAGE, total, total - len(steps) - len(places) - len(parts))
        if not cut.shortcuts:
            self._gather_all(steps)
            if places and store.get("stats", cut.sums_key) is None:
                self._call("slice_walk:add_up", [{}], "add up")
        for place in places:
            if cut.shortcuts and place in steps:
                self._gather_all([place])
            self._call("slice_walk:settle", [{"place": place}], f"axes {place}", counted=True)
        self._call("slicing:write", [{"part": part} for part in parts], "write", counted=True)
        remove_unfinished(cut.scratch)

    def _steps(self, places: Sequence[int]) -> Sequence[int]:
        """Passages of the text that axes of these places need."""
        if self.cut.shortcuts or not places:
            return places
        known = self.cut.store.get("stats", self.cut.sums_key) is not None
        return () if known else range(self.cut.steps)

    def _gather_all(self, steps: Iterable[int]) -> None:
        for step in steps:
            self._gather(step)
            self.view.advance(STAGE)

    def _gather(self, step: int) -> None:
        """One passage of the text, and whatever it starts from."""
        cut = self.cut
        block = (step - 1) // cut.sublayers if cut.shortcuts else step
        if block > 0 or (cut.shortcuts and step > 0):
            shards = range(cut.walk.shards)
            if not all(exists(cut.hidden_path(block, shard)) for shard in shards):
                self._gather(block * cut.sublayers if cut.shortcuts else block - 1)
        spans = [{"step": step, "span": span} for span in ranges(cut.walk.shards, self.pool.size)]
        self._call("slice_walk:gather", spans, f"slice {step}")

    def _call(
        self, function: str, arguments: list[dict[str, Any]], label: str, counted: bool = False
    ) -> None:
        def done(result: Any) -> Iterable[Task]:
            if counted:
                self.view.advance(STAGE, 1, result["peak_bytes"])
            return ()

        plain = asdict(self.cut)
        tasks = [Task(function, {"cut": plain, **own}, label, done=done) for own in arguments]
        self.pool.run(tasks, self.view.tick)
