"""Studies on disk: what a killed driver leaves, who may go on with what, damaged journals."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from moesaic.orchestrator import study_journal
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.study import Study
from moesaic.orchestrator.study_importances import Importances
from moesaic.orchestrator.study_journal import open_storage
from moesaic.search.knobs import Knob

KNOBS = [
    Knob("slope", "", 0.0, -1.0, 1.0),
    Knob("order", "", "any", choices=("any", "true")),
    Knob("fixed", "", 2.0, 2.0, 2.0),
]
BUDGET = "bits"
STARTS: Mapping[str, Mapping[str, Any]] = {"as predicted": {}, "steep": {"slope": 1.0}}


def study(folder: Path, **changes: Any) -> Study:
    about: dict[str, Any] = {
        "journal": folder / "journal.log",
        "name": "small",
        "knobs": KNOBS,
        "objectives": ["kl"],
        "sampler": "tpe",
        "seed": 3,
        "made_of": {"model": "a", "sequences": [[0, 4]]},
        "starts": STARTS,
    }
    return Study(**{**about, **changes})


def test_starts_come_first_and_fixed_knobs_have_their_value(tmp_path: Path) -> None:
    with study(tmp_path) as opened:
        first, second, third = (opened.ask() for _ in range(3))
        assert first.values == {"slope": 0.0, "order": "any", "fixed": 2.0}
        assert second.values["slope"] == 1.0
        assert [asked.start for asked in (first, second, third)] == [*STARTS, None]
        opened.note(first, {"bytes": 10})
        opened.tell(first, {"kl": 0.5})
        told = opened.told()
    assert [(t.number, t.state, t.kl, t.attributes) for t in told] == [
        (0, "complete", 0.5, {"bytes": 10, "start": "as predicted"})
    ]
    assert told[0].values["fixed"] == 2.0


def test_what_a_killed_driver_left_is_asked_for_again_and_counted_once(tmp_path: Path) -> None:
    with study(tmp_path) as opened:
        asked = [opened.ask() for _ in range(4)]
        opened.tell(asked[0], {"kl": 0.5})
        opened.tell_failed(asked[2], "no plan: too large")
    for _ in range(2):  # once more before any was asked for: nothing is there twice
        with study(tmp_path) as opened:
            assert [(t.number, t.state) for t in opened.told()] == [(0, "complete"), (2, "failed")]
    with study(tmp_path) as opened:
        again = [opened.ask() for _ in range(3)]
        assert [a.values for a in again[:2]] == [asked[1].values, asked[3].values]
        assert again[0].start == "steep"
        assert again[2].values not in [a.values for a in asked]
        for number, trial in enumerate(again):
            opened.tell(trial, {"kl": float(number)})
        told = opened.told()
    assert len(told) == 5
    assert told[1].attributes["reason"] == "no plan: too large"


def test_a_start_that_died_before_it_had_its_values_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with study(tmp_path) as opened:
        opened._study.ask()  # killed before anything was suggested
        opened.tell(opened.ask(), {"kl": 1.0})
    with study(tmp_path) as opened:
        again = opened.ask()
        assert (again.start, again.values) == (
            "as predicted",
            {"slope": 0.0, "order": "any", "fixed": 2.0},
        )


def test_a_resumed_sampler_does_not_draw_the_same_again(tmp_path: Path) -> None:
    drawn = []
    for _ in range(2):
        with study(tmp_path, starts={}, sampler="random") as opened:
            for _ in range(3):
                asked = opened.ask()
                drawn.append(asked.values["slope"])
                opened.tell(asked, {"kl": 1.0})
    assert len(set(drawn)) == 6


def test_a_trial_is_given_up_where_it_is_worse_than_half_of_the_others_were(
    tmp_path: Path,
) -> None:
    with study(tmp_path) as opened:
        for number in range(5):
            asked = opened.ask()
            for sequences, kl in ((2, 0.1), (4, 0.2), (8, 0.25)):
                # Too few to compare with, and the first of them are never given up.
                assert not opened.behind(asked, sequences, kl * (1 + 0.1 * (number - 2)))
            opened.tell(asked, {"kl": 0.25})
    with study(tmp_path) as opened:

        def given_up(*seen: tuple[int, float]) -> list[bool]:
            asked = opened.ask()
            return [opened.behind(asked, *step) for step in seen]

        assert given_up((2, 0.1), (4, 0.201)) == [False, True]
        assert given_up((2, 0.11), (4, 0.19)) == [True, False]
        # An easy beginning does not save one that has fallen behind since.
        assert given_up((2, 0.0999), (4, 0.30), (8, 0.30)) == [False, True, True]


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"made_of": {"model": "b", "sequences": [[0, 4]]}}, "else: the model differs (anoth"),
    "rows": (
        {"made_of": {"model": "a", "sequences": [[0, 3]]}},
        "sequences: [[0, 4]], now [[0, 3]",
    ),
    "range": (
        {"knobs": [Knob("slope", "", 0.0, -2.0, 1.0), *KNOBS[1:]]},
        "knobs slope: [-1.0, 1.0], now [-2.0, 1.0]",
    ),
    "knob": ({"knobs": KNOBS[:2]}, "knobs fixed: [2.0, 2.0], now none"),
    "objectives": ({"objectives": ["bytes", "kl"]}, 'objectives: ["kl"], now ["bytes", "kl"]'),
    "new": ({"resume": False}, "is there already: take another --output or --storage"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_study_of_something_else_is_refused_saying_what(change: str, tmp_path: Path) -> None:
    with study(tmp_path):
        pass
    changes, text = CHANGES[change]
    with pytest.raises(UserError, match="journal.log") as error, study(tmp_path, **changes):
        pass
    assert text in str(error.value)
    with study(tmp_path, sampler="random", seed=9):
        pass  # how knobs are drawn changes nothing that was found


def foreign(folder: Path, directions: list[str], trials: int) -> bytes:
    """A journal with a study of the same name that somebody else has made."""
    made = optuna.create_study(
        storage=open_storage(folder / "journal.log"), study_name="small", directions=directions
    )
    for number in range(trials):
        asked = made.ask()
        asked.suggest_float("lr", 0, 1)
        made.tell(asked, [float(number)] * len(directions))
    return (folder / "journal.log").read_bytes()


@pytest.mark.parametrize(
    ("directions", "trials"),
    [(["minimize", "minimize"], 0), (["maximize"], 0), (["minimize"], 1), (["minimize"] * 2, 3)],
)
def test_somebody_else_s_study_of_the_same_name_is_refused(
    directions: list[str], trials: int, tmp_path: Path
) -> None:
    before = foreign(tmp_path, directions, trials)
    told = r"journal.log: the study 'small' there was not made by moesaic: take another --storage"
    with pytest.raises(UserError, match=told), study(tmp_path):
        pass
    wanted = {"objectives": ["kl"]}
    with pytest.raises(UserError, match=told):
        study_journal.check_journal(tmp_path / "journal.log", "small", wanted, True)
    assert (tmp_path / "journal.log").read_bytes() == before


def test_a_study_whose_maker_died_before_it_said_of_what_is_gone_on_with(tmp_path: Path) -> None:
    made = optuna.create_study(
        storage=open_storage(tmp_path / "journal.log"), study_name="small", directions=["minimize"]
    )
    values = {"slope": 0.0, "order": "any"}
    made.enqueue_trial(values, user_attrs={"start": "as predicted", "wanted": values})
    wanted = {"objectives": ["kl"]}
    assert study_journal.check_journal(tmp_path / "journal.log", "small", wanted, True) is None
    with study(tmp_path) as opened:
        assert [opened.ask().start for _ in range(3)] == [*STARTS, None]


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ("tiny", "small", "the model differs: tiny, now small. Undo"),
        ("tiny", "tiny", "the model differs: files of tiny have changed. Undo"),
        (None, "tiny", "the model differs (another one, or its files have changed). Undo"),
    ],
)
def test_models_are_told_by_their_names_and_compared_by_their_contents(
    before: str | None, now: str, told: str, tmp_path: Path
) -> None:
    name = study_journal.MODEL_NAME
    known = {"model": "a", **({name: before} if before else {})}
    with study(tmp_path, made_of=known):
        pass
    with study(tmp_path, made_of={"model": "a", name: now}):
        pass  # the same model at another place
    with pytest.raises(UserError) as error, study(tmp_path, made_of={"model": "b", name: now}):
        pass
    assert told in str(error.value)


def test_another_study_may_lie_in_the_same_journal(tmp_path: Path) -> None:
    with study(tmp_path) as opened:
        opened.tell(opened.ask(), {"kl": 1.0})
    with study(tmp_path, name="other", made_of={"model": "b"}) as opened:
        assert opened.told() == []


def test_a_line_that_was_cut_off_is_taken_away(tmp_path: Path) -> None:
    with study(tmp_path) as opened:
        opened.tell(opened.ask(), {"kl": 1.0})
    journal = tmp_path / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"wor')
    with study(tmp_path) as opened:
        assert journal.read_bytes().startswith(whole)
        assert all(json.loads(line) for line in journal.read_bytes().splitlines())
        opened.tell(opened.ask(), {"kl": 2.0})
    with study(tmp_path) as opened:
        assert [t.kl for t in opened.told()] == [1.0, 2.0]


@pytest.mark.parametrize("content", [b"not a journal\n", b"\xff\xfe\x00", b'{"op_code": 1}\n'])
def test_a_damaged_journal_is_told_and_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    journal = tmp_path / "journal.log"
    journal.write_bytes(content)
    with pytest.raises(UserError, match=r"journal.log: is damaged.*--storage"), study(tmp_path):
        pass
    assert journal.read_bytes() == content


@pytest.mark.parametrize(
    "garbage", [b"gar\xffbage\n", b"[]\n", b'{"op_code": 99, "worker_id": "x"}\n', b"{}\n", b"\n"]
)
def test_garbage_in_the_middle_is_told_and_nothing_is_lost(garbage: bytes, tmp_path: Path) -> None:
    with study(tmp_path) as opened:
        opened.tell(opened.ask(), {"kl": 1.0})
    journal = tmp_path / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    content = b"".join([*lines[:4], garbage, *lines[4:]])
    journal.write_bytes(content)
    with pytest.raises(UserError, match=r"journal.log: is damaged"), study(tmp_path):
        pass
    assert journal.read_bytes() == content


def test_what_a_study_says_that_it_was_made_of_is_told_short_and_without_escapes(
    tmp_path: Path,
) -> None:
    made_of = {"model": "a", **{f"\x1b[2J{number}": "\n" * 500 for number in range(500)}}
    with study(tmp_path, made_of=made_of):
        pass
    with pytest.raises(UserError, match="made with something else") as error, study(tmp_path):
        pass
    assert len(str(error.value)) < 2000 and str(error.value).isprintable()


@pytest.mark.parametrize("low", ["[" * 5000, "1e999"])
def test_a_range_that_is_none_is_damage(low: str, tmp_path: Path) -> None:
    with study(tmp_path) as opened:
        opened.tell(opened.ask(), {"kl": 1.0})
    journal = tmp_path / "journal.log"
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
    drawn = next(line for line in lines if "distribution" in line)
    attributes = f'{{"log": false, "step": 1, "low": {low}, "high": 2}}'
    drawn["distribution"] = f'{{"name": "IntDistribution", "attributes": {attributes}}}'
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"journal.log: is damaged"), study(tmp_path):
        pass


@pytest.mark.parametrize("key", ["user_attrs", "system_attrs"])
def test_a_trial_without_its_attributes_is_damage(key: str, tmp_path: Path) -> None:
    with study(tmp_path) as opened:
        opened.tell(opened.ask(), {"kl": 1.0})
    journal = tmp_path / "journal.log"
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
    started = next(line for line in lines if line.get(key))
    started[key] = None
    content = "".join(f"{json.dumps(line)}\n" for line in lines)
    journal.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"journal.log: is damaged"), study(tmp_path) as opened:
        opened.told()


def test_a_lock_that_a_dead_process_left_in_the_journal_is_waited_for_and_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with study(tmp_path) as opened:
        opened.tell(opened.ask(), {"kl": 1.0})
    monkeypatch.setattr(study_journal, "_GRACE_SECONDS", 0.5)
    (tmp_path / "journal.log.lock").write_bytes(b"")
    with study(tmp_path) as opened:
        opened.tell(opened.ask(), {"kl": 2.0})
        assert [t.kl for t in opened.told()] == [1.0, 2.0]


def test_a_place_that_may_not_be_written_is_told() -> None:
    with (
        pytest.raises(UserError, match=r"--storage: /proc cannot be written"),
        study(Path("/proc")),
    ):
        pass


def test_a_journal_that_may_not_be_opened_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with study(tmp_path):
        pass

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    text = r"journal.log: cannot be used: Permission denied"
    with pytest.raises(UserError, match=text), study(tmp_path):
        pass


def test_infeasible_trials_are_told_apart_and_stand_in_no_front(tmp_path: Path) -> None:
    with study(tmp_path, objectives=["bytes", "kl"]) as opened:
        for size, kl, excess in ((10, 3.0, 0.0), (20, 1.0, 0.5), (30, 2.0, -1.0)):
            opened.tell(opened.ask(), {"kl": kl, "bytes": float(size)}, {"latency": excess})
        assert [t.feasible for t in opened.told()] == [True, False, True]
        assert opened.front() == [0, 2]


def test_a_folder_in_its_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "journal.log").mkdir()
    with pytest.raises(UserError, match=r"journal.log: cannot be used"), study(tmp_path):
        pass


HOLD = """
import fcntl, os, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f"{os.getpid()}\\n")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_one_driver_at_a_time_and_a_killed_one_does_not_count(tmp_path: Path) -> None:
    with study(tmp_path):
        pass
    (tmp_path / "journal.log.driver").write_text("")
    command = [sys.executable, "-c", HOLD, str(tmp_path / "journal.log.driver")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=f"process {other.pid} is at work"), study(tmp_path):
            pass
        other.kill()
    with study(tmp_path):
        pass


def test_two_objectives_have_a_front(tmp_path: Path) -> None:
    with study(tmp_path, objectives=["bytes", "kl"], sampler="nsga2") as opened:
        for size, kl in ((10, 3.0), (20, 1.0), (30, 2.0)):
            opened.tell(opened.ask(), {"kl": kl, "bytes": float(size)})
        assert opened.front() == [0, 1]
        assert [t.kl for t in opened.told()] == [3.0, 1.0, 2.0]
        told = "it takes 10 complete trials to tell, and there are 3"
        assert opened.importances(BUDGET) == Importances({}, told)


def test_importances_need_some_trials_and_tell_what_matters(tmp_path: Path) -> None:
    with study(tmp_path, sampler="random") as opened:
        for number in range(40):
            assert bool(opened.importances(BUDGET).untold) is (number < 10)
            asked = opened.ask()
            opened.tell(asked, {"kl": abs(float(asked.values["slope"]) - 0.3)})
        found = opened.importances(BUDGET).shares
    assert next(iter(found)) == "slope" and sum(found.values()) == pytest.approx(1)


def test_importances_are_of_what_lies_near_the_front(tmp_path: Path) -> None:
    """KL halves with the budget, and grows with the distance from one slope."""
    knobs = [*KNOBS, Knob(BUDGET, "", 4.0, 2.0, 8.0)]
    with study(tmp_path, knobs=knobs, objectives=["bytes", "kl"], sampler="random") as opened:
        for _ in range(120):
            asked = opened.ask()
            bits = float(asked.values[BUDGET])
            kl = 0.5**bits * (1 + abs(float(asked.values["slope"]) - 0.3))
            opened.tell(asked, {"kl": kl, "bytes": 100 * bits})
        found = opened.importances(BUDGET).shares
        assert found.keys() == {"slope", "order"} and found["slope"] > found["order"]


@pytest.mark.parametrize(
    ("objectives", "told"),
    [
        (["kl"], "all 12 complete trials have the same KL"),
        (["bytes", "kl"], "all 12 complete trials are on the front"),
    ],
)
def test_where_all_trials_are_as_good_nothing_is_told_of_knobs(
    objectives: list[str], told: str, tmp_path: Path
) -> None:
    with study(tmp_path, objectives=objectives, sampler="random") as opened:
        for number in range(12):
            kl = 0.5 if len(objectives) == 1 else 1.0 / (1 + number)
            opened.tell(opened.ask(), {"kl": kl, "bytes": float(number)})
        assert opened.importances(BUDGET) == Importances({}, told)


def test_no_knob_left_to_vary_is_told(tmp_path: Path) -> None:
    with study(tmp_path, knobs=[KNOBS[2]], starts={}) as opened:
        for number in range(10):
            opened.tell(opened.ask(), {"kl": float(number)})
        told = "no knob but the budget's was left to vary"
        assert opened.importances(BUDGET) == Importances({}, told)


def test_a_trial_that_is_given_back_comes_first_with_its_values(tmp_path: Path) -> None:
    with study(tmp_path) as opened:
        for _ in range(2):
            opened.tell(opened.ask(), {"kl": 1.0})
        drawn = opened.ask()
        opened.give_back()
        assert len(opened.told()) == 2
        states = [trial.state.name for trial in opened._study.get_trials(deepcopy=False)]
        assert states == ["COMPLETE", "COMPLETE", "FAIL", "WAITING"]
    with study(tmp_path) as opened:
        again = opened.ask()
        assert again.values == drawn.values
        opened.note(again, {"seconds": 0.001})
        opened.tell(again, {"kl": 1.0})
        times = opened.told()[-1].times
    assert times is not None and times[1] - times[0] == pytest.approx(0.001, abs=1e-5)


def test_the_table_has_a_row_per_trial(tmp_path: Path) -> None:
    with study(tmp_path) as opened:
        opened.tell(opened.ask(), {"kl": 1.0})
        opened.tell_failed(opened.ask(), "broken")
        table = opened.table()
    assert list(table["trial"]) == [0, 1] and list(table["state"]) == ["complete", "failed"]
    assert table["reason"][1] == "broken" and table["knob slope"][1] == 1.0
    assert json.loads(table.to_json())
