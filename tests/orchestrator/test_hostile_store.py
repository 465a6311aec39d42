"""A store that somebody else filled: it leads nowhere else, and takes no more than it may."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.orchestrator import shared
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.store import Store, remove_scratch, scratch_folder
from moesaic.orchestrator.stored_model import model_folder
from tests.orchestrator.test_store import KEY, OTHER, files, writing

# A folder of the store → what would read, write or remove files in it.
LINKS: dict[str, list[Callable[[Store], object]]] = {
    "mosaics": [
        lambda store: store.gc([], -1),
        lambda store: store.get("mosaics", KEY),
        lambda store: store.put("mosaics", KEY, writing(b"x")),
    ],
    "mosaics/ab": [
        lambda store: store.gc([], -1),
        lambda store: store.get("mosaics", KEY),
        lambda store: store.get_many("mosaics", [KEY]),
        lambda store: store.put("mosaics", KEY, writing(b"x")),
        lambda store: store.put_json("mosaics", KEY, {}),
    ],
    "scratch": [
        lambda store: store.gc([], -1),
        lambda store: scratch_folder(store.root, KEY),
        lambda store: remove_scratch(store.root / "scratch" / KEY),
        lambda store: shared.remove_unfinished(store.root / "scratch" / KEY),
    ],
    f"scratch/{KEY}": [
        lambda store: store.gc([], -1),
        lambda store: scratch_folder(store.root, KEY),
        lambda store: remove_scratch(store.root / "scratch" / KEY),
    ],
    "models": [lambda store: store.gc([], -1), lambda store: model_folder(store.root, KEY)],
    f"models/{KEY}": [lambda store: store.gc([], -1), lambda store: model_folder(store.root, KEY)],
}


@pytest.mark.parametrize("link", LINKS)
def test_a_folder_that_is_a_link_is_refused_and_nothing_is_touched_behind_it(
    tmp_path: Path, link: str
) -> None:
    """What lies there has the very names that the store gives its files, and is sealed."""
    store = Store(tmp_path / "store")
    for kind in ("errors", "stats"):
        store.put(kind, OTHER, writing(b"its own"))
    outside = Store(tmp_path / "outside")
    outside.put("mosaics", KEY, writing(b"mine"))
    # A damaged entry would be removed.
    outside.path("mosaics", KEY).write_bytes(b"altered")
    for folder in (scratch_folder(outside.root, KEY), model_folder(outside.root, KEY)):
        folder.mkdir(parents=True)
        (folder / "hidden-0001-0002.safetensors").write_bytes(b"mine")
    (store.root / link).parent.mkdir(exist_ok=True)
    (store.root / link).symlink_to(outside.root / link)
    before = files(store.root), files(outside.root)
    for use in LINKS[link]:
        with pytest.raises(UserError, match=f"^{re.escape(str(store.root / link))}: is a") as e:
            use(store)
        assert "\n" not in str(e.value)
        assert (files(store.root), files(outside.root)) == before


def test_the_store_itself_may_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to("disk")
    store = Store(tmp_path / "store")
    used = store.put("mosaics", KEY, writing(b"used")).path
    store.put("mosaics", OTHER, writing(b"unused"))
    shared.write_shared(scratch_folder(store.root, KEY) / "a.safetensors", writing(b"x"))
    assert store.get("mosaics", KEY) is not None
    assert store.gc([Path(os.path.realpath(used))], -1)[0] == 3
    assert files(tmp_path / "disk") == [
        f"mosaics/ab/{KEY}.safetensors",
        f"mosaics/ab/{KEY}.seal.json",
    ]
