"""Blocks that do not fit a worker: walked in parts, they leave the bytes of a walk in one."""

import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.methods.base import Unit
from moesaic.methods.reduction import EXPERT_STATISTICS
from moesaic.orchestrator import calibrate, gradients, measure, parted, statistics, sums
from moesaic.orchestrator.bank_slices import BankSlices
from moesaic.orchestrator.block_sizes import BlockSizes
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.passes import Passes, bank_of, planned_passes, solved_at_a_time
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.stages import Calibration
from moesaic.orchestrator.statistics import covered, held_sums, ranges
from moesaic.orchestrator.walk import Walk, opened
from moesaic.orchestrator.worker import WorkerState
from tests.orchestrator.conftest import MakeWalk
from tests.orchestrator.inline import InlinePool
from tests.orchestrator.projects import make_model_folder, make_recipe

SEQUENCES, LENGTH, SHARDS = 7, 9, 5
WALK: dict[str, Any] = {"shards": SHARDS, "needs": ("abs", "hessian", "tokens"), "gradients": 0}
SAMPLED = {
    "needs": ("abs", "hessian", "tokens", *EXPERT_STATISTICS),
    "sampled": 20,
    "sources": tuple(n % 2 for n in range(SEQUENCES)),
}


@pytest.fixture(scope="module")
def ids() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 97, (SEQUENCES, LENGTH), generator=generator)


class Cramped(WorkerState):
    """A worker with so many bytes for a block."""

    bytes: int | None = None

    @property
    def room(self) -> int:
        return 10**12 if self.bytes is None else self.bytes


def cramped(room: int | None) -> Cramped:
    state = Cramped(1)
    state.bytes = room
    return state


def sizes_of(walk: Walk) -> BlockSizes:
    return BlockSizes(opened(cramped(None), walk), walk, LENGTH)


def smallest_room(walk: Walk, workers: int) -> tuple[int, list[Passes]]:
    """The least room in which every block can be walked, and how they are walked in it."""
    sizes = sizes_of(walk)

    def planned(room: int) -> list[Passes]:
        found = []
        for span in ranges(walk.shards, workers):
            nodes = covered((0, walk.shards), span)
            held = max(held_sums(node) + (place > 0) for place, node in enumerate(nodes))
            for block in range(sizes.model.blocks):
                beside = sizes.beside("cpu", span)
                passes = planned_passes(sizes, block, held, room, *beside)
                found += [passes] if passes is not None else []
        return found

    low, high = 0, 10**9
    while high - low > 1:
        middle = (low + high) // 2
        try:
            planned(middle)
            high = middle
        except RunError:
            low = middle
    return high, planned(high)


def walked(walk: Walk, room: int | None, workers: int = 1) -> tuple[dict[str, bytes], set[str]]:
    """All statistics and gradients by name, and what workers told."""
    states = [cramped(room) for _ in ranges(walk.shards, workers)]
    spans, told = ranges(walk.shards, workers), set()
    blocks = opened(states[0], walk).blocks
    for block in range(blocks):
        for state, span in zip(states, spans, strict=True):
            told.add(calibrate.forward(state, asdict(walk), block, span)["parted"])
        sums.reduce(cramped(None), asdict(walk), "stats", block)
    for block in reversed(range(blocks) if walk.gradients else ()):
        for state, span in zip(states, spans, strict=True):
            gradients.reverse(state, asdict(walk), block, span)
        sums.reduce(cramped(None), asdict(walk), "gradients", block)
    files = [p for kind in ("stats", "gradients") for p in Path(walk.store).glob(f"{kind}/*/*.s*")]
    return {path.name: path.read_bytes() for path in files}, told


@pytest.mark.parametrize(
    ("kind", "workers", "changes"),
    [
        ("qwen3_moe", 3, {}),
        ("qwen3_moe", 1, {"experts": "all"}),
        ("qwen3_moe", 2, SAMPLED),
        ("qwen2_moe", 1, SAMPLED),  # a shared expert, and a dense block
        ("deepseek_v3", 1, {}),
        ("gpt_oss", 1, {}),  # fused, transposed, with biases
        ("llama", 2, {}),
    ],
)
def test_parts_leave_the_same_bytes(
    make_walk: MakeWalk, tmp_path: Path, kind: str, workers: int, changes: dict[str, Any]
) -> None:
    whole, nothing = walked(make_walk(kind, store=str(tmp_path / "whole"), **changes), None)
    assert nothing == {""} and len(whole) >= 2
    walk = make_walk(kind, store=str(tmp_path / "parts"), **changes)
    room, passes = smallest_room(walk, workers)
    parts, told = walked(walk, room, workers)
    assert parts == whole
    assert any("walked in parts" in text for text in told)
    assert all(p.need <= room < p.whole for p in passes)
    bank = bank_of(sizes_of(walk).model.units())
    experts = [p.experts for p in passes if p.experts]
    assert bool(experts) == (bank is not None)
    if bank is not None:
        assert min(experts) < bank.shapes["gate"][0]
    else:
        assert max(len(p.groups) for p in passes) > 1


def test_the_way_back_reads_weights_again_and_holds_some_experts_at_a_time(
    make_walk: MakeWalk, tmp_path: Path
) -> None:
    """Squared gradients, of two losses, with the weights read again on the way back."""
    changes: dict[str, Any] = {"fisher": True, "gradients": 2, "needs": ("tokens",)}
    whole, _ = walked(make_walk("qwen3_moe", store=str(tmp_path / "whole"), **changes), None)
    walk = make_walk("qwen3_moe", store=str(tmp_path / "parts"), **changes)
    sizes = sizes_of(walk)
    bank = bank_of(sizes.block_units(0))
    assert bank is not None
    everything = sizes.beside("cpu", (0, SHARDS))[0] + sizes.weights(0)
    everything += sizes.activations(0, LENGTH, keep_all=True) + sizes.squares(0)
    everything += 3 * sizes.gradients(0)
    room = everything - 3 * sizes.expert_weights(bank)
    with held_experts() as most:
        parts, _ = walked(walk, room)
    assert parts == whole
    assert 0 < max(most) < bank.shapes["gate"][0]


@contextmanager
def held_experts() -> Iterator[list[int]]:
    """How many experts' weights were alive at once, whenever some were read."""
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    original = BankSlices.slice_of

    def slice_of(self: BankSlices, number: int) -> Any:
        held = original(self, number)
        if not any(ref() is held[0] for ref in alive):
            alive.append(weakref.ref(held[0]))
        counts.append(sum(len(t) for ref in alive if (t := ref()) is not None))
        return held

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BankSlices, "slice_of", slice_of)
        yield counts


@contextmanager
def counted_sums() -> Iterator[list[int]]:
    """Bytes of all accumulators alive, whenever some were made."""
    alive: list[weakref.ref[Tensor]] = []
    totals: list[int] = []
    original = statistics.StatisticsObserver.__init__

    def make(self: statistics.StatisticsObserver, *given: Any, **named: Any) -> None:
        original(self, *given, **named)
        if self.stats and not next(iter(self.stats.values()))["tokens"].is_meta:
            alive.extend(weakref.ref(v) for s in self.stats.values() for v in s.sums.values())
            totals.append(sum(t.nbytes for ref in alive if (t := ref()) is not None))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics.StatisticsObserver, "__init__", make)
        yield totals


def test_no_more_sums_are_alive_than_was_planned(make_walk: MakeWalk, tmp_path: Path) -> None:
    walk = make_walk("qwen3_moe", store=str(tmp_path / "whole"))
    with counted_sums() as before:
        walked(walk, None)
    walk = make_walk("qwen3_moe", store=str(tmp_path / "parts"))
    room, passes = smallest_room(walk, 1)
    assert passes and all(p.need <= room for p in passes)
    sizes, held = sizes_of(walk), held_sums((0, SHARDS))
    with counted_sums() as after:
        walked(walk, room)
    assert max(before) > 0.9 * held * sizes.sums(0)
    assert max(after) < max(before) / 2
    fixed = sizes.weights_but_bank(0) + sizes.activations(0, sizes.batch_tokens())
    assert max(after) <= room - fixed - sizes.hidden_of((0, SHARDS))


def test_what_does_not_fit_even_alone_is_named(make_walk: MakeWalk) -> None:
    for kind in ("qwen3_moe", "llama"):
        walk = make_walk(kind)
        room, _ = smallest_room(walk, 1)
        with pytest.raises(RunError) as error:
            calibrate.forward(cramped(room - 1), asdict(walk), 0, (0, SHARDS))
        text = str(error.value)
        assert re.match(r"block 0: (one expert of )?model\.layers\.0\.[a-z_.]+ takes 0\.", text)
        assert "compute.workers" in text and "\n" not in text


def test_sums_for_every_text_need_the_whole_block(make_walk: MakeWalk) -> None:
    walk = make_walk(by_source=tuple(n % 2 for n in range(SEQUENCES)))
    sizes = sizes_of(walk)
    assert sizes.sums(0) > sizes_of(make_walk()).sums(0)
    assert planned_passes(sizes, 0, 1, 10**12, 0, 0) is None
    with pytest.raises(RunError, match=r"block 0: all of it, with sums .*calibration\.per_source"):
        planned_passes(sizes, 0, 1, sizes.weights(0), 0, 0)


def test_what_was_collected_in_parts_is_the_same(make_walk: MakeWalk, tmp_path: Path) -> None:
    """The walk that stays before a block, as a plan that is solved front to back needs it."""
    left = []
    for name in ("whole", "parts"):
        walk = make_walk("qwen3_moe", store=str(tmp_path / name))
        room = None if name == "whole" else smallest_room(walk, 1)[0]
        calibrate.collect(cramped(room), asdict(walk), 0, (0, SHARDS))
        sums.reduce(cramped(None), asdict(walk), "stats", 0)
        left.append([p.read_bytes() for p in Path(walk.store).glob("stats/*/*.safetensors")])
    assert left[0] == left[1] != []


def test_a_block_of_which_parts_were_lost_is_walked_again(
    make_walk: MakeWalk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = walked(make_walk("qwen3_moe", store=str(tmp_path / "whole")), None)
    walk = make_walk("qwen3_moe", store=str(tmp_path / "parts"))
    room, _ = smallest_room(walk, 1)
    state, visits = cramped(room), []
    real = parted.visit

    def visit(*given: Any) -> None:
        visits.append(1)
        if len(visits) == 9:
            raise KeyboardInterrupt
        real(*given)

    monkeypatch.setattr(parted, "visit", visit)
    with pytest.raises(KeyboardInterrupt):
        calibrate.forward(state, asdict(walk), 0, (0, SHARDS))
    assert not list(Path(walk.store).rglob("*.tmp*"))
    assert walked(walk, room)[0] == whole


LARGE: dict[str, Any] = {"budget": {"bits_per_weight": 11.0}, "baselines": {}}
CHAINS: dict[str, Any] = {
    "rtn": [{"method": "rtn", "bits": [3, 8], "group_size": 16}],
    "gptq": [{"method": "gptq", "bits": 4, "group_size": 16}],
    "low rank": [
        {"method": "svd_llm", "rank": [0.25, 0.5]},
        [{"method": "svd_llm", "rank": 0.5}, {"method": "rtn", "bits": 4, "group_size": 4}],
        [{"method": "rtn", "bits": 3, "group_size": 16}, {"method": "eora", "rank": [2, 4]}],
    ],
    "merged": [
        {"method": "rtn", "bits": 8, "group_size": 16},
        [{"method": "hc_smoe", "keep": 0.5}, {"method": "eora", "rank": [2, 4]}],
        [{"method": "m_smoe", "keep": 0.5}, {"method": "eora", "rank": 2}],
    ],
    "sparse": [
        {"method": "wanda", "density": 0.5},
        {"method": "sparse_lowrank", "rank": 2, "steps": 1},
    ],
}


@pytest.mark.parametrize("name", CHAINS)
def test_banks_that_are_solved_in_slices_leave_the_same_pieces(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model_folder(tmp_path / "model")
    left: list[dict[str, bytes]] = []
    for slices in (0, 3):
        monkeypatch.setattr(
            measure,
            "solved_at_a_time",
            lambda units, *_, n=slices: n if units[0].kind == "bank" else 0,
        )
        folder = tmp_path / f"solved{slices}"
        recipe = load_recipe(make_recipe(folder, model, candidates=CHAINS[name], **LARGE))
        experiment = Experiment(recipe, folder / "run")
        Calibration(experiment, InlinePool(1), View(), experiment.offers).run()
        files = [p for k in ("pieces", "errors") for p in (folder / "store").glob(f"{k}/*/*.s*")]
        left.append({p.name: p.read_bytes() for p in files if p.suffix == ".safetensors"})
    assert left[0] == left[1] and len(left[0]) >= 4


def test_what_takes_all_experts_together_is_refused_where_they_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model_folder(tmp_path / "model")
    monkeypatch.setattr(measure, "solved_at_a_time", lambda units, *_: int(units[0].kind == "bank"))
    candidates = [
        {"method": "rtn", "bits": 8, "group_size": 16},
        {"method": "delta_moe", "rank": 2},
    ]
    recipe = load_recipe(make_recipe(tmp_path / "delta", model, candidates=candidates, **LARGE))
    experiment = Experiment(recipe, tmp_path / "run")
    with pytest.raises(RunError, match=r"experts: delta_moe.* takes all experts together"):
        Calibration(experiment, InlinePool(1), View(), experiment.offers).run()


@pytest.mark.parametrize("kind", ["linear", "bank"])
def test_slices_that_are_solved_follow_from_bytes(kind: str) -> None:
    batch = (12,) if kind == "bank" else ()
    unit = Unit("layer", kind, 3, "mlp", {"gate": (*batch, 64, 32)}, {"gate": "site"})
    weights, stats = 12 * 64 * 32 * 4, 12 * 32 * 32 * 4
    room = 10**9
    assert solved_at_a_time([unit], weights, stats, "cpu", room) == 0
    solving = 32 * (20 * 32 + 2 * 12 * 64) * (12 if kind == "bank" else 1)  # gate and up
    if kind == "bank":
        tight = solving + (4 * weights + stats) * 5 // 12 + 12
        assert solved_at_a_time([unit], weights, stats, "cpu", tight) == 4  # three of one size
    with pytest.raises(RunError, match=r"^block 3: (one expert of )?layer takes .* MB"):
        solved_at_a_time([unit], weights, stats, "cpu", solving)
