"""How the processes of a run are set up: the driver, its workers, and the one that verifies."""

import atexit
import contextlib
import gc
import os
import sys
from typing import NoReturn

# Threads that sleep instead of spinning: with another process busy, spinning threads make a
# process several times slower.
SLEEPING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def collect_rarely() -> None:
    """Has Python look for garbage in cycles less often.

    Importing torch and transformers makes millions of objects that stay; looking through them every
    700 takes a fifth of the time. Large things in cycles are collected by name where they end.
    """
    gc.set_threshold(20_000, 20, 20)


def leave(status: int) -> NoReturn:
    """Ends the process once everything is written and all that asked for it is told.

    Taking thousands of modules apart object by object, as Python would, takes up to two seconds.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(status)
