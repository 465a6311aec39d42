"""What a command imports before it has anything to do."""

import subprocess
import sys

import pytest

from moesaic.orchestrator.dtypes import DTYPES
from moesaic.orchestrator.foreign import ITEM_BYTES

LATE = {"matplotlib", "mlflow", "pandas", "scipy", "sklearn", "optuna"}


@pytest.mark.parametrize(
    ("module", "late"),
    [
        ("moesaic.orchestrator.cli", LATE | {"torch", "transformers", "ray"}),
        ("moesaic.orchestrator.run", LATE),
    ],
)
def test_what_is_not_needed_at_the_start_is_not_imported(module: str, late: set[str]) -> None:
    # Coverage and other tools of a test run import more: a process of its own.
    code = f"import sys, {module}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert late.isdisjoint(found.stdout.split())


def test_bytes_of_a_number_are_those_of_its_dtype() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_BYTES
