"""What the metadata of an entry must say of the very unit that the entry is of.

That it has the form of its kind is checked when the entry is found, see
:mod:`moesaic.orchestrator.seals`; which members and sites there are, its reader knows.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.foreign import shown
from moesaic.orchestrator.shared import remove, told_name
from moesaic.orchestrator.store import Entry


@contextmanager
def told_by(entry: Entry) -> Iterator[Mapping[str, Any]]:
    """The metadata, for looking things up in it.

    Raises:
        RunError: a LookupError or ValueError came of that; the entry is removed.
    """
    try:
        yield entry.metadata
    except (LookupError, ValueError) as error:
        remove(entry.path)
        raise RunError(
            f"{told_name(entry.path)}: its metadata is not that of its unit"
            f" ({shown(f'{type(error).__name__}: {error}')}): it is removed; run the same command"
            " again, it is made anew"
        ) from None


def expert_counts(metadata: Mapping[str, Any], what: str, site: str, experts: int) -> list[int]:
    """A statistic of a bank's site, one number for each expert.

    Raises:
        LookupError, ValueError: there is none, or of other experts.
    """
    found = metadata[what][site]
    if not isinstance(found, list) or len(found) != experts:
        raise ValueError(f"{what} of {site} must be {experts} numbers")
    return found
