"""Summaries of runs that never happened."""

import math

from moesaic.methods.base import Chain, Event, Spec, Unit
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.summary import RunSummary
from moesaic.search.base import Budget, Measurement, Plan, Problem
from moesaic.search.knapsack import search

FIXED = 70_000


def rtn(bits: int) -> Chain:
    return (Spec.of("rtn", {"bits": bits, "group_size": 64}),)


def _linear(block: int, path: str, part: str, rows: int, columns: int) -> Unit:
    name = f"model.layers.{block}.{path}"
    return Unit(name, "linear", block, part, {"weight": (rows, columns)}, {"weight": name})


def _bank(block: int, experts: int, width: int, hidden: int) -> Unit:
    name = f"model.layers.{block}.mlp.experts"
    gate, down = (experts, width, hidden), (experts, hidden, width)
    sites = {"gate": f"{name}:in", "up": f"{name}:in", "down": f"{name}:mid"}
    return Unit(name, "bank", block, "experts", {"gate": gate, "up": gate, "down": down}, sites)


def units(blocks: int, experts: int, hidden: int = 64) -> list[Unit]:
    """A dense model with ``experts = 0``; else one of experts, the first block being dense."""
    found = []
    for block in range(blocks):
        for name, rows in {"q": hidden, "k": hidden // 4, "v": hidden // 4, "o": hidden}.items():
            found.append(_linear(block, f"self_attn.{name}_proj", "attention", rows, hidden))
        if experts and block:
            found.append(_bank(block, experts, hidden // 2, hidden))
            path, part = "mlp.shared_experts.", "shared_experts"
        else:
            path, part = "mlp.", "mlp"
        found.append(_linear(block, f"{path}gate_proj", part, 3 * hidden, hidden))
        found.append(_linear(block, f"{path}up_proj", part, 3 * hidden, hidden))
        found.append(_linear(block, f"{path}down_proj", part, hidden, 3 * hidden))
    return found


def measure(model: list[Unit], with_scores: bool) -> list[Measurement]:
    """Every choice at 2, 3, 4 and 8 bits and as it is."""
    found = []
    wanted = [(unit, choice) for unit in model for choice in choices(unit)]
    for position, (unit, choice) in enumerate(wanted):
        out, inputs = unit.shapes[choice.member][-2:]
        weights = out * inputs
        for bits in (2, 3, 4, 8):
            error = 4.0**-bits * (1 + 0.5 * math.sin(5 * position))
            score = error * (0.02 + 0.1 * math.cos(position) ** 2) if with_scores else None
            size = weights * bits // 8 + weights // 64 * 2
            found.append(Measurement(choice.name, rtn(bits), size, error, score, 0.01 * bits))
        score = 0.0 if with_scores else None
        found.append(Measurement(choice.name, (), 2 * weights, 0.0, score, 0.0))
    return found


def score(plan: Plan, model: list[Unit], quality: float) -> dict[str, object]:
    size = (plan.bytes - FIXED) * 8 / sum(unit.parameters for unit in model)
    values = {"perplexity": 12.5 * (1 + plan.loss * quality), "kl": plan.loss * quality}
    return {
        "bytes": plan.bytes + 123,
        "bits_per_weight": size,
        **values,
        "accuracy": 0.41,
        "tokens_per_second": 812.3,
        "peak_memory_bytes": 700_000_000,
        "sources": {"code": values, "prose": {key: 2 * value for key, value in values.items()}},
    }


def summary(blocks: int = 4, experts: int = 0, with_scores: bool = True) -> RunSummary:
    """A run at about 3.4 bits per weight, with events and loads if there are experts."""
    model = units(blocks, experts)
    measured = measure(model, with_scores)
    weights = sum(unit.parameters for unit in model)
    budget = Budget(FIXED + int(weights * 3.4 / 8), FIXED)
    offers: dict[str, list[Measurement]] = {}
    for measurement in measured:
        offers.setdefault(measurement.unit, []).append(measurement)
    problem = Problem(offers, [], budget)
    plan = search(problem)
    baselines = {
        "rtn": problem.plan(dict.fromkeys(offers, rtn(3))),
        "rtn 4 bits": problem.plan(dict.fromkeys(offers, rtn(4))),
        "rtn 2 bits": problem.plan(dict.fromkeys(offers, rtn(2))),
    }
    dense = {"bytes": FIXED + 2 * weights, "bits_per_weight": 16.0, "perplexity": 12.5, "kl": 0.0}
    scores = {"dense": dense}
    scores |= {name: score(found, model, 1.3) for name, found in baselines.items()}
    scores["plan"] = score(plan, model, 1.0)
    load = {
        block: [7] + [90 + (17 * (expert + 1) * (block + 3)) % 997 for expert in range(1, experts)]
        for block in range(1, blocks)
        if experts
    }
    events = [
        Event("few_tokens", f"expert {n} saw {n} tokens", model[0].name, float(n))
        for n in range(12 if experts else 0)
    ]
    events.append(Event("damping_grew", "damping 0.01 → 0.1 <not positive>", model[-1].name, 0.1))
    return RunSummary(
        name=f"test-{blocks}",
        model="Tiny-1M",
        created="2026-11-22 10:00",
        command="moesaic run recipes/test.yaml --output runs/test",
        machine="2 cores, 8 GiB memory, no GPU",
        serve="moesaic",
        recipe="name: test\nbudget:\n  bits_per_weight: 3.4\n",
        units=model,
        dense_unit_bytes={unit.name: 2 * unit.parameters for unit in model},
        dense_bytes=FIXED + 2 * weights,
        budget_bytes=budget.total_bytes,
        plan=plan,
        baselines=baselines,
        measurements=measured,
        scores=scores,
        expert_load=load,
        events=events,
        stage_seconds={"calibrate": 12.3, "measure": 75.0, "evaluate": 4000.0},
    )
