"""Mosaic: slices of one weight in different formats.

The first dimension of the weight (experts of a bank, rows of a linear) is cut into groups; each
group is a compressed tensor of its own, with its own format, bits and group size. So every expert
gets the bits that it is worth, and experts of equal choice still lie together.

Parts are named ``group{g}_{part}``. ``params["groups"]`` is JSON: for every group its ``format``,
its ``params`` and ``slices``, the indices along the first dimension in the order in which they lie
in the group's parts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels import nesting
from moesaic.kernels.tensor import CompressedTensor, Param, format_module

_GROUPS = "groups"


def pack(groups: Sequence[tuple[CompressedTensor, Sequence[int]]]) -> CompressedTensor:
    """Joins groups into one tensor.

    Args:
        groups: (tensor ``[slices, …]``, indices that its slices have in the whole). Together the
            indices are 0, 1, … without gap or repetition.

    Raises:
        ValueError: the indices are not that, or shapes and dtypes do not fit together.
    """
    if not groups:
        raise ValueError("a mosaic needs at least one group")
    indices = [index for _, slices in groups for index in slices]
    if sorted(indices) != list(range(len(indices))):
        raise ValueError(f"the slices {sorted(indices)} do not cover 0 … {len(indices) - 1} once")
    first = groups[0][0]
    parts: dict[str, Tensor] = {}
    for number, (tensor, slices) in enumerate(groups):
        if tensor.shape != (len(slices), *first.shape[1:]) or tensor.dtype != first.dtype:
            raise ValueError(
                f"group {number} is {tensor.shape} {tensor.dtype}, expected"
                f" {(len(slices), *first.shape[1:])} {first.dtype}"
            )
        parts |= nesting.prefixed(f"group{number}_", tensor)
    return CompressedTensor(
        format="mosaic",
        parts=parts,
        shape=(len(indices), *first.shape[1:]),
        dtype=first.dtype,
        params=params_of([(tensor.format, tensor.params, slices) for tensor, slices in groups]),
    )


def params_of(groups: Sequence[tuple[str, Mapping[str, Param], Sequence[int]]]) -> dict[str, Param]:
    """What :func:`pack` puts into the params, from format, params and slices of every group."""
    described = [
        {"format": inner, "params": dict(params), "slices": list(slices)}
        for inner, params, slices in groups
    ]
    return {_GROUPS: json.dumps(described, sort_keys=True)}


def taken_params(
    format_name: str, params: Mapping[str, Param], slices: Sequence[int]
) -> Mapping[str, Param]:
    """The params of what :func:`take` makes of a bank of this format and these params.

    A format whose params tell something of every expert defines ``take_params(params, slices)``.
    """
    own = getattr(format_module(format_name), "take_params", None)
    found: Mapping[str, Param] = params if own is None else own(params, slices)
    return found


def take(bank: CompressedTensor, slices: Sequence[int]) -> CompressedTensor:
    """Some experts of a bank ``[E, out, in]``, in the given order, as a bank of their own, of the
    same format and params.

    A format whose parts do not all have the experts as first dimension defines
    ``take(tensor, slices)``.
    """
    if len(bank.shape) < 3:
        raise ValueError(f"a weight of shape {bank.shape} is not a bank")
    own = getattr(format_module(bank.format), "take", take)
    if own is not take:
        chosen: CompressedTensor = own(bank, slices)
        return chosen
    parts = {name: part[list(slices)].contiguous() for name, part in bank.parts.items()}
    shape = (len(slices), *bank.shape[1:])
    return CompressedTensor(bank.format, parts, shape, bank.dtype, bank.params)


def joined(banks: Sequence[CompressedTensor]) -> CompressedTensor:
    """Banks of one format and width, one behind the other, as one bank: the inverse of
    :func:`take`, of slices in their order.

    A format whose parts do not all have the experts as first dimension defines
    ``joined(tensors)``.
    """
    first = banks[0]
    if len(banks) == 1:
        return first
    own = getattr(format_module(first.format), "joined", joined)
    if own is not joined:
        whole: CompressedTensor = own(banks)
        return whole
    parts = {name: torch.cat([bank.parts[name] for bank in banks]) for name in first.parts}
    shape = (sum(bank.shape[0] for bank in banks), *first.shape[1:])
    return CompressedTensor(first.format, parts, shape, first.dtype, first.params)


def groups(tensor: CompressedTensor) -> list[tuple[CompressedTensor, list[int]]]:
    """The groups that :func:`pack` joined; parts are shared, not copied."""
    found = []
    for number, described in enumerate(_described(tensor.params)):
        slices = described["slices"]
        shape = (len(slices), *tensor.shape[1:])
        found.append((nesting.unprefixed(tensor, f"group{number}_", described, shape), slices))
    return found


def _described(params: Mapping[str, Param]) -> list[dict[str, Any]]:
    described: list[dict[str, Any]] = json.loads(str(params[_GROUPS]))
    return described


def select(tensor: CompressedTensor, index: int) -> CompressedTensor:
    """Slice ``index`` of a bank, in its own format."""
    for member, slices in groups(tensor):
        if index in slices:
            return member[slices.index(index)]
    raise IndexError(f"slice {index} of a mosaic of {tensor.shape[0]}")


def unpack(tensor: CompressedTensor) -> Tensor:
    """Dense weight, ``tensor.shape`` and ``tensor.dtype``."""
    found = groups(tensor)
    dense = torch.empty(tensor.shape, dtype=tensor.dtype, device=_device(tensor))
    for member, slices in found:
        dense[slices] = member.dense()
    return dense


def effective(tensor: CompressedTensor) -> Tensor:
    """The weight that products amount to, in the widest dtype of the groups' own."""
    found = [(member.effective(), slices) for member, slices in groups(tensor)]
    dtype = reduce(torch.promote_types, (weight.dtype for weight, _ in found))
    whole = torch.empty(tensor.shape, dtype=dtype, device=_device(tensor))
    for weight, slices in found:
        whole[slices] = weight.to(dtype)
    return whole


def _device(tensor: CompressedTensor) -> torch.device:
    return next(iter(tensor.parts.values())).device


def part_shapes(
    shape: tuple[int, ...], dtype: torch.dtype, params: Mapping[str, Param]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part, from the dense shape alone."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for number, described in enumerate(_described(params)):
        inner = (len(described["slices"]), *shape[1:])
        found |= nesting.prefixed_shapes(f"group{number}_", described, inner, dtype)
    return found


def matmul_reference(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """``x [*, in] @ weightᵀ -> [*, out]``, each group of rows by its format's reference."""
    return _by_rows(x, tensor, lambda member: format_module(member.format).matmul_reference)


def matmul(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """The same by the formats' kernels; one launch per group of rows."""
    return _by_rows(x, tensor, lambda member: format_module(member.format).matmul)


def _by_rows(
    x: Tensor,
    tensor: CompressedTensor,
    function: Callable[[CompressedTensor], Callable[[Tensor, CompressedTensor], Tensor]],
) -> Tensor:
    if len(tensor.shape) != 2:
        raise ValueError(
            f"a weight [out, in] is needed, not {tensor.shape}: multiply expert by expert"
        )
    out = torch.empty((*x.shape[:-1], tensor.shape[0]), dtype=x.dtype, device=x.device)
    for member, slices in groups(tensor):
        out[..., slices] = function(member)(x, member)
    return out
