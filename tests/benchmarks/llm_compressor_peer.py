"""GPTQ by llm-compressor, in llm-compressor's own environment; started by llm_compressor.py.

    PEER/python tests/benchmarks/llm_compressor_peer.py MODEL IDS OUTPUT [options]

IDS is a NumPy file with the token ids of the calibration sequences, ``[sequences, length]``.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1, help="sequences at a time")
    parser.add_argument("--dtype", default="bfloat16", help="to load and calibrate the model in")
    arguments = parser.parse_args()

    ids = np.load(arguments.ids)
    sequences, length = ids.shape
    rows = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype)
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    weights = {
        "num_bits": arguments.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": arguments.group_size,
    }
    modifier = GPTQModifier(
        config_groups={"linears": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        dampening_frac=0.01,
        actorder="static",
    )
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict(rows),
        recipe=modifier,
        max_seq_length=length,
        num_calibration_samples=sequences,
        shuffle_calibration_samples=False,
        batch_size=arguments.batch_size,
    )
    model.save_pretrained(arguments.output, save_compressed=True)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
