"""A mixture of bits by AutoRound's AutoScheme, in AutoRound's own environment; started by
auto_scheme.py.

    PEER/python tests/benchmarks/auto_scheme_peer.py quantize MODEL IDS OUTPUT [options]
    PEER/python tests/benchmarks/auto_scheme_peer.py unpack MODEL PACKED OUTPUT

IDS is a NumPy file with the token ids of the calibration sequences, ``[sequences, length]``.
``quantize`` writes AutoRound's packed format. ``unpack`` loads that as its users would and writes a
plain checkpoint in float32 with the weights that the loaded layers multiply with.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from auto_round import AutoRound, AutoScheme
from auto_round.calib_dataset import register_dataset
from auto_round.schemes import QuantizationScheme
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

DATASET = "given-ids"


def offer(ids: np.ndarray) -> None:
    """Makes these sequences the data set that is called ``DATASET``."""
    rows = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}

    @register_dataset(DATASET)
    def given(*arguments: Any, **options: Any) -> Dataset:
        return Dataset.from_dict(rows)


def quantize(arguments: argparse.Namespace) -> None:
    """Scores all options, chooses one per layer, rounds, packs."""
    ids = np.load(arguments.ids)
    sequences, length = ids.shape
    offer(ids)
    options = [
        QuantizationScheme(
            bits=bits, group_size=arguments.group_size, sym=True, data_type="int", act_bits=16
        )
        for bits in arguments.bits
    ]
    scheme = AutoScheme(
        avg_bits=arguments.bits_per_weight, options=options, nsamples=sequences, seqlen=length
    )
    rounding = AutoRound(
        str(arguments.model),
        scheme=scheme,
        tokenizer=AutoTokenizer.from_pretrained(arguments.model),
        dataset=DATASET,
        nsamples=sequences,
        seqlen=length,
        iters=arguments.iterations,
        batch_size=arguments.batch_size,
        device_map="cpu",
        model_dtype=arguments.dtype,
        amp=arguments.dtype != "float32",
    )
    rounding.quantize_and_save(str(arguments.output), format="auto_round")


@torch.no_grad()
def unpack(arguments: argparse.Namespace) -> None:
    """A layer's weight is what it makes of the unit vectors."""
    loaded = {"dtype": torch.float32, "device_map": "cpu"}
    packed = AutoModelForCausalLM.from_pretrained(arguments.packed, **loaded)
    plain = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    layers = 0
    for name, module in plain.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        found = packed.get_submodule(name)
        if not isinstance(found, torch.nn.Linear):
            module.weight.copy_(found(torch.eye(module.in_features)).T)
            layers += 1
    plain.save_pretrained(arguments.output)
    print(json.dumps({"layers": layers}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("quantize")
    command.add_argument("model", type=Path)
    command.add_argument("ids", type=Path)
    command.add_argument("output", type=Path)
    command.add_argument("--bits-per-weight", type=float, required=True)
    command.add_argument("--bits", type=int, nargs="+", required=True)
    command.add_argument("--group-size", type=int, required=True)
    command.add_argument("--iterations", type=int, default=200, help="0: rounds to nearest")
    command.add_argument("--batch-size", type=int, default=8, help="sequences at a time")
    command.add_argument("--dtype", default="float32")
    command.set_defaults(run=quantize)
    command = commands.add_parser("unpack")
    command.add_argument("model", type=Path)
    command.add_argument("packed", type=Path)
    command.add_argument("output", type=Path)
    command.set_defaults(run=unpack)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
