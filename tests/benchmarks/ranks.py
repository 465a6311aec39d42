"""All ranks of a layer beside one rank of it, from factorisation to the files in the store.

    python tests/benchmarks/ranks.py [--rounds 5] [--ranks 19]

Both ways start from fresh statistics and an empty store, and take turns, so that a busy machine
slows both. One is the largest of the ranks. The layers have the shapes of SmolLM2-135M's and a
larger one; weights and inputs are random, correlated.
"""

import time
from pathlib import Path

import torch
from common import arguments_parser, median, report, scratch, table

from moesaic.methods.base import Chain, Spec, Stats, Unit
from moesaic.orchestrator.compression import Bench
from moesaic.orchestrator.store import Store, digest

# outputs, inputs
LAYERS = [(576, 576), (1536, 576), (576, 1536), (2048, 2048)]


def seconds(folder: Path, shape: tuple[int, int], chains: list[Chain]) -> float:
    """Time to make and judge one layer under all the chains."""
    out, inputs = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * inputs, inputs, generator=generator)
    x = x + x @ torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    weight = torch.randn(out, inputs, generator=generator).bfloat16()
    stats = Stats({"hessian": x.mT @ x, "tokens": torch.tensor(2 * inputs)})
    unit = Unit("layer", "linear", 0, "mlp", {"weight": shape}, {"weight": "site"})
    bench = Bench(
        store=Store(folder),
        units=[unit],
        weights={"layer": {"weight": weight}},
        side={},
        sites={"site": stats},
        stats={"layer|weight": stats},
        stages={},
        device="cpu",
    )
    keys = {chain: {"layer": digest([str(chain)])} for chain in chains}
    started = time.perf_counter()
    bench.run(keys)
    return time.perf_counter() - started


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=19, help="shares 0.05, 0.1, …, at most 19")
    parser.add_argument("--method", default="svd_llm")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shares = [step / 20 for step in range(1, arguments.ranks + 1)]
    chains: list[Chain] = [(Spec.of(arguments.method, {"rank": share}),) for share in shares]
    rows = []
    for shape in LAYERS:
        times: dict[str, list[float]] = {"one": [], "all": []}
        for _ in range(arguments.rounds):
            for name, wanted in (("one", chains[-1:]), ("all", chains)):
                with scratch("ranks") as folder:
                    times[name].append(seconds(Path(folder), shape, wanted))
        one, every = median(times["one"]), median(times["all"])
        rows.append(
            [f"{shape[0]} × {shape[1]}", f"{one:.2f}", f"{every:.2f}", f"{every / one:.2f}"]
        )
    headers = ["layer", "one rank, s", f"{len(chains)} ranks, s", "ratio"]
    text = (
        f"{arguments.method}, one thread, medians of {arguments.rounds}; files written and flushed."
        " Target: at most 1.1.\n\n" + table(headers, rows)
    )
    report("All ranks of a layer beside one", text, arguments.write)


if __name__ == "__main__":
    main()
