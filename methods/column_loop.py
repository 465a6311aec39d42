"""The column loop of GPTQ: round one input's weights, let the later inputs make up for the error.

Everything is held as ``[in, E, 1, rows]``: one input of all experts and of all members that read it
is one contiguous row, so that the loop runs once per site, whatever the number of experts.

Column j is rounded from w_j + c_j, c_j = sum_{k<j} e_k M_kj (:mod:`moesaic.methods.hessian`). The
sums are gathered on levels, from large to small: at the start of each block, of each quantization
group in it and of each leaf in that, one matrix product adds what the earlier inputs of the parent
contribute; in a leaf, columns go one by one. That leaves five small operations per column, which is
most of the time at usual widths.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.methods.grid import Grid, GridOptions, choose_grid, make_grid
from moesaic.methods.hessian import Factor

# Columns per leaf: their mutual feedback is added column by column.
LEAF = 16

# (weights [g, E, rows] of the group that starts at an input, that input) -> its grid [E, rows].
GridChoice = Callable[[Tensor, int], Grid]


@dataclass(frozen=True)
class Rounding:
    """How :func:`round_columns` chooses grids and blocks.

    Attributes:
        grid: bits, group size, symmetry.
        dtype: dtype of the dense weight, for the scales.
        clip: search each group's range for the least error.
        weighted: weight that error by the mean square of the inputs.
        static: choose all grids from the original weights, before anything is rounded.
        block: columns between two updates of all the rest.
    """

    grid: GridOptions
    dtype: torch.dtype
    clip: bool
    weighted: bool
    static: bool
    block: int


@dataclass(frozen=True)
class Codes:
    """Rounded weights: ``codes`` int8 ``[E, rows, in]``; scale, zero ``[E, rows, groups]``."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def round_columns(weight: Tensor, factor: Factor, rounding: Rounding) -> Codes:
    """Rounds ``weight`` ``[in, E, rows]`` (float32, finite) with the feedback of ``factor``.

    Raises:
        ValueError: the factor has an order of its own and ``rounding`` is not static: the groups
            of the file would not be contiguous.
    """
    inputs = weight.shape[0]
    size = rounding.grid.group_inputs(inputs)
    importance = factor.weight.t()[:, :, None] if rounding.weighted else None  # [in, E, 1]

    def choose(columns: Tensor, start: int) -> Grid:
        part = None if importance is None else importance[start : start + size]
        return choose_grid(columns, rounding.dtype, rounding.grid, rounding.clip, part)

    if not rounding.static:
        if factor.order is not None:
            raise ValueError("an order of inputs other than the file's needs static groups")
        loop = _Loop(weight, factor.feedback, _levels(inputs, size, rounding.block), size, choose)
        loop.run()
        return _codes(loop.steps, loop.grids, size)

    grids = [choose(weight[at : at + size], at) for at in range(0, inputs, size)]
    ordered = weight if factor.order is None else _reorder(weight, factor.order)
    loop = _Loop(ordered, factor.feedback, _levels(inputs, LEAF, rounding.block))
    loop.columns = _column_grids(grids, size, factor.order, rounding.grid.bits)
    loop.run()
    steps = loop.steps if factor.order is None else _reorder(loop.steps, factor.order.argsort(-1))
    return _codes(steps, grids, size)


def _levels(inputs: int, group: int, block: int) -> list[int]:
    """Widths of the levels, from the whole matrix to a leaf; groups start where a parent starts."""
    if group < block:
        block -= block % group
    return sorted({inputs, min(block, inputs), group, min(LEAF, group)}, reverse=True)


class _Loop:
    """State of one run: what has been rounded, and what the rest has been moved by."""

    def __init__(
        self,
        weight: Tensor,
        feedback: Tensor,
        levels: list[int],
        group: int = 0,
        choose: GridChoice | None = None,
    ) -> None:
        inputs, experts, rows = weight.shape
        shape = (inputs, experts, 1, rows)
        self.weight = weight.view(shape)
        # w_j + c_j of columns to come (c_j as far as it is known); steps of columns that are done.
        self.target = weight.clone().view(shape)
        self.error = torch.zeros_like(self.weight)
        self.feedback = feedback  # [E, in, in]
        self.levels = levels
        self.group, self.choose = group, choose
        self.grids: list[Grid] = []
        # Scale, lowest and highest step of each column, the first ([E, 1, rows]) at least.
        self.columns: list[tuple[Tensor, Tensor, Tensor]] = []
        self._moved = weight.new_empty(experts, 1, rows)

    @property
    def steps(self) -> Tensor:
        """Code minus zero point, ``[in, E, rows]``, after :meth:`run`."""
        return self.target.squeeze(2)

    def run(self) -> None:
        self._solve(0, self.levels[0], 0)

    def _solve(self, start: int, stop: int, level: int) -> None:
        """Rounds columns ``start`` to ``stop``, whose targets hold all errors before ``start``."""
        if self.choose is not None and self.levels[level] == self.group:
            self._start_group(self.choose, start, stop)
        if level == len(self.levels) - 1:
            self._round_leaf(start, stop)
            return
        width = self.levels[level + 1]
        for at in range(start, stop, width):
            end = min(at + width, stop)
            if at > start:
                self._gather(at, end, start)
            self._solve(at, end, level + 1)

    def _gather(self, start: int, stop: int, since: int) -> None:
        """Adds to the targets of ``start:stop`` what the errors of ``since:start`` contribute."""
        errors = self.error[since:start].squeeze(2).transpose(0, 1)  # [E, c, rows]
        moved = torch.bmm(self.feedback[:, start:stop, since:start], errors)
        self.target[start:stop].squeeze(2).add_(moved.transpose(0, 1))

    def _start_group(self, choose: GridChoice, start: int, stop: int) -> None:
        """Chooses the group's grid from its weights as all errors before it have moved them.

        Targets are right for the next column only; the best values of the whole group given the
        errors before it are w + N⁻¹ c with N = Mᵀ of the group.
        """
        weight = self.weight[start:stop].squeeze(2)  # [g, E, rows]
        if start > 0:
            change = (self.target[start:stop].squeeze(2) - weight).transpose(0, 1)  # [E, g, rows]
            own = self.feedback[:, start:stop, start:stop]
            solved = torch.linalg.solve_triangular(own, change, upper=False, unitriangular=True)
            weight = weight + solved.transpose(0, 1)
        grid = choose(weight, start)
        self.grids.append(grid)
        self.columns += [_column(grid)] * (stop - start)

    def _round_leaf(self, start: int, stop: int) -> None:
        part = slice(start, stop)
        errors = self.error[part].squeeze(2).transpose(0, 1)  # [E, c, rows], zero where not done
        columns = zip(
            self.weight[part].unbind(0),
            self.target[part].unbind(0),
            self.error[part].unbind(0),
            self.feedback[:, part, part].unsqueeze(2).unbind(1),  # [E, 1, c], zero from j on
            self.columns[part],
            strict=True,
        )
        moved = self._moved
        for weight, target, error, row, (scale, lowest, highest) in columns:
            torch.baddbmm(target, row, errors, out=moved)
            moved.div_(scale).round_()
            torch.clamp(moved, lowest, highest, out=target)
            torch.addcmul(weight, scale, target, value=-1, out=error)


def _column(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """A grid ``[E, rows]`` as the loop reads it, ``[E, 1, rows]``."""
    if grid.zero is None:
        return grid.scale.unsqueeze(-2), grid.lowest, grid.highest
    return grid.scale.unsqueeze(-2), grid.lowest.unsqueeze(-2), grid.highest.unsqueeze(-2)


def _column_grids(
    grids: list[Grid], size: int, order: Tensor | None, bits: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The grid of each column in processing order (``order`` ``[E, in]``, None: as they stand)."""
    if order is None:
        return [column for grid in grids for column in [_column(grid)] * size]
    groups = order // size  # [E, in]
    scale = _reorder(torch.stack([grid.scale for grid in grids]), groups)  # [in, E, rows]
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    if not zeros:
        return [_column(make_grid(one, None, bits)) for one in scale.unbind(0)]
    zero = _reorder(torch.stack(zeros), groups)
    return [
        _column(make_grid(one, point, bits))
        for one, point in zip(scale.unbind(0), zero.unbind(0), strict=True)
    ]


def _reorder(rows: Tensor, index: Tensor) -> Tensor:
    """``rows`` ``[n, E, r]`` taken by ``index`` ``[E, m]`` for each expert -> ``[m, E, r]``."""
    experts = rows.shape[1]
    flat = index.t() * experts + torch.arange(experts, device=index.device)  # [m, E]
    taken = rows.reshape(-1, rows.shape[2]).index_select(0, flat.flatten())
    return taken.view(-1, experts, rows.shape[2])


def _codes(steps: Tensor, grids: list[Grid], size: int) -> Codes:
    """``steps`` ``[in, E, rows]`` in the file's order, with the zero points added back."""
    scale = torch.stack([grid.scale for grid in grids], -1)  # [E, rows, groups]
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    if zeros:
        for steps_of_group, zero in zip(torch.split(steps, size), zeros, strict=True):
            steps_of_group += zero
    small = steps.to(torch.int8)
    codes = torch.stack([small[:, expert].t() for expert in range(small.shape[1])])
    return Codes(codes, scale, torch.stack(zeros, -1) if zeros else None)
