"""The recipe's baselines, judged as the trials of a study are: on the same calibration text."""

import math
from typing import TYPE_CHECKING

from moesaic.orchestrator.plan_losses import plan_losses

if TYPE_CHECKING:
    from moesaic.orchestrator.tune import TunedPipeline


def judged_baselines(pipeline: "TunedPipeline") -> dict[str, dict[str, float]]:
    """Name → ``bytes`` of the checkpoint and ``kl`` in nats per token, those of a finite KL.

    They are no trials: the sampler does not know them. What was judged is in the store, so that a
    study that goes on judges none again.
    """
    plans = pipeline.baseline_plans()
    if not plans:
        return {}
    units = {name: plan.units for name, plan in plans.items()}
    kl = plan_losses(pipeline.experiment, pipeline.pool, pipeline.view, "baselines", units)
    return {
        name: {"bytes": float(pipeline.file_bytes(plan)), "kl": kl[name]}
        for name, plan in plans.items()
        if math.isfinite(kl[name])
    }
