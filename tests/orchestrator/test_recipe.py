"""Recipes: what is read, what is refused, and in which words."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from moesaic.methods.base import Spec
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.recipe import Recipe, load_recipe
from moesaic.orchestrator.recipe_values import parse_bytes
from tests.orchestrator.projects import make_recipe


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def refusal(file: Path) -> list[str]:
    """The lines that a recipe is refused with."""
    with pytest.raises(UserError) as error:
        load_recipe(file)
    return str(error.value).splitlines()


def test_lists_in_options_become_one_candidate_each(tmp_path: Path, model: Path) -> None:
    entry = {"method": "rtn", "bits": [2, 3], "group_size": [16, -1], "symmetric": True}
    recipe = load_recipe(make_recipe(tmp_path, model, candidates=[entry]))
    wanted = [
        (Spec.of("rtn", {"bits": bits, "group_size": size, "symmetric": True}),)
        for bits in (2, 3)
        for size in (16, -1)
    ]
    assert recipe.candidates == wanted


def test_equal_candidates_are_kept_once_when_written_twice(tmp_path: Path, model: Path) -> None:
    rtn = {"method": "rtn", "bits": 4, "group_size": 16}
    file = make_recipe(tmp_path, model, candidates=[rtn, {**rtn, "clip": "none"}])
    recipe = load_recipe(file)
    assert len(recipe.candidates) == 1
    assert recipe.chains() == recipe.candidates  # the baseline of make_recipe is the same choice


def test_a_resolved_recipe_reads_back_as_the_same_recipe(tmp_path: Path, model: Path) -> None:
    file = make_recipe(
        tmp_path,
        model,
        serve="transformers",
        keep=[r"q_proj$", "größe"],
        propagate=True,
        tracking={"register_as": "small"},
        budget={"bits_per_weight": None, "bytes": "1.5 MB"},
    )
    recipe = load_recipe(file)
    again = tmp_path / "elsewhere" / "again.yaml"
    again.parent.mkdir()
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again) == recipe
    assert recipe.budget.bytes == 1_500_000


def test_relative_paths_are_relative_to_the_recipe(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_recipe(tmp_path, "model")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(Path("..") / file.name)
    assert recipe.model == str(model)
    assert recipe.calibration.texts[0].file == str(tmp_path / "first.txt")
    assert recipe.store == str(tmp_path / "store")


def test_a_name_that_is_no_folder_stays_the_name_of_a_hub_model(tmp_path: Path) -> None:
    assert load_recipe(make_recipe(tmp_path, "owner/model")).model == "owner/model"


def test_builtin_names_lead_to_files_of_the_package(tmp_path: Path) -> None:
    texts = [{"file": "builtin:calibration.prose.txt"}]
    recipe = load_recipe(make_recipe(tmp_path, "builtin:demo", evaluation={"texts": texts}))
    assert (Path(recipe.model) / "config.json").is_file()
    assert Path(str(recipe.evaluation.texts[0].file)).is_file()


def test_unknown_builtin_names_are_answered_with_the_known_ones_all_at_once(tmp_path: Path) -> None:
    file = make_recipe(tmp_path, "builtin:dmo", evaluation={"texts": [{"file": "builtin:x.txt"}]})
    first, second = refusal(file)
    assert first.startswith(f"{file}: model: no 'builtin:dmo'") and "builtin:demo" in first
    assert second.startswith(f"{file}: evaluation.texts.0.file: no 'builtin:x.txt'")


@pytest.mark.parametrize("name", ["builtin:" + "[" * 300, "builtin:../model/config.json"])
def test_builtin_names_are_names_and_no_paths(tmp_path: Path, name: str) -> None:
    (line,) = refusal(make_recipe(tmp_path, name))
    assert f"model: no {name[:20]!r}"[:-1] in line and "builtin:demo" in line and len(line) < 400


@pytest.mark.parametrize("name", ["s" * 300 + ".json", "file:///" + "t" * 300 + ".json"])
def test_files_of_names_that_are_too_long_are_not_there(tmp_path: Path, name: str) -> None:
    (line,) = refusal(make_recipe(tmp_path, "builtin:demo", score=name))
    assert "score: no file" in line


def test_all_mistakes_are_told_at_once_with_the_allowed_names(tmp_path: Path, model: Path) -> None:
    file = make_recipe(
        tmp_path,
        model,
        bugdet={"bytes": 5},
        name=None,
        serve="vlm",
        search="knapsak",
        budget={"bits": 3},
        calibration={"sequence": 4, "length": 1},
        evaluation={"texts": [{"fil": "a"}, {"file": "a", "dataset": "b"}]},
        compute={"worker": 2},
        tracking={"url": "x"},
        keep=["(", "["],
    )
    lines = refusal(file)
    assert all(line.startswith(f"{file}: ") for line in lines)
    told = {line.removeprefix(f"{file}: ").split(":")[0]: line for line in lines}
    assert told.keys() == {
        "bugdet",
        "name",
        "serve",
        "search",
        "budget.bits",
        "calibration.sequence",
        "calibration.length",
        "evaluation.texts.0.fil",
        "evaluation.texts.1",
        "evaluation.texts.1.file",
        "compute.worker",
        "tracking.url",
        "keep",
    }
    assert "allowed here: name, model" in told["bugdet"] and "budget" in told["bugdet"]
    assert told["name"].endswith(": missing")
    assert "'vllm', 'transformers' or 'moesaic'" in told["serve"] and "'vlm'" in told["serve"]
    assert "knapsack" in told["search"] and "uniform" in told["search"]
    assert "allowed here: bytes, bits_per_weight" in told["budget.bits"]
    assert "sequences" in told["calibration.sequence"] and "shards" in told["calibration.sequence"]
    assert "2" in told["calibration.length"] and told["calibration.length"].endswith("got 1")
    assert "allowed here: file, dataset" in told["evaluation.texts.0.fil"]
    assert "either file or dataset" in told["evaluation.texts.1"]
    assert "workers" in told["compute.worker"] and "address" in told["compute.worker"]
    assert "uri" in told["tracking.url"]
    assert "'('" in told["keep"] and "'['" in told["keep"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"candidates": [{"method": "gptx"}]}, ["candidates", "gptx", "gptq", "rtn"]),
        (
            {"candidates": [{"method": "rtn", "bit": 3}]},
            ["candidates: entry 1", "method rtn", "unknown option 'bit'", "bits", "group_size"],
        ),
        ({"candidates": [{"method": "rtn", "bits": [3, 11]}]}, ["option bits", "8", "got 11"]),
        (
            {"candidates": [{"method": "rtn", "bits": [1, 9, 4.5, None]}]},
            ["got 1;", "got 9;", "got 4.5;", "got None"],
        ),
        ({"candidates": [{"method": "rtn", "bits": []}]}, ["option bits", "an empty list"]),
        (
            {"candidates": [{"method": "rtn", "bits": [4] * 40, "group_size": [16] * 40}]},
            ["entry 1", "1,600 choices", "at most 1,000"],
        ),
        ({"candidates": [{"bits": 3}]}, ["candidates: entry 1", "key method"]),
        ({"candidates": ["rtn"]}, ["candidates: entry 1", "key method"]),
        ({"candidates": []}, ["candidates", "at least one"]),
        ({"candidates": {"method": "rtn"}}, ["candidates", "needs a list"]),
        (
            {"candidates": [{"method": "a"}, {"method": "rtn"}, {"method": "b"}]},
            ["entry 1", "'a'", "entry 3", "'b'"],
        ),
        ({"baselines": {"x": {"method": "rtn", "bits": [3, 4]}}}, ["'x'", "single", "not 2"]),
        ({"baselines": {"plan": {"method": "rtn"}}}, ["baselines", "'plan'", "no name"]),
        ({"baselines": {"a/b": {"method": "c"}}}, ["'a/b'", "letters", "'c'"]),
        ({"baselines": ["rtn"]}, ["baselines", "mapping"]),
        ({"name": "../up"}, ["name", "'../up'"]),
        ({"name": ".."}, ["name", "'..'"]),
        ({"name": 5}, ["name", "string", "got 5"]),
        ({"model": ["a"]}, ["model", "string"]),
        ({"propagate": "perhaps"}, ["propagate", "'perhaps'"]),
        ({"budget": 5}, ["budget", "got 5"]),
        ({"budget": {"bytes": 5}}, ["budget", "either bytes or bits_per_weight"]),
        ({"budget": {"bits_per_weight": 0}}, ["budget.bits_per_weight", "greater than 0"]),
        ({"budget": {"bits_per_weight": float("nan")}}, ["budget.bits_per_weight", "nan"]),
        (
            {"budget": {"bits_per_weight": None, "bytes": "3 pounds"}},
            ["budget.bytes", "'3 pounds'", "800 MB"],
        ),
        (
            {"budget": {"bits_per_weight": None, "bytes": "9" * 400 + " GB"}},
            ["budget.bytes", "'9999", "more than"],
        ),
        (
            {"budget": {"bits_per_weight": None, "bytes": "2000000 TB"}},
            ["budget.bytes", "more than 1,000,000,000,000,000,000 bytes"],
        ),
        ({"calibration": {"sequences": 10**400}}, ["calibration.sequences", "1000000"]),
        ({"calibration": {"length": 10**9}}, ["calibration.length", "10000000"]),
        ({"calibration": {"shards": 10**9}}, ["calibration.shards", "100000"]),
        ({"calibration": {"gradient_sequences": 10**9}}, ["gradient_sequences", "1000000"]),
        ({"compute": {"workers": 10**30}}, ["compute.workers", "100000"]),
        ({"compute": {"cpus_per_worker": 10**9}}, ["compute.cpus_per_worker", "10000"]),
        ({"compute": {"gpus_per_worker": 1e-320}}, ["compute.gpus_per_worker", "0.001"]),
        ({"compute": {"gpus_per_worker": 1e300}}, ["compute.gpus_per_worker", "1000"]),
        ({"name": "n" * 300}, ["name", "at most 100 characters"]),
        ({"model": "m" * 5000}, ["model", "at most 4096 characters"]),
        ({"model": "m" * 4000}, ["model", "cannot be looked up", "name too long"]),
        ({"store": "a\0b"}, ["store", "holds the character '\\x00'"]),
        ({"store": "~nobody-of-this-name/x"}, ["store", "~nobody-of-this-name", "home"]),
        ({"tracking": {"register_as": "a/b"}}, ["tracking.register_as", "'a/b'"]),
        (
            {"evaluation": {"texts": [{"file": "t" * 5000}]}},
            ["evaluation.texts.0.file", "at most 4096 characters"],
        ),
        ({"calibration": {"texts": "first.txt"}}, ["calibration.texts", "list", "'first.txt'"]),
        ({"calibration": {"texts": []}}, ["calibration.texts", "at least 1"]),
        ({"calibration": {"seed": -1}}, ["calibration.seed", "got -1"]),
        ({"calibration": {"experts": "some"}}, ["calibration.experts", "'routed' or 'all'"]),
        (
            {"calibration": {"texts": [{"file": "first.txt"}, {"file": "./first.txt"}]}},
            ["calibration.texts", "first.txt", "name"],
        ),
        (
            {"calibration": {"texts": [{"file": "first.txt", "weight": float("inf")}]}},
            ["calibration.texts.0.weight", "inf"],
        ),
        ({"evaluation": {"texts": [{"file": "no.txt"}]}}, ["evaluation.texts.0", "no.txt"]),
        ({"compute": {"dtype": "float16"}}, ["compute.dtype", "'float32' or 'bfloat16'"]),
        ({"trust_remote_code": "maybe"}, ["trust_remote_code"]),
    ],
)
def test_a_mistake_names_file_key_and_what_is_allowed(
    tmp_path: Path, model: Path, changes: dict[str, Any], words: list[str]
) -> None:
    file = make_recipe(tmp_path, model, **changes)
    lines = refusal(file)
    assert len(lines) == 1 and lines[0].startswith(f"{file}: ")
    for word in words:
        assert word in lines[0]


def test_both_budgets_are_refused(tmp_path: Path, model: Path) -> None:
    (line,) = refusal(make_recipe(tmp_path, model, budget={"bytes": 5, "bits_per_weight": 3}))
    assert "budget: give either bytes or bits_per_weight" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("- name", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("just words", "a recipe is a mapping"),
        ("model: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    (line,) = refusal(file)
    assert line.startswith(f"{file}: ") and words in line


@pytest.mark.parametrize(
    "text",
    [
        "store: 2024-99-99",
        "a: " + "[" * 3000,
        "a: " + "9" * 5000,
    ],
)
def test_yaml_that_has_no_values_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    (line,) = refusal(file)
    assert line.startswith(f"{file}: not valid YAML: ")


def test_a_value_that_python_does_not_print_is_refused(tmp_path: Path, model: Path) -> None:
    file = make_recipe(tmp_path, model)
    text = file.read_text().replace("sequences: 12", f"sequences: 0x{'f' * 9000}")
    file.write_text(text)
    (line,) = refusal(file)
    assert "a number of 9002 characters" in line


def test_keys_that_are_written_twice_are_refused(tmp_path: Path, model: Path) -> None:
    file = make_recipe(tmp_path, model)
    lines = file.read_text().splitlines()
    first = lines.index("serve: moesaic") + 1
    text = "\n".join([*lines, "serve: vllm", "compute: {workers: 1, workers: 2}"])
    file.write_text(text)
    twice = [line.removeprefix(f"{file}: ") for line in refusal(file)]
    last = len(lines) + 1
    assert f"serve: written twice, in lines {first} and {last}: take one out" in twice
    assert f"workers: written twice, in lines {last + 1} and {last + 1}: take one out" in twice
    assert len(twice) == 3  # compute is there already


def test_schema_mistakes_do_not_hide_texts_that_are_missing(tmp_path: Path, model: Path) -> None:
    file = make_recipe(
        tmp_path, model, serve="nobody", evaluation={"texts": [{"file": "x.txt"}, {"file": 3}, 4]}
    )
    told = [line.removeprefix(f"{file}: ").split(":")[0] for line in refusal(file)]
    assert told == ["serve", "evaluation.texts.1.file", "evaluation.texts.2"] + [
        "evaluation.texts.0.file"
    ]


def test_a_store_in_the_home_folder_is_found(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe = load_recipe(make_recipe(tmp_path, model, store="~/x"))
    assert recipe.store == str(tmp_path / "home" / "x")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml") == [f"{tmp_path / 'none.yaml'}: no such recipe"]
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: \xff\xfe")
    assert "cannot be read" in refusal(binary)[0]
    assert "cannot be read" in refusal(tmp_path)[0]


def test_bytes_are_no_text(tmp_path: Path, model: Path) -> None:
    file = make_recipe(tmp_path, model)
    with file.open("a", encoding="utf-8") as stream:
        stream.write("publish: !!binary aGVsbG8=\n")
    line = file.read_text(encoding="utf-8").count("\n")
    told = f"{file}: not valid YAML: line {line}: bytes (!!binary): write a text"
    assert refusal(file) == [told]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.5 GB", 1_500_000_000),
        ("1.5GiB", 1_610_612_736),
        ("800 MiB", 838_860_800),
        ("800 mb", 800_000_000),
        ("2 k", 2_000),
        ("1 TB", 10**12),
        ("7 B", 7),
        (123456, 123456),
        (2.5e3, 2500),
    ],
)
def test_sizes_are_read(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", [0, "abc", "5 i", "5 ib", "-3 MB", "1.2.3", ".", "GB", "", True])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


def test_keep_looks_for_patterns_anywhere_in_the_name(tmp_path: Path, model: Path) -> None:
    recipe = load_recipe(make_recipe(tmp_path, model, keep=[r"layers\.0\.", "k_proj$"]))
    assert recipe.kept("model.layers.0.mlp.up_proj")
    assert recipe.kept("model.layers.7.self_attn.k_proj")
    assert not recipe.kept("model.layers.10.self_attn.q_proj")


def test_every_recipe_of_the_repository_is_valid_yaml_with_known_keys() -> None:
    files = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert files
    for file in files:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert raw.keys() <= Recipe.model_fields.keys()
