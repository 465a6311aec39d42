"""Sums that several files hold, added up a few rows at a time into one file.

The additions are those of :func:`~moesaic.orchestrator.statistics.tree_sum`, element by element in
the same order; only how much of them is in memory at a time differs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moesaic.orchestrator.damage import damage_removed
from moesaic.orchestrator.dtypes import DTYPES
from moesaic.orchestrator.shared import fetched
from moesaic.orchestrator.statistics import Node, SumsFile, SumShapes

# Of a sum that are added at a time, for each of those that are held.
STEP_BYTES = 64 << 20


class OpenSums:
    """Files of nodes of the summation tree, and what they come to over ``root``."""

    def __init__(self, root: Node, files: Mapping[Node, Any]) -> None:
        self.root, self.files = root, files
        first = next(iter(files.values()))
        self.layout: SumShapes = {}
        for name in first.keys():  # noqa: SIM118
            opened = first.get_slice(name)
            self.layout[name] = DTYPES[opened.get_dtype()], tuple(opened.get_shape())

    def total(self, name: str) -> Tensor:
        """A sum over all."""
        return self._added(self.root, lambda file: file.get_tensor(name))

    def steps(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The same row by row: the first row of some, and these."""
        dtype, shape = self.layout[name]
        if not shape:
            yield 0, self.total(name)
            return
        size = dtype.itemsize * torch.Size(shape[1:]).numel()
        step = max(1, STEP_BYTES // max(1, size))
        for low in range(0, shape[0], step):
            rows = slice(low, min(low + step, shape[0]))
            yield low, self._added(self.root, lambda file, r=rows: file.get_slice(name)[r])  # type: ignore[misc]

    def _added(self, node: Node, read: Callable[[Any], Tensor]) -> Tensor:
        if node in self.files:
            return read(self.files[node]).clone()
        low, high = node
        middle = (low + high) // 2
        total = self._added((low, middle), read)
        total += self._added((middle, high), read)
        return total

    def look(self, checked: Callable[[str, Tensor], None]) -> None:
        """Shows all sums, some rows at a time."""
        for name in self.layout:
            for _, rows in self.steps(name):
                checked(name, rows)

    def write(self, path: Path, checked: Callable[[str, Tensor], None]) -> None:
        """All sums as one file.

        Args:
            checked: is shown everything before it is written.
        """
        with SumsFile(path, self.layout) as file:
            for name in self.layout:
                for first, rows in self.steps(name):
                    checked(name, rows)
                    file.put(name, rows, first)


@contextmanager
def open_sums(root: Node, paths: Mapping[Node, Path]) -> Iterator[OpenSums]:
    """Opens the files of nodes that together cover ``root``.

    Raises:
        DamagedFile: one of them is; it is removed.
        FileNotFoundError: one is gone.
    """
    with ExitStack() as stack:
        files = {}
        for node, path in paths.items():
            with damage_removed(path):
                files[node] = stack.enter_context(safe_open(fetched(path), framework="pt"))
        yield OpenSums(root, files)


def found_nodes(
    root: Node, path: Callable[[Node], Path], there: Callable[[Path], bool]
) -> tuple[dict[Node, Path], list[int]]:
    """Files of the largest nodes below ``root`` that are there, and the shards that lack."""
    own = path(root)
    if there(own):
        return {root: own}, []
    low, high = root
    if high - low == 1:
        return {}, [low]
    middle = (low + high) // 2
    halves = [found_nodes(half, path, there) for half in ((low, middle), (middle, high))]
    return halves[0][0] | halves[1][0], [shard for _, lacking in halves for shard in lacking]
