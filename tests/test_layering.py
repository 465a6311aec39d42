"""What may import what, and what is packed: read from the sources, nothing is imported."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "methods", "search", "orchestrator")

# Third-party packages and the only folders that may import them.
ONLY_IN = {
    "ray": {"orchestrator"},
    "mlflow": {"orchestrator"},
    "transformers": {"orchestrator"},
    "torch": {"kernels", "methods", "orchestrator"},
}


def imported(source: str) -> Iterator[str]:
    """Dotted names that a module imports, wherever in it the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports hide the layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def complaints(layer: str, source: str) -> list[str]:
    """What a module of ``layer`` imports although it must not."""
    found = []
    for name in imported(source):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top in LAYERS:
            found.append(f"{name}: write moesaic.{name}")
        elif top == "moesaic" and target in LAYERS:
            if LAYERS.index(target) > LAYERS.index(layer):
                found.append(f"{name}: {layer} stands below {target}")
        elif layer not in ONLY_IN.get(top, LAYERS):
            found.append(f"{name}: not in {layer}")
    return found


def modules(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down_the_layers(layer: str) -> None:
    assert modules(layer), f"no modules in {layer}"
    found = {
        str(path.relative_to(ROOT)): problems
        for path in modules(layer)
        if (problems := complaints(layer, path.read_text()))
    }
    assert not found


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("kernels", "from moesaic.methods.base import Spec"),
        ("methods", "import moesaic.search.base"),
        ("search", "from moesaic import orchestrator"),
        ("search", "def f():\n    import torch.nn"),
        ("methods", "if True:\n    from transformers.utils import logging"),
        ("kernels", "import os, ray"),
        ("orchestrator", "from kernels.tensor import CompressedTensor"),
    ],
)
def test_complaints_name_the_import_when_it_points_up(layer: str, source: str) -> None:
    assert len(complaints(layer, source)) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("orchestrator", "import ray, mlflow, transformers, torch\nimport moesaic.kernels.tensor"),
        ("search", "from moesaic.methods.base import Chain\nimport numpy, raygun"),
        ("methods", "import torch\nfrom moesaic.methods.base import Spec"),
    ],
)
def test_complaints_are_none_when_it_points_down(layer: str, source: str) -> None:
    assert complaints(layer, source) == []


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_folders_are_no_packages_themselves(layer: str) -> None:
    # With an __init__.py here, transformers would import our kernels as Hugging Face's package.
    assert not (ROOT / layer / "__init__.py").exists()


def test_package_list_equals_the_tree() -> None:
    setuptools = project()["tool"]["setuptools"]
    folders = {
        path.parent.relative_to(ROOT).as_posix() for layer in LAYERS for path in modules(layer)
    }
    assert set(setuptools["package-dir"].values()) == folders
    assert sorted(setuptools["packages"]) == sorted(setuptools["package-dir"])
    for package, folder in setuptools["package-dir"].items():
        expected = folder.replace("/", ".")
        assert package == ("moesaic" if folder == "orchestrator/package" else f"moesaic.{expected}")


def test_package_data_patterns_each_match_a_file() -> None:
    setuptools = project()["tool"]["setuptools"]
    unmatched = [
        f"{package}: {pattern}"
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        if not any(p.is_file() for p in (ROOT / setuptools["package-dir"][package]).glob(pattern))
    ]
    assert not unmatched


def test_every_data_file_is_package_data() -> None:
    setuptools = project()["tool"]["setuptools"]
    packed = {
        path
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for path in (ROOT / setuptools["package-dir"][package]).glob(pattern)
    }
    data = {
        path
        for layer in LAYERS
        for path in (ROOT / layer).rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert data <= packed
