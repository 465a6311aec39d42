import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from moesaic.orchestrator.pictures import byte_scale, draw
from moesaic.orchestrator.refinement import Moment, Refinement, Stage
from moesaic.orchestrator.refinement_pictures import draw_refinement
from moesaic.orchestrator.report import number_text, render, seconds_text, write_report
from moesaic.orchestrator.study import Told
from moesaic.orchestrator.study_pictures import draw_study, front, history
from moesaic.orchestrator.summary import RunSummary, StudySummary, module_names
from moesaic.search.knobs import Knob
from tests.orchestrator.summaries import summary, units


class Page(HTMLParser):
    """Cells of tables by id, addresses of everything that is loaded, and tags that never close."""

    EMPTY = frozenset({"meta", "img", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loaded += [values[key] or "" for key in ("src", "href") if key in values]
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables[values["id"] or ""] = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def run() -> RunSummary:
    return summary(blocks=3, experts=8)


@pytest.fixture(scope="module")
def report(run: RunSummary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(run, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    found = Page(report.read_text(encoding="utf-8"))
    assert found.open == []
    return found


def test_report_is_self_contained(page: Page, report: Path) -> None:
    assert len(page.loaded) == 5
    assert all(address.startswith("data:image/png;base64,") for address in page.loaded)
    assert not re.search(r"https?://|@import|url\(", report.read_text(encoding="utf-8"))


def test_report_holds_the_pictures_beside_it(page: Page, report: Path) -> None:
    beside = {path.read_bytes() for path in (report.parent / "pictures").glob("*.png")}
    assert {base64.b64decode(address.split(",")[1]) for address in page.loaded} == beside


def test_report_lists_every_unit_with_its_numbers(page: Page, run: RunSummary) -> None:
    rows = {row[0]: row for row in page.tables["units"][1:]}
    assert list(rows) == [unit.name for unit in run.units]
    for unit in run.units:
        found = run.measured(run.plan, unit)
        row = rows[unit.name]
        assert row[3] == f"{found.bytes:,}"
        assert float(row[4]) == pytest.approx(found.bytes * 8 / unit.parameters, abs=6e-4)
        assert float(row[5]) == pytest.approx(found.error, rel=1e-3)
        assert float(row[6]) == pytest.approx(found.score, rel=1e-3)


def test_report_shows_the_scores(page: Page, run: RunSummary) -> None:
    rows = {row[0]: row for row in page.tables["scores"][1:]}
    assert set(rows) == set(run.scores)
    for name, score in run.scores.items():
        assert rows[name][1] == f"{score['bytes']:,}"
        assert float(rows[name][4]) == pytest.approx(score["kl"], rel=1e-3)
    assert "412" not in rows["dense"][6]
    assert rows["plan"][6] == "812"


def test_report_counts_events_and_escapes_them(page: Page, report: Path) -> None:
    assert "12 × few tokens" in page.text
    assert "and 4 more" in page.text
    assert "damping 0.01 → 0.1 <not positive>" in page.text
    assert "&lt;not positive&gt;" in report.read_text(encoding="utf-8")


def test_report_choices_add_up(page: Page, run: RunSummary) -> None:
    rows = page.tables["choices"][1:]
    assert sum(int(row[1]) for row in rows) == len(run.plan.units)
    compressed = sum(run.measured(run.plan, unit).bytes for unit in run.units)
    assert sum(int(row[2].replace(",", "")) for row in rows) == compressed


@pytest.mark.parametrize("scored", [True, False])
def test_report_of_a_dense_model_without_evaluation(tmp_path: Path, scored: bool) -> None:
    run = summary(blocks=2, with_scores=scored)
    bare = RunSummary(**{**vars(run), "scores": {}, "events": (), "stage_seconds": {}})
    page = Page(write_report(bare, tmp_path).read_text(encoding="utf-8"))
    assert len(page.loaded) == 3
    assert "scores" not in page.tables and "Events" in page.text


def test_report_has_dashes_for_scores_without_a_number(tmp_path: Path) -> None:
    run = summary(blocks=2)
    ruined = {name: {**score, "perplexity": None, "kl": None} for name, score in run.scores.items()}
    page = Page(write_report(RunSummary(**{**vars(run), "scores": ruined}), tmp_path).read_text())
    rows = {row[0]: row for row in page.tables["scores"][1:]}
    assert rows["plan"][3:5] == ["–", "–"]
    assert len(page.loaded) >= 3


def study(several: bool, run: RunSummary) -> StudySummary:
    """Thirteen trials: two tried first, some given up, one failed."""
    states = ["complete"] * 9 + ["pruned"] * 3 + ["failed"]
    trials = [
        Told(
            number=number,
            state=state,
            values={"mix": 0.1 * number, "order": "any"},
            kl=None if state == "failed" else 1.0 / (1 + number),
            attributes={
                "bytes": run.budget_bytes - 50 + 10 * number,
                "fits": number < 6,
                "plan": f"plan {number // 2}",
                "predicted_loss": 0.5 / (1 + number // 2),
                **({"start": "even"} if number < 2 else {}),
            },
            steps={2: 1.0},
        )
        for number, state in enumerate(states)
    ]
    return StudySummary(
        journal=Path("runs/small/journal.log"),
        objectives=("bytes", "kl") if several else ("kl",),
        sampler="tpe",
        knobs=(
            Knob("mix", "of two", 0.0, 0.0, 2.0),
            Knob("order", "", "any", choices=("any", "x")),
        ),
        trials=trials,
        best=5,
        front=(0, 3, 8) if several else (),
        importances={"mix": 0.9, "order": 0.1} if not several else {},
        untold="all 10 complete trials are on the front" if several else "",
    )


@pytest.mark.parametrize("several", [False, True])
def test_a_study_has_its_own_section(several: bool, run: RunSummary, tmp_path: Path) -> None:
    found = study(several, run)
    drawn = draw_study(run, found, tmp_path)
    page = Page(render(replace(run, study=found), {}, {}, drawn))
    assert "13 trials by tpe, 9 complete, 3 pruned, 1 failed; 7 different plans" in page.text
    assert "optuna-dashboard runs/small/journal.log" in page.text
    share = "–" if several else "90 %"
    assert page.tables["knobs"][1] == ["mix", "of two", "0 to 2", "0", "0.5", share]
    assert page.tables["knobs"][2][2:5] == ["any, x", "any", "any"]
    third = "study_front" if several else "study_importances"
    assert set(drawn) == {"study_history", "study_predicted", third}
    # Of five plans: predictions order them as the measurements do.
    assert "5 of them" in drawn["study_predicted"][1] and "is 1.00" in drawn["study_predicted"][1]
    assert all(imread(path).std() > 0 for path, _ in drawn.values())
    if several:
        why = "all 10 complete trials are on the front"
        assert f"Importance of the knobs: {why}." in page.text
        assert found.to_json()["importances_untold"] == why
        assert page.tables["front"][0] == ["trial", "KL", "bytes", "within the budget"]
        assert [row[0] for row in page.tables["front"][1:]] == ["0 (even)", "3", "8"]
        assert page.tables["front"][3][1:] == ["0.1111", f"{run.budget_bytes + 30:,}", "no"]
    else:
        assert "importances_untold" not in found.to_json()
        assert "Importance of the knobs" not in page.text and "front" not in page.tables
        assert "among those of the least KL" in drawn["study_importances"][1]
    assert found.to_json()["best"] == {
        "trial": 5,
        "kl": 1 / 6,
        "bytes": run.budget_bytes,
        "values": {"mix": 0.5, "order": "any"},
    }


@pytest.mark.parametrize("limited", [False, True])
def test_the_line_of_a_history_follows_the_best_trial(limited: bool, run: RunSummary) -> None:
    """With a limit on the KL the smallest is the best, which here are the first of them."""
    found = study(limited, run)
    expected = [1.0 / (1 + min(number, 5)) for number in range(9)]
    if limited:
        within = [replace(t, feasible=t.kl is not None and t.kl <= 0.5) for t in found.trials]
        found = replace(found, trials=within, constraints={"kl": 0.5})
        expected = [0.5] * 8
    (axes,) = history(found).axes
    at, kl = axes.lines[0].get_data()
    assert list(np.asarray(at)) == list(range(9 - len(expected), 9))
    assert list(np.asarray(kl)) == expected


def test_a_front_of_three_has_all_figures_and_importances_say_of_what(
    run: RunSummary, tmp_path: Path
) -> None:
    found = study(True, run)
    timed = [
        replace(t, attributes={**t.attributes, "latency": 2.5 + t.number}) for t in found.trials
    ]
    shares = {"mix": 1.0}
    objectives = ("bytes", "kl", "latency")
    found = replace(found, objectives=objectives, trials=timed, importances=shares)
    drawn = draw_study(run, found, tmp_path)
    page = Page(render(replace(run, study=found), {}, {}, drawn))
    head, *rows = page.tables["front"]
    assert head == ["trial", "KL", "bytes", "ms per token", "within the budget"]
    assert [row[3] for row in rows] == ["2.5", "5.5", "10.5"]
    caption = drawn["study_importances"][1]
    assert "near the front, with little KL beside trials that have no more bytes and lat" in caption
    assert "The budget's own knob is left out" in caption


def test_the_front_has_trials_starts_and_baselines_with_their_names(run: RunSummary) -> None:
    found = replace(
        study(True, run),
        baselines={
            "rtn 4": {"bytes": run.budget_bytes + 30.0, "kl": 0.6},
            "untimed": {"kl": 0.1},  # what has no bytes has no place here
        },
    )
    figure = front(run, found)
    (axes,) = figure.axes
    scale, _ = byte_scale(run.budget_bytes + 30.0)

    def near(places: object, wanted: list[tuple[float, float]]) -> bool:
        return np.allclose(sorted(map(tuple, np.asarray(places))), sorted(wanted))

    known = [t for t in found.trials if t.kl is not None]
    at = {t.number: (t.attributes["bytes"] / scale, t.kl or 0.0) for t in known}
    beaten, best, starts, baseline = axes.collections
    assert near(beaten.get_offsets(), [at[n] for n in (1, 2, 4, 5, 6, 7)])
    assert near(best.get_offsets(), [at[5]])
    assert near(starts.get_offsets(), [at[0], at[1]])
    assert near(baseline.get_offsets(), [((run.budget_bytes + 30) / scale, 0.6)])
    unbeaten = axes.lines[0]
    assert near(np.transpose(unbeaten.get_data()), [at[n] for n in (0, 3, 8)])
    assert sorted(text.get_text() for text in axes.texts) == ["even", "even", "rtn 4"]


def test_refining_has_its_own_section(run: RunSummary, tmp_path: Path) -> None:
    stages = []
    for number, (method, kl) in enumerate((("evolve", 0.04), ("relax", 0.03))):
        start = 0.05 - 0.01 * number
        trace = (Moment(0, 8, 800, start), Moment(3, 40, 4000, kl))
        stages.append(Stage(method, start, kl, 3, 40, 4000, 12.5, trace))
    found = Refinement(sequences=64, length=255, stages=tuple(stages))
    drawn = draw_refinement(found, tmp_path)
    page = Page(render(replace(run, refinement=found), {}, {}, refinement=drawn))
    assert "64 sequences" in page.text and "KL 0.05 before, 0.03 after (-40.0 %)" in page.text
    assert page.tables["refinement"][1] == [
        *("evolve", "0.05", "0.04", "3", "40", "4,000", "12.5 s"),
    ]
    assert page.tables["refinement"][2][0] == "relax"
    assert imread(drawn["refinement"][0]).std() > 0
    assert found.metrics()["refine.2-relax.kl"] == 0.03
    assert "refinement" not in Page(render(run, {}, {})).tables
    nothing = Refinement(64, 255, (Stage("evolve", 0.0, 0.0, 0, 8, 800, 1.0, ()),))
    page = Page(render(replace(run, refinement=nothing), {}, {}))
    assert "KL 0 before, 0 after (+0.0 %)" in page.text


def test_pictures_decode_and_show_something(tmp_path: Path) -> None:
    files = draw(summary(blocks=2, experts=8), tmp_path)
    assert len(files) == 5
    for path in files.values():
        image = imread(BytesIO(path.read_bytes()), format="png")
        assert image.shape[0] > 250 and image.shape[1] > 500
        codes = (image[..., :3] * 255).astype(np.int64) @ np.array([1, 256, 65536])
        assert len(np.unique(codes)) > 20


def test_pictures_are_the_same_bytes_again(tmp_path: Path) -> None:
    run = summary(blocks=2)
    first = {name: path.read_bytes() for name, path in draw(run, tmp_path / "a").items()}
    again = {name: path.read_bytes() for name, path in draw(run, tmp_path / "b").items()}
    assert first == again


def test_part_bytes_sum_to_the_checkpoint(run: RunSummary) -> None:
    assert sum(run.part_bytes(None).values()) == run.dense_bytes
    for plan in run.plans.values():
        parts = run.part_bytes(plan)
        assert sum(parts.values()) == plan.bytes
        assert parts["not compressed"] == run.part_bytes(None)["not compressed"]


def test_starved_experts_saw_fewer_tokens_than_inputs(run: RunSummary) -> None:
    inputs = next(unit for unit in run.units if unit.kind == "bank").shapes["gate"][-1]
    assert all(load[0] < inputs <= min(load[1:]) for load in run.expert_load.values())
    assert {block: run.starved(block) for block in run.expert_load} == {1: [0], 2: [0]}


def test_module_names_are_short_and_tell_modules_apart() -> None:
    dense = set(module_names(units(3, 0)).values())
    assert dense == {"q", "k", "v", "o", "gate", "up", "down"}
    mixed = module_names(units(2, 4))
    assert mixed["model.layers.0.mlp.gate_proj"] == "mlp.gate"
    assert mixed["model.layers.1.mlp.shared_experts.gate_proj"] == "shared_experts.gate"
    assert mixed["model.layers.1.mlp.experts"] == "experts"


def test_numbers_are_written_for_people() -> None:
    assert [number_text(x) for x in (None, 0.0, 0.000123456, 12.3456, float("nan"))] == [
        "–",
        "0",
        "1.235e-04",
        "12.35",
        "–",
    ]
    assert [seconds_text(s) for s in (4.25, 59.99, 200, 3720)] == [
        "4.2 s",
        "60.0 s",
        "3 min 20 s",
        "1 h 02 min",
    ]
    assert byte_scale(2.5e9) == (1e9, "GB") and byte_scale(12) == (1.0, "bytes")
