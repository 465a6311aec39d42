"""Put on the path of processes whose storage is to be slow, and to fail for a while.

``FAULTY_STORAGE`` names a folder: while it holds a file ``no-writes``, renames into place fail as
those of a network file system do whose server is away. Every one takes ``FAULTY_SECONDS``.
"""

import errno
import os
import pathlib
import time

_rename = pathlib.Path.replace


def _replace(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    folder = os.environ.get("FAULTY_STORAGE")
    if folder is not None:
        time.sleep(float(os.environ.get("FAULTY_SECONDS", "0")))
        if os.path.exists(os.path.join(folder, "no-writes")):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
    return _rename(self, target)


pathlib.Path.replace = _replace  # type: ignore[method-assign]
