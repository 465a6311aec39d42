"""A worker that keeps a whole model and judges one plan after another on it.

:func:`evaluate_plan` gives the KL of :func:`moesaic.orchestrator.evaluate.evaluate_rows`, number by
number, but nothing is loaded twice. All blocks stay in memory. From plan to plan only the units
whose piece is another one change: their weights are put into the module's place. A bank that was
reduced, or is to be, has other shapes: its block is built anew. What comes before the first block
that changed is not computed again: hidden states between blocks are kept, by what the blocks before
them consist of.

A mixture of the experts of a bank is no file (see :mod:`moesaic.orchestrator.mixtures`): told which
experts come from which piece, the worker puts it together in memory.

What one worker holds, at most: the model in the dtype it is computed in, ``WEIGHT_BYTES`` of
weights that were in before or are, ``HIDDEN_BYTES`` of hidden states, and what one batch needs.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.methods.base import Unit
from moesaic.orchestrator.bank import is_reduced
from moesaic.orchestrator.evaluate import Judge, dense_hidden, dense_model, sequence_sums
from moesaic.orchestrator.mixtures import Mixtures, dense
from moesaic.orchestrator.pieces import dense_members, piece_header
from moesaic.orchestrator.store import code_digest, digest
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.walk import read_ids
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes

WEIGHT_BYTES = 1 << 30
HIDDEN_BYTES = 512 << 20
_KEY = "resident"
_MOST_MET = 100_000

Rows = tuple[int, int]


class Kept:
    """Lists of tensors by key; those used longest ago go when there are too many bytes.

    Args:
        limit_bytes: of all together; what alone is larger is not kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self._entries: OrderedDict[Any, list[Tensor]] = OrderedDict()

    def get(self, key: Any) -> list[Tensor] | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: Any, tensors: list[Tensor]) -> None:
        """Keeps tensors under a key that is not there yet."""
        size = sum(tensor.nbytes for tensor in tensors)
        if size > self.limit_bytes:
            return
        self._entries[key] = tensors
        self.nbytes += size
        while self.nbytes > self.limit_bytes:
            _, old = self._entries.popitem(last=False)
            self.nbytes -= sum(tensor.nbytes for tensor in old)


class Resident:
    """All blocks of a model, made of some pieces at the moment.

    Attributes:
        model: what the blocks are read from.
        mixtures: banks that are no files; what pieces name is looked for there first.
        swapped: units whose weights were put into place, ever.
        built: blocks that were built, ever.
        ran: blocks that hidden states passed, ever.
    """

    def __init__(self, model: StreamedModel, weight_bytes: int, hidden_bytes: int) -> None:
        self.model = model
        self.mixtures: Mixtures = {}
        self.swapped = self.built = self.ran = 0
        self._units: list[list[Unit]] = [layout.units for layout in model.layouts]
        self._blocks: list[nn.Module | None] = [None] * model.blocks
        self._inside: list[dict[str, str]] = [{} for _ in self._units]
        # Banks of each block that are reduced at the moment.
        self._reduced: list[set[str]] = [set() for _ in self._units]
        self._weights = Kept(weight_bytes)
        # What is known of pieces by their files: names of members, and whether a bank is reduced.
        self._members: dict[str, list[str]] = {}
        self._reducing: dict[str, bool] = {}
        self._parameters: dict[str, list[str]] = {}  # of units, see _names
        self._hidden = Kept(hidden_bytes)
        self._met: set[str] = set()  # keys of hidden states that were not kept

    def final(
        self, judge: Judge, rows: Rows, pieces: Mapping[str, str], total: int, sparing: bool = False
    ) -> Tensor:
        """Last hidden states ``[rows, length, H]`` under a plan (unit → file of its piece).

        Args:
            total, sparing: see :func:`evaluate_plan`.
        """
        own = self.by_block(pieces)
        keys = [digest([judge.ids_digest, judge.batch, rows])]
        for block in own:
            keys.append(digest([keys[-1], block]))
        start, hidden = self._furthest(keys)
        if hidden is None:
            ids = read_ids(judge.ids, *rows)
            hidden = [self.model.embed(part) for part in ids.split(judge.batch)]
        size = sum(tensor.nbytes for tensor in hidden) // (rows[1] - rows[0]) * total
        step = max(1, -(-self.model.blocks * size // max(self._hidden.limit_bytes, 1)))
        if start == 0 and self._hidden.get(keys[0]) is None:
            self._hidden.put(keys[0], hidden)
        for index in range(start, self.model.blocks):
            module = self.block(index, own[index])
            hidden = [self.model.run_block(index, module, x) for x in hidden]
            self.ran += 1
            if (index + 1) % step == 0 and not (sparing and self._first(keys[index + 1])):
                self._hidden.put(keys[index + 1], hidden)
        return torch.cat(hidden)

    def _first(self, key: str) -> bool:
        """Whether hidden states are met for the first time, as far as that is remembered."""
        if key in self._met:
            return False
        if len(self._met) >= _MOST_MET:
            self._met.clear()
        self._met.add(key)
        return True

    def by_block(self, pieces: Mapping[str, str]) -> list[dict[str, str]]:
        """Pieces by the block that they belong to."""
        return [
            {unit.name: pieces[unit.name] for unit in units if unit.name in pieces}
            for units in self._units
        ]

    def _furthest(self, keys: Sequence[str]) -> tuple[int, list[Tensor] | None]:
        """The last block whose input is known, and that; 0 and None where none is."""
        for index in reversed(range(len(keys))):
            found = self._hidden.get(keys[index])
            if found is not None:
                return index, found
        return 0, None

    def block(self, index: int, pieces: dict[str, str]) -> nn.Module:
        """A block as the pieces want it."""
        block, inside = self._blocks[index], self._inside[index]
        units = self._units[index]
        changed = [u for u in units if pieces.get(u.name) != inside.get(u.name)]
        reduced = {u.name for u in units if u.kind == "bank" and self._reduces(pieces, u)}
        anew = reduced | self._reduced[index]
        if block is None or any(unit.name in anew for unit in changed):
            # The old one goes first: there is room for one of each.
            block = self._blocks[index] = None
            given = {unit: self.members(unit, path) for unit, path in pieces.items()}
            block = self.model.build_block(index, given)
            self.built += 1
        elif changed:
            state: dict[str, Tensor] = {}
            for unit in changed:
                state |= self._state(unit, pieces)
            block.load_state_dict(state, strict=False, assign=True)
            block.requires_grad_(False)
            self.swapped += len(changed)
        self._blocks[index], self._inside[index], self._reduced[index] = block, pieces, reduced
        return block

    def _state(self, unit: Unit, pieces: Mapping[str, str]) -> dict[str, Tensor]:
        """Parameters of a unit's module under a plan."""
        path = pieces.get(unit.name, "")
        found, names = self._weights.get((unit.name, path)), self._names(unit)
        if found is None:
            members = self.members(unit.name, path) if path else {}
            state = self.model.unit_state(unit, members)
            if path in self.mixtures:  # which hardly come back, while their pieces do
                return {name: state[name] for name in names}
            # What the file maps is read now, not while blocks run.
            found = [state[name].contiguous().clone() for name in names]
            self._weights.put((unit.name, path), found)
        return dict(zip(names, found, strict=True))

    def members(self, unit: str, path: str) -> dict[str, Tensor]:
        """The dense weights of a piece or a mixture, member by member, and what comes with them."""
        mixture = self.mixtures.get(path)
        return dense_members({unit: path})[unit] if mixture is None else dense(mixture, self.whole)

    def whole(self, path: str) -> dict[str, Tensor]:
        """The dense weights of a piece, member by member; kept, for those that come back."""
        found = self._weights.get(path)
        if found is None:
            members = dense_members({"": path})[""]
            self._members[path] = sorted(members)
            found = [members[name].contiguous().clone() for name in self._members[path]]
            self._weights.put(path, found)
        return dict(zip(self._members[path], found, strict=True))

    def _reduces(self, pieces: Mapping[str, str], unit: Unit) -> bool:
        """Whether the piece of a bank holds fewer or narrower experts, which come with a router."""
        path = pieces.get(unit.name)
        if path is None:
            return False
        if path in self.mixtures:
            return is_reduced(self.whole(self.mixtures[path][0][1]))
        if path not in self._reducing:
            self._reducing[path] = is_reduced(piece_header(Path(path)))
        return self._reducing[path]

    def weight_names(self, unit: Unit) -> list[str]:
        """Parameters of the block that are the unit's weights."""
        module = self.model.unit_module(unit)
        if unit.kind == "bank":
            return [f"{module}.gate_up_proj", f"{module}.down_proj"]
        return [f"{module}.weight"]

    def _names(self, unit: Unit) -> list[str]:
        """The same, and its bias where a linear has one."""
        if unit.name not in self._parameters:
            bias = f"{self.model.unit_module(unit)}.bias"
            known = self.model.prototype(unit.block).state_dict()
            more = [bias] if unit.kind == "linear" and bias in known else []
            self._parameters[unit.name] = [*self.weight_names(unit), *more]
        return self._parameters[unit.name]


def trial_key(judge: Judge, rows: Rows, pieces: Mapping[str, str]) -> str:
    """Names what :func:`evaluate_plan` finds; ``pieces`` is unit → file."""
    made_of = judge.key({unit: Path(path).stem for unit, path in pieces.items()})
    code = code_digest(*(f"orchestrator/{name}.py" for name in ("bank", "mixtures", "resident")))
    return digest(["trial", made_of, list(rows), code])


@torch.no_grad()
def evaluate_plan(
    state: WorkerState,
    judge: dict[str, Any],
    rows: Rows,
    pieces: Mapping[str, str],
    total: int,
    weight_bytes: int = WEIGHT_BYTES,
    hidden_bytes: int = HIDDEN_BYTES,
    mixtures: Mixtures | None = None,
    sparing: bool = False,
) -> dict[str, Any]:
    """KL to the dense model of the sequences ``rows`` under the model made of ``pieces``.

    The dense model's hidden states of these rows are known already (``stages.remember_dense``).
    After an error nothing is kept: who comes next starts anew.

    Args:
        total: number of sequences that plans are judged on altogether.
        mixtures: what ``pieces`` name that is no file.
        sparing: keep hidden states between blocks only when they come up again: for plans that
            seldom begin alike, where memory that is always new costs more than it saves.

    Returns:
        ``kl``: sum over each sequence in nats; ``ran``, ``built`` and ``swapped``: blocks that were
        computed and built, and units put into place, this time; ``peak_bytes``.
    """
    plan = Judge(**judge)
    held = taken(state, plan, weight_bytes, hidden_bytes)
    held.mixtures = mixtures or {}
    model = held.model
    before = held.ran, held.built, held.swapped
    final = held.final(plan, rows, pieces, total, sparing)
    ids = read_ids(plan.ids, *rows)
    dense = dense_hidden(plan, rows).to(model.device)
    reference = dense_model(state, plan)
    kl = [sequence_sums(model, reference, *row)[1] for row in zip(final, dense, ids, strict=True)]
    keep(state, held)
    after = held.ran, held.built, held.swapped
    ran, built, swapped = (now - then for now, then in zip(after, before, strict=True))
    return {
        "kl": kl,
        "ran": ran,
        "built": built,
        "swapped": swapped,
        "peak_bytes": peak_memory_bytes(),
    }


def taken(
    state: WorkerState,
    judge: Judge,
    weight_bytes: int = WEIGHT_BYTES,
    hidden_bytes: int = HIDDEN_BYTES,
) -> Resident:
    """The model that a worker keeps, taken out so that nothing is kept after an error."""
    model: StreamedModel = state.model(judge.model, judge.dtype, judge.trust_remote_code)
    held: Resident | None = state.take(_KEY)
    if held is None or held.model is not model:
        held = Resident(model, weight_bytes, hidden_bytes)
    return held


def keep(state: WorkerState, held: Resident) -> None:
    """Puts back what :func:`taken` took out."""
    state.put(_KEY, held)


def release(state: WorkerState) -> None:
    """Lets go of the model that :func:`evaluate_plan` keeps."""
    state.take(_KEY)
