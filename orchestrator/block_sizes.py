"""Bytes of one block's parts: its weights, its statistics, what runs between its layers.

Statistics are counted by making the observers of a run on the meta device, so that what is
predicted is what will be allocated. Weights follow from the layout of the files; activations are
bounded from above by the widths of a block's layers.
"""

import math
from collections.abc import Collection, Iterable

import torch

from moesaic.methods.base import Stats, Unit
from moesaic.orchestrator.expert_statistics import SLICE_BYTES, expert_site, sum_shapes
from moesaic.orchestrator.room import COMPILED_BYTES, COMPILED_SHAPES
from moesaic.orchestrator.statistics import (
    BLOCK,
    SEPARATOR,
    GradientObserver,
    InfluenceObserver,
    StatisticsObserver,
    SumShapes,
    sum_layout,
)
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.walk import Walk

_META = torch.device("meta")


class BlockSizes:
    """Bytes of the parts of a model's blocks under a walk.

    Args:
        length: tokens of a sequence.
    """

    def __init__(self, model: StreamedModel, walk: Walk, length: int) -> None:
        self.model = model
        self.walk = walk
        self.length = length
        self.item: int = model.dtype.itemsize

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
                sums = self.layer_sums(unit).values()
                size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in sums)
                found[expert_site(unit.name)] = size
        return found

    def layer_sums(self, bank: Unit) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape of every sum about an expert layer."""
        experts, _, hidden = bank.shapes["gate"]
        sources = 1 + max(self.walk.sources)
        return sum_shapes(self.walk.needs, experts, hidden, sources, self.sampled())

    def layout(self, block: int) -> SumShapes:
        """Dtype and shape of everything in a file of the block's sums, by name."""
        units = self.block_units(block)
        sites = StatisticsObserver(units, self.walk.needs, _META).stats
        sites[BLOCK] = Stats(InfluenceObserver(_META).sums)
        found = sum_layout(sites)
        for unit in units if self.walk.sources else ():
            if unit.kind == "bank":
                for name, (dtype, shape) in self.layer_sums(unit).items():
                    found[f"{expert_site(unit.name)}{SEPARATOR}{name}"] = dtype, tuple(shape)
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
            reach = self.per_token(unit) if unit.kind == "bank" else 1
            kept += sum({s: unit.shapes[m][-1] for m, s in unit.sites.items()}.values()) * reach
            for *_, out, width in unit.shapes.values():
                least = min(tokens * (tokens + width), 2 * out * width)
                products.append(4 * (tokens * (out + width) + least))
        return kept * tokens * self.item + max(products)

    def weights(self, block: int) -> int:
        """Peak while a block is loaded: all of it, and one tensor twice where the dtype changes."""
        layout = self.model.layouts[block]
        return self._loaded([*layout.kept.values(), *self._names(layout.units)])

    def weights_but_bank(self, block: int) -> int:
        """The same without the experts."""
        layout = self.model.layouts[block]
        linears = [unit for unit in layout.units if unit.kind == "linear"]
        return self._loaded([*layout.kept.values(), *self._names(linears)])

    def expert_weights(self, bank: Unit) -> int:
        """Peak while some experts of a bank are loaded, for each of them."""
        stored = sum(self.model.checkpoint.nbytes(name) for name in self._names([bank]))
        computed = bank.parameters * self.item
        return -(-(stored if stored == computed else stored + computed) // bank.shapes["gate"][0])

    def _names(self, units: Iterable[Unit]) -> set[str]:
        """Names on disk of the units' tensors."""
        found = (self.model.unit_tensors(unit).values() for unit in units)
        return {name for groups in found for names in groups for name in names}

    def _loaded(self, names: Collection[str]) -> int:
        checkpoint = self.model.checkpoint
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

    def hidden_of(self, span: tuple[int, int]) -> int:
        """Hidden states of some shards, and two copies of the largest of all shards."""
        rows = [high - low for low, high in map(self.walk.shard_rows, range(self.walk.shards))]
        kept = sum(rows[shard] for shard in range(*span))
        return (kept + 2 * max(rows)) * self.length * self.model.hidden_size * self.item

    def beside(self, device: str, span: tuple[int, int]) -> tuple[int, int]:
        """Bytes on a device besides a block that some shards walk: what is there anyhow, and what
        is kept from pass to pass where it is walked in parts."""
        if device == "cuda":
            return 0, 0
        compiled = self.item == 2 and any(u.kind == "bank" for u in self.model.units())
        most = COMPILED_SHAPES * COMPILED_BYTES if compiled else 0
        return self.hidden_of(span) + most, self.calls_of(span)

    def calls_of(self, span: tuple[int, int]) -> int:
        """What the experts are called with, and what they give, for some shards."""
        rows = [high - low for low, high in map(self.walk.shard_rows, range(*span))]
        return sum(rows) * self.length * (2 * self.model.hidden_size * self.item + 256)

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
                parts["experts"] = width * item * (self.per_token(unit) if keep_all else 1)
        inner = 2 * sum(parts.values()) if keep_all else max(parts.values())
        # Residual, norm and their float32 copies; the float32 copy of a site's inputs.
        each = 16 * hidden + inner + 4 * widest
        return tokens * each + self._attention_scores(tokens)

    def per_token(self, bank: Unit) -> int:
        """Experts that a token goes to."""
        return experts_per_token(self.model.config) or bank.shapes["gate"][0]

    def _attention_scores(self, tokens: int) -> int:
        """Attention matrices, where the model's attention is not computed in tiles."""
        if getattr(self.model.config, "_attn_implementation", "sdpa") != "eager":
            return 0
        return 2 * 4 * int(self.model.config.num_attention_heads) * tokens * self.length


def experts_per_token(config: object) -> int | None:
    """How many experts a token goes to, whatever the family calls it."""
    for name in ("num_experts_per_tok", "num_experts_per_token", "top_k_experts"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None
