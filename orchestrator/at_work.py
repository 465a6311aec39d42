"""Runs that are at work beside a store, as far as their folders are known."""

import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.run_folder import LOCK
from moesaic.orchestrator.shared import is_mirrored
from moesaic.orchestrator.store import Store

# A run shows a sign of life every ten seconds.
_QUIET_SECONDS = 60.0


def refuse_at_work(store: Store, kept: Iterable[Path]) -> None:
    """Keeps what runs at work need from being removed.

    Where a store is, nothing tells which runs use it. Looked at are the folders beside it and in
    ``runs`` beside it, those in ``runs`` here, and those beside the kept ones.

    Args:
        kept: folders of runs whose entries stay anyway.

    Raises:
        UserError: another run is at work, and its recipe names this store, or cannot be read.
    """
    kept = {folder.resolve() for folder in kept}
    for folder in sorted(_neighbours(store, kept) - kept):
        if _is_at_work(folder) and _may_use(folder, store):
            raise UserError(
                f"{folder}: a run is at work there and may need what would be removed: add --keep"
                f" {folder}, or wait until it has ended (one that was killed counts as ended after"
                f" {_QUIET_SECONDS:.0f} s)"
            )


def _neighbours(store: Store, kept: Iterable[Path]) -> set[Path]:
    around = {Path("runs").resolve(), *(folder.parent for folder in kept)}
    if not is_mirrored(store.root):
        beside = store.root.resolve().parent
        around |= {beside, beside / "runs"}
    return {folder for place in around for folder in _locked(place)}


def _locked(place: Path) -> Iterator[Path]:
    for lock in place.glob(f"*/{LOCK}"):
        yield lock.parent.resolve()


def _is_at_work(folder: Path) -> bool:
    """Whether a run's lock was touched of late, by the clock of its file system."""
    probe = folder / f"{LOCK}.{uuid.uuid4().hex}"
    try:
        touched = (folder / LOCK).stat().st_mtime
        probe.touch()
        try:
            return probe.stat().st_mtime - touched < _QUIET_SECONDS
        finally:
            probe.unlink()
    except FileNotFoundError:  # it has ended meanwhile
        return False
    except OSError:  # nobody can tell
        return True


def _may_use(folder: Path, store: Store) -> bool:
    try:
        recipe = load_recipe(folder / "recipe.yaml")
    except (UserError, OSError):
        return True
    named = recipe.store_beside(folder)
    if is_mirrored(store.root) or "://" in named:
        return named == store.where
    return Path(named).resolve() == store.root.resolve()
