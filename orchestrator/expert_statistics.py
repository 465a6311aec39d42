"""Sums about expert layers: what the router does, and what experts give.

Two kinds of sums are taken in the pass that also collects the inputs' statistics. Those over
routed tokens follow the router and the experts at their work. Those over a sample of tokens, spread
evenly over the calibration text, come from running every expert on every sampled token. Their
outputs are not kept: only the ``E × E`` cosines, the ``E × H`` sums and the layer's input remain.
Sampled tokens go through in slices whose outputs take at most :data:`SLICE_BYTES`, so that memory
is bounded whatever the number of experts: 256 experts of width 2,048 run on 128 tokens at a time.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.methods.base import Stats, Unit
from moesaic.methods.reduction import EXPERT_STATISTICS
from moesaic.orchestrator.statistics import add_gram, mirror

# Outputs of all experts that are in memory at a time.
SLICE_BYTES = 256 << 20
# Sums that need every expert's output at every sampled token.
_ALL = frozenset({"all_tokens", "all_sum", "all_sq", "cosine"})
# Sums of what experts give for the tokens that the router sends to them, a row for each.
ROUTED = frozenset({"norm", "sq", "gated_norm", "gated_sq", "sum", "gated_sum"})
_SYMMETRIC = ("logits_gram", "cosine")


def expert_site(bank: str) -> str:
    """Name under which an expert layer's sums are kept."""
    return f"{bank}:experts"


@dataclass(frozen=True)
class Tokens:
    """What is to be known of a shard's tokens.

    Attributes:
        sources: text source of each token, int64 ``[tokens]``.
        kinds: number of sources.
        sampled: places in the shard of the tokens that are sampled, rising.
        rows: their rows among all sampled tokens.
        total: number of sampled tokens in all shards.
    """

    sources: Tensor
    kinds: int
    sampled: Sequence[int]
    rows: Sequence[int]
    total: int


def sampled_tokens(low: int, high: int, tokens: int, wanted: int) -> tuple[list[int], list[int]]:
    """Which tokens of ``low … high - 1`` are among ``wanted`` spread evenly over ``tokens``.

    Returns:
        their places after ``low``, and their numbers among the sampled ones.
    """
    count = min(wanted, tokens)
    places = [(2 * number + 1) * tokens // (2 * count) for number in range(count)]
    found = [(place - low, number) for number, place in enumerate(places) if low <= place < high]
    return [place for place, _ in found], [number for _, number in found]


def sum_shapes(
    needs: Collection[str], experts: int, hidden: int, sources: int, sampled: int
) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Dtype and shape of every sum that is kept where ``needs`` are wanted."""
    shapes: dict[str, tuple[torch.dtype, list[int]]] = {
        "load": (torch.int64, [sources, experts]),
        "coactivation": (torch.int64, [experts, experts]),
        "logits_gram": (torch.float32, [experts, experts]),
        "cosine": (torch.float32, [experts, experts]),
        "sum": (torch.float32, [experts, hidden]),
        "gated_sum": (torch.float32, [experts, hidden]),
        "all_sum": (torch.float32, [experts, hidden]),
        "all_tokens": (torch.int64, []),
        "sample": (torch.float32, [sampled, hidden]),
    }
    wanted = {*needs, "load", "sample"} & EXPERT_STATISTICS.keys()
    return {name: shapes.get(name, (torch.float32, [experts])) for name in sorted(wanted)}


class ExpertStatistics:
    """Sums of one expert layer over a shard; it is told of every batch in order.

    Args:
        unit: the bank.
        needs: names of the sums that are wanted, of :data:`EXPERT_STATISTICS`.
        tokens: the shard's.
        device: of the block.
    """

    def __init__(
        self, unit: Unit, needs: Collection[str], tokens: Tokens, device: torch.device
    ) -> None:
        self.unit = unit
        self.tokens = tokens
        self.experts, _, hidden = unit.shapes["gate"]
        sizes = sum_shapes(needs, self.experts, hidden, tokens.kinds, tokens.total)
        self.sums = {
            name: torch.zeros(size, dtype=dtype, device=device)
            for name, (dtype, size) in sizes.items()
        }
        self._seen = 0  # tokens whose routing has been told
        self._given = 0  # tokens whose inputs have been told

    def routing(self, logits: Tensor, gates: Tensor, index: Tensor) -> None:
        """A batch's ``logits [T, E]``; ``gates`` and ``index`` ``[T, k]`` of what was chosen."""
        count = len(index)
        source = self.tokens.sources[self._seen : self._seen + count].to(index.device)
        self._seen += count
        sums, size = self.sums, self.experts
        flat = (source[:, None] * size + index).flatten()
        sums["load"] += torch.bincount(flat, minlength=sums["load"].numel()).view_as(sums["load"])
        if "gates" in sums:
            sums["gates"].index_add_(0, index.flatten(), gates.flatten().float())
        if "coactivation" in sums:
            hit = torch.zeros(count, size, device=index.device).scatter_(1, index, 1.0)
            sums["coactivation"] += (hit.T @ hit).round().long()
        wide = logits.float()
        if "logits" in sums:
            sums["logits"] += wide.sum(0)
        if "logits_gram" in sums:
            add_gram(sums["logits_gram"], wide)

    def routed_output(self, expert: int, y: Tensor, gates: Tensor) -> None:
        """``y [t, H]``, what an expert gave for its tokens, and their gates ``[t, 1]``."""
        sums = self.sums
        wide, weight = y.float(), gates.float()
        if sums.keys() & {"norm", "sq", "gated_norm", "gated_sq"}:
            norms = wide.norm(dim=-1)
            gated = norms * weight[:, 0]
            figures = {
                "norm": norms,
                "sq": norms.square(),
                "gated_norm": gated,
                "gated_sq": gated.square(),
            }
            for name in figures.keys() & sums.keys():
                sums[name][expert] += figures[name].sum()
        if "sum" in sums:
            sums["sum"][expert] += wide.sum(0)
        if "gated_sum" in sums:
            sums["gated_sum"][expert] += (weight * wide).sum(0)

    def inputs(self, hidden: Tensor, output: Callable[[int, Tensor], Tensor]) -> None:
        """A batch's ``hidden [T, H]``; sampled tokens go through every expert.

        Args:
            output: ``(expert, x [t, H]) -> [t, H]``.
        """
        low, high = self._given, self._given + len(hidden)
        self._given = high
        pairs = zip(self.tokens.sampled, self.tokens.rows, strict=True)
        here = [(place - low, row) for place, row in pairs if low <= place < high]
        if not here:
            return
        x = hidden[[place for place, _ in here]]
        self.sums["sample"][[row for _, row in here]] = x.float()
        if not self.sums.keys() & _ALL:
            return
        step = max(1, SLICE_BYTES // (4 * self.experts * x.shape[-1]))
        for part in x.split(step):
            self._compare(part, output)

    def _compare(self, x: Tensor, output: Callable[[int, Tensor], Tensor]) -> None:
        sums = self.sums
        everything = torch.empty(self.experts, *x.shape, device=x.device)  # [E, t, H]
        for expert in range(self.experts):
            y = everything[expert]
            y.copy_(output(expert, x))
            if "all_sum" in sums:
                sums["all_sum"][expert] += y.sum(0)
            if "all_sq" in sums:
                sums["all_sq"][expert] += y.square().sum()
            if "cosine" in sums:
                F.normalize(y, dim=-1, out=y)
        if "all_tokens" in sums:
            sums["all_tokens"] += len(x)
        if "cosine" in sums:
            add_gram(sums["cosine"], everything.flatten(1).T)

    def finish(self) -> Stats:
        """The sums, after the last batch."""
        for name in _SYMMETRIC:
            if name in self.sums:
                mirror(self.sums[name])
        return Stats(self.sums)
