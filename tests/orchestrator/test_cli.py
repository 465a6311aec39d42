"""Bad input through the command line: exit status, and one or two lines that say what to do."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from typer.testing import CliRunner

from moesaic.orchestrator.cli import app
from tests.orchestrator.projects import make_model_folder, make_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "whole")


def ask(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(verb: str, recipe: Path, *more: str | Path) -> str:
    """What stderr says of a mistake of the user's."""
    result = ask(verb, recipe, "--output", recipe.parent / "run", "--json", *more)
    assert result.exit_code == 2, (result.exit_code, result.stderr)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr.removeprefix("error: ").rstrip("\n")


def test_check_prints_one_json_object_when_the_recipe_is_right(model: Path, tmp_path: Path) -> None:
    result = ask("check", make_recipe(tmp_path, model), "--json")
    assert result.exit_code == 0, result.stderr
    assert isinstance(json.loads(result.stdout), dict)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": {"bits_per_weight": 1}}, "budget: .* too few: the smallest plan .* bytes"),
        ({"budget": {"bits_per_weight": 30}}, "budget: .* hold the whole dense model"),
        ({"model": "./nothing"}, "model: no folder ./nothing"),
        (
            {"candidates": [{"method": "rtn", "bits": 4, "group_size": 40}]},
            "group_size 40 does not divide the 48 inputs",
        ),
        ({"candidates": [{"method": "nothing"}]}, "candidates: .*'nothing'.* known are gptq, rtn"),
        (
            {"candidates": [{"method": "rtn", "bits": 4, "group_size": 0}]},
            "option group_size: group_size is 0: it must be positive, or -1",
        ),
        ({"budget": 3}, "budget: must be a mapping .keys: bytes, bits_per_weight., got 3"),
        ({"calibration": {"texts": ["a.txt"]}}, "texts.0: must be a mapping .keys: file,"),
        ({"keep": ["."]}, "keep: the patterns leave no unit"),
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


def test_all_mistakes_are_told_at_once(model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, model, budgett=3, calibration={"lenght": 3}, serve="nobody")
    lines = refusal("check", recipe).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["serve", "calibration.lenght", "budgett"]


def test_text_without_words_is_told_as_such(model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, model)
    (tmp_path / "first.txt").write_text("", encoding="utf-8")
    assert refusal("check", recipe).endswith("calibration.texts: first.txt holds no text")


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lambda m: (m / "model.safetensors").unlink(), "no weights"),
        (lambda m: (m / "model.safetensors").write_bytes(b"\x10"), "truncated"),
        (lambda m: [f.unlink() for f in m.glob("tokenizer*")], "no tokenizer: put its tokenizer"),
        (lambda m: (m / "config.json").write_text('{"model_type": "odd"}'), "to add a family"),
        (lambda m: (m / "config.json").unlink(), "config.json: no such file"),
    ],
)
def test_broken_model_folders_are_refused(
    model: Path, tmp_path: Path, breaks: Any, words: str
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    breaks(folder)
    assert words in refusal("check", make_recipe(tmp_path, folder))


def test_pickled_weights_are_refused(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle files (pytorch_model.bin) are refused" in refusal(
        "check", make_recipe(tmp_path, folder)
    )


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", vocab_size=100)
    words = "model: its tokenizer gives token"
    assert words in refusal("check", make_recipe(tmp_path, folder))


@pytest.mark.parametrize("verb", ["check", "run", "search"])
def test_an_output_that_is_no_folder_is_refused(model: Path, tmp_path: Path, verb: str) -> None:
    file = tmp_path / "file"
    file.write_text("kept", encoding="utf-8")
    text = refusal(verb, make_recipe(tmp_path, model), "--output", file)
    assert text == f"{file}: --output must be a folder"
    assert file.read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize("store", ["file", "/proc/moesaic"])
def test_a_store_that_cannot_be_written_is_refused(model: Path, tmp_path: Path, store: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    text = refusal("check", make_recipe(tmp_path, model, store=store))
    assert text.startswith(str(tmp_path / store))
    assert len(text.splitlines()) == 1


def test_inspect_names_a_tensor_that_is_missing(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    save_file({"lm_head.weight": torch.zeros(257, 48)}, folder / "model.safetensors")
    result = ask("inspect", folder, "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "model.embed_tokens.weight that is in no file" in result.stderr


@pytest.mark.parametrize("kind", ["methods", "formats", "searches", "families"])
def test_lists_are_json_when_asked(kind: str) -> None:
    result = ask("list", kind, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)[kind]


def test_the_folder_of_no_run_is_refused(tmp_path: Path) -> None:
    for arguments in (("show", tmp_path), ("store", "gc", tmp_path)):
        result = ask(*arguments, "--json")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: {tmp_path}: ")
