"""Put on the path of processes whose storage is to be slow, and to fail for a while.

``FAULTY_STORAGE`` names a folder: while it holds a file ``no-writes``, renames into place fail as
those of a network file system do whose server is away, and while it holds ``full``, as those on a
full disk. Every one takes ``FAULTY_SECONDS``. The first worker of Ray's that comes to one takes a
file ``no-memory`` away, and gets no memory.
"""

import contextlib
import errno
import os
import pathlib
import sys
import time

_rename = pathlib.Path.replace


def _replace(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    folder = os.environ.get("FAULTY_STORAGE")
    if folder is not None:
        time.sleep(float(os.environ.get("FAULTY_SECONDS", "0")))
        for name, number in (("no-writes", errno.EIO), ("full", errno.ENOSPC)):
            if os.path.exists(os.path.join(folder, name)):
                raise OSError(number, os.strerror(number), str(target))
        if sys.argv[0].endswith("default_worker.py"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, "no-memory"))
                raise MemoryError("none is left")
    return _rename(self, target)


pathlib.Path.replace = _replace  # type: ignore[method-assign]
