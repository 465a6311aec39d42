"""One job's candidates as several jobs, for workers that would otherwise be idle.

A bank of experts takes as long as hundreds of linears, and a run on many workers ends with some
that are at their last banks while the others wait. Where the Hessians of its sites are too large to
keep what is derived from them, a bank's candidates have nothing in common but what they read: they
can be made by several workers, to the same entries, at the price of reading it again. Candidates
that begin with the same link, or differ in its rank, stay together: they share that result.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace

from moesaic.methods import gptq, low_rank
from moesaic.methods.base import Chain, Spec, Unit
from moesaic.methods.chains import but_for_rank, can_be_cut
from moesaic.orchestrator.measure import Job, Pairs
from moesaic.orchestrator.pool import Task

# Hessians up to this size are factorised once for all candidates.
_KEPT_BYTES = max(gptq.KEEP_BYTES, low_rank.KEEP_BYTES)


def dividable(
    task: Task,
    job: Job,
    units: list[Unit],
    make: Callable[[Job], Task],
    more: Callable[[], bool],
) -> Task:
    """The task of a job, with how it is divided; as it is where candidates share work.

    Args:
        units: of the job.
        make: the task of a part of the job.
        more: whether there are jobs still to come.
    """
    parts = len(_groups(job)) if _apart(job, units) else 1
    if parts == 1:
        return task

    def divide(count: int) -> list[Task]:
        return [make(part) for part in divided(job, count)]

    # How long it takes follows from those with as many candidates.
    kind = f"{task.kind}, {parts}"
    return replace(task, kind=kind, parts=parts, divide=divide, more=more)


def divided(job: Job, count: int) -> list[Job]:
    """The same work as at most ``count`` jobs, in order."""
    groups = _groups(job)
    count = min(count, len(groups))
    spans = [(k * len(groups) // count, (k + 1) * len(groups) // count) for k in range(count)]
    return [_only(job, set(groups[low:high])) for low, high in spans]


def _apart(job: Job, units: list[Unit]) -> bool:
    """Whether candidates have only in common what is read."""
    if job.reduction is not None or any(unit.kind != "bank" for unit in units):
        return False
    sites = {
        site: 4 * unit.shapes[member][0] * unit.shapes[member][-1] ** 2
        for unit in units
        for member, site in unit.sites.items()
    }
    return min(sites.values()) > _KEPT_BYTES


def _first_link(specs: object) -> Hashable:
    chain: Chain = tuple(Spec(*pair) for pair in specs[:1])  # type: ignore[index]
    return but_for_rank(chain) if can_be_cut(chain) else chain


def _groups(job: Job) -> list[Hashable]:
    """First links of the candidates, in order."""
    return list(dict.fromkeys(_first_link(s) for own in job.missing.values() for s, _ in own))


def _only(job: Job, groups: set[Hashable]) -> Job:
    def chosen(pairs: Pairs) -> Pairs:
        found = {
            name: [(specs, key) for specs, key in own if _first_link(specs) in groups]
            for name, own in pairs.items()
        }
        return {name: own for name, own in found.items() if own}

    missing = chosen(job.missing)
    return replace(job, missing=missing, stages=chosen(job.stages), units=tuple(missing))
