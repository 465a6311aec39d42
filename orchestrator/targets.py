"""What each engine can load: which units must share a choice, and which choices it understands.

``moesaic``       our own format and loader: everything, unit by unit.
``transformers``  compressed-tensors files through transformers' own quantizer. Measured with 5.23:
                  linears load right with 2 to 8 bits, per channel and in groups, each with a scheme
                  of its own. Zero points never load (the skeleton expects them unpacked). All
                  experts of the model are read with one scheme; a second one loads without an
                  error and with wrong weights.
``vllm``          compressed-tensors files. q, k, v and gate, up become one layer and need one
                  scheme; so do all members of an expert bank. Experts run on Marlin: 4 and 8 bits,
                  symmetric. Zero points of linears exist in 4 and 8 bits. Groups of 32, 64, 128 or
                  whole rows.

Neither of the last two can express packed experts for families that keep all experts of a block in
one tensor on disk (granitemoe, gpt_oss): there the engines look for that tensor.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from moesaic.kernels.tensor import Param
from moesaic.methods.base import Chain, Unit
from moesaic.methods.reduction import Outline
from moesaic.orchestrator.family import Family

Serve = Literal["vllm", "transformers", "moesaic"]
SERVES: tuple[Serve, ...] = get_args(Serve)
FORMAT = "int_group"
VLLM_EXPERT_BITS = (4, 8)
VLLM_ZERO_POINT_BITS = (4, 8)
VLLM_GROUP_SIZES = (-1, 32, 64, 128)

Scheme = Mapping[str, Param]


def ties(units: Sequence[Unit], serve: Serve) -> list[list[str]]:
    """Names of units that must share one chain, in model order; units on their own are left out."""
    groups: dict[Any, list[str]] = {}
    for unit in units:
        if serve == "vllm" and unit.fused:
            groups.setdefault((unit.block, unit.fused), []).append(unit.name)
        elif serve == "transformers" and unit.kind == "bank":
            groups.setdefault("banks", []).append(unit.name)
    return [names for names in groups.values() if len(names) > 1]


def allowed(unit: Unit, chain: Chain, serve: Serve, family: Family) -> str | None:
    """Why ``serve`` cannot load the unit compressed by ``chain``, in one line; None if it can.

    The empty chain is always loadable. What ties demand is not looked at.
    """
    if serve == "moesaic" or not chain:
        return None
    if len(chain) > 1:
        return f"serve: {serve} loads one quantizer per unit, not a chain of {len(chain)} methods"
    options = json.loads(chain[0].options)
    missing = {"bits", "group_size", "symmetric"} - options.keys()
    if missing:
        return f"serve: {serve} loads integer quantizers only, not {chain[0].method}"
    return scheme_problem(unit, options, serve, family)


def reduction_problem(unit: Unit, left: Outline, serve: Serve, family: Family) -> str | None:
    """Why ``serve`` cannot load a bank reduced to this; None if it can.

    What all banks together must agree in is not looked at.
    """
    if serve == "moesaic":
        return None
    if not left.ordinary:
        return (
            f"serve: {serve} loads a router row per expert only: prune, or merge with"
            " router: mean, or serve: moesaic"
        )
    if left.width != unit.shapes["gate"][1] and not (family.router and family.router.width):
        return f"serve: {serve} cannot load narrower experts of {family.model_type}"
    return None


def part_problem(kind: str, biased: bool, serve: Serve, family: Family) -> str | None:
    """Why ``serve`` cannot load a narrower MLP or attention; None if it can.

    What all blocks together must agree in is not looked at.

    Args:
        biased: whether any of its linears has a bias.
    """
    if serve == "moesaic":
        return None
    if kind != "mlp":
        return f"serve: {serve} cannot load narrower heads: serve: moesaic"
    if not family.mlp_width or family.experts is not None:
        return f"serve: {serve} cannot load narrower MLPs of {family.model_type}: serve: moesaic"
    if biased:
        return f"serve: {serve} cannot load narrower MLPs with biases: serve: moesaic"
    return None


def can_be_packed(unit: Unit, serve: Serve, family: Family) -> bool:
    """Whether ``serve`` has a place in its files for the unit's parts."""
    in_one_tensor = unit.kind == "bank" and family.experts is not None and family.experts.fused
    return serve == "moesaic" or not in_one_tensor


def scheme_problem(unit: Unit, scheme: Scheme, serve: Serve, family: Family) -> str | None:
    """Why ``serve`` cannot load the unit in integers of this scheme; None if it can.

    Args:
        scheme: ``bits``, ``group_size`` (-1: whole rows) and ``symmetric``, as ``int_group`` has.
    """
    if serve == "moesaic":
        return None
    if not can_be_packed(unit, serve, family):
        return (
            f"serve: {serve} cannot load compressed experts of {family.model_type}: its files "
            "hold all experts of a block in one tensor"
        )
    bits, symmetric = int(scheme["bits"]), bool(scheme["symmetric"])
    if serve == "transformers":
        return None if symmetric else "serve: transformers cannot load zero points: symmetric only"
    return _vllm_problem(unit.kind, bits, int(scheme["group_size"]), symmetric)


def _vllm_problem(kind: str, bits: int, group_size: int, symmetric: bool) -> str | None:
    if group_size not in VLLM_GROUP_SIZES:
        return f"serve: vllm loads group sizes {VLLM_GROUP_SIZES}, not {group_size}"
    if kind == "bank" and not symmetric:
        return "serve: vllm loads experts without zero points only: symmetric"
    if kind == "bank" and bits not in VLLM_EXPERT_BITS:
        return f"serve: vllm loads experts of {VLLM_EXPERT_BITS} bits, not {bits}"
    if not symmetric and bits not in VLLM_ZERO_POINT_BITS:
        return f"serve: vllm loads zero points with {VLLM_ZERO_POINT_BITS} bits, not {bits}"
    return None


def plan_problem(
    units: Sequence[Unit],
    schemes: Mapping[str, Mapping[str, Scheme] | None],
    serve: Serve,
    family: Family,
) -> str | None:
    """Why ``serve`` cannot load a whole plan, in one line; None if it can.

    Args:
        schemes: unit → member → scheme, None for a unit that is left dense.
    """
    if serve == "moesaic":
        return None
    known: dict[str, Scheme | None] = {}
    for unit in units:
        members = schemes[unit.name]
        distinct = {json.dumps(dict(s), sort_keys=True) for s in (members or {}).values()}
        if len(distinct) > 1:
            return f"{unit.name}: serve: {serve} needs one scheme for all members of a bank"
        known[unit.name] = json.loads(distinct.pop()) if distinct else None
        scheme = known[unit.name]
        reason = scheme_problem(unit, scheme, serve, family) if scheme else None
        if reason:
            return f"{unit.name}: {reason}"
    for names in ties(units, serve):
        other = next((name for name in names if known[name] != known[names[0]]), None)
        if other:
            return f"{names[0]} and {other}: serve: {serve} needs one scheme for both"
    return None
