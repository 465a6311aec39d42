"""The largest process's memory while a checkpoint larger than memory is calibrated and measured.

    python tests/benchmarks/memory.py [--gigabytes 6] [--limit-gb 3]

Writes a random sharded Qwen3-MoE checkpoint, runs ``moesaic measure`` on it with round-to-nearest
and GPTQ at 4 bits, and removes everything again. Takes about four times the checkpoint's size on
disk. Exits with 1 where a process was resident with more than the limit (10⁹ bytes).
"""

import random
import shutil
import sys
from pathlib import Path

from common import (
    BUILD,
    arguments_parser,
    progress,
    report,
    scratch,
    table,
    watch,
    write_recipe,
)
from random_moe import make_random_moe

# Checkpoint, statistics (Hessians of the experts), two candidates with their errors.
_DISK_FACTOR = 4


def random_text(file: Path, characters: int) -> Path:
    """Words made of random letters: as good as any for a random model."""
    generator = random.Random(0)
    words = []
    while characters > 0:
        words.append("".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=5)))
        characters -= 6
    file.write_text(" ".join(words), encoding="utf-8")
    return file


def main() -> int:
    parser = arguments_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of the checkpoint")
    parser.add_argument("--limit-gb", type=float, default=3.0, help="for any one process")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--workers", type=int, help="default: one per core")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--expert-width", type=int, default=512)
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    free, wanted = shutil.disk_usage(BUILD).free, arguments.gigabytes * _DISK_FACTOR * 1e9
    if free < wanted:
        raise SystemExit(f"{BUILD}: {free / 1e9:.1f} GB free, about {wanted / 1e9:.1f} GB needed")
    with scratch("memory") as name:
        folder = Path(name)
        progress(f"writing {arguments.gigabytes:g} GB")
        arguments.model = folder / "checkpoint"
        size = make_random_moe(
            arguments.model,
            arguments.gigabytes,
            arguments.hidden,
            arguments.experts,
            arguments.expert_width,
        )
        text = random_text(folder / "text.txt", 4 * arguments.sequences * arguments.length + 9000)
        arguments.text = arguments.heldout = [text]
        schemes = [{"method": method, "bits": 4, "group_size": -1} for method in ("rtn", "gptq")]
        calibration = {key: getattr(arguments, key) for key in ("sequences", "length", "shards")}
        compute = {"workers": arguments.workers} if arguments.workers else {}
        recipe = write_recipe(
            folder / "recipe.yaml", arguments, schemes, calibration, compute=compute
        )
        progress(f"{size:,} bytes written; moesaic measure, log in {folder}/measure.log")
        command = [sys.executable, "-m", "moesaic.orchestrator.cli", "measure", str(recipe)]
        command += ["--output", str(folder / "run")]
        usage = watch(command, folder / "measure.log")
        store = sum(p.stat().st_size for p in (folder / "store").rglob("*") if p.is_file())
    peak = usage.peak_bytes / 1e9
    rows = [
        [f"{size / 1e9:.2f}", f"{usage.seconds:.0f}", f"{peak:.2f}", f"{arguments.limit_gb:g}"]
        + [usage.process, usage.processes, f"{store / 1e9:.2f}"]
    ]
    headers = ["checkpoint, GB", "wall time, s", "largest process, GB resident", "limit, GB"]
    headers += ["which", "processes", "store, GB"]
    text_of = (
        f"Qwen3-MoE shape, hidden {arguments.hidden}, {arguments.experts} experts of"
        f" {arguments.expert_width}, {arguments.sequences} × {arguments.length} tokens in"
        f" {arguments.shards} shards; `moesaic measure` with rtn and gptq, 4 bits.\n\n"
    )
    title = "Memory for a checkpoint larger than its processes"
    report(title, text_of + table(headers, rows), arguments.write)
    return int(peak > arguments.limit_gb)


if __name__ == "__main__":
    sys.exit(main())
