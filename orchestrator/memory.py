"""What a run will hold in memory and write to the store, told from shapes alone.

Statistics are counted by making the observers of a run on the meta device, so that what is
predicted is what will be allocated. Weights, hidden states and partial sums follow from the code of
:mod:`calibrate` and :mod:`measure`; activations are bounded from above by the widths of a block's
layers. For what the allocator keeps of freed memory, a share is added.
"""

import math
from collections.abc import Iterable, Sequence

from moesaic.methods import chains, gptq
from moesaic.methods.base import Unit, compressing, link_module, merge_of
from moesaic.orchestrator.adding import STEP_BYTES
from moesaic.orchestrator.block_sizes import BlockSizes, experts_per_token
from moesaic.orchestrator.compression import ERROR_BYTES
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.gradients import LOGIT_ROWS
from moesaic.orchestrator.machine import Crew
from moesaic.orchestrator.passes import Passes, bank_of, planned_passes, solved_at_a_time
from moesaic.orchestrator.refine import BLOCKS
from moesaic.orchestrator.resident import HIDDEN_BYTES, WEIGHT_BYTES
from moesaic.orchestrator.room import (
    COMPILED_BYTES,
    COMPILED_SHAPES,
    KEPT_BY_ALLOCATOR,
    PROCESS_BYTES,
)
from moesaic.orchestrator.stages import EVALUATION_PARTS
from moesaic.orchestrator.statistics import (
    covered,
    held_by_walker,
    held_sums,
    ranges,
)
from moesaic.search.features import SWAPS, rule_of

# Arrays of the size of a slice that are alive at once: logits with what is made of them, and
# weight, difference, product and square of an error.
_LOGIT_COPIES, _ERROR_COPIES = 5, 4
# How far the tokens of experts spread, in means.
_SPREAD = 1.5
Parts = dict[str, int]

METHOD = (
    "largest worker process: libraries, weights of the largest block, its statistics once for"
    " every partial sum that is held while shards are added in pairs, hidden states of the worker's"
    " shards, activations of one batch (an upper bound), what oneDNN compiled for experts in 16"
    " bits; when measuring: weights and statistics of the largest site, its factors, the solver's"
    " working copies and those of the error; when tuning: the whole model, and at most what is kept"
    " of earlier plans"
)


def sites(units: list[Unit]) -> dict[tuple[str, ...], list[Unit]]:
    """Units by the sites that they read: those together are one job of measuring."""
    found: dict[tuple[str, ...], list[Unit]] = {}
    for unit in units:
        found.setdefault(tuple(sorted(set(unit.sites.values()))), []).append(unit)
    return found


def held_walking(shards: int, workers: int) -> int:
    """Sums that the busiest worker holds."""
    return max(held_by_walker(shards, span) for span in ranges(shards, workers))


def held_adding(shards: int, workers: int) -> int:
    """Sums in the worker that adds up those of all: the file being copied is mapped as well."""
    leaves = [node for span in ranges(shards, workers) for node in covered((0, shards), span)]
    return held_sums((0, shards), frozenset(leaves)) + 1


class Sizes(BlockSizes):
    """Bytes of an experiment's parts."""

    def __init__(self, experiment: Experiment, crew: Crew) -> None:
        super().__init__(experiment.model, experiment.walk, experiment.recipe.calibration.length)
        self.experiment = experiment
        self.crew = crew
        compute = experiment.recipe.compute
        self.walkers = compute.walking(crew.workers)
        self.ahead = compute.ahead(crew.workers)
        # Workers that sum the statistics of one block.
        self.summing = 1 if self.ahead else self.walkers

    def passes(self, block: int) -> Passes | None:
        """How a block is walked where it does not fit the device of a worker.

        Raises:
            RunError: not even one linear, or one expert, fits.
        """
        if self.crew.room is None:
            return None
        held = held_walking(self.walk.shards, self.summing)
        spans = ranges(self.walk.shards, self.summing)
        beside = max(self.beside(self.crew.device, span) for span in spans)
        return planned_passes(self, block, held, self.crew.room, *beside)

    def solved(self, units: Sequence[Unit], weights: int, stats: int) -> int:
        """How many experts of a bank are compressed at a time; 0 for all, or where none fits."""
        if self.crew.room is None:
            return 0
        try:
            return solved_at_a_time(units, weights, stats, self.crew.device, self.crew.room)
        except RunError:
            return 0

    def hidden(self) -> int:
        """Hidden states of the shards that one worker keeps, and two copies of one shard."""
        return max(map(self.hidden_of, ranges(self.walk.shards, self.walkers)))

    def logits(self, length: int) -> int:
        """Logits of some rows in float32, with what is made of them."""
        if self.model.family.is_encoder:
            return 0
        return min(LOGIT_ROWS, length) * self.model.vocab_size * 4 * _LOGIT_COPIES


def parted_blocks(sizes: Sizes) -> list[tuple[int, str, bool]]:
    """Blocks that do not fit a worker's device, one of every shape: number, how they are walked,
    and whether they can be."""
    found: dict[str, tuple[int, str, bool]] = {}
    for block in range(sizes.model.blocks):
        try:
            passes = sizes.passes(block)
        except RunError as error:
            text = str(error).partition(": ")[2]
            found.setdefault(text.replace(f".{block}.", ".*."), (block, text, False))
            continue
        if passes is not None:
            text = passes.text(bank_of(sizes.block_units(block)))
            found.setdefault(text, (block, text, True))
    return list(found.values())


def predict_memory(sizes: Sizes) -> dict[str, Parts]:
    """Stage → part → bytes of the largest worker; ``total`` is their sum."""
    blocks = range(sizes.model.blocks)
    jobs = sites(sizes.experiment.units).values()
    found = {"calibrate": _largest(_calibrate(sizes, block) for block in blocks)}
    if sizes.walk.gradients:
        found["gradients"] = _largest(_reverse(sizes, block) for block in blocks)
    found["measure"] = _largest(_measure(sizes, units) for units in jobs)
    found["evaluate"] = _largest(_evaluate(sizes, block) for block in blocks)
    if sizes.experiment.recipe.tune is not None:
        found["tune"] = _tune(sizes)
    score = sizes.experiment.recipe.score
    if score is not None and SWAPS in rule_of(score).sources:
        found["score"] = _tune(sizes)
    if sizes.experiment.recipe.refine is not None:
        found["refine"] = _refine(sizes)
    for stage, parts in found.items():
        parts["compiled products"] = _compiled(sizes, stage)
        parts["allocator"] = int(KEPT_BY_ALLOCATOR * sum(parts.values()))
        parts["process"] = PROCESS_BYTES
        parts["total"] = sum(parts.values())
    return found


def _compiled(sizes: Sizes, stage: str) -> int:
    """What the processor's library keeps for the many numbers of tokens that experts meet.

    A worker that has walked keeps it afterwards. The reverse pass adds its own, for batches of one
    sequence, in both directions; so do the plans, whose experts see other tokens.
    """
    banks = [unit for unit in sizes.model.units() if unit.kind == "bank"]
    if not banks or sizes.crew.device != "cpu" or sizes.item != 2:
        return 0
    experts = banks[0].shapes["gate"][0]
    share = (experts_per_token(sizes.model.config) or experts) / experts

    def shapes(tokens: int, batches: int) -> int:
        calls = experts * len(banks) * batches
        return min(int(_SPREAD * tokens * share), tokens, calls)

    walk = sizes.walk
    batches = math.ceil(walk.sequences / walk.batch / sizes.walkers)
    count = 2 * shapes(sizes.batch_tokens(), batches)  # gate and up in one, down
    if stage != "calibrate" and walk.gradients:
        count += 4 * shapes(sizes.length, walk.gradients * walk.shards // sizes.walkers)
    if stage == "evaluate":
        recipe = sizes.experiment.recipe
        texts, plans = recipe.evaluation, len(recipe.baselines) + len(recipe.budget.each)
        runs = math.ceil(texts.sequences / texts.batch / sizes.crew.workers) * (plans + 1)
        count += 2 * shapes(min(texts.batch, texts.sequences) * texts.length, runs)
    return COMPILED_BYTES * min(count, COMPILED_SHAPES)


def _largest(candidates: Iterable[Parts]) -> Parts:
    return max(candidates, key=lambda parts: sum(parts.values()))


def _calibrate(sizes: Sizes, block: int) -> Parts:
    one = sizes.sums(block)
    shards, workers = sizes.walk.shards, sizes.summing
    outer = sizes.outer() if block == 0 else 0  # the embedding goes when block 1 is loaded
    activations = sizes.activations(block, sizes.batch_tokens()) + sizes.outputs(block)
    walking = {
        "weights": sizes.weights(block) + outer,
        "statistics": one * held_walking(shards, workers),
        "hidden states": sizes.hidden(),
        "activations": activations,
    }
    try:
        passes = sizes.passes(block)
    except RunError:
        passes = None  # what is told then is what it would take
    if passes is not None:
        spans = ranges(shards, workers)
        beside, kept = max(sizes.beside(sizes.crew.device, span) for span in spans)
        calls = max(map(sizes.calls_of, spans)) if passes.experts else 0
        most = passes.need - beside - activations - sizes.weights_but_bank(block)
        walking |= {
            "weights": sizes.weights_but_bank(block) + outer,
            # And the weights of some experts.
            "statistics": most - (kept if passes.experts else 0),
            "hidden states": sizes.hidden() + calls,
        }
    adding = {
        "weights": outer,
        "statistics": min(one, STEP_BYTES) * held_adding(shards, workers),
        "hidden states": sizes.hidden(),
    }
    return _largest([walking, adding])


def _reverse(sizes: Sizes, block: int) -> Parts:
    last = block == sizes.model.blocks - 1
    # Hidden states, and gradients behind and before, of one or two losses.
    rows = (1 + 2 * (1 + sizes.walk.fisher)) * sizes.walk.gradients * sizes.length
    return {
        "weights": sizes.weights(block) + (sizes.outer() if last else 0),
        "statistics": sizes.gradients(block) * held_walking(sizes.walk.shards, sizes.walkers),
        "hidden states": sizes.hidden() + rows * sizes.model.hidden_size * sizes.item,
        "activations": sizes.activations(block, sizes.length, keep_all=True)
        + sizes.squares(block)
        + (sizes.logits(sizes.length) if last else 0),
    }


def _measure(sizes: Sizes, units: list[Unit]) -> Parts:
    experiment = sizes.experiment
    experts = sizes.model.family.experts
    fused = units[0].kind == "bank" and experts is not None and experts.fused
    stats = sizes.statistics(units)
    offers, predicted = experiment.offers, experiment.sizes.predicted_bytes
    compressed = sum(max((predicted(u, c) for c in offers[u.name]), default=0) for u in units)
    own = {site for unit in units for site in unit.sites.values()}
    solving = [_solving(sizes, units, site) for site in stats if site in own]
    judging = [_judging(shape, sizes.item) for unit in units for shape in unit.shapes.values()]
    dense = sum(experiment.sizes.dense_bytes(unit) for unit in units)
    inputs = sum(size for site, size in stats.items() if site in own)
    offered = [chain for unit in units for chain in experiment.offers[unit.name]]
    # The dense model's statistics come beside; so do merged experts, and what they are merged of.
    both = experiment.recipe.propagate and any(map(chains.refits, offered))
    merged = dense * 2 if any(map(merge_of, offered)) else 0
    parts = {
        "weights": dense * (2 if fused else 1) + merged + sizes.outer(),
        "statistics": sum(stats.values()) * (2 if both else 1),
        "factors": sum(_factors(experiment, size) for site, size in stats.items() if site in own),
        "hidden states": sizes.hidden(),
        "working copies": compressed + max(*solving, *judging),
    }
    together = sizes.solved(units, dense, inputs)
    if not together:
        return parts
    share = together / units[0].shapes["gate"][0]
    elsewhere = sizes.crew.device == "cuda"  # the bank itself stays in the processor's memory
    return {
        "weights": int(share * dense) + sizes.outer() + (0 if elsewhere else parts["weights"]),
        "statistics": int(share * inputs),
        "hidden states": sizes.hidden() + (parts["weights"] if elsewhere else 0) + compressed,
        "working copies": int(3 * share * dense)
        + max(slices(*site_shape(units, site), sizes.crew.device)[1] for site in own),
    }


def site_shape(units: list[Unit], site: str) -> tuple[int, int, int]:
    """Experts (1 for linears), rows of all members together, and inputs of a site."""
    shapes = [u.shapes[m] for u in units for m, own in u.sites.items() if own == site]
    return math.prod(shapes[0][:-2]), sum(shape[-2] for shape in shapes), shapes[0][-1]


def slices(experts: int, rows: int, inputs: int, device: str) -> tuple[int, int]:
    """In how many slices GPTQ solves a site, and the working memory of one in bytes."""
    each = inputs * (20 * inputs + 12 * rows)
    width = min(experts, max(1, gptq.WORK_BYTES[device] // each))
    return -(-experts // width), width * each


def _solving(sizes: Sizes, units: list[Unit], site: str) -> int:
    """GPTQ's copies, the hungriest method's: one slice, and the codes of all of them twice."""
    experts, rows, inputs = site_shape(units, site)
    return slices(experts, rows, inputs, sizes.crew.device)[1] + 2 * experts * rows * inputs


def _factors(experiment: Experiment, statistics_bytes: int) -> int:
    """Factorised Hessians that are kept for the next candidate."""
    if statistics_bytes > gptq.KEEP_BYTES:
        return 0
    kinds = {
        (spec.method, getattr(options, "damp", None), getattr(options, "act_order", None))
        for chain in experiment.recipe.chains()
        for spec in compressing(chain)
        for options in [spec.parsed()]
        if "hessian" in link_module(spec.method).NEEDS
    }
    return len(kinds) * statistics_bytes


def _judging(shape: tuple[int, ...], item: int) -> int:
    """Copies while a member's error is computed: the dense weight again, and float32 slices."""
    *batch, rows, inputs = shape
    whole = math.prod(shape)
    matrix = 4 * rows * inputs
    step = max(1, ERROR_BYTES // (4 * inputs * max(inputs, rows)))
    return whole * (1 + item) + _ERROR_COPIES * matrix * (min(step, *batch) if batch else 1)


def _evaluate(sizes: Sizes, block: int) -> Parts:
    """A part of the held-out text in one process: all its hidden states, then its logits."""
    texts = sizes.experiment.recipe.evaluation
    rows = -(-texts.sequences // (EVALUATION_PARTS * texts.batch)) * texts.batch
    hidden = min(rows, texts.sequences) * texts.length * sizes.model.hidden_size * sizes.item
    tokens = min(texts.batch, texts.sequences) * texts.length
    running = {
        # Pieces are made dense beside the block, banks are joined from their members.
        "weights": 2 * sizes.weights(block),
        "hidden states": 2 * hidden,
        "activations": sizes.activations(block, tokens),
    }
    original = sizes.experiment.original  # whose head stands beside that of a sliced model
    head = original.hidden_size * original.vocab_size * sizes.item
    judging = {
        "weights": sizes.outer() + (head if sizes.experiment.cut is not None else 0),
        "hidden states": 3 * hidden,
        "activations": sizes.logits(texts.length),
    }
    return _largest([running, judging])


def _tune(sizes: Sizes) -> Parts:
    """The whole model in one process, and what it keeps of the plans before (see ``resident``)."""
    blocks = range(sizes.model.blocks)
    texts, units = sizes.experiment.recipe.calibration, sizes.experiment.units
    model = sum(sizes.weights(block) for block in blocks)
    offers = sum(unit.parameters * len(sizes.experiment.offers[unit.name]) for unit in units)
    tokens = min(texts.batch, texts.sequences) * texts.length
    banks = any(unit.kind == "bank" for unit in units)
    return {
        # A mixture of experts, and the piece that some of them are just taken from.
        "mixtures": 2 * max(map(sizes.weights, blocks)) if banks else 0,
        "weights": model + max(map(sizes.weights, blocks)) + sizes.outer(),
        "weights of other plans": min(WEIGHT_BYTES, offers * sizes.item),
        "hidden states": HIDDEN_BYTES,
        "activations": max(
            sizes.logits(texts.length), *(sizes.activations(block, tokens) for block in blocks)
        ),
    }


def _refine(sizes: Sizes) -> Parts:
    """As :func:`_tune`; where slopes are wanted, inputs of all blocks, and a block's gradients."""
    section, texts = sizes.experiment.recipe.refine, sizes.experiment.recipe.calibration
    largest = max(map(sizes.weights, range(sizes.model.blocks)))
    parts = _tune(sizes)
    if section is None or "relax" not in section.method:
        return parts
    rows = -(-min(section.sequences, texts.sequences) // BLOCKS)
    states = rows * texts.length * sizes.model.hidden_size * sizes.item
    # Of one batch, their sum, and the change of weights that they are multiplied with.
    return {**parts, "block inputs": sizes.model.blocks * states, "gradients": 3 * largest}


def predict_store(sizes: Sizes) -> dict[str, int]:
    """What the store will hold in the end, kind → bytes of tensors, and its unfinished work."""
    experiment, walk = sizes.experiment, sizes.walk
    blocks = range(sizes.model.blocks)
    stats = [sizes.sums(block) for block in blocks]
    gradients = [sizes.gradients(block) for block in blocks] if walk.gradients else [0]
    pairs = [(unit, chain) for unit in experiment.units for chain in experiment.offers[unit.name]]
    token = sizes.model.hidden_size * sizes.item
    states = walk.sequences * sizes.length * token
    waiting = min(sizes.model.blocks, sizes.crew.workers + 1) if sizes.ahead else 2
    kept = experiment.gradient_tokens() * token * (sizes.model.blocks + 1)
    sliced = {} if experiment.cut is None else {"sliced": sizes.model.checkpoint.total_bytes}
    return {
        **sliced,
        "pieces": sum(experiment.sizes.predicted_bytes(unit, chain) for unit, chain in pairs),
        "errors": sum(error_bytes(unit) for unit, _ in pairs),
        "stats": sum(stats),
        "gradients": sum(gradients),
        "scratch": waiting * states + kept + max(stats) * held_adding(walk.shards, sizes.summing),
    }


def error_bytes(unit: Unit) -> int:
    """Error and norm of every row in float32, tokens of every expert."""
    shapes = unit.shapes.values()
    return sum(8 * math.prod(shape[:-1]) + 8 * math.prod(shape[:-2]) for shape in shapes)
