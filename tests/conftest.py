"""The order of the test files for ``make test``, where two processes take file after file."""

import gc
import signal

import pytest

# What takes longest comes first, and with it all that has a Ray of its own: several processes, and
# waits. In the end, each process takes small files.
FIRST = (
    "test_end_to_end.py",
    "test_chaos.py",
    "test_tune_end_to_end.py",
    "test_nodes.py",
    "test_model_source.py",
    "test_head.py",
    "test_pool.py",
)
_SIGTERM = signal.getsignal(signal.SIGTERM)
ORDER = {name: place for place, name in enumerate(FIRST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.get(item.path.name, len(FIRST)))


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: nobody need look for garbage there.

    The package asks for a collection here and there, which would take half a second.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown() -> None:
    """Ray leaves a handler of its own, or none that Python knows, wherever it was started."""
    signal.signal(signal.SIGTERM, _SIGTERM)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or modules of C++ tell at the end that they leak
