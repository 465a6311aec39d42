"""What a run will hold in memory and write to the store, told from shapes alone.

Statistics are counted by making the observers of a run on the meta device, so that what is
predicted is what will be allocated. Weights, hidden states and partial sums follow from the code of
:mod:`calibrate` and :mod:`measure`; activations are bounded from above by the widths of a block's
layers. For what the allocator keeps of freed memory, a share is added.
"""

import math
from collections.abc import Iterable

import torch

from moesaic.methods import gptq
from moesaic.methods.base import Unit, link_module, reducing
from moesaic.orchestrator.compression import ERROR_BYTES
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.expert_statistics import SLICE_BYTES, expert_site, sum_shapes
from moesaic.orchestrator.gradients import LOGIT_ROWS
from moesaic.orchestrator.machine import Crew
from moesaic.orchestrator.placing import WORKER_ENVIRONMENT
from moesaic.orchestrator.refine import BLOCKS
from moesaic.orchestrator.resident import HIDDEN_BYTES, WEIGHT_BYTES
from moesaic.orchestrator.stages import EVALUATION_PARTS
from moesaic.orchestrator.statistics import (
    GradientObserver,
    InfluenceObserver,
    Node,
    StatisticsObserver,
    covered,
    ranges,
)
from moesaic.search.features import SWAPS, rule_of

# Resident size of a worker that has Ray, torch and transformers loaded and has run a block
# (measured on Linux, CPU builds).
PROCESS_BYTES = 750_000_000
# Arrays of the size of a slice that are alive at once: logits with what is made of them, and
# weight, difference, product and square of an error.
_LOGIT_COPIES, _ERROR_COPIES = 5, 4
# Share that glibc keeps beyond what is in use, measured with blocks of 60 MB and sums of 90 MB.
_KEPT_BY_ALLOCATOR = 0.2
# What oneDNN keeps of every shape of a product in 16 bits that it has compiled (measured with
# bfloat16; float32 takes none), and how far the tokens of experts spread, in means.
_COMPILED_BYTES, _SPREAD = 700_000, 1.5
_META = torch.device("meta")
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


def held_sums(node: Node, leaves: frozenset[Node] = frozenset()) -> int:
    """Sums of statistics that ``tree_sum`` holds at once over ``node``.

    Args:
        leaves: nodes whose sum is had without descending, besides single shards.
    """
    low, high = node
    if node in leaves or high - low == 1:
        return 1
    middle = (low + high) // 2
    return max(held_sums((low, middle), leaves), 1 + held_sums((middle, high), leaves))


def held_walking(shards: int, workers: int) -> int:
    """Sums that the busiest worker holds: a finished node stays until the next one is done."""
    return max(
        held_sums(node) + (place > 0)
        for span in ranges(shards, workers)
        for place, node in enumerate(covered((0, shards), span))
    )


def held_adding(shards: int, workers: int) -> int:
    """Sums in the worker that adds up those of all: the file being copied is mapped as well."""
    leaves = [node for span in ranges(shards, workers) for node in covered((0, shards), span)]
    return held_sums((0, shards), frozenset(leaves)) + 1


class Sizes:
    """Bytes of an experiment's parts."""

    def __init__(self, experiment: Experiment, crew: Crew) -> None:
        self.experiment = experiment
        self.crew = crew
        self.model = experiment.model
        self.walk = experiment.walk
        self.length: int = experiment.recipe.calibration.length
        self.item: int = self.model.dtype.itemsize
        self.walkers = experiment.recipe.compute.walking(crew.workers)

    def block_units(self, block: int) -> list[Unit]:
        """All units of a block, those that the recipe keeps included: calibration sees them all."""
        return self.model.layouts[block].units

    def statistics(self, units: list[Unit]) -> dict[str, int]:
        """Site → bytes of its statistics."""
        stats = StatisticsObserver(units, self.walk.needs, _META).stats
        found = {site: entry.nbytes for site, entry in stats.items()}
        kinds = 1 + max(self.walk.by_source, default=-1)
        for site, entry in stats.items() if kinds else ():
            found[site] += kinds * (entry["hessian"].nbytes if "hessian" in entry else 0)
        for unit in units if self.walk.sources else ():
            if unit.kind == "bank":
                experts, _, hidden = unit.shapes["gate"]
                sources = 1 + max(self.walk.sources)
                sums = sum_shapes(self.walk.needs, experts, hidden, sources, self.sampled())
                size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in sums.values())
                found[expert_site(unit.name)] = size
        return found

    def sums(self, block: int) -> int:
        """Statistics of all sites of a block, and its own."""
        own = InfluenceObserver(_META).sums.values()
        sites = self.statistics(self.block_units(block)).values()
        return sum(sites) + sum(value.nbytes for value in own)

    def sampled(self) -> int:
        """Tokens that every expert is run on; 0 where no recipe reduces experts."""
        return min(self.walk.sampled, self.walk.sequences * self.length)

    def outputs(self, block: int) -> int:
        """Outputs of all experts that are compared at a time."""
        if not self.walk.sources:
            return 0
        banks = [unit for unit in self.block_units(block) if unit.kind == "bank"]
        return sum(
            min(SLICE_BYTES, 4 * u.shapes["gate"][0] * u.shapes["gate"][2] * self.sampled())
            for u in banks
        )

    def gradients(self, block: int) -> int:
        stats = GradientObserver(self.block_units(block), _META, self.walk.fisher).stats
        return sum(entry.nbytes for entry in stats.values())

    def squares(self, block: int) -> int:
        """What squared gradients of weights take: a sequence's inputs, and the largest product."""
        kept, products, tokens = 0, [0], self.length
        wanted = self.walk.fisher or self.walk.pooling
        for unit in self.block_units(block) if wanted else ():
            reach = self._per_token(unit) if unit.kind == "bank" else 1
            kept += sum({s: unit.shapes[m][-1] for m, s in unit.sites.items()}.values()) * reach
            for *_, out, width in unit.shapes.values():
                least = min(tokens * (tokens + width), 2 * out * width)
                products.append(4 * (tokens * (out + width) + least))
        return kept * tokens * self.item + max(products)

    def weights(self, block: int) -> int:
        """Peak while a block is loaded: all of it, and one tensor twice where the dtype changes."""
        layout, checkpoint = self.model.layouts[block], self.model.checkpoint
        names = {*layout.kept.values()}
        names |= {n for unit in layout.tensors.values() for group in unit.values() for n in group}
        stored = [checkpoint.nbytes(name) for name in names]
        computed = [math.prod(checkpoint.shape(name)) * self.item for name in names]
        if stored == computed:
            return sum(stored)
        return max(sum(stored), sum(computed)) + max(computed)

    def outer(self) -> int:
        """Embedding or head, the larger; they stay until the next block is loaded."""
        return self.model.hidden_size * self.model.vocab_size * self.item

    def batch_tokens(self) -> int:
        """Tokens of the largest batch."""
        rows = max(high - low for low, high in map(self.walk.shard_rows, range(self.walk.shards)))
        return min(rows, self.walk.batch) * self.length

    def hidden(self) -> int:
        """Hidden states of the shards that one worker keeps, and two copies of one shard."""
        spans = ranges(self.walk.shards, self.walkers)
        rows = [self.walk.shard_rows(shard) for shard in range(self.walk.shards)]
        largest = max(high - low for low, high in rows)
        kept = max(sum(rows[s][1] - rows[s][0] for s in range(*span)) for span in spans)
        return (kept + 2 * largest) * self.length * self.model.hidden_size * self.item

    def activations(self, block: int, tokens: int, keep_all: bool = False) -> int:
        """Bytes between the layers of a block for ``tokens`` tokens, an upper bound.

        Args:
            keep_all: everything lives until the backward pass; otherwise the largest part does.
        """
        hidden, item = self.model.hidden_size, self.item
        parts = dict.fromkeys(("attention", "mlp", "shared_experts", "experts"), 0)
        widest = 0
        for unit in self.block_units(block):
            widest = max(widest, *(shape[-1] for shape in unit.shapes.values()))
            if unit.kind == "linear":
                # Once as it comes out, once rotated, repeated or activated.
                parts[unit.part] += 2 * unit.shapes["weight"][0] * item
            else:
                width = 3 * unit.shapes["gate"][1] + hidden
                parts["experts"] = width * item * (self._per_token(unit) if keep_all else 1)
        inner = 2 * sum(parts.values()) if keep_all else max(parts.values())
        # Residual, norm and their float32 copies; the float32 copy of a site's inputs.
        each = 16 * hidden + inner + 4 * widest
        return tokens * each + self._attention_scores(tokens)

    def _per_token(self, bank: Unit) -> int:
        return experts_per_token(self.model.config) or bank.shapes["gate"][0]

    def _attention_scores(self, tokens: int) -> int:
        """Attention matrices, where the model's attention is not computed in tiles."""
        if getattr(self.model.config, "_attn_implementation", "sdpa") != "eager":
            return 0
        return 2 * 4 * int(self.model.config.num_attention_heads) * tokens * self.length

    def logits(self, length: int) -> int:
        """Logits of some rows in float32, with what is made of them."""
        if self.model.family.is_encoder:
            return 0
        return min(LOGIT_ROWS, length) * self.model.vocab_size * 4 * _LOGIT_COPIES


def experts_per_token(config: object) -> int | None:
    """How many experts a token goes to, whatever the family calls it."""
    for name in ("num_experts_per_tok", "num_experts_per_token", "top_k_experts"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


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
        parts["allocator"] = int(_KEPT_BY_ALLOCATOR * sum(parts.values()))
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
    capacity = int(WORKER_ENVIRONMENT["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
    return _COMPILED_BYTES * min(count, capacity)


def _largest(candidates: Iterable[Parts]) -> Parts:
    return max(candidates, key=lambda parts: sum(parts.values()))


def _calibrate(sizes: Sizes, block: int) -> Parts:
    one = sizes.sums(block)
    shards, workers = sizes.walk.shards, sizes.walkers
    outer = sizes.outer() if block == 0 else 0  # the embedding goes when block 1 is loaded
    walking = {
        "weights": sizes.weights(block) + outer,
        "statistics": one * held_walking(shards, workers),
        "hidden states": sizes.hidden(),
        "activations": sizes.activations(block, sizes.batch_tokens()) + sizes.outputs(block),
    }
    adding = {
        "weights": outer,
        "statistics": one * held_adding(shards, workers),
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
    compressed = sum(
        max((experiment.predicted_bytes(unit, c) for c in experiment.offers[unit.name]), default=0)
        for unit in units
    )
    own = {site for unit in units for site in unit.sites.values()}
    solving = [_solving(sizes, units, site) for site in stats if site in own]
    judging = [_judging(shape, sizes.item) for unit in units for shape in unit.shapes.values()]
    return {
        "weights": sum(experiment.dense_bytes(unit) for unit in units) * (2 if fused else 1)
        + sizes.outer(),
        "statistics": sum(stats.values()),
        "factors": sum(_factors(experiment, size) for site, size in stats.items() if site in own),
        "hidden states": sizes.hidden(),
        "working copies": compressed + max(*solving, *judging),
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
        for spec in reducing(chain)[1]
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
    return {
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
    # A mixture of experts, and the piece that some of them are just taken from.
    parts = {**_tune(sizes), "mixtures": 2 * largest}
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
    kept = experiment.gradient_tokens() * token * (sizes.model.blocks + 1)
    sliced = {} if experiment.cut is None else {"sliced": sizes.model.checkpoint.total_bytes}
    return {
        **sliced,
        "pieces": sum(experiment.predicted_bytes(unit, chain) for unit, chain in pairs),
        "errors": sum(error_bytes(unit) for unit, _ in pairs),
        "stats": sum(stats),
        "gradients": sum(gradients),
        "scratch": 2 * states + kept + max(stats) * held_adding(walk.shards, sizes.walkers),
    }


def error_bytes(unit: Unit) -> int:
    """Error and norm of every row in float32, tokens of every expert."""
    shapes = unit.shapes.values()
    return sum(8 * math.prod(shape[:-1]) + 8 * math.prod(shape[:-2]) for shape in shapes)
