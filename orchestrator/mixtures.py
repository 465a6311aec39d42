"""Banks whose experts come from different pieces: told group by group, put together where needed.

With every plan that a search looks at other experts come from other pieces. All of these mixtures
as files would be written once, read once and kept for ever; told which experts come from which
piece, a worker puts them together in memory. The file (format ``mosaic``) is written of the plans
that are evaluated and assembled in the end.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moesaic.kernels import mosaic
from moesaic.kernels.tensor import CompressedTensor, format_module
from moesaic.methods.base import Chain, Unit
from moesaic.orchestrator.choices import Chosen, choices_in
from moesaic.orchestrator.pieces import Member, read_piece
from moesaic.orchestrator.store import digest
from moesaic.orchestrator.tensorfile import DTYPE_NAMES, Stored

# (member, file of a piece, experts that come from it), group by group, in the order in which they
# lie in the file of the mixture.
Mixture = Sequence[tuple[str, str, Sequence[int]]]
# Name of a mixture's file, whether it is written or not → what it is.
Mixtures = Mapping[str, Mixture]


def mosaic_key(unit: Unit, paths: Mapping[Chain, Path], chosen: Chosen) -> str:
    """Names a mixture of the pieces of a bank.

    Args:
        paths: piece of every chain that the choices take.
    """
    parts = [[c.member, c.expert, paths[chosen[c.name]].stem] for c in choices_in(unit, chosen)]
    return digest(["mosaic", parts])


def mixture_of(unit: Unit, paths: Mapping[Chain, Path], chosen: Chosen) -> Mixture:
    """What :func:`mosaic_key` names."""
    found: list[tuple[str, str, list[int]]] = []
    for member in unit.shapes:
        experts: dict[Chain, list[int]] = {}
        for choice in choices_in(unit, chosen):
            if choice.member == member and choice.expert is not None:
                experts.setdefault(chosen[choice.name], []).append(choice.expert)
        found += [(member, str(paths[chain]), own) for chain, own in sorted(experts.items())]
    return found


def sources(mixture: Mixture) -> list[str]:
    """The files of the pieces that it comes from."""
    return list(dict.fromkeys(path for _, path, _ in mixture))


def _by_member(mixture: Mixture) -> dict[str, list[tuple[str, Sequence[int]]]]:
    """Member → its groups."""
    found: dict[str, list[tuple[str, Sequence[int]]]] = {}
    for member, path, experts in mixture:
        found.setdefault(member, []).append((path, experts))
    return found


def packed(mixture: Mixture) -> dict[str, CompressedTensor]:
    """The members of a mixture as its file holds them, from slices of the pieces.

    Raises:
        FileNotFoundError: a piece is gone.
        RunError: a file is cut off, or no piece.
    """
    pieces = {path: read_piece(Path(path)) for path in sources(mixture)}
    members = {}
    for member, parts in _by_member(mixture).items():
        groups = [(mosaic.take(pieces[path][member], own), own) for path, own in parts]
        members[member] = groups[0][0] if len(groups) == 1 else mosaic.pack(groups)
    return {**next(iter(pieces.values())), **members}  # what comes with a reduced bank: in all


def members_of(path: str, mixtures: Mixtures) -> dict[str, CompressedTensor]:
    """The members of a piece, or of a mixture that is no file."""
    return packed(mixtures[path]) if path in mixtures else read_piece(Path(path))


def outline(path: str) -> dict[str, Member]:
    """The members of a piece without their tensors, of a cut as well.

    Raises:
        FileNotFoundError: the piece is gone.
        RunError: the file is cut off, or no piece.
    """
    return {
        name: Member(
            found.format,
            found.shape,
            found.dtype,
            found.params,
            {p: _nowhere(tuple(t.shape), t.dtype) for p, t in found.parts.items()},
        )
        for name, found in read_piece(Path(path)).items()
    }


def _nowhere(shape: tuple[int, ...], dtype: torch.dtype) -> Stored:
    return Stored(Path(), 0, DTYPE_NAMES[dtype], shape)


def described(mixture: Mixture, piece: Callable[[str], Mapping[str, Member]]) -> dict[str, Member]:
    """What :func:`packed` gives, without tensors.

    Args:
        piece: gives the :func:`outline` of a piece, given its file.
    """
    found = dict(piece(mixture[0][1]))
    for member, parts in _by_member(mixture).items():
        own = [(piece(path)[member], experts) for path, experts in parts]
        first = own[0][0]
        name, params = first.format, first.params
        if len(own) > 1:
            name = "mosaic"
            params = mosaic.params_of(
                [(m.format, mosaic.taken_params(m.format, m.params, e), e) for m, e in own]
            )
        shape = (sum(len(experts) for _, experts in own), *first.shape[1:])
        sizes = format_module(name).part_shapes(shape, first.dtype, params)
        placed = {part: _nowhere(tuple(size), dtype) for part, (size, dtype) in sizes.items()}
        found[member] = Member(name, shape, first.dtype, params, placed)
    return found


def dense(mixture: Mixture, whole: Callable[[str], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights that a mixture stands for, member → ``[E, out, in]``, and what comes with them.

    The numbers and dtypes are those of its file.

    Args:
        whole: gives the weights of a piece, given its file.
    """
    mixed = {member for member, *_ in mixture}
    found: dict[str, Tensor] = {}
    # One source at a time: a bank may be large, and come from many.
    for source in sources(mixture):
        weights = whole(source)
        found |= {name: value for name, value in weights.items() if name not in mixed}
        for member, path, experts in mixture:
            if path != source:
                continue
            own = weights[member]
            target = found[member] if member in found else torch.empty_like(own)
            # Formats differ in the dtype of what products amount to.
            found[member] = target.to(torch.promote_types(target.dtype, own.dtype))
            for expert in experts:
                found[member][expert].copy_(own[expert])
    return found
