"""A mixture of bits by moesaic and by AutoRound's AutoScheme, each in its own environment.

    python tests/benchmarks/auto_scheme.py [--seeds 3] [--iterations 0 20] [--peer-python PATH]

Both choose one of the same options (symmetric integers of ``--bits``, one group size) for every
linear layer of the blocks, so that what is stored for these layers, scales and zero points
included, is ``--bits-per-weight`` on average. Both get the same calibration tokens for everything,
scores and rounding, compute in the same dtype on all cores, and are measured as whole processes:
start, loading, scoring, choosing, rounding, writing; moesaic also reloads and checks what it wrote.

moesaic: GPTQ as in recipes/smollm2.yaml, predicted losses from gradients, ``search: knapsack``.
AutoRound: its DeltaLoss scores, then its rounding with each number of ``--iterations`` per block
(0: its optimized rounding to nearest; 50: its light recipe; 200: its default); each is a process of
its own that scores anew.

Every seed draws other calibration tokens, for both, and all runs follow one another.

moesaic evaluates both on the same held-out tokens: perplexity and exact KL to the dense model.
AutoRound's files are loaded as a user would load them, and the weights that the loaded layers
multiply with go into a plain checkpoint.

What is finished stays in ``--folder`` and is not done again; ``--again`` removes it first. Without
``--peer-python`` an environment is made under build/autoround, once (about 2 GB).
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import (
    BUILD,
    ROOT,
    add_text_options,
    arguments_parser,
    check_inputs,
    end_in_order,
    progress,
    report,
    spread,
    table,
    watch,
    write_recipe,
)
from llm_compressor import draw_ids

TORCH = "torch==2.13.0"
PEER = "auto-round==0.16.1"
HERE = Path(__file__).parent
OFFLINE = {"HF_HUB_OFFLINE": "1"}
# Dense figures of two evaluations that differ in the order of sums only.
_SAME = 1e-4


def peer_python(given: Path | None) -> tuple[Path, str]:
    """The interpreter that has AutoRound, and its version; makes the environment where there is
    none."""
    python = (given or ROOT / "build" / "autoround" / "bin" / "python").absolute()
    if given is None and not python.exists():
        progress(f"installing {PEER} into {python.parents[1]}")
        venv.create(python.parents[1], with_pip=True, clear=True)
        # torch alone first, and pinned again: nothing may replace it by a build for GPUs.
        for packages in ([TORCH], [TORCH, PEER]):
            install = [str(python), "-m", "pip", "install", "--quiet", *packages]
            if subprocess.run(install, check=False, stdout=sys.stderr).returncode != 0:
                shutil.rmtree(python.parents[1])
                raise SystemExit(f"{PEER} could not be installed")
    version = "import importlib.metadata as m; print(m.version('auto-round'))"
    found = subprocess.run([python, "-c", version], check=False, capture_output=True, text=True)
    if found.returncode != 0:
        raise SystemExit(f"{python}: has no auto-round")
    return python, f"auto-round {found.stdout.strip()}"


def remembered(
    file: Path, setting: Mapping[str, Any], work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What ``work`` returned for the same setting, kept in ``file``; it works only once."""
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["setting"] == setting:
            progress(f"{file.stem}: done before")
            return dict(kept["result"])
    progress(file.stem)
    result = work()
    file.write_text(json.dumps({"setting": setting, "result": result}, indent=1), encoding="utf-8")
    return result


def run_ours(folder: Path, recipe: Path, digest: str) -> dict[str, Any]:
    """From a fresh store to a checkpoint in ``folder/ours/model``, and how good it is."""
    for old in (folder / "ours", folder / "store"):
        shutil.rmtree(old, ignore_errors=True)
    moesaic = [sys.executable, "-m", "moesaic.orchestrator.cli"]
    rest = [str(recipe), "--output", str(folder / "ours")]
    usage = watch([*moesaic, "assemble", *rest], folder / "ours.log", environment=OFFLINE)
    if not list((folder / "store" / "ids").rglob(f"{digest}.safetensors")):
        raise SystemExit("moesaic calibrated with other tokens than AutoRound was given")
    done = subprocess.run(
        [*moesaic, "evaluate", *rest, "--json"], check=True, stdout=subprocess.PIPE, text=True
    )
    scores = json.loads(done.stdout)["scores"]
    return {"usage": asdict(usage), "scores": {name: scores[name] for name in ("dense", "plan")}}


def run_theirs(
    folder: Path, python: Path, arguments: argparse.Namespace, iterations: int
) -> dict[str, Any]:
    """A checkpoint of AutoRound's in ``folder/theirs-N/packed``; what it stores, and how good."""
    own = folder / f"theirs-{iterations}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    peer, model = [str(python), str(HERE / "auto_scheme_peer.py")], str(arguments.model.resolve())
    options = ["--bits", *arguments.bits, "--group-size", arguments.group_size]
    options += ["--bits-per-weight", arguments.bits_per_weight, "--dtype", arguments.dtype]
    options += ["--iterations", iterations, "--batch-size", arguments.peer_batch_size]
    command = ["quantize", model, folder / "calibration.npy", own / "packed", *options]
    # Scores that it kept from an earlier process would not be measured.
    environment = {**OFFLINE, "AR_AUTO_SCHEME_CACHE": str(own / "cache")}
    command = [*peer, *map(str, command)]
    usage = watch(command, folder / f"{own.name}.log", cwd=own, environment=environment)
    packed = next(path.parent for path in (own / "packed").rglob("config.json"))
    unpack = [*peer, "unpack", model, str(packed), str(own / "plain")]
    watch(unpack, folder / f"{own.name}-unpack.log", cwd=own, environment=OFFLINE)
    stored, weights = stored_bytes(arguments.model, packed)
    found = {"usage": asdict(usage), "bytes": stored, "weights": weights}
    found |= scores_of(folder, own / "plain")
    shutil.rmtree(own / "plain")
    return found


def stored_bytes(dense: Path, packed: Path) -> tuple[int, int]:
    """(bytes of all tensors of the layers whose dense weight is gone, number of these weights)."""
    from moesaic.orchestrator.tensorfile import read_file

    before, after = (
        {
            name: entry
            for file in folder.glob("*.safetensors")
            for name, entry in read_file(file)[0].items()
        }
        for folder in (dense, packed)
    )
    gone = {name.removesuffix(".weight"): before[name] for name in before.keys() - after.keys()}
    stored = sum(entry.nbytes for name, entry in after.items() if name.rpartition(".")[0] in gone)
    return stored, sum(math.prod(entry.shape) for entry in gone.values())


def scores_of(folder: Path, model: Path) -> dict[str, Any]:
    """The dense model and another one with the same config on the held-out tokens.

    Returns:
        ``dense`` and ``plan``, as in ``scores.json``.
    """
    from moesaic.orchestrator.checkpoint import Checkpoint
    from moesaic.orchestrator.evaluate import evaluate_rows, score
    from moesaic.orchestrator.run import open_experiment
    from moesaic.orchestrator.worker import WorkerState

    experiment = open_experiment(folder / "recipe.yaml", folder / "ours")
    judge, sequences = experiment.judge, experiment.evaluation
    other = replace(
        judge,
        model=str(model),
        fingerprint=Checkpoint(model).fingerprint,
        original=judge.model,
        original_fingerprint=judge.fingerprint,
    )
    rows = (0, len(sequences.ids))
    state = WorkerState(cpus=2)
    parts = [evaluate_rows(state, asdict(each), rows, {}) for each in (judge, other)]
    source, labels = sequences.source.tolist(), sequences.labels
    dense, plan = (score([part], source, labels) for part in parts)
    return {"scores": {"dense": dense, "plan": plan}}


# What a seed gave: moesaic's figures, and AutoScheme's by number of iterations.
Seed = tuple[Mapping[str, Any], Mapping[int, Mapping[str, Any]]]


def row(name: str, found: Sequence[Mapping[str, Any]], bits: Sequence[float]) -> list[str]:
    """A line of the table: medians over seeds, in brackets least and largest."""
    plans, usages = [one["scores"]["plan"] for one in found], [one["usage"] for one in found]
    figures = [
        spread(bits, 4),
        spread([plan["kl"] for plan in plans], 4),
        spread([plan["perplexity"] for plan in plans], 2),
        spread([usage["seconds"] for usage in usages], 0),
        spread([usage["peak_bytes"] / 1e9 for usage in usages], 2),
    ]
    return [name, *figures]


def peer_name(iterations: int) -> str:
    return f"AutoScheme, {iterations} iterations" if iterations else "AutoScheme, to nearest"


def ratios(seeds: Sequence[Seed], iterations: int) -> str:
    """KL and time of moesaic over AutoScheme's, seed by seed."""
    pairs = [(ours, theirs[iterations]) for ours, theirs in seeds]
    kl = [a["scores"]["plan"]["kl"] / b["scores"]["plan"]["kl"] for a, b in pairs]
    seconds = [a["usage"]["seconds"] / b["usage"]["seconds"] for a, b in pairs]
    return f"{spread(kl, 3)} and {spread(seconds, 3)} ({peer_name(iterations)})"


def body(arguments: argparse.Namespace, peer: str, seeds: Sequence[Seed]) -> str:
    """The table and what is to be read from it."""
    for ours, theirs in seeds:
        dense = ours["scores"]["dense"]["perplexity"]
        for found in theirs.values():
            if abs(found["scores"]["dense"]["perplexity"] / dense - 1) > _SAME:
                raise SystemExit("the two were evaluated on different tokens")
    own = [ours for ours, _ in seeds]
    rows = [["dense", "16", "0", f"{dense:.2f}", "", ""]]
    rows.append(row("moesaic", own, [one["scores"]["plan"]["bits_per_weight"] for one in own]))
    for iterations in arguments.iterations:
        found = [theirs[iterations] for _, theirs in seeds]
        bits = [one["bytes"] * 8 / one["weights"] for one in found]
        rows.append(row(peer_name(iterations), found, bits))
    headers = ["", "stored bits per weight", "KL", "perplexity", "wall time, s"]
    headers += ["largest process, GB resident"]
    bits_offered = ", ".join(map(str, arguments.bits))
    relative = "; ".join(ratios(seeds, iterations) for iterations in arguments.iterations)
    return (
        f"{arguments.model.resolve().name}: {arguments.bits_per_weight:g} bits per weight on"
        f" average of {bits_offered} bits, symmetric, group {arguments.group_size};"
        f" {arguments.sequences} × {arguments.length} calibration tokens,"
        f" {arguments.heldout_sequences} × {arguments.length} held-out tokens, {arguments.dtype}."
        f" {peer}, {arguments.peer_batch_size} sequences at a time. {len(seeds)} seed(s): median"
        f" (least–largest).\n\n{table(headers, rows)}"
        f"\n\nKL and wall time of moesaic relative to AutoScheme, seed by seed: {relative}. Goal:"
        " KL below 1 at a time of at most 1.\n\nBits count all that is stored for the layers:"
        " codes, scales, zero points (AutoRound stores them for symmetric grids, too). KL in nats"
        " per token."
    )


def compared(
    arguments: argparse.Namespace, folder: Path, seed: int, python: Path, peer: str
) -> Seed:
    """Both, on the calibration tokens of one seed."""
    scheme = {"method": "gptq", "bits": arguments.bits, "group_size": arguments.group_size}
    scheme |= {"act_order": True, "clip": "weighted"}
    recipe = write_recipe(
        folder / "recipe.yaml",
        arguments,
        [scheme],
        # AutoScheme takes gradients of all tokens.
        {
            "sequences": arguments.sequences,
            "length": arguments.length,
            "gradient_sequences": arguments.sequences,
            "seed": seed,
        },
        search="knapsack",
        budget={"bits_per_weight": arguments.bits_per_weight},
        evaluation={
            "texts": [{"file": str(path.resolve())} for path in arguments.heldout],
            "sequences": arguments.heldout_sequences,
            "length": arguments.length,
        },
        compute={"dtype": arguments.dtype},
    )
    digest = draw_ids(recipe, arguments.heldout_sequences, folder)
    setting = {"recipe": recipe.read_text(encoding="utf-8"), "ids": digest}
    ours = remembered(folder / "ours.json", setting, lambda: run_ours(folder, recipe, digest))
    theirs = {}
    for iterations in arguments.iterations:
        own = {**setting, "peer": peer, "batch": arguments.peer_batch_size}
        theirs[iterations] = remembered(
            folder / f"theirs-{iterations}.json",
            own,
            lambda iterations=iterations: run_theirs(folder, python, arguments, iterations),
        )
    return ours, theirs


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has auto-round")
    parser.add_argument("--peer-batch-size", type=int, default=8, help="its own default is 8")
    parser.add_argument("--iterations", type=int, nargs="+", default=[0, 20])
    parser.add_argument("--bits-per-weight", type=float, default=3.0)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=16, help="AutoScheme's own default")
    parser.add_argument("--length", type=int, default=256, help="AutoScheme's own default")
    parser.add_argument("--heldout-sequences", type=int, default=48)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--folder", type=Path, default=BUILD / "auto_scheme")
    parser.add_argument("--again", action="store_true", help="remove --folder first")
    arguments = parser.parse_args()
    check_inputs(arguments)
    end_in_order()
    python, peer = peer_python(arguments.peer_python)
    progress(peer)
    folder = arguments.folder.resolve()
    if arguments.again:
        shutil.rmtree(folder, ignore_errors=True)
    seeds = [
        compared(arguments, folder / f"seed-{seed}", seed, python, peer)
        for seed in range(arguments.seeds)
    ]
    report(
        "Mixtures of bits: moesaic beside AutoScheme",
        body(arguments, peer, seeds),
        arguments.write,
    )


if __name__ == "__main__":
    main()
