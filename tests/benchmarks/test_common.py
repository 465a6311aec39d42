"""The watcher sees what its command's processes took; the generator writes what it says."""

import json
import os
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmarks import common
from tests.benchmarks.random_moe import make_random_moe

MEGABYTE = 1_000_000
ALLOCATE = "import time; x = b'x' * 200_000_000; time.sleep(0.3)"
IN_A_CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"


@pytest.mark.parametrize("generations", [0, 1, 2])
def test_watch_sees_the_memory_of_every_descendant(tmp_path: Path, generations: int) -> None:
    code = ALLOCATE
    for _ in range(generations):
        code = IN_A_CHILD.format(code=code)
    usage = common.watch([sys.executable, "-c", code], tmp_path / "log")
    assert 200 * MEGABYTE < usage.peak_bytes < 260 * MEGABYTE
    assert usage.processes == 1 + generations
    assert usage.seconds > 0.3


def test_watch_sees_a_peak_that_is_over_when_it_looks(tmp_path: Path) -> None:
    code = "import time; x = b'x' * 200_000_000; del x; time.sleep(0.5)"
    assert common.watch([sys.executable, "-c", code], tmp_path / "log").peak_bytes > 2e8


def test_watch_reports_the_largest_process_and_not_the_sum(tmp_path: Path) -> None:
    code = f"import subprocess, sys; a = [sys.executable, '-c', {ALLOCATE!r}]\n"
    code += "for p in [subprocess.Popen(a), subprocess.Popen(a)]: p.wait()"
    usage = common.watch([sys.executable, "-c", code], tmp_path / "log")
    assert 200 * MEGABYTE < usage.peak_bytes < 260 * MEGABYTE
    assert usage.processes == 3


def test_watch_follows_and_ends_a_child_that_has_lost_its_parent(tmp_path: Path) -> None:
    """The middle process ends at once; the one it started would sleep for a minute."""
    sleeper = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    pid_file = tmp_path / "pid"
    middle = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {sleeper!r},"
    middle += f" {str(pid_file)!r}]); time.sleep(0.7)"
    code = IN_A_CHILD.format(code=middle) + "; import time; time.sleep(0.3)"
    usage = common.watch([sys.executable, "-c", code], tmp_path / "log")
    assert usage.processes == 3
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the orphan was left behind"
        time.sleep(0.05)


def test_watch_shows_the_end_of_the_log_when_the_command_fails(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no luck\n[^\n]*exit status 3"):
        common.watch([sys.executable, "-c", "print('no luck'); exit(3)"], tmp_path / "log")


def test_watch_hands_on_no_choice_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = "import os; print(os.environ.get('OMP_NUM_THREADS'), os.environ['GIVEN'])"
    common.watch([sys.executable, "-c", code], tmp_path / "log", environment={"GIVEN": "yes"})
    assert (tmp_path / "log").read_text() == "None yes\n"


def test_high_water_equals_what_the_process_says_of_itself() -> None:
    import resource

    ballast = np.ones(20_000_000)
    found = common.high_water(os.getpid())
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert found is not None
    assert ballast.nbytes < found[0]
    assert abs(found[0] - own) < 4 * MEGABYTE


def test_alternate_takes_turns() -> None:
    order: list[str] = []
    ways = {name: lambda index, n=name: order.append(f"{n}{index}") for name in "ab"}
    assert {name: len(results) for name, results in common.alternate(ways, 2).items()} == {
        "a": 2,
        "b": 2,
    }
    assert order == ["a0", "b0", "a1", "b1"]


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("llm_compressor", "--peer-python"),
        ("auto_scheme", "--bits-per-weight"),
        ("memory", "--limit-gb"),
        ("workers", "--gradients"),
        ("assemble", "--runs"),
    ],
)
def test_every_benchmark_explains_itself(
    script: str, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(common.__file__).parent
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(folder / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert option in shown
    assert "--write" in shown


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A random model of about 20 MB in shards of 5 MB, and the bytes it is said to have."""
    path = tmp_path_factory.mktemp("moe")
    sizes = {"hidden": 128, "experts": 8, "expert_width": 96}
    return path, make_random_moe(path, 0.02, shard_bytes=5 * MEGABYTE, **sizes)


def test_random_moe_has_the_size_asked_for_in_shards(checkpoint: tuple[Path, int]) -> None:
    path, total = checkpoint
    assert abs(total - 20 * MEGABYTE) < MEGABYTE
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) >= 4
    assert max(shard.stat().st_size for shard in shards) < 5.1 * MEGABYTE
    index = json.loads((path / "model.safetensors.index.json").read_text())
    found = 0
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                assert index["weight_map"].pop(name) == shard.name
                found += file.get_tensor(name).nbytes
    assert found == total == index["metadata"]["total_size"]
    assert not index["weight_map"]


def test_random_moe_loads_in_transformers_and_computes(checkpoint: tuple[Path, int]) -> None:
    path, _ = checkpoint
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(path)("two words", return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 9)
    assert torch.isfinite(model(ids).logits).all()


def test_random_moe_repeats_no_weight(checkpoint: tuple[Path, int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    weights = [p.flatten()[:64] for p in model.parameters() if p.dim() > 1]
    weights += [e.flatten()[:64] for p in model.parameters() if p.dim() == 3 for e in p]
    distinct = {tuple(w.tolist()) for w in weights}
    banks = sum(p.dim() == 3 for p in model.parameters())
    assert len(distinct) == len(weights) - banks  # a bank begins as its first expert does
    assert all(float(w.detach().float().std()) > 0.01 for w in weights)
