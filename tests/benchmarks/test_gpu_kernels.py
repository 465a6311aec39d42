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
import gpu_kernels
from gpu_kernels import Draw, Model, attend, cases, differences, feed_forward
draw = Draw(torch.float16, "cpu")
gated, plain = (Model("tiny", 128, 256, 2, gated, ((2, 9),)) for gated in (True, False))
found = [[labels[0], differences(ways)] for labels, ways in cases(gated, [8, 2], draw)]
# All that depends on the gate.
for name, make in (("feed-forward", feed_forward), ("attention", attend)):
    found += [[name, differences(make(plain, 2, 9, rank, draw))] for rank in (16, 64)]
# A single token, which takes a second for every width.
gpu_kernels.WIDTHS = (4,)
single = Model("tiny", 128, 256, 2, True, ((1, 1),))
found += [[labels[0], differences(ways)] for labels, ways in cases(single, [8], draw)]
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
