"""A bank of experts solved by GPTQ as a batch, beside the same experts in a loop.

    python tests/benchmarks/bank_batch.py [--threads 1 2] [--rounds 5]

Both ways start from fresh statistics (the factorisation is timed too) and take turns, so that a
busy machine slows both; figures are medians in milliseconds. The results are compared first.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.methods import gptq
from moesaic.methods.base import Result, Stats

# experts, rows, inputs, rounds for each round asked for
BANKS = [(64, 96, 256, 2), (64, 256, 96, 2), (8, 1024, 1024, 1)]
OPTIONS = gptq.Options(bits=3, group_size=32)


def make_bank(experts: int, rows: int, inputs: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights ``[experts, rows, inputs]`` and sums over correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(experts, 2 * inputs, inputs, generator=generator)
    x = x + x @ torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    weight = torch.randn(experts, rows, inputs, generator=generator).bfloat16()
    return weight, {"hessian": x.mT @ x, "tokens": torch.full((experts,), 2 * inputs)}


def batched(weight: Tensor, sums: dict[str, Tensor]) -> list[Result]:
    return [gptq.compress({"w": weight}, {"w": Stats(sums)}, OPTIONS)]


def looped(weight: Tensor, sums: dict[str, Tensor]) -> list[Result]:
    results = []
    for expert, one in enumerate(weight):
        stats = Stats({name: value[expert] for name, value in sums.items()})
        results.append(gptq.compress({"w": one}, {"w": stats}, OPTIONS))
    return results


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print("threads experts    out x in  batch ms   loop ms  ratio")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for experts, rows, inputs, factor in BANKS:
            weight, sums = make_bank(experts, rows, inputs)
            together = batched(weight, sums)[0].members["w"].dense()
            apart = torch.stack([one.members["w"].dense() for one in looped(weight, sums)])
            differing = float((together != apart).float().mean())
            if differing > 1e-4:
                raise SystemExit(f"batch and loop differ in {differing:.2%} of the weights")
            times: dict[str, list[float]] = {"batch": [], "loop": []}
            for _ in range(factor * arguments.rounds):
                times["batch"].append(milliseconds(lambda w=weight, s=sums: batched(w, s)))
                times["loop"].append(milliseconds(lambda w=weight, s=sums: looped(w, s)))
            batch, loop = (statistics.median(times[name]) for name in ("batch", "loop"))
            shape, ratio = f"{rows} x {inputs}", loop / batch
            print(f"{threads:>7} {experts:>7} {shape:>11} {batch:>9.1f} {loop:>9.1f} {ratio:>6.2f}")


if __name__ == "__main__":
    main()
