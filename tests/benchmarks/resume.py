"""How long a run takes that finds everything finished.

    python tests/benchmarks/resume.py [--pieces 10000] [--runs 3] [--stage measure]

A dense model of many small layers is compressed in many ways, so that the store has about as many
pieces as asked for. Then the same command is given again: it starts, reads the recipe and the
model, finds every entry, compares it with its seal, and ends. Processor time is told beside the
wall time, because a busy machine stretches the latter only.
"""

import math
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from common import (
    add_text_options,
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
from random_moe import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

CANDIDATES = [
    {
        "method": "rtn",
        "bits": [2, 3, 4, 5, 6, 7, 8],
        "symmetric": [True, False],
        "group_size": [16, -1],
    }
]
CHOICES, LINEARS = 28, 7  # of them, and in a layer


@dataclass(frozen=True)
class Run:
    """Wall time and processor time of one command."""

    seconds: float
    processor_seconds: float


def make_model(folder: Path, layers: int) -> Path:
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def timed(folder: Path, recipe: Path, stage: str) -> Run:
    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    command = [sys.executable, "-m", "moesaic.orchestrator.cli", stage, str(recipe)]
    usage = watch([*command, "--output", str(folder / "run")], folder / "log")
    return Run(usage.seconds, spent() - before)


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    parser.add_argument("--pieces", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--stage", choices=["measure", "search", "run"], default="measure")
    arguments = parser.parse_args()
    with scratch("resume") as name:
        folder = Path(name)
        layers = math.ceil(arguments.pieces / (CHOICES * LINEARS))
        arguments.model = make_model(folder / "model", layers)
        check_inputs(arguments)
        compute = {"workers": 1, "cpus_per_worker": 1, "dtype": "float32"}
        sizes = {"sequences": 8, "length": 64, "shards": 1, "gradient_sequences": 4}
        recipe = write_recipe(folder / "r.yaml", arguments, CANDIDATES, sizes, compute=compute)
        progress(f"makes {layers * LINEARS * CHOICES:,} pieces")
        first = timed(folder, recipe, arguments.stage)
        again = [timed(folder, recipe, arguments.stage) for _ in range(arguments.runs)]
        pieces = len(list((folder / "store" / "pieces").glob("*/*.safetensors")))
        errors = len(list((folder / "store" / "errors").glob("*/*.safetensors")))
    rows = [
        ["first", f"{first.seconds:.1f}", f"{first.processor_seconds:.1f}"],
        [
            "again",
            spread([run.seconds for run in again]),
            f"{median([run.processor_seconds for run in again]):.1f}",
        ],
    ]
    text = f"moesaic {arguments.stage}; {pieces:,} pieces, {errors:,} entries of their errors.\n\n"
    headers = ["run", "seconds", "of the processor"]
    report("Nothing left to do", text + table(headers, rows), arguments.write)


if __name__ == "__main__":
    main()
