"""The recipe's baselines, judged as the trials of a study are: on the same calibration text."""

import math
from typing import TYPE_CHECKING

from moesaic.orchestrator.plan_losses import PlanRuns
from moesaic.orchestrator.study_terms import section

if TYPE_CHECKING:
    from moesaic.orchestrator.tune import TunedPipeline

_STAGE = "baselines"


def judged_baselines(pipeline: "TunedPipeline") -> dict[str, dict[str, float]]:
    """Name → ``bytes`` of the checkpoint, ``kl`` in nats per token and, where trials are timed,
    ``latency`` in milliseconds per token, of those that have a finite KL. Those that cannot be run
    or timed are told in a line each.

    They are no trials: the sampler does not know them. What was judged is in the store, so that a
    study that goes on judges none again. As many are timed at once as trials were.
    """
    plans = pipeline.baseline_plans()
    if not plans:
        return {}
    experiment, view = pipeline.experiment, pipeline.view
    runs = PlanRuns(experiment, pipeline.pool, view)
    units = {name: plan.units for name, plan in plans.items()}
    kl = runs.losses(
        _STAGE,
        units,
        failed=lambda name, reason: view.line(f"baseline {name} cannot be judged: {reason}"),
    )
    finite = {name: units[name] for name, loss in kl.items() if math.isfinite(loss)}
    for name in (name for name in kl if name not in finite):
        view.line(f"baseline {name} cannot be compared: its KL is {kl[name]}")
    latency: dict[str, float] = {}
    if section(experiment).timed:
        latency = runs.latencies(
            _STAGE,
            finite,
            pipeline.options.jobs,
            lambda name, reason: view.line(f"baseline {name} cannot be timed: {reason}"),
        )
    runs.release()
    found = {}
    for name in finite:
        size = pipeline.file_bytes(plans[name])
        found[name] = {"bytes": float(size), "kl": kl[name]}
        timed = ""
        if name in latency:
            found[name]["latency"] = latency[name]
            timed = f", {latency[name]:.4g} ms/token"
        view.line(f"baseline {name}: KL {kl[name]:.4g}, {size:,} bytes{timed}")
    return found
