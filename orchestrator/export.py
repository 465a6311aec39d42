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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.kernels.int_group import MAX_BITS, part_shapes, quantization_args
from moesaic.kernels.tensor import Param
from moesaic.methods.base import Unit
from moesaic.orchestrator.compressed_modules import METHOD, VERSION
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.pieces import Member
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.targets import FORMAT, Scheme, Serve, plan_problem
from moesaic.orchestrator.tensorfile import DTYPE_NAMES, Stored

PACKED = "pack-quantized"
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
        odd = next((m.format for m in piece.values() if m.format != FORMAT), None)
        if odd:
            raise RunError(f"{name}: serve: {serve} cannot load the format {odd}")
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
        if unit.name in pieces:
            found[unit.name] = {name: m.params for name, m in pieces[unit.name].items()}
    return found


def unit_tensors(
    model: StreamedModel, unit: Unit, piece: Piece, serve: Serve
) -> list[tuple[str, Stored]]:
    """Names and places of everything that the file holds of a compressed unit."""
    if serve == "moesaic":
        module = module_path(model, unit)
        return [
            (f"{module}.{part}" if unit.kind == "linear" else f"{module}.{member}.{part}", stored)
            for member, described in piece.items()
            for part, stored in described.parts.items()
        ]
    tensors = []
    for member, names in model.unit_tensors(unit).items():
        for index, name in enumerate(names):
            for part, stored in piece[member].parts.items():
                place = stored if unit.kind == "linear" else stored[index]
                tensors.append((f"{name.removesuffix('.weight')}.{part}", place))
    return tensors


def largest_piece(unit: Unit, serve: Serve) -> Piece:
    """A piece whose parts are as many and as large as any that ``serve`` can load, or larger."""
    params: dict[str, Param] = {
        "bits": MAX_BITS,
        "group_size": 1,
        "symmetric": serve == "transformers" or (serve == "vllm" and unit.kind == "bank"),
    }
    return {
        member: Member(FORMAT, shape, torch.float32, params, _nowhere(shape, params))
        for member, shape in unit.shapes.items()
    }


def _nowhere(shape: tuple[int, ...], params: Mapping[str, Param]) -> dict[str, Stored]:
    shapes = part_shapes(shape, torch.float32, params)
    return {
        part: Stored(Path(), 0, DTYPE_NAMES[dtype], extent)
        for part, (extent, dtype) in shapes.items()
    }


def quantization_config(
    model: StreamedModel, pieces: Mapping[str, Piece], serve: Serve
) -> dict[str, Any] | None:
    """What ``config.json`` says of the plan; None if nothing is compressed."""
    if not pieces:
        return None
    if serve == "moesaic":
        return {"quant_method": METHOD, "version": VERSION, "modules": _modules(model, pieces)}
    groups = _groups(model, pieces, serve)
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": _ignored(model, pieces, serve),
    }


def _modules(model: StreamedModel, pieces: Mapping[str, Piece]) -> dict[str, Any]:
    return {
        module_path(model, unit): {
            "kind": unit.kind,
            "members": {name: member.to_json() for name, member in pieces[unit.name].items()},
        }
        for unit in model.units()
        if unit.name in pieces
    }


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
    names = {model.family.head, *others, *linears}
    return [*sorted(names, key=natural_key), *(_target(model, unit, serve) for unit in banks)]


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that counts numbers between dots as numbers: layer 10 comes after layer 9."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]
