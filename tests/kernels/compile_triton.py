"""Compiles the ``int_group`` kernel ahead of time and prints what it takes, as JSON. Needs no GPU.

TRITON_INTERPRET=0 python tests/kernels/compile_triton.py 80 90       # what the tests ask for
TRITON_INTERPRET=0 python tests/kernels/compile_triton.py 90 --all    # every width, minutes
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moesaic.kernels import _int_group_triton as kernel
from moesaic.kernels._tiles_triton import group_span

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# bits, symmetric, group size (0: one group), dtype. 3 bits straddle words, 4 do not; 7 bits with a
# zero point and a scale per 16 weights need the most registers, of which "prefill" has the fewest
# to spare. The other widths differ from these in constants only; --all compiles them too.
Case = tuple[int, bool, int, str]
USUAL: list[Case] = [(3, False, 128, "bf16"), (4, True, 0, "fp16")]
CASES = {
    "vector": USUAL,
    "decode": USUAL,
    "batch": USUAL,
    "prefill": [*USUAL, (7, False, 16, "bf16")],
    "odd": [(7, False, 7, "bf16")],
}
WIDTHS = list(itertools.product(range(2, 9), (True, False)))


def all_cases(name: str) -> list[Case]:
    """Every width, symmetric or not, with each kind of group that the configuration is for."""
    group_sizes = (0, 7, 8) if name == "odd" else (0, 16, 128)
    return [(*width, group_size, "bf16") for width in WIDTHS for group_size in group_sizes]


def compiled(
    name: str,
    bits: int,
    symmetric: bool,
    group_size: int,
    dtype: str,
    capability: int,
) -> dict[str, object]:
    """Shared memory in bytes, registers and stack per thread, and whether tensor cores are used."""
    config = kernel.CONFIGS[name]
    pointers = {"x": dtype, "packed": "i32", "scale": dtype, "zero": "i32", "out": dtype}
    sizes = dict.fromkeys(("rows", "outputs", "inputs", "words", "groups"), "i32")
    constants: dict[str, int | bool] = {
        "BITS": bits,
        "GROUP_SIZE": group_size,
        "SPAN": group_span(group_size),
        "SYMMETRIC": symmetric,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    function = kernel.int_group_matvec
    if name != "vector":
        function = kernel.int_group_matmul
        constants |= {"UPCAST": False, "BLOCK_M": config.block_m}
    signature = {name: f"*{element}" for name, element in pointers.items()}
    signature |= sizes | dict.fromkeys(constants, "constexpr")
    # What Triton finds out when it is called: which addresses and sizes are multiples of 16.
    aligned = [*pointers] if name == "odd" else [*pointers, "inputs"]
    attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    source = ASTSource(function, signature, constants, attributes)
    return resources(source, options, capability)


def resources(source: ASTSource, options: dict[str, int], capability: int) -> dict[str, object]:
    """Compiles, and says what a program takes."""
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "shared_bytes": binary.metadata.shared,
        "registers": registers,
        "stack_bytes": stack,
        "tensor_cores": bool(re.search(r"\b(mma\.sync|wgmma\.mma_async)\b", binary.asm["ptx"])),
    }


def main(capabilities: list[int], everything: bool) -> None:
    results = []
    for capability, name in itertools.product(capabilities, kernel.CONFIGS):
        for case in all_cases(name) if everything else CASES[name]:
            found = compiled(name, *case, capability)
            case_name = f"sm_{capability} {name} {case}"
            results.append({"capability": capability, "config": name, "case": case_name, **found})
    print(json.dumps(results))


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:] if word != "--all"], "--all" in sys.argv)
