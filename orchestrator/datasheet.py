"""Speeds of well-known GPUs that nobody measured: from their data sheets, with stated shares.

Matrix products reach half of what the sheet says, memory and links 70 %. A product with few tokens
is held up by reading weights, a Hessian of few tokens by reading and writing sums. What solving
takes is on no data sheet: a column costs what launching some twenty kernels does, a weight some
passes over memory, more where clipping is searched; a factorisation runs at a tenth of float32, and
so does one of a Hessian, which takes four operations per cube of its inputs. Attention runs at a
quarter of the tensor cores' peak, a shard's sums pass over memory twelve times, an operation on
single values twice. A visit to an expert takes what starting its kernels does, besides its
products; there and back it takes that twice.
"""

from dataclasses import dataclass

import torch

from moesaic.methods.base import Chain, compressing, link_module
from moesaic.methods.chains import can_be_cut
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.machine import Crew, Load, Speeds
from moesaic.orchestrator.solving import Compressing
from moesaic.orchestrator.timing import SpeedSource

_OF_PRODUCTS, _OF_BANDWIDTH, _OF_FACTORISING, _OF_ATTENTION = 0.5, 0.7, 0.1, 0.25
# Passes over memory of a shard's sums (zeros, filling, mirroring, adding), and bytes per value of
# an operation in float32 that reads two and writes one.
_SUM_PASSES, _VALUE_BYTES = 12, 12
# Operations per cube of a Hessian's inputs: Cholesky's n³/3, inverse and feedback, in float64.
_FACTOR_OPERATIONS = 4
_COLUMN_SECONDS = 1e-4
# Starting the kernels of two products with all that is around them.
_VISIT_SECONDS = 4e-4
# Bytes of memory traffic per weight: to quantize it, with a search for clipping, to unpack it.
_QUANTIZE, _SEARCH, _UNPACK = 80, 1600, 8
# Operations per weight and singular value (Golub & Van Loan, Matrix Computations, section 8.6).
_SVD_OPERATIONS = 22


@dataclass(frozen=True)
class DataSheet:
    """What a GPU's maker says of it.

    Attributes:
        tensor, float32: operations per second, dense, in bfloat16 and in float32.
        bandwidth: bytes per second of its memory.
        memory: bytes.
        link: bytes per second between it and the processor's memory, one way.
    """

    tensor: float
    float32: float
    bandwidth: float
    memory: int
    link: float


# NVIDIA's data sheets: A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2024).
DATA_SHEETS = {
    "A100": DataSheet(312e12, 19.5e12, 2.039e12, 80_000_000_000, 32e9),
    "H100": DataSheet(989e12, 67e12, 3.35e12, 80_000_000_000, 64e9),
    "H200": DataSheet(989e12, 67e12, 4.8e12, 141_000_000_000, 64e9),
}


@dataclass(frozen=True)
class Host:
    """What a GPU's worker does on the processor and with files; see ``Speeds``."""

    read: float
    write: float
    entry: float
    save: float
    digest: float
    host_add: float


def sheet_speeds(gpu: str, host: Host) -> SpeedSource:
    """Speeds of a worker with one such GPU.

    Args:
        gpu: one of ``DATA_SHEETS``.
    """
    sheet = DATA_SHEETS[gpu]

    def speeds(experiment: Experiment, crew: Crew, load: Load) -> Speeds:
        model, memory = experiment.model, _OF_BANDWIDTH * sheet.bandwidth
        dtype, few = model.dtype, load.few or load.tokens
        peak = sheet.float32 if dtype == torch.float32 else sheet.tensor
        products, single = _OF_PRODUCTS * peak, _OF_PRODUCTS * sheet.float32

        def product(rows: int) -> float:
            return min(products, 2 * rows * memory / dtype.itemsize)

        def gram(rows: int) -> float:
            return min(single, 2 * rows * memory / 8)

        widths = [unit.shapes["gate"][1] for unit in model.units() if unit.kind == "bank"]

        def visit(rows: int) -> float:
            """Operations per second of an expert that so many tokens visit."""
            if not widths:
                return product(rows)
            work = 6.0 * rows * model.hidden_size * max(widths)
            return work / (work / product(rows) + _VISIT_SECONDS)

        softmax = 20 * model.vocab_size / memory  # logits in float32, five times
        return Speeds(
            matmul=product(load.tokens),
            hessian=gram(load.tokens),
            expert_matmul=visit(few),
            expert_hessian=gram(few),
            expert_reverse=visit(load.fewer or load.length),
            attention=4 / (_OF_ATTENTION * peak),
            wide=_VALUE_BYTES / memory,
            head=2 * model.hidden_size * model.vocab_size / products + softmax,
            read=host.read,
            sums=memory / _SUM_PASSES,
            product=single,
            factor=_OF_FACTORISING * sheet.float32 / _FACTOR_OPERATIONS,
            write=host.write,
            entry=host.entry,
            compress={
                chain: _solving(compressing(chain), sheet)
                for chain in experiment.recipe.chains()
                if compressing(chain)
            },
            save=host.save,
            digest=host.digest,
            host_add=host.host_add,
            copy=_OF_BANDWIDTH * sheet.link,
        )

    return speeds


def _solving(chain: Chain, sheet: DataSheet) -> Compressing:
    memory = _OF_BANDWIDTH * sheet.bandwidth
    if any(can_be_cut(chain[: end + 1]) for end in range(len(chain))):
        cube = _SVD_OPERATIONS / (_OF_FACTORISING * sheet.float32)
        return Compressing((), 0.0, _UNPACK / memory, cube=cube)
    column = weight = 0.0
    for spec in chain:
        searched = getattr(spec.parsed(), "clip", "none") != "none"
        weight += (_SEARCH if searched else _QUANTIZE) / memory
        if "hessian" in link_module(spec.method).NEEDS:
            column += _COLUMN_SECONDS
    return Compressing(((0, column), (1, column + weight)), weight, _UNPACK / memory)
