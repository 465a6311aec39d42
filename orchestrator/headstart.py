"""Ray and its workers start while the driver still imports what it needs itself.

Both take seconds and seldom more than one core. It is done where there will be work: on this
machine alone, with a store that holds nothing yet. With GPUs the model must be known first: its
size decides how many workers share one.
"""

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moesaic.orchestrator.cluster import cluster_address
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.gpu_shares import may_have_gpus
from moesaic.orchestrator.objects import is_url
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.recipe import Recipe, load_recipe
from moesaic.orchestrator.recipe_sections import Compute


@contextmanager
def head_start(
    recipe_file: Path,
    output: Path | None,
    driver: str,
    make: Callable[[Compute], Pool] | None = None,
) -> Iterator[Pool | None]:
    """A pool whose workers are on their way, or None where the run is to start them when it must.

    Args:
        recipe_file: of the run.
        output: its folder, if it was named.
        driver: module to import meanwhile.
        make: a pool of another class.

    Raises:
        UserError: something is wrong with the recipe.
    """
    recipe = load_recipe(recipe_file)
    if not _all_is_to_do(recipe, output):
        yield None
        return
    importing = threading.Thread(target=importlib.import_module, args=(driver,))
    importing.start()
    with (make or Pool)(recipe.compute) as pool:
        begun: Pool | None = pool
        try:
            pool.begin()
        except (RunError, UserError):
            begun = None  # the run comes to it again, and has it on record
        importing.join()
        yield begun


def _all_is_to_do(recipe: Recipe, output: Path | None) -> bool:
    store = recipe.store_beside(recipe.folder(output))
    if is_url(store) or cluster_address(recipe.compute)[1] is not None:
        return False
    if recipe.compute.gpus_per_worker is None and may_have_gpus():
        return False
    try:
        return not os.listdir(store)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
