"""Mapped: many slices of one weight that are copies of a few.

The first dimension of the weight (experts of a bank, rows of a linear) is longer than that of what
is stored. ``params["map"]`` is JSON: for every slice the number of its stand-in. Numbers need not
be consecutive: what is taken of a bank keeps them, and only the stand-ins that it needs.

``stand_ins``  dtype of the weight ``[numbers, …]``, in the order of their numbers.
``order``      int32 ``[experts, size]``, of a bank whose experts have their stand-in's channels in
               an order of their own: which row of it (``params["moved"]`` is ``rows``), or which
               column (``columns``), stands at each place.
"""

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moesaic.kernels import dense, lowrank
from moesaic.kernels.tensor import CompressedTensor, Param

STAND_INS, ORDER = "stand_ins", "order"
_MAP, _MOVED = "map", "moved"
# What is moved → dimension of an expert's matrix.
_DIMENSIONS = {"rows": 0, "columns": 1}


def pack(
    stand_ins: Tensor,
    numbers: Sequence[int],
    order: Tensor | None = None,
    moved: str = "rows",
) -> CompressedTensor:
    """A weight of stand-ins ``[numbers, …]``; their memory is shared.

    Args:
        numbers: for every slice the number of its stand-in; as many different ones as stand-ins.
        order: ``[experts, size]``, see above; None where all channels are in place.
        moved: what ``order`` is about, ``rows`` or ``columns``.

    Raises:
        ValueError: the numbers, or the order, are not such.
    """
    numbers = [int(number) for number in numbers]
    if len(set(numbers)) != len(stand_ins):
        raise ValueError(f"{len(set(numbers))} different numbers for {len(stand_ins)} stand-ins")
    shape = (len(numbers), *stand_ins.shape[1:])
    params: dict[str, Param] = {_MAP: json.dumps(numbers)}
    parts = {STAND_INS: stand_ins}
    if order is not None:
        if len(shape) != 3 or moved not in _DIMENSIONS:
            raise ValueError(f"channels of {shape} cannot be moved by {moved!r}")
        size = shape[1 + _DIMENSIONS[moved]]
        places = torch.arange(size, device=order.device).expand(len(numbers), size)
        if order.shape != places.shape or not torch.equal(order.long().sort(dim=1).values, places):
            raise ValueError(
                f"order {tuple(order.shape)} holds not every one of {size} {moved} once"
            )
        params[_MOVED] = moved
        parts[ORDER] = order.to(torch.int32).contiguous()
    return CompressedTensor("mapped", parts, shape, stand_ins.dtype, params)


def _numbers(params: Mapping[str, Param]) -> list[int]:
    numbers: list[int] = json.loads(str(params[_MAP]))
    return numbers


def _places(numbers: Sequence[int]) -> dict[int, int]:
    """Number → where its stand-in lies."""
    return {number: place for place, number in enumerate(sorted(set(numbers)))}


def _repacked(
    tensor: CompressedTensor, parts: Mapping[str, Tensor], numbers: list[int]
) -> CompressedTensor:
    params = {**tensor.params, _MAP: json.dumps(numbers)}
    shape = (len(numbers), *tensor.shape[1:])
    return CompressedTensor("mapped", parts, shape, tensor.dtype, params)


def select(tensor: CompressedTensor, index: int) -> CompressedTensor:
    """Member ``index`` of a bank, dense: its stand-in, or a copy of it in the expert's order."""
    numbers = _numbers(tensor.params)
    weight = tensor.parts[STAND_INS][_places(numbers)[numbers[index]]]
    if ORDER in tensor.parts:
        weight = weight.index_select(_dimension(tensor), tensor.parts[ORDER][index])
    return dense.pack(weight)


def _dimension(tensor: CompressedTensor) -> int:
    return _DIMENSIONS[str(tensor.params[_MOVED])]


def take(tensor: CompressedTensor, slices: Sequence[int]) -> CompressedTensor:
    """Some members of a bank, with the stand-ins that they need."""
    numbers = _numbers(tensor.params)
    chosen = [numbers[index] for index in slices]
    places = _places(numbers)
    kept = [places[number] for number in sorted(set(chosen))]
    parts = {STAND_INS: tensor.parts[STAND_INS][kept]}
    if ORDER in tensor.parts:
        parts[ORDER] = tensor.parts[ORDER][list(slices)]
    return _repacked(tensor, parts, chosen)


def take_params(params: Mapping[str, Param], slices: Sequence[int]) -> dict[str, Param]:
    """The params of what :func:`take` gives."""
    numbers = _numbers(params)
    return {**params, _MAP: json.dumps([numbers[index] for index in slices])}


def joined(banks: Sequence[CompressedTensor]) -> CompressedTensor:
    """Banks one behind the other: stand-ins of one number are the same, and lie there once."""
    numbers: list[int] = []
    found: dict[int, Tensor] = {}
    for bank in banks:
        own = _numbers(bank.params)
        numbers += own
        for number, place in _places(own).items():
            found.setdefault(number, bank.parts[STAND_INS][place])
    parts = {STAND_INS: torch.stack([found[number] for number in sorted(found)])}
    if ORDER in banks[0].parts:
        parts[ORDER] = torch.cat([bank.parts[ORDER] for bank in banks])
    return _repacked(banks[0], parts, numbers)


def unpack(tensor: CompressedTensor) -> Tensor:
    """Dense weight, ``tensor.shape`` and ``tensor.dtype``."""
    whole = tensor.parts[STAND_INS][_rows(tensor)]
    if ORDER in tensor.parts:
        for expert, order in enumerate(tensor.parts[ORDER]):
            whole[expert] = whole[expert].index_select(_dimension(tensor), order)
    return whole


def _rows(tensor: CompressedTensor) -> list[int]:
    """For every slice where its stand-in lies."""
    numbers = _numbers(tensor.params)
    places = _places(numbers)
    return [places[number] for number in numbers]


def part_shapes(
    shape: tuple[int, ...], dtype: torch.dtype, params: Mapping[str, Param]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part.

    Raises:
        ValueError: the map is not one of such a weight.
    """
    numbers = _numbers(params)
    if len(numbers) != shape[0] or not all(type(number) is int for number in numbers):
        raise ValueError(f"a map of {len(numbers)} slices, the weight has {shape[0]}")
    parts = {STAND_INS: ((len(set(numbers)), *shape[1:]), dtype)}
    if _MOVED in params:
        size = shape[1 + _DIMENSIONS[str(params[_MOVED])]]
        parts[ORDER] = ((shape[0], size), torch.int32)
    return parts


def matmul_reference(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """``x [*, in] @ weightᵀ -> [*, out]`` for rows of a linear: a product per stand-in, copied."""
    lowrank.check_matrix(tensor)
    return dense.matmul_reference(x, dense.pack(tensor.parts[STAND_INS]))[..., _rows(tensor)]


def matmul(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """The same on a GPU."""
    lowrank.check_matrix(tensor)
    return dense.matmul(x, dense.pack(tensor.parts[STAND_INS]))[..., _rows(tensor)]
