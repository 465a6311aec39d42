"""Slopes of a plan's KL: against autograd through transformers' own model, and differences."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.methods import svd
from moesaic.methods.base import Unit
from moesaic.orchestrator.evaluate import Judge, evaluate_rows
from moesaic.orchestrator.pieces import dense_members, is_cut, read_piece, write_cut, write_piece
from moesaic.orchestrator.resident import evaluate_plan
from moesaic.orchestrator.slopes import DENSE, plan_slopes
from moesaic.orchestrator.worker import WorkerState, plain
from tests.orchestrator.conftest import Tiny
from tests.orchestrator.planning import Choice, channel, make_pieces, mixed, open_model

ROWS = (1, 6)


class Sloped:
    """A model with a text, a plan, and candidates of two and five bits for all units; or of rank
    two and five, those of rank two and the plan's of rank three being cuts."""

    def __init__(self, folder: Path, path: Path, ranks: bool = False) -> None:
        ids = torch.arange(7 * 11).view(7, 11) * 37 % 90
        save_file({"ids": ids.int()}, path / "ids.safetensors")
        self.ids = ids[slice(*ROWS)]
        self.folder = folder
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
        self.state = WorkerState(1)
        evaluate_rows(self.state, plain(self.judge), ROWS, {})
        self.units = open_model(folder).units()
        if ranks:
            whole = self.factored(path / "pieces")
            three, two = (self.cuts(whole, rank) for rank in (3, 2))
            self.pieces = {u.name: three[u.name] for n, u in enumerate(self.units) if n % 5 != 3}
            both = [two, whole]
        else:
            self.pieces = self.paths(path / "plan", mixed)
            both = [self.paths(path / f"{bits}", every(bits)) for bits in (2, 5)]
        self.candidates = {u.name: [DENSE, *(found[u.name] for found in both)] for u in self.units}

    def paths(self, folder: Path, choose: Any) -> dict[str, str]:
        made = make_pieces(open_model(self.folder), choose, folder)
        return {unit: str(path) for unit, path in made.items() if path is not None}

    def factored(self, folder: Path) -> dict[str, str]:
        """Rank five of all units, where the pieces of a store would lie."""
        model, found = open_model(self.folder), {}
        (folder / "00").mkdir(parents=True)
        for number, unit in enumerate(self.units):
            members = svd.compress(model.read_unit(unit), {}, svd.Options(rank=5)).members
            file = folder / "00" / f"{number:04x}.safetensors"
            write_piece(file, members, {"unit": unit.name})
            found[unit.name] = str(file)
        return found

    def cuts(self, whole: dict[str, str], rank: int) -> dict[str, str]:
        """Cuts of them, written out, as workers get them."""
        found = {}
        for unit in self.units:
            of = Path(whole[unit.name])
            file = of.with_name(f"{of.stem}{rank}.safetensors")
            write_cut(file, of.stem, dict.fromkeys(unit.shapes, rank), {"unit": unit.name})
            assert is_cut(file)
            found[unit.name] = str(file.with_name(f"{rank}-{file.name}"))
            write_piece(Path(found[unit.name]), read_piece(file), {"unit": unit.name})
        return found

    def sloped(self) -> dict[str, Any]:
        return plan_slopes(self.state, plain(self.judge), ROWS, self.pieces, self.candidates)

    def members(self, unit: Unit, path: str) -> dict[str, Tensor]:
        """As the worker has them: a bank's ``[E, out, in]``, a linear's ``[1, out, in]``."""
        model = open_model(self.folder)
        found = dense_members({"": path})[""] if path else model.read_unit(unit)
        return {m: w.float() if unit.kind == "bank" else w.float()[None] for m, w in found.items()}


def every(bits: int) -> Any:
    def choose(index: int, unit: Unit) -> Choice:
        return channel(bits)

    return choose


def kl_of(model: Any, dense: Tensor, ids: Tensor) -> Tensor:
    """Σ KL(dense ‖ model) over all predicted tokens."""
    log_q = model(ids).logits[:, :-1].log_softmax(-1)
    log_p = dense[:, :-1].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize(
    ("family", "ranks"),
    [("llama", False), ("qwen3_moe", False), ("gpt_oss", False), ("qwen3_moe", True)],
)
def test_slopes_are_those_of_autograd_through_transformers(
    family: str, ranks: bool, tiny: Tiny, tmp_path: Path
) -> None:
    made = Sloped(tiny(family), tmp_path, ranks)
    found = made.sloped()
    kl = evaluate_plan(made.state, plain(made.judge), ROWS, made.pieces, total=7)["kl"]
    assert found["kl"] == pytest.approx(kl, rel=1e-6)

    model = AutoModelForCausalLM.from_pretrained(
        made.folder, dtype=torch.float32, experts_implementation="eager"
    )
    with torch.no_grad():
        dense = model(made.ids).logits
    streamed = open_model(made.folder)
    parameters: dict[str, dict[str, Tensor]] = {}
    own: dict[str, dict[str, Tensor]] = {}
    for unit in made.units:
        own[unit.name] = made.members(unit, made.pieces.get(unit.name, DENSE))
        block = model.get_submodule(streamed.family.block.format(block=unit.block))
        module = block.get_submodule(streamed.unit_module(unit))
        given = (
            {}
            if unit.name not in made.pieces
            else dense_members({unit.name: made.pieces[unit.name]})[unit.name]
        )
        prefix = f"{streamed.unit_module(unit)}."
        for name, value in streamed.unit_state(unit, given).items():
            parameter = module.get_parameter(name.removeprefix(prefix))
            parameter.data = value.float().clone()
            parameters.setdefault(unit.name, {})[name] = parameter
    total = kl_of(model, dense, made.ids)
    assert float(total.detach()) == pytest.approx(sum(kl), rel=1e-4)
    total.backward()

    largest = max(
        abs(x) for u in found["slopes"].values() for m in u.values() for r in m for x in r
    )
    assert largest > 0
    for unit in made.units:
        # Along the straight line to each candidate, as the model's own parameters lie.
        here = streamed.unit_state(unit, _linear(unit, own[unit.name]))
        for number, path in enumerate(made.candidates[unit.name]):
            there = streamed.unit_state(unit, _linear(unit, made.members(unit, path)))
            wanted = sum(
                float((parameter.grad.double() * (there[n] - here[n]).double()).sum())
                for n, parameter in parameters[unit.name].items()
                if parameter.grad is not None and not n.endswith("bias")
            )
            slopes = found["slopes"][unit.name]
            mine = sum(sum(values[number]) for values in slopes.values())
            assert mine == pytest.approx(wanted, abs=2e-5 * largest + 1e-3 * abs(wanted))
            for member, values in slopes.items():
                assert len(values[number]) == own[unit.name][member].shape[0]


def _linear(unit: Unit, members: dict[str, Tensor]) -> dict[str, Tensor]:
    return members if unit.kind == "bank" else {"weight": members["weight"][0]}


def test_slopes_of_experts_are_differences_of_the_kl(tiny: Tiny, tmp_path: Path) -> None:
    made = Sloped(tiny("qwen3_moe"), tmp_path)
    unit = next(u for u in made.units if u.kind == "bank" and u.name in made.pieces)
    slopes = made.sloped()["slopes"][unit.name]
    here = dense_members({"": made.pieces[unit.name]})[""]
    there = dense_members({"": made.candidates[unit.name][1]})[""]
    expert = max(range(len(slopes["down"][1])), key=lambda e: abs(slopes["down"][1][e]))

    def kl(step: float) -> float:
        moved = {member: weight.clone() for member, weight in here.items()}
        moved["down"][expert] += step * (there["down"][expert] - here["down"][expert])
        model = open_model(made.folder)
        rest = dense_members({u: p for u, p in made.pieces.items() if u != unit.name})
        replaced = {**rest, unit.name: moved}
        with torch.no_grad():
            ends = []
            for given in (replaced, {}):
                hidden = model.embed(made.ids)
                for index in range(model.blocks):
                    hidden = model.run_block(index, model.load_block(index, given), hidden)
                logits = model.logits(model.final_norm(hidden)).double()
                ends.append(logits[:, :-1].log_softmax(-1))
        return float((ends[1].exp() * (ends[1] - ends[0])).sum())

    step = 0.02
    difference = (kl(step) - kl(-step)) / (2 * step)
    assert slopes["down"][1][expert] == pytest.approx(difference, rel=0.05)


def test_the_model_is_as_it_was_afterwards(tiny: Tiny, tmp_path: Path) -> None:
    made = Sloped(tiny("qwen3_moe"), tmp_path)
    before = evaluate_plan(made.state, plain(made.judge), ROWS, made.pieces, total=7)
    first, second = made.sloped(), made.sloped()
    assert first["slopes"] == second["slopes"]
    after = evaluate_plan(made.state, plain(made.judge), ROWS, made.pieces, total=7)
    assert after["kl"] == before["kl"] and after["built"] == after["swapped"] == 0
