"""Folders below a root that others can write to: theirs may be links to anywhere.

Nothing is written or removed through a link that somebody put into a store. The root itself may be
reached through links: its owner chose them.
"""

import os
from pathlib import Path

from moesaic.orchestrator.errors import UserError


def own_folder(root: Path, *names: str) -> Path:
    """The folder ``root/names[0]/names[1]/…``, which need not be there.

    Raises:
        UserError: one of the folders below the root is a symbolic link.
    """
    folder = os.fspath(root)
    for name in names:
        folder = f"{folder}/{name}"
        if os.path.islink(folder):
            raise UserError(
                f"{folder}: is a symbolic link, and a store's folders must be none below its root:"
                " move the folder there, or give another store"
            )
    return Path(folder)
