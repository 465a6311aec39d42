"""Similarity of all experts of a layer beside one pass of all experts over the same tokens.

    python tests/benchmarks/similarity.py [--experts 128] [--tokens 8192] [--runs 3]

Both run every expert on every token, in turns, one thread. The one keeps nothing; the other is what
calibration does: pairwise token-wise cosines, sums and norms of all outputs. It must take at most
1.3 × as long. Memory is what it adds to the layer's weights at its peak; outputs are not kept, so
it is the same for any number of tokens.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from common import alternate, arguments_parser, median, report, spread, table
from torch import Tensor
from torch.nn import functional as F

from moesaic.methods.base import Unit
from moesaic.orchestrator.expert_statistics import SLICE_BYTES, ExpertStatistics, Tokens
from moesaic.orchestrator.worker import peak_memory_bytes

NEEDS = frozenset({"all_tokens", "all_sum", "all_sq", "cosine"})


def main() -> None:
    parser = arguments_parser(__doc__)
    for name, default in (("experts", 128), ("hidden", 2048), ("width", 768), ("tokens", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=4096, help="tokens told at a time")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    experts, hidden, width = arguments.experts, arguments.hidden, arguments.width
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(experts, 2 * width, hidden, generator=generator).div_(hidden**0.5)
    down = torch.randn(experts, hidden, width, generator=generator).div_(width**0.5)
    batches = torch.randn(arguments.tokens, hidden, generator=generator).split(arguments.batch)
    before = peak_memory_bytes()

    def output(expert: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up[expert]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down[expert])

    def passed() -> None:
        for x in batches:
            for expert in range(experts):
                output(expert, x)

    def compared() -> None:
        gate, back = (experts, width, hidden), (experts, hidden, width)
        shapes = {"gate": gate, "up": gate, "down": back}
        unit = Unit("bank", "bank", 0, "experts", shapes, dict.fromkeys(shapes, "site"))
        rows = range(arguments.tokens)
        sources = torch.zeros(arguments.tokens, dtype=torch.int64)
        tokens = Tokens(sources, 1, rows, rows, arguments.tokens)
        layer = ExpertStatistics(unit, NEEDS, tokens, torch.device("cpu"))
        for x in batches:
            layer.inputs(x, output)
        layer.finish()

    def timed(way: Callable[[], None]) -> Callable[[int], Any]:
        def run(index: int) -> float:
            started = time.perf_counter()
            way()
            return time.perf_counter() - started

        return run

    seconds = alternate({"one pass": timed(passed), "similarity": timed(compared)}, arguments.runs)
    ratio = median(seconds["similarity"]) / median(seconds["one pass"])
    added = (peak_memory_bytes() - before) / 1e6
    rows = [[way, spread(values, 2)] for way, values in seconds.items()]
    figures = table(["", "s"], [*rows, ["ratio", f"{ratio:.2f}"]])
    sample = arguments.tokens * hidden * 4 / 1e6
    text = (
        f"{experts} experts, hidden {hidden}, width {width}, {arguments.tokens} tokens; float32,"
        f" one thread; {arguments.runs} run(s) each, in turns; medians (least–largest). Target: at"
        f" most 1.3 ×.\n\n{figures}\n\nMemory above weights and inputs: {added:.0f} MB at the peak,"
        f" of which a slice of outputs may take {SLICE_BYTES / 1e6:.0f} MB and the sample of inputs"
        f" {sample:.0f} MB."
    )
    report("Similarity of experts", text, arguments.write)


if __name__ == "__main__":
    main()
