"""How a plan is written down for each engine: names of tensors and ``quantization_config``.

``vllm`` and ``transformers`` read compressed-tensors' ``pack-quantized`` layout: every linear, and
every expert of a bank by itself, has its parts beside each other as ``{linear}.{part}``. The
configuration has one group per distinct scheme. Linears are named exactly; a bank is named by a
regular expression that matches the bank and everything in it, because vLLM asks for
``…experts.0.gate_proj`` whatever the files call it, and transformers takes the first group whose
expression mentions experts for all experts.

``moesaic`` keeps a bank together: ``{module}.{member}.{part}`` with the experts as first dimension,
under the name of the module that transformers builds.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels import channels
from moesaic.kernels.int_group import MAX_BITS, quantization_args
from moesaic.kernels.lowrank import factor_params
from moesaic.kernels.nesting import nested_params
from moesaic.kernels.tensor import Param, format_module
from moesaic.methods.base import Unit
from moesaic.orchestrator.bank import (
    BIAS,
    CONSTANTS,
    EXPERT_MAP,
    ROUTER,
    fuse,
    fuse_biases,
    is_reduced,
)
from moesaic.orchestrator.compressed_modules import METHOD, VERSION
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.narrowing import LINEAR_BIAS
from moesaic.orchestrator.pieces import Member, tensor_blob
from moesaic.orchestrator.shortcuts import CONFIG_KEY
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.targets import FORMAT, Scheme, Serve, plan_problem
from moesaic.orchestrator.tensorfile import DTYPE_NAMES, Blob, Stored

PACKED = "pack-quantized"
DENSE = "dense"
CHANNELS = "channels"
# Transformers folds every expert tensor through its dequantizer as soon as anything is quantized.
# Told that experts are float8, it passes weights that have no scale through as they are; packed
# integers are the only other thing it understands, and dense experts make that fail.
_DENSE_EXPERTS = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
}

Piece = Mapping[str, Member]


def module_path(model: StreamedModel, unit: Unit) -> str:
    """Path of the unit's module from the top of transformers' model."""
    return f"{model.family.block.format(block=unit.block)}.{model.unit_module(unit)}"


def check_plan(model: StreamedModel, pieces: Mapping[str, Piece], serve: Serve) -> None:
    """Raises a RunError if ``serve`` cannot load the plan."""
    if serve == "moesaic":
        return
    for name, piece in pieces.items():
        odd = next((m.format for m in piece.values() if m.format not in (FORMAT, DENSE)), None)
        if odd or {EXPERT_MAP, CONSTANTS} & piece.keys():
            raise RunError(f"{name}: serve: {serve} cannot load {odd or 'a map of experts'}")
    _one_form(model, pieces, serve)
    reason = plan_problem(model.units(), schemes(model, pieces), serve, model.family)
    if reason:
        raise RunError(reason)


def schemes(
    model: StreamedModel, pieces: Mapping[str, Piece]
) -> dict[str, dict[str, Scheme] | None]:
    """Unit → member → scheme; None for a unit that is left dense."""
    found: dict[str, dict[str, Scheme] | None] = {}
    for unit in model.units():
        found[unit.name] = None
        if unit.name in pieces and not is_dense(unit, pieces[unit.name]):
            found[unit.name] = {name: pieces[unit.name][name].params for name in unit.shapes}
    return found


def unplaced(piece: Piece) -> Piece:
    """A piece whose members in the format ``channels`` are what is left of them by itself."""
    return {name: _unplaced(member) for name, member in piece.items()}


def _unplaced(member: Member) -> Member:
    if member.format != CHANNELS:
        return member
    inner, params = channels.described_inner(member.params)
    parts = {own: part for name, part in member.parts.items() if (own := channels.inner_part(name))}
    shape = channels.inner_shape(member.shape, member.params)
    return Member(inner, shape, member.dtype, params, parts)


def is_dense(unit: Unit, piece: Piece) -> bool:
    """Whether a piece compresses nothing: it is that of a unit that is only reduced."""
    return all(piece[member].format == DENSE for member in unit.shapes)


def _one_form(model: StreamedModel, pieces: Mapping[str, Piece], serve: Serve) -> None:
    """Raises a RunError unless all banks have equally many and equally wide experts, and all MLPs
    one width where any is narrower."""
    units = model.units()
    banks = {u.name: form(u, pieces.get(u.name)) for u in units if u.kind == "bank"}
    widths = _mlp_widths(model, pieces)
    narrower = any(widths[u.name] != u.shapes["weight"][1] for u in units if u.name in widths)
    asked = ((banks, "equally many experts of one width"), (widths, "MLPs of one width"))
    for forms, what in asked[: 1 + narrower]:
        first = next(iter(forms), "")
        other = next((name for name, own in forms.items() if own != forms[first]), None)
        if other is not None:
            raise RunError(f"{first} and {other}: serve: {serve} needs {what}")


def _mlp_widths(model: StreamedModel, pieces: Mapping[str, Piece]) -> dict[str, int]:
    """Unit that reads what is inside of an MLP → the width of that."""
    down = model.family.mlp_roles.get("down")
    units = [u for u in model.units() if u.kind == "linear" and model.unit_module(u) == down]
    return {
        u.name: (pieces[u.name]["weight"].shape if u.name in pieces else u.shapes["weight"])[1]
        for u in units
    }


def form(unit: Unit, piece: Piece | None) -> tuple[int, int]:
    """Number and width of a bank's experts under a piece; None leaves it as it is."""
    shape = unit.shapes["gate"] if piece is None else piece["gate"].shape
    return shape[0], shape[1]


def resized_config(model: StreamedModel, pieces: Mapping[str, Piece]) -> dict[str, int]:
    """Keys of ``config.json`` that say how many experts there are and how wide, and how wide MLPs
    are, where it changes.

    For engines that load ordinary checkpoints.
    """
    units = {unit.name: unit for unit in model.units()}
    for name, own in _mlp_widths(model, pieces).items():
        if own != units[name].shapes["weight"][1]:
            return {model.family.mlp_width: own}  # of one width, and no experts beside them
    router = model.family.router
    banks = [u for u in model.units() if u.kind == "bank" and is_reduced(pieces.get(u.name, {}))]
    if not banks or router is None:
        return {}
    (experts, width), before = form(banks[0], pieces[banks[0].name]), banks[0].shapes["gate"]
    # Transformers knows the count by two names, and files have either.
    pairs = (getattr(model.config, "attribute_map", None) or {}).items()
    aliases = {other for pair in pairs if router.count in pair for other in pair}
    known = aliases & model.checkpoint.config.keys() or {router.count}
    changed = dict.fromkeys(sorted(known), experts)
    return changed if width == before[1] else {**changed, router.width: width}


def unit_tensors(model: StreamedModel, unit: Unit, piece: Piece, serve: Serve) -> list[Blob]:
    """Everything that the file holds of a compressed unit, and of what comes with it."""
    side = _side_tensors(model, unit, piece) if is_reduced(piece) else []
    module = module_path(model, unit)
    if serve == "moesaic":
        own = [name for name in piece if name in (*unit.shapes, EXPERT_MAP, CONSTANTS)]
        bias = model.bias_name(unit) if unit.kind == "linear" and LINEAR_BIAS in piece else None
        if bias is not None:
            (stored,) = piece[LINEAR_BIAS].parts.values()
            side.append(Blob.of(bias, stored))
        return side + [
            Blob.of(_own_name(unit, module, member, part), stored)
            for member in own
            for part, stored in piece[member].parts.items()
        ]
    if unit.kind == "bank" and is_dense(unit, piece) and model.bank.fused:
        return side + _fused(model, unit, piece)
    tensors = []
    for member, names in model.unit_tensors(unit).items():
        count = 1 if unit.kind == "linear" else piece[member].shape[0]
        for index, name in enumerate(names[:count]):
            for part, stored in piece[member].parts.items():
                place = stored if unit.kind == "linear" else stored[index]
                layer = name.removesuffix(".weight")
                full = name if piece[member].format == DENSE else f"{layer}.{part}"
                tensors.append(Blob.of(full, place))
    return side + tensors


def _own_name(unit: Unit, module: str, member: str, part: str) -> str:
    """Name of a part in our own layout."""
    if unit.kind == "linear":
        return f"{module}.{part}"
    return (
        f"{module}.{member}" if member in (EXPERT_MAP, CONSTANTS) else f"{module}.{member}.{part}"
    )


def replaced_names(model: StreamedModel, unit: Unit, piece: Piece) -> set[str]:
    """Names on disk of everything that a piece stands for."""
    names = {name for group in model.unit_tensors(unit).values() for name in group}
    if is_reduced(piece):
        kept = model.layouts[unit.block].kept
        own = [*model.router_names(unit.block).values(), *model.bias_names(unit.block)]
        names |= {kept[name] for name in own}
    bias = model.bias_name(unit) if unit.kind == "linear" and LINEAR_BIAS in piece else None
    return names | ({bias} if bias is not None else set())


def _side_tensors(model: StreamedModel, unit: Unit, piece: Piece) -> list[Blob]:
    """Router and biases of a reduced bank under their names on disk."""
    kept = model.layouts[unit.block].kept
    found = []
    for role, name in model.router_names(unit.block).items():
        (stored,) = piece[f"{ROUTER}{role}"].parts.values()
        found.append(Blob.of(kept[name], stored))
    biases = model.bias_names(unit.block)
    if biases:
        members = {name: piece[f"{BIAS}{name}"] for name in unit.shapes}
        fused = _lazily(members, lambda tensors: fuse_biases(tensors, model.bank))
        found += [blob(kept[name]) for name, blob in zip(biases, fused, strict=True)]
    return found


def _fused(model: StreamedModel, unit: Unit, piece: Piece) -> list[Blob]:
    """A reduced, dense bank of a family that keeps all experts of a block in one tensor."""
    names = model.unit_tensors(unit)
    blobs = _lazily(
        {name: piece[name] for name in unit.shapes}, lambda tensors: fuse(tensors, model.bank)
    )
    return [blob(names[m][0]) for m, blob in zip(("gate", "down"), blobs, strict=True)]


def _lazily(
    members: Mapping[str, Member], join: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
) -> list[Callable[[str], Blob]]:
    """Tensors joined from dense members; their sizes now, their bytes when they are written."""
    empty = {
        name: torch.empty(member.shape, dtype=member.dtype, device="meta")
        for name, member in members.items()
    }

    def made(index: int, like: Tensor) -> Callable[[str], Blob]:
        def chunks() -> Iterable[bytes | memoryview]:
            read = {name: _read(member) for name, member in members.items()}
            return tensor_blob("", join(read)[index]).chunks()

        dtype, shape = DTYPE_NAMES[like.dtype], tuple(like.shape)
        return lambda name: Blob(name, dtype, shape, chunks)

    return [made(index, like) for index, like in enumerate(join(empty))]


def _read(member: Member) -> Tensor:
    (stored,) = member.parts.values()
    data = bytearray(b"".join(stored.chunks()))
    return torch.frombuffer(data, dtype=member.dtype).view(member.shape)


def largest_piece(unit: Unit, serve: Serve, chained: bool = False, narrowed: bool = False) -> Piece:
    """A piece whose parts are as many and as large as any that ``serve`` can load, or larger.

    Args:
        chained: whether there may be factors, rounded ones too, and corrections on top.
        narrowed: whether a linear may have lost some of its channels.
    """
    params: dict[str, Param] = {
        "bits": MAX_BITS,
        "group_size": 1,
        "symmetric": serve == "transformers" or (serve == "vllm" and unit.kind == "bank"),
    }
    format_name, widest = FORMAT, params
    piece: dict[str, Member] = {}
    for member, shape in unit.shapes.items():
        if chained:
            rank = min(shape[-2:])
            rounded = factor_params(FORMAT, params, rank)
            plain = factor_params("dense", {}, rank)
            inner = {"base": ("lowrank", rounded), "residual": ("lowrank", plain)}
            format_name, widest = "residual", nested_params(inner)
        if narrowed and unit.kind == "linear":
            left = {"rows": shape[0] - 1, "columns": shape[1] - 1}
            widest = {**left, **nested_params({"inner": (format_name, widest)})}
            format_name = CHANNELS
        parts = format_module(format_name).part_shapes(shape, torch.float32, widest)
        nowhere = {
            part: Stored(Path(), 0, DTYPE_NAMES[dtype], extent)
            for part, (extent, dtype) in parts.items()
        }
        piece[member] = Member(format_name, shape, torch.float32, widest, nowhere)
    return piece


def quantization_config(
    model: StreamedModel, pieces: Mapping[str, Piece], serve: Serve
) -> dict[str, Any] | None:
    """What ``config.json`` says of the plan; None if nothing is compressed."""
    if serve == "moesaic":
        modules, config = _modules(model, pieces), {"quant_method": METHOD, "version": VERSION}
        shortcuts = shortcut_config(model)
        return {**config, "modules": modules, **shortcuts} if pieces or shortcuts else None
    dense = [unit.name for unit in model.units() if schemes(model, pieces)[unit.name] is None]
    pieces = {name: piece for name, piece in pieces.items() if name not in dense}
    if not pieces:
        return None
    groups = _groups(model, pieces, serve)
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": _ignored(model, pieces, serve),
    }


def shortcut_config(model: StreamedModel) -> dict[str, Any]:
    """What our plug-in must know of a sliced model whose blocks turn the residual stream."""
    if not model.checkpoint.config.get(CONFIG_KEY):
        return {}
    blocks, _, _ = model.family.block.rpartition(".")
    return {"shortcuts": {"blocks": blocks, "pairs": model.family.shortcut_pairs()}}


def _modules(model: StreamedModel, pieces: Mapping[str, Piece]) -> dict[str, Any]:
    return {
        module_path(model, unit): _module(model, unit, pieces[unit.name])
        for unit in model.units()
        if unit.name in pieces
    }


def _module(model: StreamedModel, unit: Unit, piece: Piece) -> dict[str, Any]:
    described: dict[str, Any] = {
        "kind": unit.kind,
        "members": {name: piece[name].to_json() for name in piece if name in unit.shapes},
    }
    if is_reduced(piece):
        block = model.family.block.format(block=unit.block)
        constants = piece[CONSTANTS].shape[0] if CONSTANTS in piece else 0
        described["reduced"] = {
            "router": f"{block}.{model.router_module}",
            "rows": piece[f"{ROUTER}weight"].shape[0],
            "mapped": EXPERT_MAP in piece,
            "constants": constants,
        }
    return described


def _groups(
    model: StreamedModel, pieces: Mapping[str, Piece], serve: Serve
) -> list[dict[str, Any]]:
    targets: dict[str, list[str]] = {}
    for unit in model.units():
        if unit.name in pieces:
            scheme = quantization_args(next(iter(pieces[unit.name].values())).params)
            text = json.dumps(scheme, sort_keys=True)
            targets.setdefault(text, []).append(_target(model, unit, serve))
    groups = [_group(json.loads(text), names, PACKED) for text, names in targets.items()]
    dense = [u for u in model.units() if u.kind == "bank" and u.name not in pieces]
    if serve == "transformers" and dense:
        names = [_target(model, unit, serve) for unit in dense]
        groups.insert(0, _group(_DENSE_EXPERTS, names, "float-quantized"))
    return groups


def _group(weights: dict[str, Any], targets: list[str], layout: str) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": layout,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }


def _target(model: StreamedModel, unit: Unit, serve: Serve) -> str:
    if unit.kind == "linear":
        return unit.name
    name = module_path(model, unit) if serve == "transformers" else unit.name
    return rf"re:^{re.escape(name)}(\.|$)"


def _ignored(model: StreamedModel, pieces: Mapping[str, Piece], serve: Serve) -> list[str]:
    """Every matrix that is not quantized: the head, routers, and units left dense."""
    dense = [unit for unit in model.units() if unit.name not in pieces]
    banks = [unit for unit in dense if unit.kind == "bank"]
    others = [
        name.removesuffix(".weight")
        for name in model.fixed_names()
        if name.endswith(".weight")
        and len(model.checkpoint.shape(name)) == 2
        and name != f"{model.family.embed}.weight"
    ]
    linears = [unit.name for unit in dense if unit.kind == "linear"]
    names = {*filter(None, [model.family.head]), *others, *linears}
    return [*sorted(names, key=natural_key), *(_target(model, unit, serve) for unit in banks)]


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that counts numbers between dots as numbers: layer 10 comes after layer 9."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]
