"""What can be told before anything starts: what a model consists of, what a recipe will take.

Everything that a recipe may do wrong was found when its :class:`Experiment` was made. Here bytes
are exact (the headers of files are bounded from above), memory is predicted from shapes, and time
is estimated from speeds measured on this machine.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from moesaic.methods.base import Chain, Event, Unit, chain_text
from moesaic.orchestrator import memory, stage_times
from moesaic.orchestrator.bench import bench_source, read_bench
from moesaic.orchestrator.block_sizes import experts_per_token
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.machine import Crew, crew
from moesaic.orchestrator.memory import Sizes
from moesaic.orchestrator.model_folder import find_model
from moesaic.orchestrator.recipe_sections import CacheSection
from moesaic.orchestrator.recipe_values import resolve
from moesaic.orchestrator.remote_model import open_checkpoint
from moesaic.orchestrator.results import expert_load
from moesaic.orchestrator.stages import missing_pairs
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.texts import beyond_vocabulary

_SHOWN_EVENTS = 8


def inspect_model(model: str) -> dict[str, Any]:
    """What a model consists of, from its headers alone.

    Args:
        model: a folder, a name on the hub, or ``builtin:demo``.

    Returns:
        plain data: ``bytes`` and ``parameters`` of all tensors and of the ``fixed`` ones, ``parts``
        (part → units, parameters, bytes), ``experts`` (per layer, per token, layers) or None.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    try:
        folder = find_model(resolve(model, Path.cwd()), CacheSection().place)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    streamed = StreamedModel(open_checkpoint(folder))
    checkpoint, units = streamed.checkpoint, streamed.units()
    fixed = streamed.fixed_names()
    parts: dict[str, dict[str, int]] = {}
    for unit in units:
        part = parts.setdefault(unit.part, {"units": 0, "parameters": 0, "bytes": 0})
        names = {n for group in streamed.unit_tensors(unit).values() for n in group}
        part["units"] += 1
        part["parameters"] += unit.parameters
        part["bytes"] += sum(checkpoint.nbytes(name) for name in names)
    banks = [unit for unit in units if unit.kind == "bank"]
    return {
        "model": str(folder),
        "model_type": streamed.family.model_type,
        "blocks": streamed.blocks,
        "hidden_size": streamed.hidden_size,
        "vocabulary": streamed.vocab_size,
        "dtype": str(streamed.dtype).removeprefix("torch."),
        "files": len(checkpoint.files),
        "bytes": checkpoint.total_bytes,
        "parameters": _parameters(checkpoint, checkpoint.names()),
        "parts": parts,
        "fixed": {
            "tensors": len(fixed),
            "parameters": _parameters(checkpoint, fixed),
            "bytes": sum(checkpoint.nbytes(name) for name in fixed),
        },
        "experts": _experts(banks, streamed.config) if banks else None,
    }


def _parameters(checkpoint: Checkpoint, names: list[str]) -> int:
    return sum(math.prod(checkpoint.shape(name)) for name in names)


def _experts(banks: list[Unit], config: object) -> dict[str, Any]:
    return {
        "per_layer": max(bank.shapes["gate"][0] for bank in banks),
        "per_token": experts_per_token(config),
        "layers": len(banks),
    }


def show_model(result: Mapping[str, Any], console: Console) -> None:
    """Prints what :func:`inspect_model` found."""
    console.print(
        f"{result['model']}: {result['model_type']}, {result['blocks']} blocks,"
        f" hidden size {result['hidden_size']:,}, vocabulary {result['vocabulary']:,},"
        f" {result['dtype']}",
        markup=False,
    )
    experts = result["experts"]
    if experts:
        console.print(
            f"{experts['per_layer']} experts in each of {experts['layers']} layers,"
            f" {experts['per_token'] or 'all'} per token",
            markup=False,
        )
    table = new_table("", "units", "parameters", "bytes", "share")
    rows = {
        **result["parts"],
        "fixed": {**result["fixed"], "units": result["fixed"]["tensors"]},
        "total": {"units": "", "parameters": result["parameters"], "bytes": result["bytes"]},
    }
    for name, row in rows.items():
        count = f"{row['units']} tensors" if name == "fixed" else str(row["units"])
        share = f"{row['bytes'] / result['bytes']:.1%}"
        table.add_row(name, count, f"{row['parameters']:,}", f"{row['bytes']:,}", share)
    console.print(table)


def forecast(experiment: Experiment, bench: Path | None = None) -> dict[str, Any]:
    """What a run of the recipe will take, as plain data; see the keys below.

    ``bytes`` of plans, ``work`` to do and how much of it is done, ``store`` and ``memory`` in
    bytes, ``time`` in seconds for what is left, ``experts``, ``events``, ``unloadable`` (reason →
    number of units and candidates).

    Args:
        bench: file of unit costs; by default they are measured now.
    """
    team = crew(experiment.recipe.compute, experiment.workers_per_gpu)
    sizes = Sizes(experiment, team)
    left = _left(experiment)
    stages = memory.predict_memory(sizes)
    store = memory.predict_store(sizes)
    source = None if bench is None else bench_source(bench, team.device)
    overheads = stage_times.OVERHEADS if bench is None else read_bench(bench)["host"]["overheads"]
    seconds = stage_times.predict_seconds(experiment, team, left, source, overheads)
    told = (
        stage_times.METHOD if bench is None else f"operations counted, over the speeds of {bench}"
    )
    peak = max(parts["total"] for parts in stages.values())
    _, events = expert_load(experiment, experiment.walk)
    events += _expected_events(experiment, left.blocks)
    events += _larger_than_dense(experiment)
    events += _tokenizer_events(experiment)
    events += _slicing_events(experiment)
    events += parted_events(sizes)
    events += _machine_events(experiment, team, peak, sum(store.values()))
    return {
        "recipe": experiment.recipe.name,
        "model": str(experiment.folder),
        "model_type": experiment.model.family.model_type,
        "bytes": _bytes(experiment),
        "work": _work(experiment, left),
        "store": {
            "path": experiment.store.where,
            **store,
            "total": sum(store.values()),
            "free": experiment.store.free_bytes,
        },
        "memory": {
            "stages": stages,
            "peak": peak,
            "workers": team.workers,
            "available": psutil.virtual_memory().available,
            "method": memory.METHOD,
        },
        "time": {**seconds, "crew": asdict(team), "method": told},
        "experts": _expert_tokens(experiment),
        "events": [asdict(event) for event in events],
        "unloadable": dict(experiment.space.unloadable),
    }


def _left(experiment: Experiment) -> stage_times.Left:
    """What the store lacks; entries are checked as a resuming run checks them."""
    walk, store = experiment.walk, experiment.store
    blocks = range(experiment.model.blocks)
    missing = missing_pairs(experiment, walk, experiment.offers)
    return stage_times.Left(
        blocks=[b for b in blocks if store.get("stats", walk.stats_key(b)) is None],
        gradients=sum(
            store.get("gradients", walk.gradients_key(b)) is None
            for b in (blocks if walk.gradients else ())
        ),
        pairs={unit: [chain for chain, _ in pairs] for unit, pairs in missing.items()},
    )


def _bytes(experiment: Experiment) -> dict[str, Any]:
    size = experiment.sizes.size

    def entry(total: int) -> dict[str, float]:
        bits = (total - size.fixed_bytes) * 8 / size.weights
        return {"bytes": total, "bits_per_weight": bits}

    def uniform(chain: Chain) -> int:
        return size.fixed_bytes + sum(
            experiment.sizes.predicted_bytes(u, chain) for u in experiment.units
        )

    dense = sum(experiment.sizes.dense_bytes(unit) for unit in experiment.units)
    limits = {name: entry(budget.total_bytes) for name, budget in experiment.budgets.items()}
    several = experiment.recipe.budget.several
    return {
        "fixed": size.fixed_bytes,
        "weights": size.weights,
        "dense": {"bytes": size.dense_bytes, "bits_per_weight": dense * 8 / size.weights},
        **({"budgets": limits} if several else {"budget": next(iter(limits.values()))}),
        "smallest": entry(size.smallest_bytes),
        "baselines": {
            name: {"choice": chain_text(chain), **entry(uniform(chain))}
            for name, chain in experiment.recipe.baselines.items()
        },
    }


def _work(experiment: Experiment, left: stage_times.Left) -> dict[str, int]:
    section, blocks = experiment.recipe.calibration, experiment.model.blocks
    pairs = sum(len(chains) for chains in experiment.offers.values())
    return {
        "units": len(experiment.units),
        "candidates": len(experiment.recipe.candidates),
        "pairs": pairs,
        "pairs_finished": pairs - sum(len(chains) for chains in left.pairs.values()),
        "blocks": blocks,
        "blocks_finished": blocks - len(left.blocks),
        "gradients": blocks if experiment.walk.gradients else 0,
        "gradients_finished": (blocks - left.gradients) if experiment.walk.gradients else 0,
        "calibration_tokens": section.sequences * section.length,
        "gradient_tokens": experiment.gradient_tokens(),
        "evaluation_tokens": experiment.recipe.evaluation.sequences
        * experiment.recipe.evaluation.length,
    }


def _expert_tokens(experiment: Experiment) -> dict[str, Any] | None:
    """Tokens that an expert sees in calibration if routing is even."""
    banks = [unit for unit in experiment.model.units() if unit.kind == "bank"]
    if not banks:
        return None
    found = _experts(banks, experiment.model.config)
    section = experiment.recipe.calibration
    share = (found["per_token"] or found["per_layer"]) / found["per_layer"]
    if section.experts == "all":
        share = 1.0
    return {**found, "expected_tokens": section.sequences * section.length * share}


def _expected_events(experiment: Experiment, blocks: list[int]) -> Iterator[Event]:
    """Experts that cannot see as many tokens as they have inputs, where none were counted yet."""
    found = _expert_tokens(experiment)
    banks = [u for u in experiment.units if u.kind == "bank" and u.block in blocks]
    if found is None:
        return
    expected, length = found["expected_tokens"], experiment.recipe.calibration.length
    widths = {(m, u.shapes[m][-1]): u for u in banks for m in ("gate", "down")}
    for (member, width), unit in widths.items():
        if expected < width:
            sequences = experiment.recipe.calibration.sequences * width / expected
            yield Event(
                "few_tokens",
                f"{expected:,.0f} tokens per expert are to be expected, fewer than the {width:,}"
                f" inputs of {member}_proj: calibration.sequences: {math.ceil(sequences):,} or more"
                f" of {length:,} tokens would do, or experts: all",
                unit.name,
                expected,
            )


def _larger_than_dense(experiment: Experiment) -> Iterator[Event]:
    """What is offered and takes more bytes than what it is to compress."""
    for unit in experiment.units:
        dense = experiment.sizes.dense_bytes(unit)
        for chain in experiment.offers[unit.name]:
            size = experiment.sizes.predicted_bytes(unit, chain)
            if size > dense:
                text = f"{chain_text(chain)} takes {size:,} bytes, the dense weights take {dense:,}"
                yield Event("larger_than_dense", text, unit.name, size / dense)


def _tokenizer_events(experiment: Experiment) -> Iterator[Event]:
    """Tokens that the model lacks, where they only come out of texts that spell them out."""
    size = experiment.model.vocab_size
    extra = beyond_vocabulary(experiment.tokenizer, size)
    if extra:
        yield Event(
            "tokenizer_larger",
            f"{len(extra)} added token(s) of the tokenizer are beyond the model's vocabulary of"
            f" {size:,}: no text may contain {', '.join(map(repr, list(extra)[:3]))}",
            value=float(len(extra)),
        )


def _slicing_events(experiment: Experiment) -> Iterator[Event]:
    """The width that slicing leaves, where that has still to be done."""
    cut, store = experiment.cut, experiment.store
    if cut is None:
        return
    missing = sum(store.get("sliced", cut.part_key(part)) is None for part in range(cut.parts))
    if missing:
        before, after = experiment.original.checkpoint, experiment.model.checkpoint
        yield Event(
            "slice_first",
            f"hidden size {experiment.original.hidden_size} → {cut.width}, {before.file_bytes:,} →"
            f" {after.file_bytes:,} bytes, comes first; how long it takes is not predicted",
            value=float(cut.width),
        )


def parted_events(sizes: Sizes) -> Iterator[Event]:
    """Blocks that do not fit a worker's device at once, and those that do not fit in parts."""
    for block, text, possible in memory.parted_blocks(sizes):
        kind = "walked_in_parts" if possible else "block_too_large"
        yield Event(kind, f"block {block} {text}" if possible else f"block {block}: {text}")


def _machine_events(
    experiment: Experiment, team: Crew, peak: int, store_bytes: int
) -> Iterator[Event]:
    """What this machine does not have."""
    if team.cluster:
        yield Event(
            "cluster_unknown",
            f"memory and time are for this machine, not for the cluster at {team.cluster}",
        )
        return
    busy, cores = psutil.getloadavg()[0], psutil.cpu_count() or 1
    if busy > cores / 2:
        yield Event(
            "machine_busy",
            f"other processes keep {busy:.1f} of {cores} cores busy: all takes longer",
            value=busy,
        )
    available = psutil.virtual_memory().available
    if peak * team.workers > available:
        yield Event(
            "memory_short",
            f"{team.workers} worker(s) of up to {size_text(peak)} need more than the"
            f" {size_text(available)} that are available",
            value=peak * team.workers,
        )
    free = experiment.store.free_bytes
    if free is not None and store_bytes > free:
        yield Event(
            "disk_short",
            f"{experiment.store.where} has {size_text(free)} free, the store may take"
            f" {size_text(store_bytes)}",
            value=store_bytes,
        )


def size_text(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit in ("B", "kB") else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def new_table(*columns: str) -> Table:
    table = Table(title=None)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table


def show_forecast(result: Mapping[str, Any], console: Console) -> None:
    """Prints what :func:`forecast` found."""
    work = result["work"]
    console.print(
        f"{result['recipe']}: {result['model']} ({result['model_type']}), {work['blocks']} blocks,"
        f" {work['units']} units, {work['candidates']} candidates",
        markup=False,
    )
    console.print(_bytes_table(result["bytes"]))
    console.print(_stage_table(result))
    store, team = result["store"], result["time"]["crew"]
    console.print(
        f"store   {store['path']}: {size_text(store['total'])} in the end"
        f" (pieces {size_text(store['pieces'])}, statistics {size_text(store['stats'])},"
        f" unfinished work {size_text(store['scratch'])})"
        + ("" if store["free"] is None else f", {size_text(store['free'])} free"),
        markup=False,
    )
    console.print(
        f"memory  {result['memory']['method']}\ntime    {team['workers']} worker(s) of"
        f" {team['cpus']} CPU on {team['device']}; {result['time']['method']}",
        markup=False,
        style="dim",
    )
    _show_warnings(result, console)


def _bytes_table(sizes: Mapping[str, Any]) -> Table:
    table = new_table("", "bytes", "bits/weight")
    rows = {
        "dense": sizes["dense"],
        **{f"baseline {name}": entry for name, entry in sizes["baselines"].items()},
        **{f"budget {name}": entry for name, entry in sizes.get("budgets", {}).items()},
        **({"budget": sizes["budget"]} if "budget" in sizes else {}),
        "smallest plan": sizes["smallest"],
    }
    for name, entry in rows.items():
        style = "bold" if name.startswith("budget") else None
        bits = f"{entry['bits_per_weight']:.3f}"
        table.add_row(name, f"{entry['bytes']:,}", bits, style=style)
    table.add_row("of which not compressed", f"{sizes['fixed']:,}", "")
    return table


def _stage_table(result: Mapping[str, Any]) -> Table:
    """Stages: steps, how many are finished, seconds, largest process."""
    work, stages = result["work"], result["memory"]["stages"]
    steps = {
        "calibrate": f"{work['blocks_finished']} of {work['blocks']} blocks",
        "gradients": f"{work['gradients_finished']} of {work['gradients']} blocks",
        "measure": f"{work['pairs_finished']} of {work['pairs']} pairs",
    }
    table = new_table("stage", "finished before", "time left", "largest process")
    times = {name: v for name, v in result["time"].items() if isinstance(v, float)}
    total = times.pop("total")
    # How long a study takes is up to whoever starts it.
    for name in dict.fromkeys([*times, *stages]):
        size = size_text(stages[name]["total"]) if name in stages else ""
        left = duration(times[name]) if name in times else ""
        table.add_row(name, steps.get(name, ""), left, size)
    table.add_row("total", "", duration(total), size_text(result["memory"]["peak"]))
    return table


def _show_warnings(result: Mapping[str, Any], console: Console) -> None:
    experts = result["experts"]
    if experts:
        console.print(
            f"experts {experts['per_layer']} per layer, {experts['per_token'] or 'all'} per token:"
            f" about {experts['expected_tokens']:,.0f} calibration tokens each",
            markup=False,
        )
    for reason, count in result["unloadable"].items():
        console.print(f"not offered {count} times: {reason}", markup=False)
    events = result["events"]
    for event in events[:_SHOWN_EVENTS]:
        place = f"{event['unit']}: " if event["unit"] else ""
        console.print(f"event {event['kind']}: {place}{event['message']}", markup=False)
    if len(events) > _SHOWN_EVENTS:
        console.print(f"… and {len(events) - _SHOWN_EVENTS} more events (--json lists all)")
