"""Sums over tokens: how they are taken, added along a tree, written and read."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moesaic.methods.base import Stats, Unit
from moesaic.orchestrator.damage import damage_removed
from moesaic.orchestrator.shared import fetched
from moesaic.orchestrator.tensorfile import DTYPE_NAMES, Canvas

# A range of shards, or a node of the summation tree: first and one past the last.
Node = tuple[int, int]
SiteStats = dict[str, Stats]
SEPARATOR = "|"


def ranges(shards: int, workers: int) -> list[Node]:
    """Contiguous ranges of shards, one per worker, none empty."""
    count = min(shards, workers)
    return [(w * shards // count, (w + 1) * shards // count) for w in range(count)]


def covered(node: Node, span: Node) -> list[Node]:
    """The largest nodes of the summation tree below ``node`` that lie inside ``span``."""
    low, high = node
    if span[0] <= low and high <= span[1]:
        return [node]
    if high <= span[0] or span[1] <= low:
        return []
    middle = (low + high) // 2
    return covered((low, middle), span) + covered((middle, high), span)


def tree_sum(node: Node, leaf: Callable[[Node], SiteStats | None]) -> SiteStats:
    """Sum over ``node`` along the tree; ``leaf`` gives the sum of a node if it has it."""
    found = leaf(node)
    if found is not None:
        return found
    low, high = node
    middle = (low + high) // 2
    total = tree_sum((low, middle), leaf)
    other = tree_sum((middle, high), leaf)
    for name, stats in total.items():
        for statistic, value in stats.sums.items():
            value += other[name][statistic]
    return total


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


def held_by_walker(shards: int, span: Node) -> int:
    """Sums of a block that the worker of some shards holds: a finished node stays until the next
    one is done."""
    nodes = covered((0, shards), span)
    return max(held_sums(node) + (place > 0) for place, node in enumerate(nodes))


# Name in a file → dtype and shape.
SumShapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def sum_layout(stats: Mapping[str, Stats]) -> SumShapes:
    """Dtype and shape of every ``name|statistic``."""
    return {
        f"{name}{SEPARATOR}{statistic}": (value.dtype, tuple(value.shape))
        for name, entry in stats.items()
        for statistic, value in entry.sums.items()
    }


class SumsFile:
    """A file of ``name|statistic`` tensors that is filled in any order, some rows at a time.

    The same sums give the same bytes, whatever the order; a context manager.
    """

    def __init__(self, path: Path, layout: SumShapes) -> None:
        shapes = {name: (DTYPE_NAMES[dtype], shape) for name, (dtype, shape) in layout.items()}
        self._canvas = Canvas(path, shapes)

    def __enter__(self) -> "SumsFile":
        self._canvas.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._canvas.__exit__(*failure)

    def put(self, name: str, value: Tensor, first: int = 0) -> None:
        """A sum, or its rows from ``first`` on."""
        flat = value.detach().cpu().contiguous().reshape(-1)
        self._canvas.put(name, flat.view(torch.uint8).numpy().data, first)

    def put_all(self, stats: Mapping[str, Stats], first: int = 0) -> None:
        """Sums of several sites, or their rows from ``first`` on."""
        for name, entry in stats.items():
            for statistic, value in entry.sums.items():
                self.put(f"{name}{SEPARATOR}{statistic}", value, first)


def save_stats(path: Path, stats: Mapping[str, Stats]) -> None:
    """Writes ``name|statistic`` tensors."""
    with SumsFile(path, sum_layout(stats)) as file:
        file.put_all(stats)


def load_stats(path: Path, only: Callable[[str], bool] = lambda name: True) -> SiteStats:
    """Reads what :func:`save_stats` wrote, for the names that ``only`` accepts."""
    sums: dict[str, dict[str, Tensor]] = {}
    with damage_removed(path), safe_open(fetched(path), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            name, _, statistic = key.rpartition(SEPARATOR)
            if only(name):
                sums.setdefault(name, {})[statistic] = file.get_tensor(key)
    return {name: Stats(entry) for name, entry in sums.items()}


# Rows of a Hessian that are added, or copied, at a time. Only what lies in them up to the diagonal
# is computed: five eighths of the work for four such slices, in the end half.
_GRAM_ROWS = 1024


def add_gram(total: Tensor, x: Tensor) -> None:
    """Adds xᵀx to the lower half of ``total``; :func:`mirror` fills in the upper one.

    Args:
        total: ``[in, in]``, float32 or float64, contiguous.
        x: ``[tokens, in]`` of the same dtype, contiguous or the transpose of what is.
    """
    if total.device.type == "cpu":
        _add_gram_on_cpu(total, x)
        return
    for low, high in _row_spans(total):
        total[low:high, :high].addmm_(x[:, low:high].T, x[:, :high])


def _add_gram_on_cpu(total: Tensor, x: Tensor) -> None:
    """By BLAS, which has a product for symmetric results: a fifth faster than slices on one core.

    To its column-major eyes ``total`` is transposed, and its lower half the upper one.
    """
    if not len(x):
        return
    from scipy.linalg import get_blas_funcs  # takes long, and who only reads sums does without

    transposed = not x.is_contiguous()
    a = x.numpy() if transposed else x.numpy().T
    c = total.numpy().T
    get_blas_funcs("syrk", (c,))(1.0, a, 1.0, c, transposed, lower=False, overwrite_c=True)


def mirror(total: Tensor) -> None:
    """Copies the lower half of ``total`` ``[*batch, in, in]`` to the upper one."""
    for low, high in _row_spans(total):
        total[..., :low, low:high] = total[..., low:high, :low].mT
        block = total[..., low:high, low:high]
        block.copy_(block.tril() + block.tril(-1).mT)


def _row_spans(total: Tensor) -> Iterator[Node]:
    inputs = total.shape[-1]
    for low in range(0, inputs, _GRAM_ROWS):
        yield low, min(low + _GRAM_ROWS, inputs)


# Name under which a block's own sums stand among those of its sites.
BLOCK = "block"
# Product of lengths below which hidden states count as turned entirely.
_LEAST_LENGTH = 1e-16


class InfluenceObserver:
    """Sums how far a block turns its hidden states: 1 − cos between before and after, per token.

    ``tokens``  int64 [].
    ``turn``    float64 [].
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = {
            "tokens": torch.zeros((), dtype=torch.int64, device=device),
            "turn": torch.zeros((), dtype=torch.float64, device=device),
        }

    def add(self, before: Tensor, after: Tensor) -> None:
        """Takes hidden states ``[*, hidden]`` of the same tokens."""
        # Twenty times as fast as torch's cosine_similarity, in whose place this stands.
        x, y = before.float(), after.float()
        lengths = x.norm(dim=-1) * y.norm(dim=-1)  # [*]
        cosine = torch.linalg.vecdot(x, y) / lengths.clamp_min(_LEAST_LENGTH)
        self.sums["tokens"] += cosine.numel()
        self.sums["turn"] += (1 - cosine.double()).sum()


class StatisticsObserver:
    """Sums what is wanted of every site's inputs; :meth:`finish` hands them out."""

    def __init__(self, units: list[Unit], needs: tuple[str, ...], device: torch.device) -> None:
        self.stats: SiteStats = {}
        # Where the tokens really routed to experts are counted, whoever learns from them.
        self.routed: dict[str, Tensor] = {}
        for unit in units:
            for member, site in unit.sites.items():
                *batch, _, width = unit.shapes[member]
                shapes = {
                    "tokens": (torch.int64, batch),
                    "hessian": (torch.float32, [*batch, width, width]),
                    "abs": (torch.float32, [*batch, width]),
                }
                sums = {
                    need: torch.zeros(shapes[need][1], dtype=shapes[need][0], device=device)
                    for need in {*needs, "tokens"} & shapes.keys()
                }
                self.stats.setdefault(site, Stats(sums))
            if unit.kind == "bank":
                experts = self.stats[unit.sites["gate"]].sums
                experts["routed"] = torch.zeros_like(experts["tokens"])
                self.routed[unit.name] = experts["routed"]

    def inputs(self, site: str, x: Tensor, expert: int | None) -> None:
        sums = self.stats[site].sums
        x = x.detach().reshape(-1, x.shape[-1])

        def target(name: str) -> Tensor:
            return sums[name] if expert is None else sums[name][expert]

        target("tokens").add_(x.shape[0])
        wide = x.float()
        if "hessian" in sums:
            add_gram(target("hessian"), wide)
        if "abs" in sums:
            target("abs").add_(wide.abs().sum(0))

    def outputs(self, unit: str, member: str, y: Tensor, expert: int | None) -> None:
        if expert is not None and member == "down":
            self.routed[unit][expert] += y.shape[0]

    def finish(self) -> SiteStats:
        """The sums, after the last input."""
        for stats in self.stats.values():
            if "hessian" in stats:
                mirror(stats["hessian"])
        return self.stats


class GradientObserver:
    """Sums squared gradients of every member's outputs, as the reverse pass brings them.

    Args:
        fisher: also sum squared gradients of weights over outputs. Each sequence is then taken
            back twice, and ``following`` says for which labels: False while they are drawn from
            the model, True while they are the next tokens of the text.
        pooled: what gradients come from is of a whole sequence (an embedding), and the tokens of
            one act together: see :func:`pooled_squares`.
    """

    def __init__(
        self,
        units: list[Unit],
        device: torch.device,
        fisher: bool = False,
        pooled: bool = False,
    ) -> None:
        self.stats: SiteStats = {}
        self.fisher = fisher
        self.pooled = pooled
        self.following = False
        self._sites = {(unit.name, m): site for unit in units for m, site in unit.sites.items()}
        self._inputs: dict[tuple[str, int | None], Tensor] = {}
        for unit in units:
            shapes = {member: (*batch, out) for member, (*batch, out, _) in unit.shapes.items()}
            if unit.kind == "bank":
                shapes["output"] = (unit.shapes["down"][-2],)
            for member, (*batch, out) in shapes.items():
                self.stats[f"{unit.name}{SEPARATOR}{member}"] = Stats(
                    {
                        "grad_tokens": torch.zeros(batch, dtype=torch.int64, device=device),
                        "grad_sq": torch.zeros([*batch, out], device=device),
                    }
                )
            for member, (*batch, _, width) in unit.shapes.items() if fisher else ():
                sums = self.stats[f"{unit.name}{SEPARATOR}{member}"].sums
                sums["fisher"] = torch.zeros([*batch, width], device=device)

    def inputs(self, site: str, x: Tensor, expert: int | None) -> None:
        if self.fisher or self.pooled:
            self._inputs[site, expert] = x.detach()

    def outputs(self, unit: str, member: str, y: Tensor, expert: int | None) -> None:
        sums = self.stats[f"{unit}{SEPARATOR}{member}"].sums
        wanted = "fisher" in sums or self.pooled
        x = self._inputs[self._sites[unit, member], expert] if wanted else None
        index = ... if expert is None else expert

        def add(gradient: Tensor) -> None:
            rows = gradient.detach().reshape(-1, gradient.shape[-1])
            if not self.following:
                sums["grad_tokens"][index] += rows.shape[0]
                if self.pooled and x is not None:
                    sums["grad_sq"][index] += pooled_squares(rows, x)
                else:
                    sums["grad_sq"][index] += rows.float().square().sum(0)
            elif x is not None:
                sums["fisher"][index] += squared_gradients(rows.float(), x.float())

        y.register_hook(add)


def pooled_squares(g: Tensor, x: Tensor) -> Tensor:
    """What errors of each output cost a sequence whose tokens act together.

    Errors Δy_t = Δw·x_t of an output cost (Σ_t g_t Δy_t)². Where tokens are taken one by one that
    is Σ_t g_t² for each unit of the mean of Δy²; but the errors of all tokens come from one Δw. For
    Δw of any direction alike it is ‖Σ_t g_t x_t‖² for each unit of the mean of ‖x‖².

    Args:
        g: ``[tokens, out]``, gradients of a layer's outputs for one sequence.
        x: ``[tokens, in]``, its inputs.

    Returns:
        ``[out]``.
    """
    g, x = g.float(), x.float()
    scale = x.square().sum() / len(x)
    return (g.T @ x).square_().sum(1) / scale.clamp_min(torch.finfo(x.dtype).tiny)


def squared_gradients(g: Tensor, x: Tensor) -> Tensor:
    """Squares of a weight's gradient gᵀx, summed over outputs; the cheaper of two ways.

    With fewer tokens than weights ask for (some experts see a handful), the tokens' products with
    one another do: Σ_o (Σ_t g_to x_ti)² = x_iᵀ (g gᵀ) x_i.

    Args:
        g: ``[tokens, out]``, gradients of a layer's outputs for one sequence.
        x: ``[tokens, in]``, its inputs.

    Returns:
        ``[in]``.
    """
    tokens, (out, width) = len(x), (g.shape[1], x.shape[1])
    if tokens * (out + width) < out * width:
        return ((g @ g.T @ x) * x).sum(0).clamp_min(0)
    return (g.T @ x).square_().sum(0)
