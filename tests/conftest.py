"""The order of the test files for ``make test``, where two processes take file after file."""

import gc

import pytest

# What takes longest comes first, so that nothing waits for it in the end; the other files with a
# real Ray come last, so that there are two at a time at most.
ORDER = {"test_end_to_end.py": 0, "test_chaos.py": 0}
ORDER |= dict.fromkeys(("test_pool.py", "test_nodes.py", "test_head.py"), 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.get(item.path.name, 1))


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: nobody need look for garbage there.

    The package asks for a collection here and there, which would take half a second.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or modules of C++ tell at the end that they leak
