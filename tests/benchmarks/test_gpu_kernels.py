"""The ways that the benchmark times do the same; without a GPU it says so."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
# In a process of its own, since Triton reads TRITON_INTERPRET when it is imported.
TINY = """
import json, torch
from gpu_kernels import Draw, Model, cases, differences
found = []
for gated in (False, True):
    model = Model("tiny", 128, 256, 2, gated, ((2, 20), (1, 1)))
    for labels, ways in cases(model, [8, 2], Draw(torch.float16, "cpu")):
        found.append([labels[0], differences(ways)])
print(json.dumps(found))
"""


def test_every_way_is_close_to_the_dense_layer() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(FOLDER)}
    run = [sys.executable, "-c", TINY]
    output = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    found = json.loads(output)
    for layer, differences in found:
        assert set(differences) == {"products", "fused"}, layer
        assert all(difference < 2**-7 for difference in differences.values()), (layer, differences)
    assert {layer for layer, _ in found} == {
        "2 bits",
        "3 bits",
        "4 bits",
        "4 bits + correction",
        "8 bits",
        "attention",
        "feed-forward",
        "linear",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_status_is_2_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / "gpu_kernels.py"), run_name="__main__")
    assert ended.value.code == 2
    assert "needs a GPU" in capsys.readouterr().err
