"""Times tile sizes of the Triton kernels on a GPU: what the configurations in kernels/ come from.

    python tests/benchmarks/kernel_configs.py [--only mlp attention …] [--processes 14] [--top 5]

Every kernel is run with every combination of tile sizes, warps and stages that is listed here, for
shapes that decide (BERT-base, Llama-7B). Processes compile side by side; then one times. Shown are
the fastest combinations of every shape, with the median milliseconds, and the one that ships.
"""

import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from common import arguments_parser, progress, report, table
from gpu_kernels import Draw, integers

from moesaic.kernels import _int_group_triton as int_group
from moesaic.kernels import _lowrank_attention_triton as attention
from moesaic.kernels import _lowrank_mlp_triton as mlp
from moesaic.kernels import _lowrank_triton as low_rank
from moesaic.kernels import _plan
from moesaic.kernels import _residual_triton as residual
from moesaic.kernels._lowrank_attention import Lifted, Options
from moesaic.kernels._tiles_triton import Config

Launch = Callable[[], object]
BITS = 4
MODULES = {
    "int_group": int_group,
    "low_rank": low_rank,
    "mlp": mlp,
    "attention": attention,
    "residual": residual,
}


@dataclass(frozen=True)
class Case:
    """One kernel, one shape, one configuration; sections 0: the kernel has none."""

    kernel: str
    shape: tuple[int, ...]
    config: Any
    sections: int = 0


def grid(*values: tuple[int, ...], kind: Callable[..., Any] = Config) -> list[Any]:
    """All combinations, in the order of the fields of a configuration."""
    return [kind(*each) for each in itertools.product(*values)]


def cases() -> Iterator[Case]:
    """Shapes: rows, outputs, inputs[, rank]; of attention: batch, length, heads, size, rank."""
    vector = grid((2,), (4, 8, 16, 32), (512, 1024), (1, 2, 4), (2,))
    decode = grid((16,), (32, 64, 128), (128, 256), (4, 8), (2, 4))
    for rows, configs in ((1, vector), (2, vector), (2, decode), (16, decode)):
        for shape in ((11008, 4096), (4096, 11008)):
            for config, sections in itertools.product(configs, (1, 2, 4, 8)):
                yield Case("int_group", (rows, *shape), config, sections)
    prefill = grid((64, 128), (64, 128), (32, 64), (4, 8), (2, 3, 4))
    for rows in (64, 512, 4096):
        for config in prefill:
            yield Case("int_group", (rows, 11008, 4096), config, 1)
    for rank in (96, 192, 384):
        for config in grid((64, 128), (64, 128), (32, 64), (4, 8), (2, 3)):
            yield Case("low_rank", (16384, 3072, 768, rank), config, 1)
    for rank, block_m in ((96, (64, 128)), (192, (64, 128)), (384, (32, 64))):
        for config in grid(block_m, (32, 64, 128), (32, 64), (4, 8), (2, 3)):
            yield Case("mlp", (16384, 768, 3072, rank), config)
    for shape in ((16, 512, 12, 64, 192), (1, 2048, 32, 128, 512)):
        for config in grid((64, 128), (32, 64), (32, 64), (4, 8), (2, 3), kind=attention.Config):
            yield Case("attention", shape, config)
    for rows in (512, 4096):
        for config in grid((64, 128), (64, 128), (64,), (4, 8), (2, 3)):
            yield Case("residual", (rows, 11008, 4096, 64), config, 1)


@cache
def operands(kernel: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """What a kernel is launched with, its output last."""
    draw = Draw(torch.bfloat16, "cuda")
    if kernel == "attention":
        batch, length, heads, size, rank = shape
        states = draw.normal(batch, length, rank)
        left = draw.normal(heads * size, rank, scale=rank**-0.5)
        angle = torch.rand(length, size // 2, device="cuda")
        causal = size == 128
        tables = (angle.cos(), angle.sin()) if causal else (None, None)
        options = Options(size, causal, size**-0.5, *tables)
        lifted = Lifted(states, left)
        return lifted, lifted, lifted, options, states.new_empty((batch, length, heads, size))
    if kernel == "mlp":
        rows, hidden, width, rank = shape
        x = draw.normal(rows, hidden)
        layer = mlp.Layer(
            draw.factors(width, hidden, rank), draw.factors(hidden, width, rank), activation="gelu"
        )
        return x, layer, torch.empty_like(x)
    rows, outputs, inputs = shape[:3]
    x = draw.normal(rows, inputs)
    out = x.new_empty((rows, outputs))
    factors = draw.factors(outputs, inputs, shape[3]) if len(shape) > 3 else ()
    if kernel == "low_rank":
        return x, *factors, out
    return x, integers(outputs, inputs, BITS, draw), *factors, out


def launch(case: Case) -> Launch:
    """The launch of a case, the module's own choice of a configuration set aside."""
    module: Any = MODULES[case.kernel]
    given = operands(case.kernel, case.shape)
    if case.kernel == "int_group":
        return partial(int_group.launch, *given, int_group.Plan(case.config, case.sections))
    last = (case.sections,) if case.sections else ()

    def run() -> None:
        own = module.config_for
        module.config_for = lambda *_: case.config
        try:
            module.launch(*given, *last)
        finally:
            module.config_for = own

    return run


def compiles(case: Case) -> bool:
    """Whether a combination fits the card; leaves what was compiled in Triton's cache."""
    from triton.runtime.errors import OutOfResources

    try:
        launch(case)()
        torch.cuda.synchronize()
    except OutOfResources:
        return False
    except RuntimeError as error:  # of the compiler
        progress(f"{case}: {error}")
        return False
    return True


def shipped(case: Case) -> Any:
    """The configuration that the module takes for a shape."""
    given: Any = operands(case.kernel, case.shape)
    if case.kernel == "attention":
        return attention.config_for(given[3].head_dim, tuple(part.rank for part in given[:3]))
    if case.kernel == "mlp":
        return mlp.config_for(case.shape[1], given[1])
    rows, _, inputs, *rank = case.shape
    if case.kernel == "low_rank":
        return low_rank.config_for(rows, inputs, *rank)
    return MODULES[case.kernel].config_for(rows, inputs, 32, *rank)


def main() -> int:
    parser = arguments_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--top", type=int, default=5, help="combinations shown of every shape")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernel_configs.py needs a GPU that PyTorch can use, there is none", file=sys.stderr)
        return 2
    wanted = [case for case in cases() if case.kernel in arguments.only]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        fits = []
        for count, fit in enumerate(pool.imap(compiles, wanted, chunksize=4)):
            fits.append(fit)
            if count % 100 == 0:
                progress(f"compiled {count} of {len(wanted)}")
    times: dict[tuple[str, tuple[int, ...]], list[tuple[float, Case]]] = {}
    for case, fit in zip(wanted, fits, strict=True):
        if fit:
            found = times.setdefault((case.kernel, case.shape), [])
            found.append((_plan.milliseconds(launch(case)), case))
    rows = []
    for (kernel, shape), measured in times.items():
        progress(f"{kernel} {shape}: {len(measured)} combinations")
        standing = shipped(measured[0][1])
        ranked = sorted(measured, key=lambda pair: pair[0])
        for place, (milliseconds, case) in enumerate(ranked):
            if place < arguments.top or case.config == standing:
                tiles = ", ".join(str(v) for v in vars(case.config).values())
                mark = "ships" if case.config == standing else ""
                label = " × ".join(map(str, shape))
                sections = str(case.sections or "–")
                rows.append([kernel, label, tiles, sections, f"{milliseconds:.4f}", mark])
    headers = ["kernel", "shape", "tiles, warps, stages", "sections", "ms", ""]
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, {BITS} bits."
    report("Tile sizes", f"{title}\n\n{table(headers, rows)}", arguments.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
