"""Bad input through the command line: exit status, and one or two lines that say what to do."""

import errno
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moesaic.orchestrator import cli, cluster, headstart, reach
from moesaic.orchestrator.cli import _finite, app
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.recipe_sections import Compute, Tracking
from moesaic.orchestrator.redaction import redacted
from moesaic.orchestrator.store import Store
from tests.orchestrator.projects import byte_tokenizer, make_model_folder, make_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture(autouse=True)
def no_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here comes as far as work; Ray need not start for it."""
    monkeypatch.setattr(headstart, "_all_is_to_do", lambda *about: False)


def ask(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(verb: str, recipe: Path, *more: str | Path) -> str:
    """What stderr says of a mistake of the user's."""
    result = ask(verb, recipe, "--output", recipe.parent / "run", "--json", *more)
    return told(result)


def told(result: Result) -> str:
    """The text of an error with exit status 2, the same for people and in JSON."""
    assert result.exit_code == 2, (result.exit_code, result.stderr)
    assert "Traceback" not in result.stderr
    text = result.stderr.removeprefix("error: ").rstrip("\n")
    assert json.loads(result.stdout) == {"error": text, "exit": 2}
    return text


def test_scores_refuses_what_it_cannot_compare(model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, model, score="trace", calibration={"gradient_sequences": 0})
    for verb in ("scores", "check", "run"):
        text = refusal(verb, recipe)
        assert "recipe.yaml: score: unknown score 'trace': known are block_importance" in text
    recipe = make_recipe(tmp_path, model, score="fisher", calibration={"gradient_sequences": 0})
    for verb in ("check", "search"):
        text = refusal(verb, recipe)
        assert text.endswith("score: fisher needs gradients: set calibration.gradient_sequences to"
                             " 16 or more, or take output")  # fmt: skip
    for option in (["--plans", "5"], ["--seed", "-1"], ["--swaps", "-1"], ["--plans", "many"]):
        assert ask("scores", recipe, *option).exit_code == 2


def test_tune_refuses_what_it_cannot_tune_and_needs_a_number_of_trials(
    model: Path, tmp_path: Path
) -> None:
    tune = {"sampler": "grid", "knobs": {"mix": 0}, "seeds": 1}
    text = refusal("tune", make_recipe(tmp_path, model, tune=tune), "--trials", "3")
    assert "recipe.yaml: tune.sampler: unknown sampler 'grid': known are tpe, gp" in text
    assert (
        "recipe.yaml: tune.seeds: unknown key (allowed here: objectives, constraints, sampler, seed"
        in text
    )
    wrong = make_recipe(tmp_path, model, tune={"knobs": {"mix": 2, "weight.head": 1}})
    for verb, more in (("tune", ["--trials", "3"]), ("check", [])):
        text = refusal(verb, wrong, *more)
        assert "tune.knobs.mix: 2 is not within 0 to 1" in text
        assert "tune.knobs.weight.head: no such knob here (there are: score_exponent" in text
    assert ask("tune", wrong).exit_code == 2


@pytest.mark.parametrize(
    "storage",
    ["sqlite:///study.db", "s3://bucket/study.log", "postgresql://me:word@host/db", "", ".", "/"],
)
def test_a_storage_that_is_no_file_is_refused_before_any_work(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = refusal("tune", tmp_path / "recipe.yaml", "--trials", "2", "--storage", storage)
    assert found.startswith(f"--storage: {redacted(storage)} is no file: give the path of one")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"budget": {"bits_per_weight": [4.5, 6]}}, "budget: a study is made under one budget"),
        ({"search": "strs"}, "search: strs does not add up losses"),
        (
            {"serve": "transformers", "tune": {"objectives": ["kl", "latency"]}},
            "tune: latency is measured with the modules of serve: moesaic",
        ),
    ],
)
def test_check_says_what_tune_will_refuse_of_a_recipe_that_can_be_run(
    model: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    recipe = make_recipe(tmp_path, model, **{"tune": {"sequences": 8}, **changes})
    result = ask("check", recipe, "--output", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.stderr
    line = f"moesaic tune will refuse this: {reason}"
    assert json.loads(result.stdout)["events"][0]["message"].startswith(line)
    assert line in result.stderr
    assert reason in refusal("tune", recipe, "--trials", "3")


def test_check_prints_one_json_object_when_the_recipe_is_right(model: Path, tmp_path: Path) -> None:
    result = ask("check", make_recipe(tmp_path, model), "--json")
    assert result.exit_code == 0, result.stderr
    assert isinstance(json.loads(result.stdout), dict)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": {"bits_per_weight": 1}}, "budget: .* too few: the smallest plan .* bytes"),
        ({"budget": {"bits_per_weight": 30}}, "budget: .* hold the whole dense model"),
        ({"model": "./nothing"}, r"model: there is no folder /\S+/nothing"),
        (
            {"candidates": [{"method": "rtn", "bits": 4, "group_size": 40}]},
            "group_size 40 does not divide the 48 inputs",
        ),
        (
            {"candidates": [{"method": "nothing"}]},
            "candidates: .*'nothing'.* known are .*gptq, .*rtn",
        ),
        (
            {"candidates": [{"method": "rtn", "bits": 4, "group_size": 0}]},
            "option group_size: group_size is 0: it must be positive, or -1",
        ),
        ({"budget": 3}, "budget: must be a mapping .keys: bytes, bits_per_weight., got 3"),
        ({"calibration": {"texts": ["a.txt"]}}, "texts.0: must be a mapping .keys: file,"),
        ({"keep": ["."]}, "keep: the patterns leave no unit"),
        (
            {"keep": ["k_proj", "no_such_name"]},
            r"keep: 'no_such_name' matches no unit: .* model\.layers\.0\.self_attn\.q_proj, .*,",
        ),
        (
            {"compute": {"workers": 1000}},
            r"compute: 1000 worker\(s\) of 1 CPU and 0 GPU do not fit this machine, which has",
        ),
        ({"compute": {"address": "nonsense"}}, "compute.address: 'nonsense' is no address: write"),
        ({"compute": {"address": "127.0.0.1:1"}}, "compute.address: no Ray cluster answers at"),
        ({"tracking": {"uri": "foo://bar"}}, "tracking.uri: 'foo://bar' is none: write"),
        ({"tracking": {"uri": "file:///tmp/ml"}}, "tracking.uri: .* folder of files"),
        ({"tracking": {"uri": "http://127.0.0.1:1"}}, "tracking.uri: nobody answers at http://127"),
        ({"tracking": {"uri": "http://"}}, "tracking.uri: 'http://' names no host"),
        ({"tracking": {"uri": "http://a:b"}}, "tracking.uri: 'http://a:b' is no address"),
        (
            {"tracking": {"uri": "postgresql://u:secret@127.0.0.1:1/db"}},
            r"nobody answers at postgresql://u:\*\*\*@127.0.0.1:1/db",
        ),
        ({"tracking": {"uri": "sqlite:////proc/x/mlflow.db"}}, "tracking.uri: /proc/x cannot be"),
        ({"calibration": {"length": 65}}, "calibration.length: 65 .* more than the 64 positions"),
        ({"evaluation": {"sequences": 10000}}, r"evaluation\.texts: held-out.txt has .* need"),
    ],
)
def test_mistakes_are_told_with_file_and_key(
    model: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    recipe = make_recipe(tmp_path, model, **changes)
    text = refusal("check", recipe)
    assert text.startswith(f"{recipe}: ")
    assert len(text.splitlines()) <= 2
    assert re.search(words, text), text


RTN = {"method": "rtn", "bits": 4, "group_size": -1}


def reduced(**link: Any) -> dict[str, Any]:
    """A recipe that reduces experts by ``link``, or not at all."""
    return {"candidates": [RTN, [link, RTN]], "baselines": None}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Path]:
    made = {
        name: make_model_folder(tmp_path_factory.mktemp(name), name)
        for name in ("llama", "deepseek_v3", "deepseek_v2")
    }
    return {"": model, **made}


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("", reduced(method="reap", keep=0), "entry 2: method reap: option keep: .* than 0, got 0"),
        ("", reduced(method="mone", keep=9), "keep: 9 experts are more than the 8 there are"),
        ("", reduced(method="mone", keep=1.5), "keep: 1.5 is no share of the experts: at most 1.0"),
        ("", reduced(method="reap", keep=1), "keep: 1 of 8 .* chooses 2 per token and needs at"),
        ("", reduced(method="hc_smoe", keep=[0.1, 1]), "keep: 1 of 8 experts are too few"),
        ("", reduced(method="slim", width=33), "width: 33 channels are more than the 32"),
        (
            "",
            reduced(method="stun", keep=6, window=0),
            "keep: 6 .* with a window, give their share",
        ),
        ("deepseek_v3", reduced(method="reap", keep=7), "keep: 7 .* divide into .* 2 groups"),
        ("deepseek_v3", reduced(method="reap", keep=4), "keep: 4 of 8 experts are too few: .* 6"),
        (
            "llama",
            reduced(method="reap"),
            "candidates: reap.*: for experts only, and llama has none",
        ),
        (
            "llama",
            {"candidates": [RTN], "baselines": {"half": [{"method": "reap"}, RTN]}},
            "baselines: reap.*: for experts only, and llama has none",
        ),
        (
            "llama",
            reduced(method="modegpt", keep=0.01),
            r"cannot be used on model\.layers\.0\.self_attn\.q_proj: keep: 0.01 of .* is none",
        ),
        ("llama", reduced(method="modegpt", keep=1.5), "entry 2: method modegpt: .* than or equal"),
        (
            "llama",
            {
                "candidates": [RTN, [{"method": "modegpt"}, {"method": "fwsvd", "rank": 2}]],
                "baselines": None,
                "calibration": {"gradient_sequences": 2},
            },
            "fwsvd cannot follow modegpt in an attention, whose values are new",
        ),
        (
            "llama",
            {
                **reduced(method="modegpt"),
                "serve": "transformers",
                "keep": ["self_attn", r"layers\.0\.mlp\.down"],
            },
            r"needs MLPs of one width, but keep leaves model\.layers\.0\.mlp or some of it",
        ),
        (
            "llama",
            {**reduced(method="modegpt"), "router_calibration": {"epochs": 1}},
            "router_calibration: nothing .* reduces",
        ),
        (
            "llama",
            {**reduced(method="modegpt"), "serve": "vllm", "keep": ["mlp"]},
            "modegpt.*: serve: vllm cannot load narrower heads: serve: moesaic",
        ),
        ("", {"candidates": [RTN, [RTN, {"method": "reap"}]]}, "entry 2: .* come first in a chain"),
        (
            "",
            {"candidates": [RTN, [{"method": "reap"}, {"method": "slim"}, RTN]]},
            "entry 2: a chain reduces experts once, not twice",
        ),
        ("", {"candidates": [RTN, [{"method": "reap"}, RTN, RTN]]}, "rtn cannot follow rtn"),
        ("", {"candidates": [RTN, []]}, "entry 2: a chain needs at least one method"),
        ("", {"calibration": {"expert_tokens": 0}}, "calibration.expert_tokens: .* equal to 1"),
        ("", {"router_calibration": {"epochs": 1}}, "router_calibration: nothing .* reduces"),
        (
            "",
            {**reduced(method="hc_smoe"), "serve": "transformers"},
            "hc_smoe.*: serve: transformers loads a router row per expert only: .* router: mean",
        ),
        (
            "",
            {**reduced(method="mone"), "serve": "vllm"},
            "mone.*: serve: vllm loads a router row per expert only",
        ),
        (
            "",
            {**reduced(method="stun", window=0), "serve": "transformers"},
            "stun.*: serve: transformers needs equally many experts in all blocks: give window: 1",
        ),
        (
            "deepseek_v2",
            {**reduced(method="slim"), "serve": "transformers"},
            "slim.*: serve: transformers cannot load narrower experts of deepseek_v2",
        ),
        (
            "",
            {**reduced(method="reap"), "serve": "transformers", "keep": [r"layers\.1\.mlp"]},
            r"needs equally many experts .* keep leaves model\.layers\.1\.mlp\.experts as it is",
        ),
        (
            "",
            {"serve": "vllm", "candidates": [RTN], "baselines": {"m": [{"method": "mone"}, RTN]}},
            "baselines: mone.* serve: vllm loads a router row per expert only",
        ),
    ],
)
def test_reductions_that_cannot_be_are_told(
    others: dict[str, Path], tmp_path: Path, model_type: str, changes: dict[str, Any], words: str
) -> None:
    recipe = make_recipe(tmp_path, others[model_type], **changes)
    lines = refusal("check", recipe).splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{recipe}: ")
    assert re.search(words, lines[0]), lines[0]


def test_a_recipe_with_reductions_is_forecast(model: Path, tmp_path: Path) -> None:
    """Also where the linears have nothing to choose from."""
    for number, candidates in enumerate(
        ([RTN, [{"method": "reap", "keep": [0.75, 0.5]}, RTN]], [[{"method": "mone", "keep": 0.5}]])
    ):
        changes = {"candidates": candidates, "baselines": None, "budget": {"bits_per_weight": 12}}
        result = ask("check", make_recipe(tmp_path / str(number), model, **changes), "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["bytes"]


def test_all_mistakes_are_told_at_once(model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, model, budgett=3, calibration={"lenght": 3}, serve="nobody")
    lines = refusal("check", recipe).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["serve", "calibration.lenght", "budgett"]


def test_mistakes_of_recipe_model_texts_and_places_are_told_at_once(
    model: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(
        tmp_path,
        model,
        store="/proc/moesaic",
        candidates=[{"method": "gptq", "bits": [3, 4], "group_size": 17}],
        calibration={"texts": [{"file": "empty.txt"}, {"file": "short.txt"}]},
        evaluation={"length": 65},
        compute={"address": "nonsense"},
        tracking={"uri": "foo://bar"},
    )
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    lines = refusal("check", recipe).splitlines()
    assert all(line.startswith(f"{recipe}: ") for line in lines)
    rest = [line.removeprefix(f"{recipe}: ") for line in lines]
    assert [line.split(": ")[0] for line in rest] == [
        "store",
        "candidates",
        "calibration.texts",
        "calibration.texts",
        "evaluation.length",
        "compute.address",
        "tracking.uri",
    ]
    assert rest[1].count("gptq(") == 2 and "keep: [pattern]" in rest[1]


def test_a_budget_is_told_beside_an_empty_text(model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, model, budget={"bits_per_weight": 1})
    (tmp_path / "first.txt").write_text("", encoding="utf-8")
    first, second = refusal("search", recipe).splitlines()
    assert first.startswith(f"{recipe}: budget: ")
    assert second.startswith(f"{recipe}: calibration.texts: ")


def test_check_refuses_what_only_another_search_could_reach(model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "serve": "vllm",  # which loads experts in 8 bits only, of these
        "baselines": None,
        "candidates": [{"method": "rtn", "bits": [2, 8], "group_size": -1}],
        "budget": {"bits_per_weight": 7.6},
    }
    assert ask("check", make_recipe(tmp_path, model, **changes)).exit_code == 0
    recipe = make_recipe(tmp_path, model, search="uniform", **changes)
    found = re.search(r"smallest .* \((\S+) bits per weight; serve: vllm", refusal("check", recipe))
    assert found is not None
    changes["budget"] = {"bits_per_weight": float(found[1])}
    result = ask("check", make_recipe(tmp_path, model, search="uniform", **changes))
    assert result.exit_code == 0, result.stderr


def test_a_search_without_any_plan_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object) -> int:
        raise ValueError("nothing fits together")

    monkeypatch.setattr("moesaic.orchestrator.plan_bytes.smallest_bytes", nothing)
    recipe = make_recipe(tmp_path, model)
    words = "candidates: with search: knapsack and serve: moesaic there is no plan: nothing fits"
    assert words in refusal("check", recipe)


def test_a_server_that_answers_will_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ask", lambda address: None)  # a head that is well
    with socket.create_server(("127.0.0.1", 0)) as ray:
        address = f"127.0.0.1:{ray.getsockname()[1]}"
        recipe = make_recipe(tmp_path, model, compute={"address": address})
        result = ask("check", recipe, "--output", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.stderr
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers that it cannot
    Thread(target=server.handle_request, daemon=True).start()
    reach.check_tracking(Tracking(uri=f"http://127.0.0.1:{server.server_port}"), tmp_path)
    server.server_close()


def test_a_weight_without_a_value_is_told_with_recipe_file_and_name(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][3, 3] = math.nan
    save_file(tensors, file, {"format": "pt"})
    recipe = make_recipe(tmp_path, folder)
    text = refusal("check", recipe)
    assert text.startswith(f"{recipe}: {file}: tensor model.embed_tokens.weight has 1 values of ")
    assert "copy the file again" in text


@pytest.mark.parametrize("running", [True, False])
def test_auto_wants_a_cluster_on_this_machine(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    left: list[bool] = []

    def connect(compute: Compute) -> bool:
        if not running:
            raise RunError("Could not find any running Ray instance")
        return False

    monkeypatch.setattr(reach, "connect", connect)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: left.append(True))
    recipe = make_recipe(tmp_path, model, compute={"address": "auto"})
    if running:
        assert ask("check", recipe, "--output", tmp_path / "run").exit_code == 0
        assert left == [True]
    else:
        assert "compute.address: auto: no Ray cluster runs on this" in refusal("check", recipe)


def test_a_file_that_is_no_database_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.db").write_text("this is no database", encoding="utf-8")
    recipe = make_recipe(tmp_path, model, tracking={"uri": f"sqlite:///{tmp_path}/odd.db"})
    assert refusal("check", recipe).endswith("odd.db is no sqlite database: name another file")


@pytest.mark.parametrize("verb", [["run"], ["tune", "--trials", "3"]])
def test_a_name_that_the_registry_refuses_is_told(
    verb: list[str], model: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, model)
    text = told(ask(*verb, str(recipe), "--register", "a/b", "--json"))
    assert text.startswith("--register: 'a/b' is no name for a model")


def test_check_leaves_no_database(model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, model, tracking={"uri": f"sqlite:///{tmp_path}/new.db"})
    assert ask("check", recipe, "--output", tmp_path / "run").exit_code == 0
    assert not list(tmp_path.rglob("*.db"))


def test_text_without_words_is_told_as_such(model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, model)
    (tmp_path / "first.txt").write_text("", encoding="utf-8")
    assert refusal("check", recipe).endswith(
        "calibration.texts: first.txt holds no text: give another file"
    )


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lambda m: (m / "model.safetensors").unlink(), "no weights"),
        (lambda m: (m / "model.safetensors").write_bytes(b"\x10"), "truncated"),
        (lambda m: [f.unlink() for f in m.glob("tokenizer*")], "no tokenizer: put its tokenizer"),
        (lambda m: (m / "config.json").write_text('{"model_type": "odd"}'), "to add a family"),
        (lambda m: (m / "config.json").unlink(), "config.json: no such file"),
        (lambda m: change(m / "config.json", num_attention_heads=0), "config.json: transformers"),
        (lambda m: (m / "tokenizer.json").write_text("{"), "model: .* tokenizer cannot be loaded"),
        (
            lambda m: (m / "generation_config.json").write_text("[]"),
            "must hold a JSON object",
        ),
    ],
)
def test_broken_model_folders_are_refused(
    model: Path, tmp_path: Path, breaks: Any, words: str
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    breaks(folder)
    recipe = make_recipe(tmp_path, folder)
    text = refusal("check", recipe)
    assert text.startswith(f"{recipe}: model: ")
    assert re.search(words, text), text


def change(file: Path, **keys: Any) -> None:
    """Other values for keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_inspect_names_the_configuration_that_transformers_cannot_use(
    model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    change(folder / "config.json", num_attention_heads=0)
    text = told(ask("inspect", folder, "--json"))
    assert text.startswith(f"{folder / 'config.json'}: transformers cannot build this model: ")


def test_pickled_weights_are_refused(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle files (pytorch_model.bin) are refused" in refusal(
        "check", make_recipe(tmp_path, folder)
    )


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", vocab_size=100)
    lines = refusal("check", make_recipe(tmp_path, folder)).splitlines()
    assert len(lines) == 1
    assert "model: its tokenizer gives token 256, but the vocabulary ends at 99" in lines[0]


def test_entries_of_a_tokenizer_that_only_other_texts_give_are_refused(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", vocab_size=250)
    assert "gives token 256" in refusal("check", make_recipe(tmp_path, folder))


def test_added_tokens_beyond_the_vocabulary_are_an_event_until_a_text_has_them(
    model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    recipe = make_recipe(tmp_path, folder)
    result = ask("check", recipe, "--output", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.stderr
    (event,) = [e for e in json.loads(result.stdout)["events"] if e["kind"] == "tokenizer_larger"]
    assert event["value"] == 1 and "'<extra>'" in event["message"]
    (tmp_path / "first.txt").write_text("<extra> word " * 1000, encoding="utf-8")
    assert "model: its tokenizer gives token 257" in refusal("check", recipe)


@pytest.mark.parametrize("verb", ["check", "run", "search"])
def test_an_output_that_is_no_folder_is_refused(model: Path, tmp_path: Path, verb: str) -> None:
    file = tmp_path / "file"
    file.write_text("kept", encoding="utf-8")
    text = refusal(verb, make_recipe(tmp_path, model), "--output", file)
    assert text == f"--output: {file} must be a folder: a file is in its place"
    assert file.read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize("store", ["file", "/proc/moesaic"])
def test_a_store_that_cannot_be_written_is_refused(model: Path, tmp_path: Path, store: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    recipe = make_recipe(tmp_path, model, store=store)
    text = refusal("check", recipe)
    assert text.startswith(f"{recipe}: store: {tmp_path / store} ")
    assert re.search("a file is in its place|name a folder that can be", text)
    assert len(text.splitlines()) == 1


def test_inspect_names_a_tensor_that_is_missing(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    save_file({"lm_head.weight": torch.zeros(257, 48)}, folder / "model.safetensors")
    result = ask("inspect", folder, "--json")
    assert "model.embed_tokens.weight that is in no file" in told(result)


@pytest.mark.parametrize("kind", ["methods", "formats", "searches", "scores", "families"])
def test_lists_are_json_when_asked(kind: str) -> None:
    result = ask("list", kind, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)[kind]


def test_the_folder_of_no_run_is_refused(tmp_path: Path) -> None:
    for arguments in (("show", tmp_path), ("store", "gc", tmp_path)):
        assert told(ask(*arguments, "--json")).startswith(f"{tmp_path}: ")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("plan.json", "[]"),
        ("plan.json", "{}"),
        ("plan.json", "{"),
        ("plan.json", '{"units": []}'),
        ("plan.json", '{"units": {"u": [{"method": "rtn", "options": {"bits": 99}}]}}'),
        ("plan.json", '{"units": {"u": [{"method": "zzz", "options": {}}]}}'),
        ("plan.json", b"\xff\xfe"),
        ("scores.json", "[]"),
        ("scores.json", '{"dense": {"kl": 0}}'),
        ("scores.json", '{"dense": 3}'),
        ("scores.json", "[" * 100_000),
    ],
)
def test_show_refuses_damaged_files(tmp_path: Path, file: str, content: str | bytes) -> None:
    whole = {"plan.json": '{"units": {}}', "scores.json": "{}"}
    for name, text in (whole | {file: content}).items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    text = told(ask("show", tmp_path, "--json"))
    assert text.startswith(f"{tmp_path / file}: is damaged (")
    assert len(text.splitlines()) == 1


def test_show_has_a_dash_for_a_perplexity_without_a_number(tmp_path: Path) -> None:
    score = {"bytes": 9, "bits_per_weight": 3, "perplexity": None, "kl": None, "accuracy": 0.0}
    (tmp_path / "plan.json").write_text('{"units": {}}')
    (tmp_path / "scores.json").write_text(json.dumps({"plan": score}))
    result = ask("show", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["scores"]["plan"]["perplexity"] is None
    assert result.stderr.count("–") == 2


def test_gc_wants_to_be_told_what_stays(tmp_path: Path) -> None:
    file = Store(tmp_path).put_json("ids", "ab" * 20, {}).path
    os.utime(file, (0, 0))
    for arguments in ([], ["--all", "--keep", tmp_path]):
        text = told(ask("store", "gc", tmp_path, *arguments, "--json"))
        assert "--keep RUN" in text and "--all" in text
    assert file.is_file()
    assert ask("store", "gc", tmp_path, "--all").exit_code == 0
    assert not file.exists()


@pytest.mark.parametrize("arguments", [["check"], ["inspect"], ["show"], ["store", "gc", "--all"]])
def test_paths_that_are_too_long_are_refused(arguments: list[str]) -> None:
    text = told(ask(*arguments, "n" * 5000, "--json"))
    assert "nnnn" in text and len(text) < 500


def test_an_output_that_is_too_long_is_refused(model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, model)
    text = refusal("check", recipe, "--output", tmp_path / ("n" * 300))
    assert text.startswith(f"--output: {tmp_path}") and "File name too long" in text


def test_numbers_that_json_does_not_have_are_null() -> None:
    found = {"name": ("text", math.nan, [math.inf, 1.5])}
    assert _finite(found) == {"name": ["text", None, [None, 1.5]]}


def test_what_fails_is_one_json_object_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kind: str) -> None:
        passing = OSError(errno.EIO, "Input/output error", "/shared/run/recipe.yaml")
        found = {"run": RunError("out of luck"), "other": OSError("odd"), "passing": passing}
        raise found[kind]

    monkeypatch.setattr("moesaic.orchestrator.listing.listing", fail)
    for kind, reason in (
        ("run", "out of luck"),
        ("other", "OSError: odd (--debug shows the"),
        ("passing", "/shared/run/recipe.yaml: Input/output error; finished work is kept: run the"),
    ):
        result = ask("list", kind, "--json")
        assert result.exit_code == 1
        answer = json.loads(result.stdout)
        assert answer["exit"] == 1 and answer["error"].startswith(reason)
        assert ask("list", kind).stdout == ""
    debugged = ask("list", "run", "--json", "--debug")
    assert debugged.exit_code == 1 and "Traceback" in debugged.stderr


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    "recipe",
    [file.name for file in sorted(RECIPES.glob("*.yaml")) if "builtin:demo" in file.read_text()],
)
def test_every_recipe_for_the_bundled_model_is_forecast(recipe: str, tmp_path: Path) -> None:
    result = ask("check", RECIPES / recipe, "--output", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["bytes"]


def test_check_names_what_would_grow(model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path,
        model,
        budget={"bits_per_weight": 14.0},
        candidates=[{"method": "svd", "rank": [0.5, 30]}],
    )
    result = ask("check", recipe, "--output", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.stderr
    events = json.loads(result.stdout)["events"]
    large = [event for event in events if event["kind"] == "larger_than_dense"]
    assert large and all("svd(rank=30) takes" in event["message"] for event in large)
    assert all(event["value"] > 1 for event in large)


def test_a_second_signal_stops_again_unless_it_is_the_same_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one may get lost in a place where Python drops exceptions."""
    now = [100.0]
    monkeypatch.setattr(cli, "_stopped_at", -math.inf)
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt):
        cli._stop(signal.SIGTERM, None)
    for now[0] in (100.1, 109.0):
        cli._stop(signal.SIGTERM, None)
    now[0] = 111.0
    with pytest.raises(KeyboardInterrupt):
        cli._stop(signal.SIGTERM, None)


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        ("| true", 1, ""),
        ("> /dev/full", 1, "failed: the JSON cannot be written: No space left on device\n"),
        (">&-", 0, ""),
    ],
)
def test_json_that_nobody_takes_is_no_traceback(redirection: str, status: int, said: str) -> None:
    command = (
        f"{sys.executable} -m moesaic.orchestrator.cli list families --json {redirection};"
        " exit ${PIPESTATUS[0]}"
    )
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert found.returncode == status
    assert "Traceback" not in found.stderr and "llama" in found.stderr
    assert found.stderr.endswith(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("run --json", "Missing argument 'RECIPE'. (moesaic run --help)"),
        ("nosuch --json", "No such command 'nosuch'. (moesaic --help)"),
        ("store gc x --all --minutes nan --json", "'--minutes': .*0 (moesaic store gc --help)"),
        ("store gc x --all --minutes -1 --json", "'--minutes': .*0 (moesaic store gc --help)"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_json(
    arguments: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(sys, "argv", ["moesaic", *arguments.split()])
    monkeypatch.setattr(cli, "leave", ended.append)
    monkeypatch.setattr(signal, "signal", lambda *handler: None)
    cli.main()
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert ended == [2] and found["exit"] == 2
    assert re.search(said.replace("(", r"\(").replace(")", r"\)"), found["error"])
    assert err == f"error: {found['error']}\n"
