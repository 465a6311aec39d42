"""The values that a study tries first, as far as a user's ranges of knobs leave of them."""

from collections.abc import Mapping, Sequence

from moesaic.search.knobs import GREEDY, Knob, Values

# Before the name of a start that the ranges do not hold.
_NEAREST = "nearest to "


def within(
    starts: Mapping[str, Values], own: Sequence[Knob], knobs: Sequence[Knob]
) -> dict[str, Values]:
    """The starts that a user's ranges leave something of.

    One with a value of its own that is not allowed would be no more what it is called, nor anything
    else: the even plan is one with an exponent of 0. It is left out. Where only the others cannot
    be at their defaults, it is told in its name that it is but the nearest to that.

    Args:
        starts: name → values; the others are at their defaults.
        own: the knobs as they are by themselves.
        knobs: the same as a user wants them.
    """
    defaults = {knob.name: knob.default for knob in own}
    found = {}
    for name, values in starts.items():
        wanted = {**defaults, **values}
        other = {k.name for k in knobs if k.nearest(wanted[k.name]) != wanted[k.name]}
        if not other:
            found[name] = values
        elif other.isdisjoint(values):
            found[_NEAREST + name] = values
    return found


def is_greedy(start: str | None) -> bool:
    """Whether the plan of a trial is made by the greedy strategy."""
    return start in (GREEDY, _NEAREST + GREEDY)
