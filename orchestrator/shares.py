"""Into how many parts a large task goes, so that no worker is idle while others have long ones."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesaic.orchestrator.pool import Task


def parts_now(task: "Task", waiting: Iterable["Task"], idle: int, workers: int) -> int:
    """Parts of a task that can be divided and is about to begin; the first is for who is free.

    While more of its kind is to come, it is for those who are idle now. After that a worker takes
    its share of all that waits and can be divided: large ones as long as there is much, ever
    smaller ones towards the end (guided self-scheduling; Polychronopoulos & Kuck, IEEE Transactions
    on Computers, 1987).

    Args:
        waiting: the other tasks that wait for a worker.
        idle: workers that are, the one that is to begin among them.
        workers: all of them.
    """
    if task.more():
        return min(task.parts, idle)
    left = task.parts + sum(other.parts for other in waiting if other.divide is not None)
    share = -(-left // workers)
    return -(-task.parts // share)
