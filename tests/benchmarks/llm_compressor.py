"""GPTQ of a model by moesaic and by llm-compressor, each in its own environment, in turns.

    python tests/benchmarks/llm_compressor.py [--runs 3] [--peer-python PATH]

Both get the same calibration tokens, write compressed-tensors files with the same scheme
(symmetric, groups, inputs rounded by falling activity, damping 0.01, no clipping), and are measured
as whole processes: start, loading, calibration, solving, writing; moesaic also reloads and checks
what it wrote. Then one neutral program reads both results and computes their perplexity on held-out
text. llm-compressor feeds every block with what its compressed predecessors put out; moesaic does
so with --propagate, and otherwise uses the dense model's activations, its default. Each computes in
the dtype that it chooses for itself: llm-compressor in the checkpoint's, moesaic in float32 where
the processor multiplies bfloat16 in software. --dtype and --peer-dtype compare the two in the same.

Without --peer-python an environment is made under build/llmcompressor, once (about 3 GB).
"""

import argparse
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    ROOT,
    Usage,
    add_text_options,
    alternate,
    arguments_parser,
    check_inputs,
    median,
    progress,
    report,
    scratch,
    spread,
    table,
    watch,
    write_recipe,
)

TORCH = "torch==2.13.0"
PEER = "llmcompressor==0.14.0"
HERE = Path(__file__).parent
OURS, THEIRS = "moesaic", "llm-compressor"
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def peer_python(given: Path | None) -> Path:
    """The interpreter that has llm-compressor; makes the environment where there is none."""
    python = (given or ROOT / "build" / "llmcompressor" / "bin" / "python").absolute()
    if given is None and not python.exists():
        progress(f"installing {PEER} into {python.parents[1]}")
        venv.create(python.parents[1], with_pip=True, clear=True)
        for package in ([TORCH], [TORCH, PEER]):
            install = [str(python), "-m", "pip", "install", "--quiet", *package]
            if subprocess.run(install, check=False, stdout=sys.stderr).returncode != 0:
                shutil.rmtree(python.parents[1])
                raise SystemExit(f"{PEER} could not be installed")
    version = "import importlib.metadata as m; print(m.version('llmcompressor'))"
    found = subprocess.run([python, "-c", version], check=False, capture_output=True, text=True)
    if found.returncode != 0:
        raise SystemExit(f"{python}: has no llmcompressor")
    progress(f"llm-compressor {found.stdout.strip()}")
    return python


def draw_ids(recipe_file: Path, heldout_sequences: int, folder: Path) -> str:
    """Writes the tokens that the recipe will calibrate with, and held-out ones, as NumPy files.

    Returns:
        digest of the calibration tokens.
    """
    from moesaic.orchestrator.recipe import load_recipe
    from moesaic.orchestrator.texts import draw, load_tokenizer

    recipe = load_recipe(recipe_file)
    tokenizer = load_tokenizer(recipe.model, False)
    size = len(tokenizer)
    calibration = draw(recipe.calibration, tokenizer, size, "calibration")
    update = {"sequences": heldout_sequences, "length": recipe.calibration.length}
    heldout = draw(recipe.evaluation.model_copy(update=update), tokenizer, size, "evaluation")
    np.save(folder / "calibration.npy", calibration.ids)
    np.save(folder / "heldout.npy", heldout.ids)
    return calibration.digest


def run_ours(folder: Path, recipe: Path, digest: str) -> Usage:
    """From a fresh store to a checkpoint in ``folder/ours/model``."""
    for old in (folder / "ours", recipe.parent / "store"):
        shutil.rmtree(old, ignore_errors=True)
    command = [sys.executable, "-m", "moesaic.orchestrator.cli", "assemble", str(recipe)]
    command += ["--output", str(folder / "ours")]
    usage = watch(command, folder / "ours.log", environment=OFFLINE)
    if not list((recipe.parent / "store" / "ids").rglob(f"{digest}.safetensors")):
        raise SystemExit("moesaic calibrated with other tokens than llm-compressor was given")
    return usage


def run_theirs(folder: Path, python: Path, arguments: argparse.Namespace) -> Usage:
    """Into ``folder/theirs``."""
    shutil.rmtree(folder / "theirs", ignore_errors=True)
    options = ["--bits", arguments.bits, "--group-size", arguments.group_size]
    options += ["--batch-size", arguments.peer_batch_size, "--dtype", arguments.peer_dtype]
    inputs = [arguments.model.resolve(), folder / "calibration.npy", folder / "theirs"]
    command = [python, HERE / "llm_compressor_peer.py", *inputs, *options]
    # Its own run-time log would be written into the working directory.
    return watch([str(p) for p in command], folder / "theirs.log", cwd=folder, environment=OFFLINE)


def perplexities(folder: Path, models: Mapping[str, Path]) -> dict[str, float]:
    """Name → perplexity on the held-out tokens."""
    progress("perplexity of the results")
    script = [sys.executable, str(HERE / "perplexity.py"), str(folder / "heldout.npy")]
    command = [*script, *map(str, models.values())]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    by_folder = json.loads(found.stdout.splitlines()[-1])
    return {name: by_folder[str(path)] for name, path in models.items()}


def tensor_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _own_dtype(named: str) -> str:
    from moesaic.orchestrator.cluster import has_16_bit_products

    found = "bfloat16" if has_16_bit_products() else "float32"
    return f"{found} ({named})" if named == "auto" else named


def body(
    arguments: argparse.Namespace, usages: Mapping[str, list[Usage]], scores: dict[str, float]
) -> str:
    """The table and what is to be read from it."""
    times = {name: [u.seconds for u in found] for name, found in usages.items()}
    peaks = {name: [u.peak_bytes / 1e9 for u in found] for name, found in usages.items()}
    rows: list[list[Any]] = [["dense", "", "", "", "", f"{scores['dense']:.3f}"]]
    for name, found in usages.items():
        largest = max(found, key=lambda usage: usage.peak_bytes)
        row: list[Any] = [name, spread(times[name]), spread(peaks[name], 2), largest.process]
        row.append(largest.processes)
        rows.append([*row, f"{scores[name]:.3f}"])
    time_ratio = median(times[OURS]) / median(times[THEIRS])
    memory_ratio = median(peaks[OURS]) / median(peaks[THEIRS])
    rows.append([f"{OURS} / {THEIRS}", f"{time_ratio:.3f}", f"{memory_ratio:.3f}", "", "", ""])
    headers = ["", "wall time, s", "largest process, GB resident", "which", "processes"]
    headers.append("perplexity")
    fed = "compressed predecessors" if arguments.propagate else "the dense model"
    return (
        f"{arguments.model.name}, GPTQ {arguments.bits} bits, group {arguments.group_size},"
        f" {arguments.sequences} × {arguments.length} calibration tokens; {len(times[OURS])} run(s)"
        f" each, in turns; medians (least–largest). moesaic's inputs come from {fed}."
        f" moesaic computes in {_own_dtype(arguments.dtype)}, {PEER} in {arguments.peer_dtype},"
        f" {arguments.peer_batch_size} sequence(s) at a time."
        " Target: time at most 0.5, memory at most 1.\n\n" + table(headers, rows)
    )


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has llmcompressor")
    parser.add_argument("--peer-batch-size", type=int, default=1, help="its own default is 1")
    parser.add_argument(
        "--peer-dtype", default="bfloat16", help="of its model; its own default is the files'"
    )
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--heldout-sequences", type=int, default=24)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--propagate", action="store_true", help="moesaic: propagate: true")
    parser.add_argument("--dtype", default="auto", help="moesaic: of the activations")
    arguments = parser.parse_args()
    check_inputs(arguments)
    python = peer_python(arguments.peer_python)
    scheme = {"method": "gptq", "bits": arguments.bits, "group_size": arguments.group_size}
    scheme |= {"act_order": True, "damp": 0.01, "clip": "none"}
    size = {"sequences": arguments.sequences, "length": arguments.length}
    with scratch("llmcompressor") as name:
        folder = Path(name)
        more = {"serve": "transformers", "propagate": arguments.propagate}
        more["compute"] = {"dtype": arguments.dtype}
        recipe = write_recipe(folder / "recipe.yaml", arguments, [scheme], size, **more)
        digest = draw_ids(recipe, arguments.heldout_sequences, folder)
        ways = {
            OURS: lambda index: run_ours(folder, recipe, digest),
            THEIRS: lambda index: run_theirs(folder, python, arguments),
        }
        usages = alternate(ways, arguments.runs)
        results = {OURS: folder / "ours" / "model", THEIRS: folder / "theirs"}
        scores = perplexities(folder, {"dense": arguments.model.resolve(), **results})
        sizes = ", ".join(f"{name} {tensor_bytes(path):,}" for name, path in results.items())
    text = body(arguments, usages, scores) + f"\n\nBytes of the safetensors files: {sizes}."
    report("GPTQ beside llm-compressor", text, arguments.write)


if __name__ == "__main__":
    main()
