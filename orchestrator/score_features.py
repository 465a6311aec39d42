"""Features of scores: few numbers per choice and candidate, from what lies in the store.

What :mod:`moesaic.search.features` says of each is computed here, by workers, in float64: from a
finished piece and the statistics of its inputs (an entry ``features`` per unit and chain), and from
a pass of the calibration text through the dense model that counts what routers do. Only what a
score asks for is computed, once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesaic.methods.base import Unit
from moesaic.orchestrator.expert_statistics import ExpertStatistics, Tokens
from moesaic.orchestrator.experts import observing
from moesaic.orchestrator.pieces import read_piece
from moesaic.orchestrator.shared import fetched, open_store
from moesaic.orchestrator.statistics import (
    SEPARATOR,
    StatisticsObserver,
    load_stats,
)
from moesaic.orchestrator.store import code_digest, digest
from moesaic.orchestrator.walk import Walk, block_units, opened, token_ids
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes

# Features of a pair that a finished piece and statistics give; the last ones need gradients.
OF_WEIGHTS = ("weight_norm", "outlier")
OF_ERRORS = ("weight_error", "diagonal_error", "output_error", "output_norm", "trace")
OF_GRADIENTS = ("fisher_error", "gradient_norm")


@dataclass(frozen=True)
class FeatureJob:
    """A unit and the pieces of it whose features lack; plain data for workers.

    Attributes:
        pairs: (key of the piece, key of its features).
        stats: file of the block's statistics.
        gradients: file of what its reverse pass left; None where there was none.
        samples: what sums of gradients are means over.
    """

    model: str
    dtype: str
    trust_remote_code: bool
    unit: str
    pairs: Sequence[tuple[str, str]]
    stats: str
    gradients: str | None
    samples: int
    store: str


def features_key(piece: str, gradients: str) -> str:
    """Names the features of a piece; ``gradients`` is the key of those, empty without any."""
    return digest(["features", piece, gradients, code_digest("orchestrator/score_features.py")])


def gates_key(walk: Walk, shard: int) -> str:
    """Names what routers did on a shard."""
    code = code_digest("orchestrator/score_features.py")
    return digest(["gates", walk.key, list(walk.shard_rows(shard)), code])


@torch.no_grad()
def unit_features(state: WorkerState, job: dict[str, Any]) -> dict[str, Any]:
    """Writes the entries ``features`` that a job lacks: ``feature|member``, float64 ``[*batch]``.

    Returns:
        ``peak_bytes``.
    """
    plan = FeatureJob(**job)
    store = open_store(plan.store)
    model = state.model(plan.model, plan.dtype, plan.trust_remote_code)
    unit = next(unit for unit in model.units() if unit.name == plan.unit)
    weights = {m: w.to(state.device) for m, w in model.read_unit(unit).items()}
    moments = _moments(unit, Path(plan.stats), state.device)
    slopes = _slopes(unit, plan, state.device)
    known = {m: weight_features(weight) for m, weight in weights.items()}
    for piece, key in plan.pairs:
        members = read_piece(store.path("pieces", piece))
        tensors: dict[str, Tensor] = {}
        for member, weight in weights.items():
            other = members[member].to(state.device).effective()
            found = dict(known[member])
            found |= error_features(weight, other, moments[member], slopes.get(member))
            found |= _output_features(store.path("errors", piece), member)
            for name, value in found.items():
                tensors[f"{name}{SEPARATOR}{member}"] = value.double().cpu().contiguous()
        store.put("features", key, lambda path, own=tensors: save_file(own, path))  # type: ignore[misc]
    return {"peak_bytes": peak_memory_bytes()}


def _moments(unit: Unit, stats: Path, device: str) -> dict[str, Tensor]:
    """Member → E[x_j²] ``[*batch, in]``; 0 where no token came."""
    sites = load_stats(stats, set(unit.sites.values()).__contains__)
    found = {}
    for member, site in unit.sites.items():
        tokens = sites[site]["tokens"].double().clamp_min(1)
        squares = sites[site]["hessian"].diagonal(dim1=-2, dim2=-1).double()
        found[member] = (squares / tokens[..., None]).to(device)
    return found


def _slopes(unit: Unit, plan: FeatureJob, device: str) -> dict[str, Tensor]:
    """Member → E[g_i²] ``[*batch, out]``; for an expert over all tokens."""
    if plan.gradients is None:
        return {}
    names = {f"{unit.name}{SEPARATOR}{member}": member for member in unit.shapes}
    found = load_stats(Path(plan.gradients), names.__contains__)
    return {
        member: (found[name]["grad_sq"].double() / plan.samples).to(device)
        for name, member in names.items()
    }


def weight_features(weight: Tensor) -> dict[str, Tensor]:
    """``weight_norm`` and ``outlier`` of ``weight [*batch, out, in]``, float64 ``[*batch]``."""
    norms, outliers = [], []
    for one in _each(weight):
        size = one.double().abs()
        mean = size.mean(0)  # of each column
        ratio = torch.where(mean > 0, size.amax(0) / mean.clamp_min(1e-300), 0.0)
        norms.append(size.square().sum())
        outliers.append(ratio.amax())
    return {name: _joined(v, weight) for name, v in zip(OF_WEIGHTS, (norms, outliers), strict=True)}


def error_features(
    weight: Tensor, other: Tensor, moments: Tensor, slopes: Tensor | None
) -> dict[str, Tensor]:
    """What ΔW is, weighed by inputs and by gradients.

    Args:
        weight, other: dense and compressed, ``[*batch, out, in]``.
        moments: E[x_j²] ``[*batch, in]``.
        slopes: E[g_i²] ``[*batch, out]``, or None.

    Returns:
        ``weight_error``, ``diagonal_error``, ``trace``; with slopes ``fisher_error`` and
        ``gradient_norm``. Float64 ``[*batch]`` each.
    """
    plain, diagonal, fisher = [], [], []
    inputs = moments.reshape(-1, moments.shape[-1])
    outputs = None if slopes is None else slopes.reshape(-1, slopes.shape[-1])
    for index, (one, changed) in enumerate(zip(_each(weight), _each(other), strict=True)):
        squares = (one.double() - changed.double()).square()
        rows = squares @ inputs[index]  # [out]
        plain.append(squares.sum())
        diagonal.append(rows.sum())
        if outputs is not None:
            fisher.append(0.5 * (outputs[index] * rows).sum())
    found = {
        "weight_error": _joined(plain, weight),
        "diagonal_error": _joined(diagonal, weight),
        "trace": moments.sum(-1),
    }
    if slopes is not None:
        found |= {"fisher_error": _joined(fisher, weight), "gradient_norm": slopes.sum(-1)}
    return found


def _each(weight: Tensor) -> Sequence[Tensor]:
    """The matrices of a batch, one by one: what is made of each in float64 is no larger."""
    return weight.reshape(-1, *weight.shape[-2:]).unbind(0)


def _joined(values: Sequence[Tensor], weight: Tensor) -> Tensor:
    return torch.stack(list(values)).view(weight.shape[:-2])


def _output_features(errors: Path, member: str) -> dict[str, Tensor]:
    """``output_error`` and ``output_norm``, means over the tokens that a member saw."""
    with safe_open(fetched(errors), framework="pt") as file:
        tokens = file.get_tensor(f"tokens{SEPARATOR}{member}").double().clamp_min(1)
        sums = {
            f"output_{name}": file.get_tensor(f"{name}{SEPARATOR}{member}").double().sum(-1)
            for name in ("error", "norm")
        }
    return {name: value / tokens for name, value in sums.items()}


@torch.no_grad()
def gates(state: WorkerState, walk: dict[str, Any], shards: Sequence[int]) -> dict[str, Any]:
    """What the dense model's routers do on shards of the calibration text, into the store.

    Every block is read once for all shards given, whose hidden states stay in memory.

    Returns:
        ``found``: shard → block → ``tokens`` routed to each expert and sums of their ``gates``;
        ``peak_bytes``.
    """
    plan = Walk(**walk)
    model = opened(state, plan)
    hidden: dict[int, list[Tensor]] = {}
    found: dict[int, dict[str, dict[str, list[float]]]] = {shard: {} for shard in shards}
    for shard in shards:
        parts = token_ids(plan, shard).split(plan.batch)
        hidden[shard] = [model.embed(part.to(model.device)).cpu() for part in parts]
    for index in range(model.blocks):
        module = model.load_block(index)
        units = block_units(model, index)
        bank = next((unit for unit in units if unit.kind == "bank"), None)
        for shard, states in hidden.items():
            layer = None
            if bank is not None:
                kinds = torch.zeros(sum(x[..., 0].numel() for x in states), dtype=torch.int64)
                nothing = Tokens(sources=kinds, kinds=1, sampled=(), rows=(), total=0)
                layer = ExpertStatistics(bank, {"gates"}, nothing, model.device)
            observer = StatisticsObserver(units, (), model.device)
            with observing(model, index, module, observer, layer=layer):
                moved = (x.to(model.device) for x in states)
                hidden[shard] = [model.run_block(index, module, x).cpu() for x in moved]
            if layer is not None:
                sums = layer.finish()
                found[shard][str(index)] = {
                    "tokens": sums["load"].sum(0).double().tolist(),
                    "gates": sums["gates"].double().tolist(),
                }
    store = open_store(plan.store)
    for shard, own in found.items():
        store.put_json("scores", gates_key(plan, shard), own)
    return {"found": found, "peak_bytes": peak_memory_bytes()}


def read_features(path: Path) -> dict[str, dict[str, Tensor]]:
    """Feature → member → ``[*batch]``, from an entry."""
    found: dict[str, dict[str, Tensor]] = {}
    with safe_open(fetched(path), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            name, _, member = key.partition(SEPARATOR)
            found.setdefault(name, {})[member] = file.get_tensor(key)
    return found


def summed(parts: Sequence[Mapping[str, Mapping[str, Sequence[float]]]]) -> dict[int, Any]:
    """Block → sums of :func:`gates` over shards, in their order."""
    total: dict[int, dict[str, Tensor]] = {}
    for part in parts:
        for block, sums in part.items():
            own = total.setdefault(int(block), {})
            for name, values in sums.items():
                value = torch.tensor(values, dtype=torch.float64)
                own[name] = own[name] + value if name in own else value
    return total
