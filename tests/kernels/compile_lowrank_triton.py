"""Compiles the low-rank kernels ahead of time and prints what they take, as JSON. Needs no GPU.

TRITON_INTERPRET=0 python tests/kernels/compile_lowrank_triton.py 90          # what the tests ask
TRITON_INTERPRET=0 python tests/kernels/compile_lowrank_triton.py 90 --all    # minutes
"""

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from compile_triton import WIDTHS, resources
from triton.compiler import ASTSource

from moesaic.kernels import _lowrank_triton as low_rank
from moesaic.kernels import _residual_triton as residual

# The largest rank of each configuration needs the most registers; the two dtypes take the same.
RANKS = {name: int(name.partition("_")[2] or low_rank.MAX_ODD_RANK) for name in low_rank.CONFIGS}
# bits, symmetric, group size (0: one group): see compile_triton.py.
RESIDUAL = {
    "decode": [(3, False, 128)],
    "prefill": [(7, False, 16)],
    "odd": [(7, False, 7)],
}
Found = tuple[str, str, dict[str, object]]  # kernel, configuration, what it takes


def compiled(
    kernel: Any,
    config: Any,
    capability: int,
    pointers: Mapping[str, str],
    sizes: Mapping[str, bool],
    constants: Mapping[str, Any],
) -> dict[str, object]:
    """What a program takes when pointers, and the sizes marked so, are multiples of 16."""
    blocks = {name.upper(): size for name, size in vars(config).items() if "block" in name}
    constants = {**constants, **blocks}
    signature = {name: f"*{element}" for name, element in pointers.items()}
    signature |= dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    aligned = [*pointers, *(name for name, multiple in sizes.items() if multiple)]
    attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return resources(ASTSource(kernel, signature, constants, attributes), options, capability)


def low_rank_results(capability: int, everything: bool) -> Iterator[Found]:
    for name, config in low_rank.CONFIGS.items():
        largest = RANKS[name]
        ranks = [rank for rank in (16, 32, 64, 128, 256, 512) if rank <= largest]
        for rank in ranks if everything else [largest]:
            even = name != "odd"
            found = compiled(
                low_rank.low_rank_matmul,
                config,
                capability,
                dict.fromkeys(("x", "right", "left", "out"), "bf16" if even else "fp16"),
                {"rows": False, "outputs": even, "inputs": even, "rank": even},
                {"UPCAST": False, "RANK": rank},
            )
            yield "low_rank", name, found


def residual_results(capability: int, everything: bool) -> Iterator[Found]:
    for name, config in residual.CONFIGS.items():
        even = name != "odd"
        group_sizes = (0, 16, 128) if even else (0, 7, 8)
        every = [(*width, size) for width in WIDTHS for size in group_sizes]
        for bits, symmetric, group_size in every if everything else RESIDUAL[name]:
            found = compiled(
                residual.residual_matmul,
                config,
                capability,
                {
                    "x": "fp16",
                    "packed": "i32",
                    "scale": "fp16",
                    "zero": "i32",
                    "right": "fp16",
                    "left": "fp16",
                    "out": "fp16",
                },
                {
                    "rows": False,
                    "outputs": False,
                    "inputs": even,
                    "words": False,
                    "groups": False,
                    "rank": even,
                },
                {
                    "BITS": bits,
                    "GROUP_SIZE": group_size,
                    "SPAN": residual.group_span(group_size),
                    "SYMMETRIC": symmetric,
                    "UPCAST": False,
                    "RANK": residual.MAX_RANK,
                },
            )
            yield "residual", name, found


def main(capability: int, everything: bool) -> None:
    results = itertools.chain(
        low_rank_results(capability, everything), residual_results(capability, everything)
    )
    print(json.dumps([{"kernel": k, "config": c, **found} for k, c, found in results]))


if __name__ == "__main__":
    main(int(sys.argv[1]), "--all" in sys.argv)
