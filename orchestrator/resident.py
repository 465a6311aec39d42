"""A worker that keeps a whole model and judges one plan after another on it.

:func:`evaluate_plan` gives the KL of :func:`moesaic.orchestrator.evaluate.evaluate_rows`, number by
number, but nothing is loaded twice. All blocks stay in memory. From plan to plan only the units
whose piece is another one change: their weights are put into the module's place. A bank that was
reduced, or is to be, has other shapes: its block is built anew. What comes before the first block
that changed is not computed again: hidden states between blocks are kept, by what the blocks before
them consist of.

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
from moesaic.orchestrator.bank import ROUTER
from moesaic.orchestrator.calibrate import dense_members, read_ids
from moesaic.orchestrator.evaluate import Judge, dense_hidden, dense_model, sequence_sums
from moesaic.orchestrator.pieces import piece_header
from moesaic.orchestrator.store import code_digest, digest
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes

WEIGHT_BYTES = 1 << 30
HIDDEN_BYTES = 512 << 20
_KEY = "resident"

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
        swapped: units whose weights were put into place, ever.
        built: blocks that were built, ever.
        ran: blocks that hidden states passed, ever.
    """

    def __init__(self, model: StreamedModel, weight_bytes: int, hidden_bytes: int) -> None:
        self.model = model
        self.swapped = self.built = self.ran = 0
        self._units: list[list[Unit]] = [layout.units for layout in model.layouts]
        self._blocks: list[nn.Module | None] = [None] * model.blocks
        self._inside: list[dict[str, str]] = [{} for _ in self._units]
        self._weights = Kept(weight_bytes)
        self._hidden = Kept(hidden_bytes)

    def final(self, judge: Judge, rows: Rows, pieces: Mapping[str, str], total: int) -> Tensor:
        """Last hidden states ``[rows, length, H]`` under a plan (unit → file of its piece).

        Args:
            total: number of sequences that plans are judged on altogether.
        """
        own = [
            {unit.name: pieces[unit.name] for unit in units if unit.name in pieces}
            for units in self._units
        ]
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
            module = self._block(index, own[index])
            hidden = [self.model.run_block(index, module, x) for x in hidden]
            self.ran += 1
            if (index + 1) % step == 0:
                self._hidden.put(keys[index + 1], hidden)
        return torch.cat(hidden)

    def _furthest(self, keys: Sequence[str]) -> tuple[int, list[Tensor] | None]:
        """The last block whose input is known, and that; 0 and None where none is."""
        for index in reversed(range(len(keys))):
            found = self._hidden.get(keys[index])
            if found is not None:
                return index, found
        return 0, None

    def _block(self, index: int, pieces: dict[str, str]) -> nn.Module:
        """A block as the pieces want it."""
        block, inside = self._blocks[index], self._inside[index]
        units = self._units[index]
        changed = [u for u in units if pieces.get(u.name) != inside.get(u.name)]
        if block is None or any(
            u.kind == "bank" and (_reduces(pieces, u) or _reduces(inside, u)) for u in changed
        ):
            # The old one goes first: there is room for one of each.
            block = self._blocks[index] = None
            block = self.model.build_block(index, dense_members(pieces))
            self.built += 1
        else:
            for unit in changed:
                block.load_state_dict(self._state(unit, pieces), strict=False, assign=True)
                self.swapped += 1
            block.requires_grad_(False)
        self._blocks[index], self._inside[index] = block, pieces
        return block

    def _state(self, unit: Unit, pieces: Mapping[str, str]) -> dict[str, Tensor]:
        """Parameters of a unit's module under a plan."""
        path = pieces.get(unit.name, "")
        found, names = self._weights.get((unit.name, path)), self._names(unit)
        if found is None:
            members = dense_members({unit.name: path})[unit.name] if path else {}
            state = self.model.unit_state(unit, members)
            # What the file maps is read now, not while blocks run.
            found = [state[name].contiguous().clone() for name in names]
            self._weights.put((unit.name, path), found)
        return dict(zip(names, found, strict=True))

    def _names(self, unit: Unit) -> list[str]:
        module = self.model.unit_module(unit)
        if unit.kind == "bank":
            return [f"{module}.gate_up_proj", f"{module}.down_proj"]
        names = [f"{module}.weight", f"{module}.bias"]
        known = self.model.prototype(unit.block).state_dict()
        return [name for name in names if name in known]


def _reduces(pieces: Mapping[str, str], unit: Unit) -> bool:
    """Whether the piece of a bank holds fewer or narrower experts, which come with a router."""
    path = pieces.get(unit.name)
    return path is not None and f"{ROUTER}weight" in piece_header(Path(path))


def trial_key(judge: Judge, rows: Rows, pieces: Mapping[str, str]) -> str:
    """Names what :func:`evaluate_plan` finds; ``pieces`` is unit → file."""
    made_of = judge.key({unit: Path(path).stem for unit, path in pieces.items()})
    return digest(["trial", made_of, list(rows), code_digest("orchestrator/resident.py")])


@torch.no_grad()
def evaluate_plan(
    state: WorkerState,
    judge: dict[str, Any],
    rows: Rows,
    pieces: Mapping[str, str],
    total: int,
    weight_bytes: int = WEIGHT_BYTES,
    hidden_bytes: int = HIDDEN_BYTES,
) -> dict[str, Any]:
    """KL to the dense model of the sequences ``rows`` under the model made of ``pieces``.

    The dense model's hidden states of these rows are known already (``stages.remember_dense``).
    After an error nothing is kept: who comes next starts anew.

    Args:
        total: number of sequences that plans are judged on altogether.

    Returns:
        ``kl``: sum over each sequence in nats; ``ran``, ``built`` and ``swapped``: blocks that were
        computed and built, and units put into place, this time; ``peak_bytes``.
    """
    plan = Judge(**judge)
    model: StreamedModel = state.model(plan.model, plan.dtype, plan.trust_remote_code)
    held: Resident | None = state.take(_KEY)
    if held is None or held.model is not model:
        held = Resident(model, weight_bytes, hidden_bytes)
    before = held.ran, held.built, held.swapped
    final = held.final(plan, rows, pieces, total)
    ids = read_ids(plan.ids, *rows)
    dense = dense_hidden(plan, rows).to(model.device)
    reference = dense_model(state, plan)
    kl = [sequence_sums(model, reference, *row)[1] for row in zip(final, dense, ids, strict=True)]
    state.put(_KEY, held)
    after = held.ran, held.built, held.swapped
    ran, built, swapped = (now - then for now, then in zip(after, before, strict=True))
    return {
        "kl": kl,
        "ran": ran,
        "built": built,
        "swapped": swapped,
        "peak_bytes": peak_memory_bytes(),
    }


def release(state: WorkerState) -> None:
    """Lets go of the model that :func:`evaluate_plan` keeps."""
    state.take(_KEY)
