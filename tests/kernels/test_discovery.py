"""Plug-ins are found by file name."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic.kernels import discovery, tensor
from moesaic.kernels.discovery import UnknownName, plugin, plugins

KERNELS = Path(discovery.__file__).parent


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder with two plug-ins, shared code, a private module that fails, and a subfolder."""
    folder = tmp_path / "shelf"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "__init__.py").write_text("def pack(): ...\n")
    (folder / "zinc.py").write_text("def pack(): ...\n")
    (folder / "acid.py").write_text("def pack(): ...\n")
    (folder / "common.py").write_text("def helper(): ...\n")
    (folder / "_private.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins.cache_clear()
    plugin.cache_clear()
    yield "shelf"
    plugins.cache_clear()
    plugin.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "shelf"]:
        del sys.modules[name]


def test_plugins_are_the_modules_with_the_marker_in_alphabetical_order(package: str) -> None:
    assert list(plugins(package, ("pack",))) == ["acid", "zinc"]
    assert list(plugins(package, ("helper",))) == ["common"]


def test_plugin_returns_the_module(package: str) -> None:
    assert plugin(package, ("pack",), "zinc").__name__ == "shelf.zinc"


def test_plugin_lists_the_known_names_when_the_name_is_unknown(package: str) -> None:
    with pytest.raises(UnknownName, match="unknown name 'zink' in shelf: known are acid, zinc"):
        plugin(package, ("pack",), "zink")


def test_formats_are_the_files_of_kernels_that_define_pack() -> None:
    defining = [file.stem for file in KERNELS.glob("*.py") if "\ndef pack(" in file.read_text()]
    assert tensor.formats() == sorted(defining)
    assert "int_group" in tensor.formats()


def test_format_module_lists_the_formats_when_the_name_is_unknown() -> None:
    with pytest.raises(UnknownName, match="int_gruop.*known are .*int_group"):
        tensor.format_module("int_gruop")
