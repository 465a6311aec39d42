"""Twenty things break in one run; it leaves the bytes of a run that nobody disturbed."""

import tempfile
from pathlib import Path

import pytest

from tests.chaos import SHARES, Chaos, Pace, faults_of
from tests.orchestrator.inline import Project
from tests.orchestrator.projects import make_model_folder

SEED, FAULTS = 52, 20


@pytest.mark.timeout(400)
def test_twenty_faults_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model_folder(tmp_path / "model", "qwen3_moe")
    changes = {
        "candidates": [
            {"method": "rtn", "bits": [3, 8], "group_size": 16},
            {"method": "gptq", "bits": [3, 4, 5], "group_size": 16},
        ],
    }
    with monkeypatch.context() as patch:
        whole = Project(tmp_path / "whole", model, patch)
        whole.write(**changes)
        whole.run(stages=("assemble",))
    other = Project(tmp_path / "other", model, monkeypatch)
    with (
        tempfile.TemporaryDirectory(prefix="ch", dir="/tmp", ignore_cleanup_errors=True) as name,
        Chaos(Path(name), other.folder / "store", SEED, Pace()) as chaos,
    ):
        recipe = other.write(**changes, compute={"workers": None, "address": chaos.address})
        command = ["assemble", str(recipe), "--output", str(other.output)]
        outcome = chaos.run([command], faults_of(SEED, FAULTS), limit=280)
    counts = outcome.counts()
    assert counts.total() == FAULTS and counts.keys() == SHARES.keys()
    assert any("the disk is full; free space" in line for line in outcome.endings)
    one, two = whole.left(), other.left()
    assert {name for name in one if one[name] != two.get(name)} <= {"README.md"}
