"""How long the stages of a run will take, from counted operations and measured speeds.

A token costs two operations per weight that it meets, a Hessian two per pair of inputs; what a
method takes per column and per weight was measured on one small layer, its matrix products are
counted. Every call of a layer adds a little that does not depend on sizes. All of it is divided by
the workers that can share it. Expect a factor of two either way; reading from a slow disk and
other users of the machine come on top.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from moesaic.methods.base import Chain, Unit, link_module, reducing
from moesaic.methods.chains import but_for_rank, can_be_cut
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.machine import Crew, Speeds, measure_speeds
from moesaic.orchestrator.memory import (
    Sizes,
    experts_per_token,
    site_shape,
    sites,
    slices,
)
from moesaic.orchestrator.stages import EVALUATION_PARTS

# Ray and its workers, until torch and transformers are loaded: measured on two cores.
START_SECONDS = 15.0
# One call of a layer with its hooks, whatever its size: measured on one core.
_CALL_SECONDS = 2e-4

METHOD = (
    "operations counted from shapes, over the speeds of this machine measured just now, as if it"
    " were idle; rough: expect a factor of two either way"
)


@dataclass(frozen=True)
class Left:
    """What an earlier run did not finish.

    Attributes:
        blocks: whose statistics lack.
        gradients: number of blocks whose gradients lack.
        pairs: unit → chains that lack.
    """

    blocks: list[int]
    gradients: int
    pairs: Mapping[str, list[Chain]]


class Clock:
    """Seconds of one worker for the parts of a run."""

    def __init__(self, experiment: Experiment, crew: Crew) -> None:
        self.experiment = experiment
        self.crew = crew
        self.sizes = Sizes(experiment, crew)
        self.model = experiment.model
        banks = [unit for unit in self.model.units() if unit.kind == "bank"]
        self.experts = banks[0].shapes["gate"][0] if banks else 0
        self.per_token = (experts_per_token(self.model.config) or self.experts) if banks else 0
        tokens = self.sizes.batch_tokens()
        few = max(1, tokens * self.per_token // self.experts) if banks else 0
        speeds: Speeds = measure_speeds(experiment, crew, tokens, few)
        # Pooling takes next to nothing.
        self.speeds = replace(speeds, head=0.0) if self.model.family.is_encoder else speeds

    def linears(self, block: int, tokens: int) -> float:
        """The layers of a block for ``tokens`` tokens."""
        seconds = 0.0
        for unit in self.sizes.block_units(block):
            if unit.kind == "linear":
                seconds += 2 * tokens * unit.parameters / self.speeds.matmul
            else:
                met = unit.parameters * self.per_token / self.experts
                seconds += 2 * tokens * met / self.speeds.expert_matmul
        return seconds

    def calls(self, block: int, batches: int) -> float:
        """What layers cost besides their arithmetic, for a number of batches."""
        units = self.sizes.block_units(block)
        layers = sum(2 * u.shapes["gate"][0] if u.kind == "bank" else 1 for u in units)
        return _CALL_SECONDS * batches * (layers + 4)

    def load(self, block: int) -> float:
        return self.sizes.weights(block) / self.speeds.read

    def statistics(self, block: int, tokens: int) -> float:
        """Hessians of the sites of a block, and for ``experts: all`` the inputs of its experts."""
        everything = self.experiment.recipe.calibration.experts == "all"
        units, seconds = self.sizes.block_units(block), 0.0
        for names, group in sites(units).items():
            for site in names:
                experts, _, inputs = site_shape(group, site)
                work = 2.0 * tokens * inputs * inputs
                if group[0].kind == "linear":
                    seconds += work / self.speeds.hessian
                elif everything:
                    seconds += work * experts / self.speeds.hessian
                else:
                    seconds += work * self.per_token / self.speeds.expert_hessian
            if group[0].kind == "bank" and everything:
                gate = math.prod(group[0].shapes["gate"])
                seconds += 2 * 2 * tokens * gate / self.speeds.matmul
        return seconds if "hessian" in self.experiment.walk.needs else 0.0

    def every_expert(self, block: int) -> float:
        """All experts on the sampled tokens, where they are compared or reduced."""
        banks = [unit for unit in self.sizes.block_units(block) if unit.kind == "bank"]
        return sum(2 * self.sizes.sampled() * u.parameters / self.speeds.matmul for u in banks)

    def calibrate(self, blocks: list[int]) -> float:
        """Forward through the blocks from the first that lacks, with statistics and their sums."""
        walk, sizes = self.experiment.walk, self.sizes
        tokens = walk.sequences * sizes.length
        batches = sum(
            math.ceil((high - low) / walk.batch)
            for low, high in map(walk.shard_rows, range(walk.shards))
        )
        seconds = 0.0
        for block in range(min(blocks), self.model.blocks) if blocks else ():
            size = sizes.sums(block)
            seconds += self.linears(block, tokens) + self.statistics(block, tokens)
            seconds += self.every_expert(block)
            # Every shard's sums are zeroed and added; the last are written, read and written.
            seconds += self.calls(block, batches) + (walk.shards + 2) * size / self.speeds.add
            seconds += self.load(block) * self.walkers + walk.shards * 2 * self.speeds.write
        return seconds

    @property
    def walkers(self) -> int:
        """Workers that can share the walk."""
        return min(self.crew.workers, self.experiment.walk.shards)

    def gradients(self, lacking: int) -> float:
        """Forward and back through the blocks for a few sequences, and labels from the head.

        With a second loss it goes back twice, and multiplies gradients and inputs; the latter also
        for embeddings.
        """
        walk = self.experiment.walk
        if not lacking or not walk.gradients:
            return 0.0
        tokens = self.experiment.gradient_tokens()
        sequences = tokens // self.sizes.length
        again = int(walk.fisher)
        seconds = (3 + again) * tokens * self.speeds.head
        for block in range(self.model.blocks):
            products = 2 + 2 * again + bool(walk.pooling)
            seconds += products * self.linears(block, tokens)
            seconds += (3 + again) * self.calls(block, sequences)
            seconds += self.load(block) * self.walkers + walk.shards * self.speeds.write
        return seconds

    def measure(self, pairs: Mapping[str, list[Chain]]) -> float:
        """Compression of the pairs that lack, their errors, and the files."""
        units = [self.experiment.by_name[name] for name in pairs]
        seconds = 0.0
        for names, group in sites(units).items():
            stats = sum(self.sizes.statistics(group).values())
            size = sum(self.experiment.dense_bytes(unit) for unit in group)
            seconds += (stats + size) / self.speeds.read
            chains = dict.fromkeys(chain for unit in group for chain in pairs[unit.name])
            made: set[Hashable] = set()
            # A reduction is read and written, and run beside the layer as it is.
            prefixes = set(filter(None, (reducing(chain)[0] for chain in chains)))
            once = 2 * self.every_expert(group[0].block) * self.per_token / max(1, self.experts)
            seconds += len(prefixes) * (once + 2 * size / self.speeds.read)
            for chain in chains:
                todo = [unit for unit in group if chain in pairs[unit.name]]
                seconds += 4 * self.speeds.write * len(todo)
                if can_be_cut(chain):
                    if but_for_rank(chain) in made:
                        continue
                    made.add(but_for_rank(chain))
                seconds += sum(self.compress(todo, site, chain) for site in names)
        return seconds

    def compress(self, units: list[Unit], site: str, chain: Chain) -> float:
        """One chain on the members that read one site, and the errors of what it made."""
        experts, rows, inputs = site_shape(units, site)
        speed = self.speeds.compress.get(chain)
        if speed is None:
            return 0.0
        parts, _ = slices(experts, rows, inputs, self.crew.device)
        weights = experts * rows * inputs
        products = 4.0 * weights * inputs  # Δw H and w H
        if any("hessian" in link_module(spec.method).NEEDS for spec in reducing(chain)[1]):
            products += weights * inputs + experts * inputs**3  # feedback, factorisation
        return (
            speed.column * inputs * parts
            + (speed.weight + speed.dense + speed.cube * min(rows, inputs)) * weights
            + products / self.speeds.hessian
        )

    def evaluate(self) -> float:
        """The dense model, every baseline and the plans on the held-out text."""
        recipe = self.experiment.recipe
        texts = recipe.evaluation
        plans = len(recipe.baselines) + len(recipe.budget.each)
        tokens = texts.sequences * texts.length
        dense = max((speed.dense for speed in self.speeds.compress.values()), default=0.0)
        parts = min(EVALUATION_PARTS, math.ceil(texts.sequences / texts.batch))
        batches = math.ceil(texts.sequences / texts.batch)
        blocks = range(self.model.blocks)
        walk = sum(self.linears(b, tokens) + self.calls(b, batches) for b in blocks)
        load = sum(self.load(block) for block in blocks) * parts
        head = tokens * self.speeds.head
        unpack = self.experiment.size.weights * dense * parts
        return (plans + 1) * (walk + load) + (1 + 2 * plans) * head + plans * unpack

    def evaluators(self) -> int:
        """Workers that can share the evaluation."""
        texts = self.experiment.recipe.evaluation
        return min(self.crew.workers, EVALUATION_PARTS, math.ceil(texts.sequences / texts.batch))


def predict_seconds(experiment: Experiment, crew: Crew, left: Left) -> dict[str, float]:
    """Stage → seconds of what is left to do with the crew's workers; ``total`` is their sum."""
    clock = Clock(experiment, crew)
    jobs = len(sites([experiment.by_name[name] for name in left.pairs]))
    found = {
        "start": START_SECONDS,
        "calibrate": clock.calibrate(left.blocks) / clock.walkers,
        "gradients": clock.gradients(left.gradients) / clock.walkers,
        "measure": clock.measure(left.pairs) / max(1, min(crew.workers, jobs)),
        "evaluate": clock.evaluate() / clock.evaluators(),
    }
    if experiment.recipe.propagate:
        found["propagate"] = _propagate(clock)
    return {**found, "total": sum(found.values())}


def _propagate(clock: Clock) -> float:
    """Every plan solved again from front to back: two passes per block, one chain per unit."""
    experiment = clock.experiment
    plans = len(experiment.recipe.baselines) + len(experiment.recipe.budget.each)
    passes = 2 * clock.calibrate(list(range(experiment.model.blocks))) / clock.walkers
    first = {name: chains[:1] for name, chains in experiment.offers.items()}
    return plans * (passes + clock.measure(first) / clock.crew.workers)
