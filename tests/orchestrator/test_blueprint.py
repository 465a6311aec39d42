"""What is planned from a configuration alone is what the files would have said."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.orchestrator.blueprint import Blueprint, PlannedExperiment
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import RecipeError, UserError
from moesaic.orchestrator.family import families
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.run import open_experiment
from moesaic.orchestrator.streaming import StreamedModel
from tests.orchestrator.projects import make_model_folder, make_recipe

SHAPES = Path(__file__).parents[1] / "benchmarks" / "shapes"


@pytest.mark.parametrize("model_type", families())
def test_blueprint_has_the_tensors_of_the_files(tmp_path: Path, tiny: Any, model_type: str) -> None:
    whole = Checkpoint(tiny(model_type, torch.bfloat16))
    shutil.copy(whole.path / "config.json", tmp_path)
    plan = Blueprint(tmp_path)
    family = StreamedModel(whole).family
    names = [n for n in whole.names() if not family.is_unused_outside(n)]
    names = [n for n in names if n.rpartition(".")[2] not in ("inv_freq",)]
    assert [n for n in plan.names() if not family.is_unused_outside(n)] == names
    for name in names:
        assert plan.shape(name) == whole.shape(name)
        assert plan.nbytes(name) == whole.nbytes(name)
    assert StreamedModel(plan).units() == StreamedModel(whole).units()


# Billions of parameters, as their publishers have it; without the layer that predicts further.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3-30b-a3b", 30.53),
        ("qwen3-235b-a22b", 235.1),
        ("deepseek-v3", 671.0),
        ("kimi-k2", 1026.4),
    ],
)
def test_parameters_of_well_known_models(name: str, billions: float) -> None:
    plan = Blueprint(SHAPES / name)
    count = sum(torch.Size(plan.shape(n)).numel() for n in plan.names())
    assert count / 1e9 == pytest.approx(billions, rel=1e-3)


def test_an_experiment_without_weights_has_the_bytes_and_candidates_of_one_with_them(
    tmp_path: Path,
) -> None:
    folder = make_model_folder(tmp_path / "model")
    whole = open_experiment(make_recipe(tmp_path / "whole", folder), tmp_path / "out")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    recipe = load_recipe(make_recipe(tmp_path / "planned", bare))
    plan = PlannedExperiment(recipe, tmp_path / "out", gpus=False)
    assert not plan.weights_are_here
    assert plan.offers == whole.offers
    assert plan.calibration.ids.shape == whole.calibration.ids.shape
    assert plan.compute_dtype == whole.compute_dtype
    for unit in plan.units:
        for chain in plan.offers[unit.name]:
            known = whole.sizes.predicted_bytes(unit, chain)
            assert plan.sizes.predicted_bytes(unit, chain) == known


def test_slicing_needs_weights(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, SHAPES / "qwen3-30b-a3b", slice={"hidden": 0.75})
    with pytest.raises(RecipeError, match=r"slice: needs the model's weights"):
        PlannedExperiment(load_recipe(recipe), tmp_path / "out", gpus=True)


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        Blueprint(tmp_path)
