"""Compiles the low-rank kernels ahead of time and prints what they take, as JSON. Needs no GPU.

TRITON_INTERPRET=0 python tests/kernels/compile_lowrank_triton.py 80 90       # what the tests ask
TRITON_INTERPRET=0 python tests/kernels/compile_lowrank_triton.py 90 --all    # minutes
"""

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compile_triton import WIDTHS, resources
from triton.compiler import ASTSource

from moesaic.kernels import _lowrank_attention_triton as attention
from moesaic.kernels import _lowrank_mlp_triton as mlp
from moesaic.kernels import _lowrank_triton as low_rank
from moesaic.kernels import _residual_triton as residual
from moesaic.kernels._tiles_triton import group_span

# bits, symmetric, group size (0: one group): see compile_triton.py.
RESIDUAL = {
    "decode": [(3, False, 128)],
    "wide": [(3, False, 128), (4, True, 0)],
    "prefill": [(7, False, 16)],
    "odd": [(7, False, 7)],
}
LAYERS = ("gate", "up", "down")
# Activation and whether it is gated: two factors before the activation need more than one.
MLP = {"plain": [("gelu", False)]}
GATED = [("silu", True)]
# Whether attention is causal, biased, rotates, has lengths: all, as Llama, as BERT, nothing.
SWITCHES = [(True,) * 4, (True, False, True, False), (False, True, False, True), (False,) * 4]
# Features of a head.
ATTENTION = {"head_64": [64], "head_128": [128], "head_256": [256], "odd": [256]}
ALL_ATTENTION = {"head_64": [32, 64], "head_128": [80, 96, 128], "head_256": [192, 256]}
Found = tuple[str, str, dict[str, object]]  # kernel, configuration, what it takes


def compiled(
    kernel: Any,
    config: Any,
    capability: int,
    pointers: Mapping[str, str],
    sizes: Mapping[str, bool],
    constants: Mapping[str, Any],
    floats: Sequence[str] = (),
) -> dict[str, object]:
    """What a program takes when pointers, and the sizes marked so, are multiples of 16."""
    blocks = {name.upper(): size for name, size in vars(config).items() if "block" in name}
    constants = {**constants, **blocks}
    signature = {name: f"*{element}" for name, element in pointers.items()}
    signature |= dict.fromkeys(sizes, "i32") | dict.fromkeys(floats, "fp32")
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [*pointers, *(name for name, multiple in sizes.items() if multiple)]
    attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return resources(ASTSource(kernel, signature, constants, attributes), options, capability)


def ranks(name: str, largest_odd: int, everything: bool) -> list[int]:
    """The largest rank of a configuration, which needs the most registers, or every one."""
    largest = int(name.partition("_")[2] or largest_odd)
    return [r for r in (16, 32, 64, 128, 256, 512) if r <= largest and (everything or r == largest)]


def low_rank_results(capability: int, everything: bool) -> Iterator[Found]:
    for name, config in low_rank.CONFIGS.items():
        for rank in ranks(name, low_rank.MAX_ODD_RANK, everything):
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
        group_sizes = (0, 7, 8) if not even else (0, 128) if name == "wide" else (0, 16, 128)
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
                    "SPAN": group_span(group_size),
                    "SYMMETRIC": symmetric,
                    "UPCAST": False,
                    "RANK": residual.MAX_WIDE_RANK if name == "wide" else residual.MAX_RANK,
                },
            )
            yield "residual", name, found


def mlp_results(capability: int, everything: bool) -> Iterator[Found]:
    for name, config in mlp.CONFIGS.items():
        even = name != "odd"
        kind = name.partition("_")[0]
        switches = {"plain": (False,), "gated": (True,)}.get(kind, (True, False))
        every = itertools.product(("silu", "gelu", "gelu_tanh"), switches)
        cases = every if everything else MLP.get(kind, GATED)
        all_ranks = ranks(name, mlp.MAX_ODD_RANK, everything)
        for (activation, gated), rank in itertools.product(cases, all_ranks):
            layers = [f"{layer}_{side}" for layer in LAYERS for side in ("right", "left")]
            pointers = ["x", *layers, "up_bias", "down_bias", "out"]
            sizes = ["inputs", "width", "outputs", *(f"{layer}_rank" for layer in LAYERS)]
            found = compiled(
                mlp.low_rank_mlp,
                config,
                capability,
                dict.fromkeys(pointers, "bf16" if even else "fp16"),
                {"rows": False, **dict.fromkeys(sizes, even)},
                {
                    "ACTIVATION": activation,
                    "GATED": gated,
                    "UP_BIAS": not gated,
                    "DOWN_BIAS": not gated,
                    "UPCAST": False,
                    "RANK": rank,
                    "DOWN_RANK": rank,
                },
            )
            yield "mlp", name, found


def attention_results(capability: int, everything: bool) -> Iterator[Found]:
    every = {**ALL_ATTENTION, "odd": [34, 64, 80, 128, 256]} if everything else ATTENTION
    for causal, biased, rotary, lengths in SWITCHES if everything else SWITCHES[:1]:
        for name, size in ((name, size) for name, sizes in every.items() for size in sizes):
            even = name != "odd"
            dtype = "bf16" if even else "fp16"
            operands = [f"{part}_{what}" for what in ("states", "left", "bias") for part in "qkv"]
            found = compiled(
                attention.low_rank_attention,
                attention.CONFIGS[name],
                capability,
                {
                    **dict.fromkeys(operands, dtype),
                    "cos": "fp32",
                    "sin": "fp32",
                    "lengths": "i64",
                    "out": dtype,
                },
                {
                    **dict.fromkeys(("queries", "keys", "group"), False),
                    **dict.fromkeys(("q_rank", "k_rank", "v_rank"), even),
                },
                {
                    "HEAD_DIM": size,
                    "CAUSAL": causal,
                    "Q_BIAS": biased,
                    "K_BIAS": biased,
                    "V_BIAS": biased,
                    "ROTARY": rotary,
                    "LENGTHS": lengths,
                    "UPCAST": False,
                    "HALF": attention.half_tile(size),
                },
                ("scale",),
            )
            yield "attention", name, found


def main(capabilities: list[int], everything: bool) -> None:
    kernels = (low_rank_results, residual_results, mlp_results, attention_results)
    results = [
        {"capability": capability, "kernel": kernel, "config": config, **found}
        for capability, of in itertools.product(capabilities, kernels)
        for kernel, config, found in of(capability, everything)
    ]
    print(json.dumps(results))


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:] if word != "--all"], "--all" in sys.argv)
