"""Strategies that share out how much each layer loses, where banks or parts may be reduced first.

To such a strategy (one that says ``SHARES_OUT``) a bank is one layer. All its choices take one
chain, prefix included, as do the choices of banks that are tied, and the strategy sees what each
such chain leaves of the bank's bytes and what it is predicted to cost, the reduction's own loss
included; where it asks for an output error, that loss stands for its square. Nothing else decides:
the plan is the strategy's own.

Where all banks must have one form, forms are tried one by one; the plan of least loss is taken.
"""

import math
from collections.abc import Iterator, Mapping

from moesaic.methods.base import Chain
from moesaic.search import base
from moesaic.search.base import Alternative, Infeasible, Layer, Measurement, Plan, Problem

# Bank → prefix and chain → the alternative that it belongs to.
Whole = Mapping[str, Mapping[Chain, Alternative]]


def solve(problem: Problem, strategy: str) -> Plan:
    """A strategy's plan.

    Raises:
        Infeasible: no plan fits; names the smallest in bytes.
        ValueError: some bank has no chain for all of its choices.
    """
    plans: list[Plan] = []
    refusal: Infeasible | None = None
    for joined, whole in _joined(problem):
        try:
            found = base.search_module(strategy).search(joined)
            plans.append(problem.plan(_apart(whole, found)))
        except Infeasible as error:
            refusal = error
    if not plans and refusal is not None:
        raise refusal
    return min(plans, key=lambda plan: (plan.loss, plan.bytes))


def smallest_bytes(problem: Problem, strategy: str) -> int:
    """Bytes of the smallest plan that :func:`solve` can find, whatever the budget.

    Raises:
        ValueError: there is no plan at all.
    """
    return min(base.smallest_bytes(joined, strategy) for joined, _ in _joined(problem))


def _joined(problem: Problem) -> Iterator[tuple[Problem, Whole]]:
    """The problem with every bank as one choice, form by form where all must have one."""
    forms: list[str | None] = [None]
    if problem.one_form:
        forms = list(dict.fromkeys(a.form for found in problem.banks.values() for a in found))
    possible = False
    for form in forms:
        whole = {
            bank: {
                a.prefix + chain: a
                for a in alternatives
                if form in (None, a.form)
                for chain in _common(a)
            }
            for bank, alternatives in problem.banks.items()
        }
        if all(whole.values()):
            possible = True
            yield _problem(problem, whole), whole
    if not possible:
        raise ValueError("some bank has no candidate for all of its choices")


def _common(alternative: Alternative) -> list[Chain]:
    """Chains that all choices of an alternative were measured with."""
    first, *others = ([m.chain for m in found] for found in alternative.choices.values())
    return [chain for chain in first if all(chain in other for other in others)]


def _problem(problem: Problem, whole: Whole) -> Problem:
    owner = {
        name: bank
        for bank, alternatives in problem.banks.items()
        for a in alternatives
        for name in a.choices
    }
    choices = dict(problem.choices)
    layers = dict(problem.layers)
    for bank, chains in whole.items():
        choices[bank] = [_measurement(bank, chain, a) for chain, a in chains.items()]
        # Every expert counts, also one that no alternative leaves.
        names = [name for name in layers if owner.get(name) == bank or name.startswith(f"{bank}.")]
        inside = [layers[name] for name in names if name != bank]
        if inside:
            known = [layer.influence for layer in inside if layer.influence is not None]
            mean = sum(known) / len(known) if known else None
            layers[bank] = Layer(sum(layer.bytes for layer in inside), mean)
    # Names that no alternative has do not count.
    there = [[n for n in tie if n in owner or n in problem.choices] for tie in problem.ties]
    ties = [list(dict.fromkeys(owner.get(name, name) for name in tie)) for tie in there]
    merged: dict[str, list[str]] = {}
    for tie in ties:  # ties that meet in a bank are one
        group = list(dict.fromkeys(n for name in tie for n in merged.get(name, [name])))
        merged |= dict.fromkeys(group, group)
    groups = {id(group): group for group in merged.values() if len(group) > 1}
    return Problem(choices, list(groups.values()), problem.budget, layers=layers)


def _measurement(bank: str, chain: Chain, alternative: Alternative) -> Measurement:
    rest = chain[len(alternative.prefix) :]
    found = [next(m for m in own if m.chain == rest) for own in alternative.choices.values()]
    loss = alternative.loss + sum(m.loss for m in found)
    if not math.isfinite(loss):
        raise ValueError(f"bank {bank}: the loss of one of its choices is {loss}")
    size = alternative.bytes + sum(m.bytes for m in found)
    return Measurement(bank, chain, size, error=max(loss, 0.0), score=loss, seconds=0.0)


def _apart(whole: Whole, plan: Plan) -> dict[str, Chain]:
    """The plan's choices, those of every bank in the bank's place."""
    units: dict[str, Chain] = {}
    for name, chain in plan.units.items():
        names = whole[name][chain].choices if name in whole else [name]
        units |= dict.fromkeys(names, chain)
    return units
