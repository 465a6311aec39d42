"""The Triton kernel of ``int_group``, in Triton's interpreter and compiled ahead of time.

Both need a process of their own, since Triton reads TRITON_INTERPRET when it is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

CONFIGS = {"vector", "decode", "batch", "prefill", "odd"}  # every one must run, and must compile
HERE = Path(__file__).parent
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Largest error over largest output. The interpreter accumulates in float32 and multiplies bfloat16
# in float32; otherwise the weight is rounded to the activations' dtype (half a unit in the last
# place), and in fp16 the interpreter checks just that.
TOLERANCE = {
    ("cpu", "float16"): 2**-10,
    ("cpu", "bfloat16"): 1e-6,
    ("cuda", "float16"): 2**-10,
    ("cuda", "bfloat16"): 2**-7,
}
# Shared memory that a block may ask for, bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


def run_script(name: str, *arguments: str, interpret: bool) -> subprocess.Popen[str]:
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / name), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str], seconds: int = 240) -> list[dict[str, Any]]:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, process.args
    found = json.loads(output)
    assert found
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_kernel_is_close_to_float64_on_odd_shapes(device: str) -> None:
    cases = answer(run_script("run_triton.py", device, interpret=device == "cpu"))
    for case in cases:
        assert case["finite"], case
        assert case["guard_intact"], case
        assert case["error"] <= TOLERANCE[device, case["activations"]], case
        assert case["matmul_equals_launch"], case
        assert case["shape_without_rows"], case
    assert {case["config"] for case in cases} == CONFIGS


def test_every_configuration_compiles_within_the_limits() -> None:
    cases = answer(run_script("compile_triton.py", *map(str, SHARED_LIMIT), interpret=False))
    for case in cases:
        assert case["stack_bytes"] == 0, case  # registers spill to the stack
        assert case["shared_bytes"] <= SHARED_LIMIT[case["capability"]], case
        assert case["tensor_cores"] == (case["config"] != "vector"), case
    for capability in SHARED_LIMIT:
        found = {case["config"] for case in cases if case["capability"] == capability}
        assert found == CONFIGS
