"""Encoders of sentences, from text to checkpoint, against plain transformers.

The reference pads sentences and masks the padding, as users of transformers do; ours runs those of
one length together.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerFast

from moesaic.orchestrator import calibrate, gradients, sums
from moesaic.orchestrator.console import score_table
from moesaic.orchestrator.embeddings import (
    Sentences,
    noise_gradients,
    pool,
    read_pooling,
    sentence_score,
)
from moesaic.orchestrator.errors import RecipeError, UserError
from moesaic.orchestrator.evaluate import dense_members, evaluate_rows
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.forecast import forecast
from moesaic.orchestrator.listing import read_run
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.recipe_sections import Source, Texts
from moesaic.orchestrator.statistics import load_stats
from moesaic.orchestrator.store import Store
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.study_terms import check_tune
from moesaic.orchestrator.texts import draw, framed_windows, sentences
from moesaic.orchestrator.walk import Walk
from moesaic.orchestrator.worker import WorkerState
from tests.orchestrator.inline import Project
from tests.orchestrator.planning import grouped, make_pieces
from tests.orchestrator.projects import byte_tokenizer, make_model_folder, make_recipe

LENGTH, SENTENCES = 96, 11
PROSE = [{"file": "builtin:heldout.prose.txt"}]
SECTIONS: dict[str, Any] = {
    "calibration": {"texts": [{"file": "builtin:calibration.prose.txt"}], "length": 20},
    "evaluation": {"texts": PROSE, "sequences": SENTENCES, "length": LENGTH},
    "budget": {"bits_per_weight": 8},
}


def sentence_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one special token before and behind every text."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", 0)]
    )
    return tokenizer


def pooled_by(folder: Path, **modes: bool) -> None:
    """Says how to pool as sentence-transformers does."""
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    listed = [{"path": p, "type": f"sentence_transformers.models.{k}"} for k, p in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    config = {"word_embedding_dimension": 48, **modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pooling → a tiny encoder that wants it."""
    found = {}
    for name, key in (("mean", "pooling_mode_mean_tokens"), ("first", "pooling_mode_cls_token")):
        sizes = {"dtype": torch.float32, "max_position_embeddings": LENGTH}
        folder = make_model_folder(tmp_path_factory.mktemp(name), "bert", **sizes)
        sentence_tokenizer().save_pretrained(folder)
        pooled_by(folder, **{key: True, "pooling_mode_max_tokens": False})
        found[name] = folder
    return found


@pytest.fixture(params=["mean", "first"])
def experiment(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path: Path
) -> Experiment:
    file = make_recipe(tmp_path, models[request.param], **SECTIONS)
    return Experiment(load_recipe(file), tmp_path / "runs" / "small")


def embeddings(model: Any, ids: Tensor, pooling: str) -> Tensor:
    """By plain transformers, padded and masked, ``[sentences, hidden]`` in float64."""
    mask = (ids >= 0).long()
    with torch.no_grad():
        hidden = model(input_ids=ids.clamp_min(0), attention_mask=mask).last_hidden_state.double()
    weights = mask[..., None].double()
    vector = hidden[:, 0] if pooling == "first" else (hidden * weights).sum(1) / weights.sum(1)
    return vector / vector.norm(dim=-1, keepdim=True)


def cosines(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))


# Text


def test_sentences_are_whole_different_and_framed_by_the_tokenizer() -> None:
    tokenizer = sentence_tokenizer()
    section = Texts(texts=[Source(file=builtin("heldout.prose.txt"))], sequences=60, length=90)
    found = draw(section, tokenizer, 257, "evaluation", sentences)
    rows = [[token for token in row.tolist() if token >= 0] for row in found.ids]
    text = " ".join(Path(builtin("heldout.prose.txt")).read_text(encoding="utf-8").split())
    lengths = {len(row) for row in rows}
    assert len(lengths) > 5 and max(lengths) == 90 == found.ids.shape[1]
    assert len({tuple(row) for row in rows}) == 60
    for row, padded in zip(rows, found.ids.tolist(), strict=True):
        assert padded == row + [-1] * (90 - len(row))
        assert row[0] == row[-1] == 0
        said = tokenizer.decode(row[1:-1])
        assert said in text
        if len(row) < 90:
            assert said[-1] in ".!?\"')" and len(said.split()) >= 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two three four five. Six seven eight nine ten!", 2),
        ("See e.g. the part\nthat is about names. No more.", 1),
        ('He said "one two three four." Then he went on to sleep.', 2),
        ("A Heading Without A Mark\n\nAnd what comes below it here.", 1),
        ("def f(x): return x + 1", 0),
        ("", 0),
    ],
)
def test_sentences_end_where_readers_would_end_them(
    tmp_path: Path, text: str, expected: int
) -> None:
    (tmp_path / "a.txt").write_text(text)
    section = Texts(texts=[Source(file=str(tmp_path / "a.txt"))], sequences=max(1, expected))
    if expected:
        found = draw(section, sentence_tokenizer(), 257, "evaluation", sentences)
        assert len(found.ids) == expected
    with pytest.raises(UserError, match=f"has {expected} sentences of 5 words or more, but"):
        more = section.model_copy(update={"sequences": expected + 1})
        draw(more, sentence_tokenizer(), 257, "evaluation", sentences)


def test_windows_of_running_text_are_framed_and_of_one_length() -> None:
    section = Texts(texts=[Source(file=builtin("heldout.prose.txt"))], sequences=9, length=17)
    found = draw(section, sentence_tokenizer(), 257, "calibration", framed_windows)
    assert found.ids.shape == (9, 17)
    assert not found.ids[:, [0, -1]].any() and found.ids[:, 1:-1].min() > 0
    with pytest.raises(UserError, match="2 tokens leave none between"):
        short = section.model_copy(update={"length": 2})
        draw(short, sentence_tokenizer(), 257, "calibration", framed_windows)


def builtin(name: str) -> str:
    from moesaic.orchestrator.recipe_values import resolve

    return resolve(f"builtin:{name}", Path())


# Pooling


def test_without_a_word_about_it_the_mean_is_taken(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == "mean"


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
    ],
)
def test_pooling_is_read_where_sentence_transformers_keeps_it(
    tmp_path: Path, modes: Mapping[str, bool], expected: str
) -> None:
    pooled_by(tmp_path, **modes)
    assert read_pooling(tmp_path) == expected


@pytest.mark.parametrize(
    ("modes", "reason"),
    [
        ({"pooling_mode_max_tokens": True}, "config.json: pooling_mode_max_tokens: exactly one of"),
        ({}, "no pooling_mode is on"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "exactly one of"),
    ],
)
def test_pooling_that_is_not_understood_is_told(
    tmp_path: Path, modes: Mapping[str, bool], reason: str
) -> None:
    pooled_by(tmp_path, **modes)
    with pytest.raises(UserError, match=reason):
        read_pooling(tmp_path)


@pytest.mark.parametrize("content", ["{", "[3]", "{}", '[{"type": "a.Pooling", "path": "none"}]'])
def test_damaged_modules_are_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    if content == "{}":
        assert read_pooling(tmp_path) == "mean"
        return
    with pytest.raises(UserError, match=r"modules\.json: the pooling cannot be read"):
        read_pooling(tmp_path)


def test_a_layer_behind_the_pooling_is_refused(tmp_path: Path) -> None:
    pooled_by(tmp_path, pooling_mode_mean_tokens=True)
    listed = json.loads((tmp_path / "modules.json").read_text())
    listed.append({"path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"modules\.json: Dense: embeddings are pooled"):
        read_pooling(tmp_path)


# Judging


def test_scores_are_the_cosines_of_transformers_with_padding_and_mask(
    experiment: Experiment, tmp_path: Path
) -> None:
    made = make_pieces(experiment.model, lambda *_: grouped(3), tmp_path / "made")
    pieces = {unit: str(path) for unit, path in made.items()}
    ids = torch.from_numpy(experiment.evaluation.ids).long()
    state, judge = WorkerState(1), asdict(replace(experiment.judge, batch=2))
    dense = evaluate_rows(state, judge, (0, SENTENCES), {})
    assert dense["distance"] == [0.0] * SENTENCES

    found = evaluate_rows(state, judge, (0, SENTENCES), pieces)

    reference = AutoModel.from_pretrained(experiment.folder, dtype=torch.float32).eval()
    before = embeddings(reference, ids, experiment.pooling)
    weights = {f"{unit}.weight": m["weight"] for unit, m in dense_members(pieces).items()}
    assert not reference.load_state_dict(weights, strict=False).unexpected_keys
    after = embeddings(reference, ids, experiment.pooling)
    expected = 1 - cosines(before, after)
    assert expected.min() > 1e-4 and len({(row >= 0).sum().item() for row in ids}) > 3
    distance = torch.tensor(found["distance"], dtype=torch.float64)
    torch.testing.assert_close(distance, expected, rtol=2e-3, atol=1e-7)
    assert found["tokens"] == int((ids >= 0).sum())
    score = sentence_score([found], [0] * SENTENCES, ["a"])
    assert score["cosine"] == pytest.approx(float(1 - expected.mean()), abs=1e-5)
    assert score["cosine_least"] == pytest.approx(float(1 - expected.max()), abs=1e-5)


def test_parts_are_independent_of_how_the_sentences_are_cut(
    experiment: Experiment, tmp_path: Path
) -> None:
    made = make_pieces(experiment.model, lambda *_: grouped(3), tmp_path / "made")
    pieces = {unit: str(path) for unit, path in made.items()}
    state, judge = WorkerState(1), asdict(experiment.judge)
    found = []
    for rows in ((0, 11), (0, 4), (4, 11)):
        evaluate_rows(state, judge, rows, {})
        found.append(evaluate_rows(state, judge, rows, pieces)["distance"])
    assert found[1] + found[2] == pytest.approx(found[0], rel=1e-3)


def test_scores_are_means_quantiles_and_by_source() -> None:
    distance = [0.01 * number for number in range(40)]
    parts = [{"distance": distance[:25], "tokens": 300}, {"distance": distance[25:], "tokens": 100}]
    parts = [{**p, "seconds": 2.0, "peak_bytes": b} for p, b in zip(parts, (5, 7), strict=True)]
    found = sentence_score(parts, [0] * 10 + [1] * 30, ["a", "b", "unused"])
    assert found["distance"] == pytest.approx(0.195) and found["cosine"] == pytest.approx(0.805)
    assert found["cosine_least"] == pytest.approx(1 - 0.39)
    assert found["cosine_low"] == pytest.approx(1 - 0.37)  # two of forty are below
    assert found["tokens_per_second"] == 100 and found["peak_memory_bytes"] == 7
    assert found["sources"].keys() == {"a", "b"}
    assert found["sources"]["a"]["distance"] == pytest.approx(0.045)


def test_a_ruined_encoder_has_no_cosine() -> None:
    part = {"distance": [0.1, float("nan")], "tokens": 3, "seconds": 0, "peak_bytes": 1}
    found = sentence_score([part], [0, 0], ["a"])
    assert found["cosine"] is None is found["distance"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    table = score_table({"plan": {"bytes": 1, "bits_per_weight": 2.0, **found}})
    assert [str(column.header) for column in table.columns][3:] == [
        "cosine",
        "cosine, worst 5 %",
        "least cosine",
        "1 − cosine",
    ]


def test_batches_hold_every_sentence_once_and_none_is_padded() -> None:
    ids = torch.full((7, 5), -1)
    for row, length in enumerate((3, 5, 3, 1, 3, 5, 3)):
        ids[row, :length] = row
    batches = Sentences("mean").batches(ids, 3)
    assert [tuple(batch.shape) for batch in batches] == [(1, 1), (3, 3), (1, 3), (2, 5)]
    assert all((batch >= 0).all() for batch in batches)
    assert sorted(row for batch in batches for row in batch[:, 0].tolist()) == list(range(7))


# Gradients


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_noise_estimates_what_a_change_of_hidden_states_costs(pooling: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, 12, generator=generator)
    change = 0.01 * torch.randn(1, 4, 12, generator=generator)
    distance = 1 - cosines(*(pool(x, pooling).double() for x in (hidden, hidden + change)))

    gradient = noise_gradients(hidden, pooling, generator, draws=4000)  # [draws, 1, 4, 12]

    felt = (gradient * change).sum((1, 2, 3))
    assert gradient.shape == (4000, 1, 4, 12)
    assert float(0.5 * felt.square().mean()) == pytest.approx(float(distance), rel=0.1)
    # Independent: neighbouring draws have nothing to do with each other.
    assert abs(float((felt[1:] * felt[:-1]).mean() / felt.square().mean())) < 0.1


@pytest.fixture
def walk(experiment: Experiment) -> Walk:
    return replace(experiment.walk, fisher=True)


def back_and_forth(walk: Walk) -> list[Any]:
    """What the reverse pass left of every block."""
    state, span = WorkerState(1), (0, walk.shards)
    for block in range(2):
        calibrate.forward(state, asdict(walk), block, span)
    found = []
    for block in (1, 0):
        gradients.reverse(state, asdict(walk), block, span)
        sums.reduce(state, asdict(walk), "gradients", block)
        entry = Store(Path(walk.store)).get("gradients", walk.gradients_key(block))
        assert entry is not None
        found.insert(0, load_stats(entry.path))
    return found


def test_squared_gradients_are_those_of_noise_through_the_whole_model(
    experiment: Experiment, walk: Walk
) -> None:
    assert walk.gradients == 1
    found = back_and_forth(walk)
    model = AutoModel.from_pretrained(experiment.folder, dtype=torch.float64).eval()
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: Any, y: Tensor) -> None:
            seen[name] = args[0].detach()[0]

        return keep

    units = StreamedModel(experiment.model.checkpoint).units()
    for unit in units:
        model.get_submodule(unit.name).register_forward_hook(hook(unit.name))
    squares: dict[str, Tensor | float] = {unit.name: 0.0 for unit in units}
    fisher: dict[str, Tensor | float] = {unit.name: 0.0 for unit in units}
    ids = torch.from_numpy(experiment.calibration.ids).long()
    for shard in range(walk.shards):
        generator = torch.Generator().manual_seed(walk.seed * 1_000_003 + shard)
        row = walk.shard_rows(shard)[0]
        for target in (squares, fisher):
            noise = torch.randn(1, 48, generator=generator).double()
            hidden = model(ids[row : row + 1]).last_hidden_state
            vector = hidden.mean(1) if walk.pooling == "mean" else hidden[:, 0]
            model.zero_grad()
            (torch.nn.functional.normalize(vector, dim=-1) * noise).sum().backward()
            for unit in units:
                weight: Any = model.get_submodule(unit.name).weight
                own = weight.grad.square().sum(1 if target is squares else 0)
                if target is squares:
                    own = own / seen[unit.name].square().sum(1).mean()
                target[unit.name] = target[unit.name] + own
    for unit in units:
        sums = found[unit.block][f"{unit.name}|weight"].sums
        for name, expected in (("grad_sq", squares[unit.name]), ("fisher", fisher[unit.name])):
            close = {"rtol": 2e-3, "atol": 1e-5 * float(expected.max())}
            torch.testing.assert_close(sums[name].double(), expected, **close)


def test_predicted_losses_are_those_of_random_errors(
    models: dict[str, Path], tmp_path: Path
) -> None:
    section = {**SECTIONS["calibration"], "sequences": 48, "gradient_sequences": 48}
    file = make_recipe(tmp_path, models["mean"], **{**SECTIONS, "calibration": section})
    experiment = Experiment(load_recipe(file), tmp_path / "runs" / "small")
    found = back_and_forth(experiment.walk)
    model = AutoModel.from_pretrained(experiment.folder).eval().requires_grad_(False)
    ids = torch.from_numpy(experiment.calibration.ids).long()
    before = embeddings(model, ids, "mean")
    generator = torch.Generator().manual_seed(1)
    assert experiment.gradient_samples() == 48 and experiment.gradient_tokens() == 48 * 20
    ratios = []
    for unit in experiment.units:
        linear: Any = model.get_submodule(unit.name)
        inputs: list[Tensor] = []
        handle = linear.register_forward_hook(lambda _, args, y, kept=inputs: kept.append(args[0]))
        model(input_ids=ids)
        handle.remove()
        squares = found[unit.block][f"{unit.name}|weight"].sums["grad_sq"]
        weight, measured, predicted = linear.weight.data, 0.0, 0.0
        for _ in range(5):
            change = 0.02 * torch.randn(weight.shape, generator=generator) * weight.std()
            linear.weight.data = weight + change
            measured += float((1 - cosines(before, embeddings(model, ids, "mean"))).mean())
            error = (inputs[0] @ change.T).square().mean((0, 1))  # [out]
            predicted += 0.5 * float((squares * error).sum()) / 48
        linear.weight.data = weight
        ratios.append(predicted / measured)
    assert min(ratios) > 0.4 and max(ratios) < 2.5, ratios
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.3)


# Runs

RUN: dict[str, Any] = {
    **SECTIONS,
    "calibration": {**SECTIONS["calibration"], "gradient_sequences": 12},
    "candidates": [
        {"method": "svd_llm", "rank": [0.3, 0.5, 0.7]},
        {"method": "fwsvd", "rank": 0.5},
        {"method": "rtn", "bits": 8, "group_size": -1, "symmetric": True},
    ],
    "baselines": {"svd": {"method": "svd", "rank": 0.5}},
    "budget": {"bits_per_weight": 14.0},
}
PACKED: dict[str, Any] = {
    **RUN,
    "serve": "transformers",
    "candidates": [
        {"method": "rtn", "bits": [3, 8], "group_size": -1, "symmetric": True},
        {"method": "gptq", "bits": 4, "group_size": -1, "symmetric": True},
    ],
    "baselines": {"rtn 4": {"method": "rtn", "bits": 4, "group_size": -1, "symmetric": True}},
    "budget": {"bits_per_weight": 6.0},
}


@pytest.mark.parametrize("recipe", [RUN, PACKED], ids=["low rank", "integers"])
def test_a_run_ends_in_a_folder_that_gives_the_embeddings_it_was_scored_with(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any]
) -> None:
    project = Project(tmp_path, models["mean"], monkeypatch)
    file = project.write(**recipe)
    project.run(size=2)

    experiment = Experiment(load_recipe(file), project.output)
    ids = torch.from_numpy(experiment.evaluation.ids).long()
    dense = embeddings(AutoModel.from_pretrained(project.model).eval(), ids, "mean")
    served = embeddings(AutoModel.from_pretrained(project.output / "model").eval(), ids, "mean")
    found = cosines(dense, served)
    scores = project.json("scores.json")
    assert scores["dense"]["cosine"] == 1 and scores["dense"]["distance"] == 0
    assert scores["plan"]["distance"] == pytest.approx(float(1 - found.mean()), rel=1e-2)
    assert scores["plan"]["cosine_least"] == pytest.approx(float(found.min()), abs=1e-3)
    assert not {"kl", "perplexity", "accuracy"} & scores["plan"].keys()

    plan = project.json("plan.json")
    assert len({json.dumps(specs) for specs in plan["units"].values()}) > 1
    size = sum(path.stat().st_size for path in (project.output / "model").glob("*.safetensors"))
    assert plan["bytes"] == size == scores["plan"]["bytes"]
    table = pd.read_parquet(project.output / "measurements.parquet")
    assert "predicted_kl" not in table and (table["predicted_distance"] >= 0).all()
    chosen = table.set_index("unit").loc[list(plan["units"])]
    assert chosen["predicted_distance"].max() > 0
    copied = project.output / "model" / "1_Pooling" / "config.json"
    assert copied.read_bytes() == (project.model / "1_Pooling" / "config.json").read_bytes()
    stored = load_file(project.output / "model" / "model.safetensors")
    assert "pooler.dense.weight" in stored


def test_finalists_are_compared_by_the_distance_of_embeddings(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path, models["mean"], monkeypatch)
    three = {"method": "rtn", "bits": 3, "group_size": -1}
    corrected = [three, {"method": "eora", "rank": [1, 2, 4]}]
    file = project.write(**{**RUN, "candidates": [three, corrected], "baselines": None})
    project.run()
    found = project.json("plan.json")["finalists"]
    assert {"as offered", "without corrections"} <= found.keys()
    experiment = Experiment(load_recipe(file), project.output)
    assert experiment.model.family.is_encoder
    assert all(0 < value < 1 for value in found.values())
    with pytest.raises(RecipeError, match="is an encoder, and studies compare KL"):
        check_tune(experiment)


def test_everything_that_tells_of_a_run_tells_what_encoders_are_judged_by(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path, models["mean"], monkeypatch)
    project.write(**RUN)
    result, _ = project.run(stages=("evaluate", "assemble", "report"))
    scores = project.json("scores.json")
    card = (project.output / "model" / "README.md").read_text(encoding="utf-8")
    assert 'AutoModel.from_pretrained("PATH")' in card
    assert f"| {scores['plan']['cosine']:.4f} |" in card
    report = Path(result["report"]).read_text(encoding="utf-8")
    report = re.sub(r"data:image/png;base64,[^\"]*", "", report)
    assert "predicted 1 − cosine" in report and "least cosine" in report
    for text in (card, report):
        assert "perplexity" not in text and "KL" not in text
    assert read_run(project.output)["scores"] == scores
    client = mlflow.MlflowClient(result["tracking_uri"])
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (tracked,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert tracked.data.metrics["cosine"] == scores["plan"]["cosine"]
    assert "cosine, worst 5 %" in tracked.data.tags["mlflow.note.content"]


def test_what_a_run_will_take_is_told(experiment: Experiment) -> None:
    found = forecast(experiment)
    assert found["model_type"] == "bert" and found["work"]["gradient_tokens"] == 4 * 20
    assert 0 < found["time"]["gradients"] < 60 and 0 < found["time"]["evaluate"] < 60
    assert found["bytes"]["dense"]["bytes"] == experiment.model.checkpoint.file_bytes


def test_a_plan_is_solved_again_on_its_own_predecessors(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path, models["first"], monkeypatch)
    ranks = {**RUN, "candidates": RUN["candidates"][:1]}
    project.write(**ranks)
    project.run()
    alone = project.json("scores.json")
    project.write(**{**ranks, "propagate": True})
    _, calls = project.run()
    assert calls["calibrate:collect"] > 0
    propagated = project.json("scores.json")
    assert 0 < propagated["plan"]["distance"] != alone["plan"]["distance"]
    assert propagated["dense"]["distance"] == 0


def test_encoders_are_not_offered_to_engines_they_were_not_tried_with(
    models: dict[str, Path], tmp_path: Path
) -> None:
    file = make_recipe(tmp_path, models["mean"], **{**PACKED, "serve": "vllm"})
    with pytest.raises(RecipeError, match="serve: vllm: not for encoders"):
        Experiment(load_recipe(file), tmp_path / "out")
