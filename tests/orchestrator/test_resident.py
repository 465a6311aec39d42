"""A resident model: the numbers of evaluate_rows, without computing anything twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moesaic.methods.base import Unit
from moesaic.orchestrator.evaluate import Judge, evaluate_rows
from moesaic.orchestrator.mixtures import Mixture, packed
from moesaic.orchestrator.pieces import write_piece
from moesaic.orchestrator.resident import Kept, evaluate_plan, release
from moesaic.orchestrator.worker import WorkerState, plain
from tests.orchestrator.conftest import Tiny
from tests.orchestrator.planning import Choice, channel, make_pieces, mixed, open_model

ROWS, TOTAL = (1, 6), 7


class Judged:
    """A model with a text, judged by one worker that keeps it and one that streams it."""

    def __init__(self, folder: Path, path: Path) -> None:
        ids = torch.arange(7 * 11).view(7, 11) % 90
        save_file({"ids": ids.int()}, path / "ids.safetensors")
        self.judge = Judge(
            model=str(folder),
            dtype="float32",
            trust_remote_code=False,
            fingerprint="tiny",
            ids=str(path / "ids.safetensors"),
            ids_digest="ids",
            batch=2,
            store=str(path / "store"),
        )
        self.state, self.streaming = WorkerState(1), WorkerState(1)
        self.streamed({})  # remembers the dense model's hidden states

    def streamed(self, pieces: dict[str, str]) -> list[float]:
        found: list[float] = evaluate_rows(self.streaming, plain(self.judge), ROWS, pieces)["kl"]
        return found

    def resident(self, pieces: dict[str, str], **limits: Any) -> dict[str, Any]:
        judge = plain(self.judge)
        return evaluate_plan(self.state, judge, ROWS, pieces, total=TOTAL, **limits)


def paths(folder: Path, model: Path, choose: Any) -> dict[str, str]:
    made = make_pieces(open_model(model), choose, folder)
    return {unit: str(path) for unit, path in made.items() if path is not None}


def in_block(number: int) -> Any:
    """Three bits in one block, nothing elsewhere."""

    def choose(index: int, unit: Unit) -> Choice:
        return channel(3) if unit.block == number else None

    return choose


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama", "deepseek_v3"])
def test_numbers_are_those_of_evaluate_rows_plan_after_plan(
    family: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = tiny(family)
    judged = Judged(folder, tmp_path)
    last = open_model(folder).blocks - 1
    plans = [
        paths(tmp_path / "mixed", folder, mixed),
        paths(tmp_path / "last", folder, in_block(last)),
        {},
        paths(tmp_path / "first", folder, in_block(0)),
        paths(tmp_path / "mixed", folder, mixed),
    ]
    for pieces in plans:
        assert judged.resident(pieces)["kl"] == judged.streamed(pieces)
    assert sum(judged.resident(plans[0])["kl"]) > 0


def test_blocks_before_the_first_change_do_not_run_again(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama", num_hidden_layers=4)
    judged = Judged(folder, tmp_path)
    third = paths(tmp_path / "third", folder, in_block(2))
    both = {**paths(tmp_path / "second", folder, in_block(1)), **third}
    first = judged.resident(third)
    assert (first["ran"], first["built"], first["swapped"]) == (4, 4, 0)
    second = judged.resident(both)
    units = sum(unit.block == 1 for unit in open_model(folder).units())
    assert (second["ran"], second["built"], second["swapped"]) == (3, 0, units)
    again = judged.resident(third)  # all of it is known
    assert (again["ran"], again["swapped"]) == (0, 0)
    assert again["kl"] == first["kl"] == judged.streamed(third)
    dense = judged.resident({})
    assert dense["ran"] == 2  # what comes before the third block was in both
    assert dense["kl"] == pytest.approx([0.0] * 5, abs=1e-9)


@pytest.mark.parametrize("limits", [{"hidden_bytes": 0}, {"hidden_bytes": 12_000}])
def test_little_memory_costs_time_and_changes_nothing(
    limits: dict[str, int], tiny: Tiny, tmp_path: Path
) -> None:
    folder = tiny("qwen3_moe", num_hidden_layers=3)
    judged = Judged(folder, tmp_path)
    for choose in (mixed, in_block(2), mixed):
        pieces = paths(tmp_path / ("mixed" if choose is mixed else "third"), folder, choose)
        found = judged.resident(pieces, weight_bytes=10_000, **limits)
        assert found["kl"] == judged.streamed(pieces)
        assert found["ran"] >= 1


def test_kept_tensors_stay_within_their_bytes_and_the_oldest_go() -> None:
    kept = Kept(100)
    for name in "abc":
        kept.put(name, [torch.zeros(10)])
        kept.get("a")
    kept.put("large", [torch.zeros(30)])
    assert kept.nbytes == 80
    assert kept.get("a") is not None and kept.get("b") is None and kept.get("c") is not None
    assert kept.get("large") is None


def test_an_error_or_a_release_leaves_nothing_behind(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")
    judged = Judged(folder, tmp_path)
    pieces = paths(tmp_path / "pieces", folder, in_block(1))
    first = judged.resident(pieces)
    with pytest.raises(FileNotFoundError):
        judged.resident({next(iter(pieces)): str(tmp_path / "gone.safetensors")})
    for _ in range(2):
        again = judged.resident(pieces)
        assert (again["kl"], again["built"], again["ran"]) == (first["kl"], 2, 2)
        release(judged.state)


def test_a_mixture_that_is_told_is_the_one_that_is_written(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe")
    judged = Judged(folder, tmp_path)
    bank = next(unit for unit in open_model(folder).units() if unit.kind == "bank")

    def only_bank(bits: int) -> Any:
        def choose(index: int, unit: Unit) -> Choice:
            return channel(bits) if unit.name == bank.name else None

        return choose

    low, high = (paths(tmp_path / f"{bits}", folder, only_bank(bits))[bank.name] for bits in (2, 5))
    experts = range(bank.shapes["gate"][0])

    def mixture(odd: str, even: str) -> Mixture:
        odds = {member: [e for e in experts if (e + len(member)) % 2] for member in bank.shapes}
        evens = {member: [e for e in experts if e not in own] for member, own in odds.items()}
        return [
            (member, path, own[member])
            for member in bank.shapes
            for path, own in ((odd, odds), (even, evens))
        ]

    one, other = mixture(low, high), mixture(high, low)
    written = tmp_path / "written.safetensors"
    write_piece(written, packed(one), {})

    told = judged.resident({bank.name: "told"}, mixtures={"told": one})
    assert told["kl"] == judged.streamed({bank.name: str(written)})
    # Another mixture of the same pieces takes the first one's place.
    turned = judged.resident({bank.name: "turned"}, mixtures={"turned": other})
    assert turned["kl"] != told["kl"] and turned["built"] == 0
    assert judged.resident({bank.name: "told"}, mixtures={"told": one})["kl"] == told["kl"]


def test_a_sparing_worker_keeps_what_comes_up_again(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama", num_hidden_layers=4)
    judged = Judged(folder, tmp_path)
    third = paths(tmp_path / "third", folder, in_block(2))
    both = {**third, **paths(tmp_path / "last", folder, in_block(3))}
    ran = []
    for pieces in (third, both, third, both):
        found = judged.resident(pieces, sparing=True)
        assert found["kl"] == judged.streamed(pieces)
        ran.append(found["ran"])
    # What is before the third block is kept the second time, with that block the same; all of the
    # first plan when it comes up again.
    assert ran == [4, 4, 1, 1]
    assert judged.resident(third, sparing=True)["ran"] == 0
