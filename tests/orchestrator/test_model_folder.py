"""A model of the hub: what is downloaded of its repository."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import RecipeError, UserError
from moesaic.orchestrator.model_folder import find_model
from moesaic.orchestrator.shared import CachePlace
from tests.orchestrator.projects import make_model_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What repositories hold besides a model.
OTHERS = (
    "consolidated.safetensors",
    "fp16/model.safetensors",
    "onnx/config.json",
    "onnx/model.onnx",
    "original/params.json",
    "pytorch_model.bin",
    "README.md",
)


class Hub:
    """Stands for the hub: files are chosen by its own filter and copied to a snapshot."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.snapshots = repository, cache / "models--a--b" / "snapshots"
        self.revisions: list[str | None] = []

    def download(
        self,
        name: str,
        *,
        revision: str | None = None,
        allow_patterns: list[str],
        ignore_patterns: list[str] | None = None,
    ) -> str:
        self.revisions.append(revision)
        files = [path for path in sorted(self.repository.rglob("*")) if path.is_file()]
        names = [path.relative_to(self.repository).as_posix() for path in files]
        patterns: dict[str, Any] = {
            "allow_patterns": allow_patterns,
            "ignore_patterns": ignore_patterns,
        }
        for chosen in filter_repo_objects(names, **patterns):
            target = self.snapshots / COMMIT / chosen
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.repository / chosen, target)
        return str(self.snapshots / COMMIT)

    def got(self) -> set[str]:
        root = self.snapshots / COMMIT
        return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(params=[1, 2], ids=["one file", "shards"])
def hub(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    sizes = {} if request.param == 1 else {"max_shard_size": "20KB"}
    repository = make_model_folder(tmp_path / "repository", "llama", **sizes)
    own = ("modeling_own.py", "qwen.tiktoken", "spm.vocab", "1_Pooling/config.json")
    for name in (*own, *OTHERS):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("{}")
    found = Hub(repository, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.download)
    yield found


@pytest.mark.parametrize("code", [False, True])
def test_what_belongs_to_the_model_comes_and_nothing_else(
    hub: Hub, tmp_path: Path, code: bool
) -> None:
    folder = find_model("a/b", CachePlace(tmp_path, 10**9), code)
    every = {
        path.relative_to(hub.repository).as_posix()
        for path in hub.repository.rglob("*")
        if path.is_file()
    }
    wanted = every - set(OTHERS) - (set() if code else {"modeling_own.py"})
    assert hub.got() == wanted and {"qwen.tiktoken", "spm.vocab"} < wanted
    assert Checkpoint(folder).names() == Checkpoint(hub.repository).names()
    assert hub.revisions == [None, COMMIT]  # of one commit, whatever is pushed meanwhile


@pytest.mark.parametrize("content", ["[", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_names_nothing_is_told(hub: Hub, tmp_path: Path, content: str) -> None:
    for file in hub.repository.glob("model*.safetensors"):
        file.unlink()
    (hub.repository / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json"):
        Checkpoint(find_model("a/b", CachePlace(tmp_path, 10**9)))


def test_a_model_that_cannot_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*given: Any, **more: Any) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(RecipeError, match="model: a/b is no folder and cannot be downl") as error:
        find_model("a/b", CachePlace(tmp_path, 10**9))
    assert "\n" not in str(error.value)
