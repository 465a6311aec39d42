"""Perplexity of model folders by plain transformers: the same judge for whoever wrote them.

    python tests/benchmarks/perplexity.py IDS FOLDER...

IDS is a NumPy file with token ids, ``[sequences, length]``. Compressed weights are unpacked after
loading and everything is computed in float32. Prints one JSON object: folder → perplexity.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.utils import logging


@torch.no_grad()
def perplexity(folder: Path, ids: torch.Tensor) -> float:
    """exp of the mean loss over ``ids`` ``[sequences, length]``, first tokens not predicted."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    unpack = {}
    if "quantization_config" in config:
        unpack["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **unpack)
    model = model.float().eval()
    losses = []
    for row in ids:
        logits = model(row[None, :-1]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:]).item())
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ids", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    ids = torch.from_numpy(np.load(arguments.ids)).long()
    print(json.dumps({str(folder): perplexity(folder, ids) for folder in arguments.folders}))


if __name__ == "__main__":
    main()
