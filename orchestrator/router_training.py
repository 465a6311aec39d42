"""Routers of reduced banks learn from the dense model, data-parallel over the workers.

The calibration sequences are cut into chunks, fixed by the recipe. A step takes some chunks, in an
order drawn from the seed: workers run the reduced model forwards and backwards on one chunk each
and write the gradients of the routers; the driver adds them up in the order of the chunks and takes
one step of Adam. So the result is the same for any number of workers. After every step routers and
optimizer are on disk: whatever dies, the next run goes on from the last step.

A part of the sequences is held back. Where the routers do not lower the divergence on it, they stay
as the reduction left them, and an event says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moesaic.kernels import dense
from moesaic.methods.base import Event
from moesaic.methods.router_calibration import TRAINED, Options, divergence_gradient
from moesaic.orchestrator.bank import ROUTER, is_reduced
from moesaic.orchestrator.console import View
from moesaic.orchestrator.damage import damage_removed
from moesaic.orchestrator.evaluate import Judge, dense_hidden, dense_model
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.pieces import (
    dense_members,
    piece_header,
    piece_metadata,
    read_piece,
    write_piece,
)
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.shared import (
    exists,
    fetched,
    remove,
    remove_unfinished,
    write_shared,
)
from moesaic.orchestrator.stages import remember_dense
from moesaic.orchestrator.store import code_digest, digest, scratch_folder
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.walk import read_ids
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes

# Blocks stay loaded from one chunk to the next where this many copies of the model would fit.
_ROOM = 4
# Where there are enough sequences, they are cut into at least so many chunks.
_LEAST_CHUNKS = 8
_MODEL, _FIRST, _SECOND = "model", "first", "second"

Rows = tuple[int, int]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """What came of it.

    Attributes:
        pieces: unit → its piece; those of reduced banks have the new routers.
        events: what a person should know.
    """

    pieces: dict[str, str]
    events: list[Event]


# On the workers


def chunk(
    state: WorkerState,
    judge: dict[str, Any],
    rows: Rows,
    pieces: Mapping[str, str],
    routers: str,
    output: str | None,
) -> dict[str, Any]:
    """Runs the reduced model on the sequences ``rows``.

    Args:
        routers: file of the routers' tensors, ``unit|role``.
        output: file for their gradients; None runs forwards only.

    Returns:
        ``kl``: sum over tokens in nats; ``peak_bytes``.
    """
    plan = Judge(**judge)
    model: StreamedModel = state.model(plan.model, plan.dtype, plan.trust_remote_code)
    ids = read_ids(plan.ids, *rows)
    blocks = _Blocks(state, model, pieces, _loaded(Path(routers)))
    with torch.no_grad():
        hidden = [model.embed(ids.to(model.device))]
        for index in range(model.blocks):
            hidden.append(model.run_block(index, blocks[index], hidden[-1]))
    final = hidden.pop()
    reference = dense_model(state, plan)
    target = dense_hidden(plan, rows).to(final)

    def logits(x: Tensor) -> Tensor:
        return model.logits(model.final_norm(x[None]))[0]

    def dense_logits(x: Tensor) -> Tensor:
        return reference.logits(reference.final_norm(x[None]))[0]

    total, gradient = divergence_gradient(
        final.flatten(0, 1), target.flatten(0, 1), logits, dense_logits
    )
    if output is not None:
        found = _backwards(model, blocks, hidden, gradient.view_as(final))
        write_shared(Path(output), lambda p: save_file(found, p))
    blocks.keep()
    return {"kl": total, "peak_bytes": peak_memory_bytes()}


class _Blocks:
    """The reduced model's blocks; they stay loaded from call to call where memory allows."""

    def __init__(
        self, state: WorkerState, model: StreamedModel, pieces: Mapping[str, str], routers: Tensors
    ) -> None:
        self.state, self.model, self.pieces, self.routers = state, model, pieces, routers
        self.key = ("reduced blocks", digest(dict(pieces)))
        self.loaded: dict[int, nn.Module] = state.take(self.key) or {}
        for index, block in self.loaded.items():
            self._put_routers(index, block)
        needed = _ROOM * model.checkpoint.total_bytes
        self.room = psutil.virtual_memory().available > needed or bool(self.loaded)

    def __getitem__(self, index: int) -> nn.Module:
        if index in self.loaded:
            return self.loaded[index]
        units = [unit.name for unit in self.model.units() if unit.block == index]
        own = {name: self.pieces[name] for name in units if name in self.pieces}
        block = self.model.load_block(index, replaced=dense_members(own))
        self._put_routers(index, block)
        if self.room:
            self.loaded[index] = block
        return block

    def trained(self, index: int) -> dict[str, str]:
        """``unit|role`` → parameter of the block, for those that learn."""
        units = [unit for unit in self.model.units() if unit.block == index]
        names = self.model.router_names(index)
        keys = {f"{unit.name}|{role}": name for unit in units for role, name in names.items()}
        return {key: name for key, name in keys.items() if key in self.routers}

    def _put_routers(self, index: int, block: nn.Module) -> None:
        for key, name in self.trained(index).items():
            parameter = block.get_parameter(name)
            parameter.data = self.routers[key].to(parameter)

    def keep(self) -> None:
        """For the next call."""
        if self.room:
            self.state.put(self.key, self.loaded)


def _backwards(
    model: StreamedModel, blocks: _Blocks, hidden: list[Tensor], gradient: Tensor
) -> Tensors:
    """Gradients of the routers, ``unit|role`` → float32, block by block from the last one."""
    found: Tensors = {}
    for index in reversed(range(model.blocks)):
        block, names = blocks[index], blocks.trained(index)
        parameters = [block.get_parameter(name).requires_grad_(True) for name in names.values()]
        with torch.enable_grad():
            x = hidden.pop().requires_grad_(True)
            y = model.run_block(index, block, x)
            inner, *own = torch.autograd.grad(y, [x, *parameters], gradient)
        for parameter in parameters:
            parameter.requires_grad_(False)
        found |= {k: g.float().cpu() for k, g in zip(names, own, strict=True)}
        gradient = inner
    return found


# In the driver


class RouterTraining:
    """Trains the routers of one plan.

    Args:
        name: of the plan.
        pieces: unit → file of its piece.
    """

    def __init__(
        self,
        experiment: Experiment,
        pool: Pool,
        view: View,
        name: str,
        pieces: Mapping[str, str],
        options: Options,
    ) -> None:
        self.experiment, self.pool, self.view = experiment, pool, view
        self.stage = f"routers {name}"
        self.pieces, self.options = dict(pieces), options
        self.judge = experiment.calibration_judge
        self.seed = experiment.recipe.calibration.seed
        count = len(experiment.calibration.ids)
        size = max(1, min(self.judge.batch, options.batch, count // _LEAST_CHUNKS))
        self.chunks = [(low, min(low + size, count)) for low in range(0, count, size)]
        held = min(round(options.held_back * len(self.chunks)), len(self.chunks) - 1)
        order = torch.randperm(len(self.chunks), generator=self._generator(0)).tolist()
        self.held = sorted(order[:held]) or order  # without any, all of them judge
        self.learning = sorted(set(order) - set(order[:held]))
        self.reduced = [u for u, path in pieces.items() if is_reduced(piece_header(Path(path)))]
        self.key = digest(
            {
                "pieces": self.judge.key({u: Path(path).stem for u, path in pieces.items()}),
                "options": options.model_dump(mode="json"),
                "seed": self.seed,
                "code": code_digest(
                    "methods/router_calibration.py", "orchestrator/router_training.py"
                ),
            }
        )
        self.scratch = scratch_folder(experiment.store.root, self.key)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number)

    def run(self) -> Trained:
        """Does what is missing."""
        store = self.experiment.store
        entry = store.get("routers", self.key)
        if entry is None:
            first, last = self._learned()
            before, after = self._judged(first), self._judged(last)
            figures = {"before": before, "after": after}
            source = last if after < before else first
            tensors = _loaded(source)
            entry = store.put("routers", self.key, lambda p: save_file(tensors, p), figures)
            remove_unfinished(self.scratch)
        else:
            steps = len(self._steps())
            self.view.stage(self.stage, steps, steps)
        before, after = float(entry.metadata["before"]), float(entry.metadata["after"])
        events = []
        if not after < before:
            text = f"{self.stage}: KL on held-back text {before:.4g}, after training {after:.4g}"
            events.append(Event("routers_not_better", f"{text}: they stay as they were"))
            return Trained(self.pieces, events)
        return Trained(self._written(load_file(fetched(entry.path))), events)

    def _steps(self) -> list[list[int]]:
        """The chunks of every step."""
        size = self.chunks[0][1] - self.chunks[0][0]
        each = max(1, round(self.options.batch / size))
        steps = []
        for epoch in range(self.options.epochs):
            generator = self._generator(1 + epoch)
            order = torch.randperm(len(self.learning), generator=generator).tolist()
            chunks = [self.learning[number] for number in order]
            steps += [chunks[low : low + each] for low in range(0, len(chunks), each)]
        return steps

    def _learned(self) -> tuple[Path, Path]:
        """Files of the routers before the first step and after the last one."""
        steps = self._steps()
        first = self._state(0)
        if not any(exists(self._state(number)) for number in range(len(steps) + 1)):
            tensors = self._routers()
            moments = {
                f"{m}|{k}": torch.zeros_like(v)
                for k, v in tensors.items()
                for m in (_FIRST, _SECOND)
            }
            write_shared(first, lambda p: save_file({**_named(tensors), **moments}, p))
        self._plain(0)
        done = max(n for n in range(len(steps) + 1) if exists(self._state(n)))
        self.view.stage(self.stage, len(steps), done)
        remember_dense(self.pool, self.view, self.judge, self.chunks)
        for number in range(done, len(steps)):
            self._step(number, steps[number])
            self.view.advance(self.stage)
        return self._plain(0), self._plain(len(steps))

    def _state(self, step: int) -> Path:
        return self.scratch / f"routers-{step:04d}.safetensors"

    def _plain(self, step: int) -> Path:
        """The routers of a step without the optimizer's state, as workers read them."""
        path = self.scratch / f"plain-{step:04d}.safetensors"
        if not exists(path):
            state = _loaded(self._state(step))
            own = {
                k.removeprefix(f"{_MODEL}|"): v for k, v in state.items() if k.startswith(_MODEL)
            }
            write_shared(path, lambda p: save_file(own, p))
        return path

    def _routers(self) -> Tensors:
        found: Tensors = {}
        for unit in self.reduced:
            for name, member in read_piece(Path(self.pieces[unit])).items():
                role = name.removeprefix(ROUTER)
                if name.startswith(ROUTER) and role in TRAINED:
                    found[f"{unit}|{role}"] = member.dense().float()
        return found

    def _run(
        self, chunks: Sequence[int], routers: Path, step: int | None = None
    ) -> dict[int, float]:
        """Chunk → its divergence; for a step, gradients are written beside."""
        found: dict[int, float] = {}

        def task(number: int) -> Task:
            def done(result: Mapping[str, Any]) -> list[Task]:
                found[number] = result["kl"]
                return []

            arguments = {
                "judge": asdict(self.judge),
                "rows": self.chunks[number],
                "pieces": self.pieces,
                "routers": str(routers),
                "output": None if step is None else str(self._gradients(step, number)),
            }
            return Task("router_training:chunk", arguments, f"routers {number}", done=done)

        self.pool.run([task(number) for number in chunks], self.view.tick)
        return found

    def _gradients(self, step: int, chunk: int) -> Path:
        # With the step: what a worker writes too late must not be taken for that of another one.
        return self.scratch / f"gradients-{step:04d}-{chunk:05d}.safetensors"

    def _tokens(self, chunks: Sequence[int]) -> int:
        length = self.experiment.recipe.calibration.length
        return sum(self.chunks[n][1] - self.chunks[n][0] for n in chunks) * length

    def _step(self, number: int, chunks: Sequence[int]) -> None:
        """One step of Adam (Kingma & Ba, 1412.6980, algorithm 1) on the sum over ``chunks``."""
        self._run(chunks, self._plain(number), number)
        state = _loaded(self._state(number))
        total: Tensors = {}
        for part in chunks:  # in this order, whoever was first
            for key, value in _loaded(self._gradients(number, part)).items():
                total[key] = total[key] + value if key in total else value
        tokens = self._tokens(chunks)
        new: Tensors = {}
        for key, gradient in total.items():
            weight = state[f"{_MODEL}|{key}"]
            mean = gradient / tokens
            first = 0.9 * state[f"{_FIRST}|{key}"] + 0.1 * mean
            second = 0.999 * state[f"{_SECOND}|{key}"] + 0.001 * mean.square()
            step = (first / (1 - 0.9 ** (number + 1))) / (
                (second / (1 - 0.999 ** (number + 1))).sqrt() + 1e-12
            )
            scale = self.options.learning_rate * weight.square().mean().sqrt()
            new |= {
                f"{_MODEL}|{key}": weight - scale * step,
                f"{_FIRST}|{key}": first,
                f"{_SECOND}|{key}": second,
            }
        write_shared(self._state(number + 1), lambda p: save_file(new, p))
        for part in chunks:
            remove(self._gradients(number, part))
        if number > 0:
            remove(self._state(number - 1))

    def _judged(self, routers: Path) -> float:
        """Divergence per token on the held-back sequences."""
        sums = self._run(self.held, routers)
        return sum(sums[number] for number in self.held) / self._tokens(self.held)

    def _written(self, routers: Tensors) -> dict[str, str]:
        """Pieces with the new routers."""
        store, pieces = self.experiment.store, dict(self.pieces)
        for unit in self.reduced:
            old = Path(pieces[unit])
            key = digest(["routers", self.key, old.stem])
            entry = store.get("mosaics", key)
            if entry is None:
                entry = store.put("mosaics", key, self._writer(unit, old, routers))
            pieces[unit] = str(entry.path)
        return pieces

    def _writer(self, unit: str, old: Path, routers: Tensors) -> Callable[[Path], None]:
        """Writes a unit's piece with its new router."""
        members = dict(read_piece(old))
        for role in TRAINED:
            name = f"{ROUTER}{role}"
            if name in members:
                value = routers[f"{unit}|{role}"].to(members[name].dtype)
                members[name] = dense.pack(value)
        return lambda path: write_piece(path, members, piece_metadata(old))


def _loaded(path: Path) -> Tensors:
    with damage_removed(path):
        found: Tensors = load_file(fetched(path))
    return found


def _named(tensors: Tensors) -> Tensors:
    return {f"{_MODEL}|{key}": value for key, value in tensors.items()}
