"""One chain for all units: what a person would do without a search, and the usual baseline."""

from moesaic.methods.base import Chain, chain_text
from moesaic.search.base import Infeasible, Plan, Problem


def search(problem: Problem) -> Plan:
    """The plan of least predicted loss among those with the same chain everywhere.

    Ties are kept by any such plan. Of equal losses the one with fewer bytes is taken, then the one
    measured first.

    Raises:
        Infeasible: every such plan is larger than the budget.
        ValueError: no chain was measured for every unit.

    Example::

        plan = search(Problem(choices, ties=[], budget=Budget(total, fixed)))
    """
    plans = [uniform_plan(problem, chain) for chain in shared(problem)]
    limit = problem.budget.total_bytes
    fitting = [plan for plan in plans if plan.bytes <= limit]
    if not fitting:
        smallest = min(plan.bytes for plan in plans)
        raise Infeasible(
            f"the smallest plan with one choice for all units has {smallest:,} bytes,"
            f" the budget is {limit:,} bytes"
        )
    return min(fitting, key=lambda plan: (plan.loss, plan.bytes))


def smallest_bytes(problem: Problem) -> int:
    """Bytes of the smallest plan with the same chain everywhere.

    Raises:
        ValueError: no chain was measured for every unit.
    """
    return min(uniform_plan(problem, chain).bytes for chain in shared(problem))


def uniform_plan(problem: Problem, chain: Chain) -> Plan:
    """The plan that gives every unit ``chain``, whatever the budget.

    Raises:
        ValueError: a unit was not measured with it.
    """
    return problem.plan(dict.fromkeys(problem.choices, chain))


def shared(problem: Problem) -> list[Chain]:
    """Chains that every unit was measured with, in the order of the first unit's."""
    measured = {unit: {m.chain for m in found} for unit, found in problem.choices.items()}
    chains = list(dict.fromkeys(m.chain for found in problem.choices.values() for m in found))
    shared = [chain for chain in chains if all(chain in known for known in measured.values())]
    if shared:
        return shared
    lacking = {
        chain: [unit for unit, known in measured.items() if chain not in known] for chain in chains
    }
    closest = min(chains, key=lambda chain: len(lacking[chain]))
    raise ValueError(
        f"no candidate was measured for all {len(measured)} units; {chain_text(closest)} is missing"
        f" for {len(lacking[closest])} of them, {lacking[closest][0]} first"
    )
