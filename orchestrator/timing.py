"""What the work of a run costs one worker, from counted operations and measured speeds.

A token costs two operations per weight that it meets, and four per token that it looks at and
channel; a Hessian costs two per pair of inputs; what a method takes was measured on small layers,
its products with Hessians are counted. Operations on single values are counted per layer, calls of
a layer add a little that does not depend on sizes. What a run takes besides is in
:mod:`moesaic.orchestrator.stage_times`.
"""

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace

from moesaic.methods import gptq
from moesaic.methods.base import Chain, Unit, compressing, reducers_of
from moesaic.methods.chains import but_for_rank, can_be_cut
from moesaic.orchestrator.block_sizes import experts_per_token
from moesaic.orchestrator.costs import Cost
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.machine import Crew, Load, Speeds, measure_speeds
from moesaic.orchestrator.memory import (
    Sizes,
    error_bytes,
    site_shape,
    sites,
    slices,
)
from moesaic.orchestrator.readahead import own_share
from moesaic.orchestrator.solving import factoring, wants_hessian
from moesaic.orchestrator.stages import EVALUATION_PARTS
from moesaic.orchestrator.statistics import Node, covered, ranges

# One call of a layer with its hooks, whatever its size: measured on one core.
_CALL_SECONDS = 2e-4

# Operations on every value of a token's hidden state in a block, besides the products: two norms of
# six, turning queries and keys by their places and their own norms, two sums; and where statistics
# are taken, two float32 copies, and what the block did to the state.
_VALUES_IN_BLOCK, _VALUES_WATCHED = 20, 9

# Parts in which a block's weights are read: what one worker of a node has read, others find there.
_READ_PARTS = 8

# Speeds of one worker for an experiment, at what it computes at a time.
SpeedSource = Callable[[Experiment, Crew, Load], Speeds]


class Clock:
    """Costs of one worker for the parts of a run.

    Args:
        source: of a worker's speeds; by default they are measured, on this machine.
    """

    def __init__(
        self, experiment: Experiment, crew: Crew, source: SpeedSource | None = None
    ) -> None:
        self.experiment = experiment
        self.crew = crew
        self.sizes = Sizes(experiment, crew)
        self.model = experiment.model
        banks = [unit for unit in self.model.units() if unit.kind == "bank"]
        self.experts = banks[0].shapes["gate"][0] if banks else 0
        self.per_token = (experts_per_token(self.model.config) or self.experts) if banks else 0
        self.load_of_worker = self._load()
        speeds = (source or measure_speeds)(experiment, crew, self.load_of_worker)
        # Pooling takes next to nothing.
        self.speeds = replace(speeds, head=0.0) if self.model.family.is_encoder else speeds

    def _load(self) -> Load:
        """What the worker computes at a time."""
        tokens, length, config = self.sizes.batch_tokens(), self.sizes.length, self.model.config
        heads = int(getattr(config, "num_attention_heads", 1))
        channels = getattr(config, "head_dim", None) or self.model.hidden_size // heads

        def seen(count: int) -> int:
            return max(1, count * self.per_token // self.experts) if self.experts else 0

        return Load(tokens, seen(tokens), seen(length), length, heads, int(channels))

    def taken(self, cost: Cost) -> float:
        """Seconds of a cost where nobody else reads or writes."""
        reading = cost.read / self.speeds.read
        return reading + cost.computing(reading) + cost.written / self.speeds.save

    def linears(self, block: int, tokens: int, back: bool = False) -> float:
        """The layers of a block for ``tokens`` tokens, and their attention to one another.

        Args:
            back: at the speed of experts that run forward and back.
        """
        seconds, load = tokens * self.attention(), self.load_of_worker
        experts = self.speeds.expert_reverse if back else self.speeds.expert_matmul
        for unit in self.sizes.block_units(block):
            if unit.kind == "linear":
                seconds += 2 * tokens * unit.parameters / self.speeds.matmul
            else:
                met = unit.parameters * self.per_token / self.experts
                seconds += 2 * tokens * met / experts
        values = max(self.model.hidden_size, load.heads * load.channels)
        return seconds + tokens * values * _VALUES_IN_BLOCK * self.speeds.wide

    def attention(self) -> float:
        """Looking at the other tokens of a sequence, per token of a block."""
        load = self.load_of_worker
        return load.length * load.heads * load.channels * self.speeds.attention

    def calls(self, block: int, batches: int) -> float:
        """What layers cost besides their arithmetic, for a number of batches."""
        units = self.sizes.block_units(block)
        layers = sum(unit.kind == "linear" for unit in units)
        return _CALL_SECONDS * batches * (layers + 4)

    def load(self, block: int, span: Node | None = None) -> Cost:
        """Reading a block's weights, and moving them to the device.

        Args:
            span: of the shards that walk, if the reader is one who walks.
        """
        size = self.sizes.weights(block)
        share = 0.0 if span is None else own_share(span)
        first = int(share * _READ_PARTS)
        order = [(first + k) % _READ_PARTS for k in range(_READ_PARTS)]
        files = tuple((("weights", str(part)), size / _READ_PARTS) for part in order)
        return Cost(size / self.speeds.copy, read=size, files=files)

    def statistics(self, block: int, tokens: int) -> float:
        """Hessians of the sites of a block, and for ``experts: all`` the inputs of its experts."""
        everything = self.experiment.recipe.calibration.experts == "all"
        units = self.sizes.block_units(block)
        seconds = tokens * self.model.hidden_size * _VALUES_WATCHED * self.speeds.wide
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

    def forward(self, block: int, span: Node) -> Cost:
        """Some shards through a block: statistics of theirs, and their hidden states, as files."""
        walk, sizes = self.experiment.walk, self.sizes
        rows = [high - low for low, high in map(walk.shard_rows, range(*span))]
        tokens, share = sum(rows) * sizes.length, sum(rows) / walk.sequences
        batches = sum(math.ceil(count / walk.batch) for count in rows)
        size, states = sizes.sums(block), tokens * self.token_bytes
        kept = sum(min(walk.gradients, count) for count in rows) * sizes.length * self.token_bytes
        seconds = self.linears(block, tokens) + self.statistics(block, tokens)
        seconds += self.every_expert(block) * share + self.calls(block, batches)
        seconds += self.parted(block, span, tokens)
        # Sums of every shard begin at zero, and are added to those before them.
        seconds += len(rows) * size / self.speeds.sums
        seconds += 2 * states / self.speeds.copy
        seconds += len(rows) * (1 + bool(walk.gradients)) * self.speeds.write
        moved = Cost(seconds, written=states + kept)
        return self.load(block) + moved + self.leaving(size, span)

    def leaving(self, size: int, span: Node) -> Cost:
        """Sums of some shards, ``size`` bytes each, as files to be added; of all, as an entry."""
        speeds, nodes = self.speeds, self.nodes([span])
        seconds = nodes * (size / speeds.copy + speeds.write)
        if span == (0, self.experiment.walk.shards):
            seconds = size / speeds.copy + self._entered(size) + size / speeds.host_add
        return Cost(seconds, written=nodes * size)

    def _entered(self, size: int) -> float:
        """Seconds of an entry of sums besides writing: its digest, and whether all is finite."""
        return size / self.speeds.digest + size / 4 * self.speeds.wide + self.speeds.entry

    def parted(self, block: int, span: Node, tokens: int) -> float:
        """What a block costs more where it is walked in parts: linears are run again, and what the
        experts are called with goes to the device for every slice of them."""
        try:
            passes = self.sizes.passes(block)
        except RunError:
            return 0.0
        if passes is None:
            return 0.0
        units = self.sizes.block_units(block)
        linears = sum(unit.parameters for unit in units if unit.kind == "linear")
        again, slices = len(passes.groups) - 1, 0
        if passes.experts:
            again, slices = again + 1, math.ceil(self.experts / passes.experts)
        moved = 2 * slices * self.sizes.calls_of(span)
        return again * 2 * tokens * linears / self.speeds.matmul + moved / self.speeds.copy

    def read_ahead(self, cost: Cost, size: float) -> Cost:
        """A cost of which so many bytes are read while a GPU's worker is busy with others."""
        return cost if self.crew.device == "cpu" else replace(cost, ahead=size)

    def passing(self, block: int, span: Node) -> Cost:
        """Some shards through a block of a walk that goes ahead."""
        walk, sizes = self.experiment.walk, self.sizes
        rows = [high - low for low, high in map(walk.shard_rows, range(*span))]
        tokens = sum(rows) * sizes.length
        states = tokens * self.token_bytes
        kept = sum(min(walk.gradients, count) for count in rows) * sizes.length * self.token_bytes
        batches = sum(math.ceil(count / walk.batch) for count in rows)
        seconds = self.linears(block, tokens) + self.calls(block, batches)
        seconds += 2 * states / self.speeds.copy
        seconds += len(rows) * (1 + bool(walk.gradients)) * self.speeds.write
        load = self.load(block, span)
        return self.read_ahead(load + Cost(seconds, written=states + kept), load.read)

    def collecting(self, block: int) -> Cost:
        """Statistics of all shards behind such a walk: as forward, but states are read."""
        walk, sizes = self.experiment.walk, self.sizes
        states = walk.sequences * sizes.length * self.token_bytes
        whole = self.forward(block, (0, walk.shards))
        cost = replace(whole, read=whole.read + states, written=float(sizes.sums(block)))
        # Those of the first shard are waited for.
        return self.read_ahead(cost, states * (walk.shards - 1) / walk.shards)

    def reduce(self, what: str, block: int, spans: Sequence[Node]) -> Cost:
        """The sums that all ranges of shards left, as one entry."""
        sizes, nodes = self.sizes, self.nodes(spans)
        size = sizes.sums(block) if what == "stats" else sizes.gradients(block)
        seconds = nodes * size / self.speeds.host_add + self._entered(size)
        return Cost(seconds, nodes * size, size)

    def reverse(self, block: int, span: Node) -> Cost:
        """Gradients of some shards back through a block; from the losses in the last one.

        With a second loss it goes back twice, and multiplies gradients and inputs; the latter also
        for embeddings.
        """
        walk, sizes = self.experiment.walk, self.sizes
        rows = [high - low for low, high in map(walk.shard_rows, range(*span))]
        sequences = sum(min(walk.gradients, count) for count in rows)
        tokens, again = sequences * sizes.length, int(walk.fisher)
        size, states = sizes.gradients(block), tokens * self.token_bytes
        seconds = (2 + 2 * again + bool(walk.pooling)) * self.linears(block, tokens, back=True)
        seconds += (3 + again) * self.calls(block, sequences)
        if block == self.model.blocks - 1:
            seconds += (3 + again) * tokens * self.speeds.head
        seconds += (3 + 2 * again) * states / self.speeds.copy
        seconds += len(rows) * self.speeds.write
        moved = Cost(0.0, (2 + again) * states, (1 + again) * states)
        load = self.load(block, span)
        read = self.read_ahead(load + Cost(seconds), load.read)
        return read + moved + self.leaving(size, span)

    def calibrate(self, blocks: list[int]) -> float:
        """Forward through the blocks from the first that lacks, with statistics and their sums."""
        walked = range(min(blocks), self.model.blocks) if blocks else ()
        if self.sizes.ahead:
            return sum(
                sum(self.taken(self.passing(block, span)) for span in self.spans)
                + self.taken(self.collecting(block))
                for block in walked
            )
        return sum(
            sum(self.taken(self.forward(block, span)) for span in self.spans)
            + self.adding("stats", block)
            for block in walked
        )

    def adding(self, what: str, block: int) -> float:
        """Seconds in which the sums of several ranges of shards become one entry."""
        spans = self.summed(what)
        return self.taken(self.reduce(what, block, spans)) if len(spans) > 1 else 0.0

    def walked(self, blocks: list[int]) -> float:
        """Seconds of :meth:`calibrate`, shared by the workers that can."""
        work = self.calibrate(blocks)
        if not self.sizes.ahead:
            return work / self.walkers
        walked = range(min(blocks), self.model.blocks) if blocks else ()
        chain = sum(max(self.taken(self.passing(b, s)) for s in self.spans) for b in walked)
        return max(chain, work / self.crew.workers)

    def summed(self, what: str) -> list[Node]:
        """Ranges of shards that leave sums, of statistics or gradients, to be added."""
        ahead = what == "stats" and self.sizes.ahead
        return [(0, self.experiment.walk.shards)] if ahead else self.spans

    @property
    def spans(self) -> list[Node]:
        """Ranges of shards, one for each worker that walks."""
        return ranges(self.experiment.walk.shards, self.sizes.walkers)

    def nodes(self, spans: Sequence[Node]) -> int:
        """Files of sums that ranges of shards leave of a block."""
        shards = self.experiment.walk.shards
        return sum(len(covered((0, shards), span)) for span in spans)

    @property
    def token_bytes(self) -> int:
        """Of one token's hidden state."""
        return int(self.model.hidden_size) * self.sizes.item

    @property
    def walkers(self) -> int:
        """Workers that can share the walk."""
        return min(self.sizes.walkers, self.experiment.walk.shards)

    def gradients(self, lacking: int) -> float:
        """Back through the blocks for a few sequences of every shard."""
        if not lacking or not self.experiment.walk.gradients:
            return 0.0
        return sum(
            sum(self.taken(self.reverse(block, span)) for span in self.spans)
            + self.adding("gradients", block)
            for block in range(self.model.blocks)
        )

    def measure(self, pairs: Mapping[str, list[Chain]]) -> float:
        """Compression of the pairs that lack, their errors, and the files."""
        units = [self.experiment.space.by_name[name] for name in pairs]
        return sum(self.taken(self.job(group, pairs)) for group in sites(units).values())

    def job(self, group: list[Unit], pairs: Mapping[str, Collection[Chain]]) -> Cost:
        """Units that share their sites under the chains that each lacks."""
        speeds, experiment = self.speeds, self.experiment
        names = sorted({site for unit in group for site in unit.sites.values()})
        stats = sum(self.sizes.statistics(group).values())
        size = sum(experiment.sizes.dense_bytes(unit) for unit in group)
        chains = dict.fromkeys(chain for unit in group for chain in pairs[unit.name])
        made: set[Hashable] = set()
        factored: set[Hashable] = set()
        # A reduction is read and written, and run beside the layer as it is.
        prefixes = set(filter(None, map(reducers_of, chains)))
        once = 2 * self.every_expert(group[0].block) * self.per_token / max(1, self.experts)
        seconds, written = len(prefixes) * once, 0.0
        for chain in chains:
            todo = [unit for unit in group if chain in pairs[unit.name]]
            seconds += 2 * speeds.entry * len(todo)
            if can_be_cut(chain):
                if but_for_rank(chain) in made:
                    continue
                made.add(but_for_rank(chain))
            written += sum(experiment.sizes.predicted_bytes(unit, chain) for unit in todo)
            written += sum(error_bytes(unit) for unit in todo)
            seconds += sum(self.compress(todo, site, chain) for site in names)
            seconds += sum(self.factors(todo, site, chain, factored) for site in names)
        seconds += written / speeds.digest + (stats + size + written) / speeds.copy
        read = stats + size + len(prefixes) * size
        files = ((("stats", "own"), float(stats)), (("weights", "own"), float(size)))
        return Cost(seconds, read, written + len(prefixes) * size, files)

    def compress(self, units: list[Unit], site: str, chain: Chain) -> float:
        """One chain on the members that read one site, and the errors of what it made."""
        experts, rows, inputs = site_shape(units, site)
        speed = self.speeds.compress.get(chain)
        if speed is None:
            return 0.0
        parts, _ = slices(experts, rows, inputs, self.crew.device)
        weights = experts * rows * inputs
        together = math.ceil(experts / parts) if units[0].kind == "bank" else 0
        # Δw H and w H; and what rounding moves to the columns that follow.
        products = 4.0 * weights * inputs
        if wants_hessian(chain):
            products += weights * inputs
        return (
            parts * speed.seconds(together, rows, inputs)
            + (speed.dense + speed.cube * min(rows, inputs)) * weights
            + products / self.speeds.product
        )

    def factors(self, units: list[Unit], site: str, chain: Chain, known: set[Hashable]) -> float:
        """Factorising the Hessians of a site, unless that is kept from an earlier chain.

        Args:
            known: what is kept; what this chain leaves is added.
        """
        experts, _, inputs = site_shape(units, site)
        if not wants_hessian(chain):
            return 0.0
        key = (site, *((spec.method, *factoring(spec.parsed())) for spec in compressing(chain)))
        if key in known:
            return 0.0
        if 4 * experts * inputs**2 <= gptq.KEEP_BYTES:
            known.add(key)
        return experts * inputs**3 / self.speeds.factor

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
        load = sum(self.taken(self.load(block)) for block in blocks) * parts
        head = tokens * self.speeds.head
        unpack = self.experiment.sizes.size.weights * dense * parts
        return (plans + 1) * (walk + load) + (1 + 2 * plans) * head + plans * unpack

    def evaluators(self) -> int:
        """Workers that can share the evaluation."""
        texts = self.experiment.recipe.evaluation
        return min(self.crew.workers, EVALUATION_PARTS, math.ceil(texts.sequences / texts.batch))
