"""A wheel built from the tree, installed in a clean environment, works without the checkout."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "methods", "search", "orchestrator")


def call(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed and sees no PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expected_files() -> dict[str, Path]:
    """Name in the wheel → file of the tree, for modules and package data."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {}
    for package, folder in setuptools["package-dir"].items():
        for pattern in ["*.py", *setuptools["package-data"].get(package, [])]:
            for path in (ROOT / folder).glob(pattern):
                inside = path.relative_to(ROOT / folder).as_posix()
                found[f"{package.replace('.', '/')}/{inside}"] = path
    return found


@dataclass
class Installed:
    wheel: Path
    bin: Path
    site: Path
    empty: Path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in an environment of its own that borrows the dependencies of this one."""
    tmp = tmp_path_factory.mktemp("wheel")
    # A build leaves folders behind: it gets a copy.
    tree = tmp / "tree"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tree)
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    call(*pip, *build, "--wheel-dir", tmp, tree, cwd=tmp)
    (wheel,) = tmp.glob("*.whl")

    venv = tmp / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp)
    python = venv / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    call(*pip, "--python", python, *install, wheel, cwd=tmp)
    (site,) = venv.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but its own .pth files are not read: the checkout's
    # editable installation, which is one, stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = tmp / "empty"
    empty.mkdir()
    return Installed(wheel, venv / "bin", site, empty)


def test_wheel_holds_the_modules_and_data_of_the_tree_and_nothing_else(
    installed: Installed,
) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        expected = expected_files()
        assert names == set(expected)
        for name, path in expected.items():
            assert archive.read(name) == path.read_bytes(), name


def test_wheel_holds_demo_model_texts_families_and_report_template() -> None:
    names = set(expected_files())
    demo = "moesaic/orchestrator/demo/"
    assert {f"{demo}model/config.json", f"{demo}model/tokenizer.json"} <= names
    assert any(n.startswith(f"{demo}model/") and n.endswith(".safetensors") for n in names)
    assert any(n.startswith(f"{demo}text/heldout") for n in names)
    assert "moesaic/orchestrator/families/qwen3_moe.yaml" in names
    assert any(n.endswith(".html.j2") for n in names)


def test_installed_modules_are_the_wheels(installed: Installed) -> None:
    modules = (
        "moesaic",
        "moesaic.kernels.tensor",
        "moesaic.methods.base",
        "moesaic.search.base",
        "moesaic.orchestrator.demo",
        "moesaic.orchestrator.recipe",
    )
    code = f"import {', '.join(modules)}, sys\nfor m in {modules}: print(sys.modules[m].__file__)"
    files = call(installed.bin / "python", "-c", code, cwd=installed.empty).split()
    assert len(files) == len(modules)
    assert all(Path(file).is_relative_to(installed.site) for file in files), files


def test_installation_brings_no_bare_top_level_names(installed: Installed) -> None:
    assert {path.name for path in installed.site.iterdir() if path.is_dir()} == {
        "moesaic",
        f"{installed.wheel.name.split('-py3')[0]}.dist-info",
    }


@pytest.mark.parametrize(
    ("kind", "folder", "name"),
    [("methods", "methods", "gptq"), ("families", "orchestrator/families", "qwen3_moe")],
)
def test_installed_command_lists_what_it_finds(
    installed: Installed, kind: str, folder: str, name: str
) -> None:
    assert list((ROOT / folder).glob(f"{name}.*"))
    listed = call(installed.bin / "moesaic", "list", kind, cwd=installed.empty)
    assert name in listed.split()
    assert list(installed.empty.iterdir()) == []


def test_installed_demo_model_is_found_without_the_checkout(installed: Installed) -> None:
    code = "from moesaic.orchestrator import demo; print(demo.MODEL)"
    model = Path(call(installed.bin / "python", "-c", code, cwd=installed.empty).strip())
    assert model.is_relative_to(installed.site)
    assert (model / "config.json").is_file()


def imported(file: Path) -> Iterator[str]:
    """Names of the top-level modules that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).split(".")[0]


def canonical(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def test_what_is_imported_is_declared_and_what_is_declared_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["datasets"], *extras["gguf"], *extras["s3"]]
    declared = {canonical(re.split(r"[^\w-]", text)[0]) for text in wanted}
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    names = {name for file in files for name in imported(file)}
    known = importlib.metadata.packages_distributions()
    own = {*sys.stdlib_module_names, "moesaic"}
    brought = {name: set(map(canonical, known.get(name, ()))) for name in names - own}
    assert not {name for name, found in brought.items() if not found & declared}
    for name in declared:
        assert importlib.metadata.version(name)
