"""Reading the next block's weights while a GPU is busy with this one."""

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from moesaic.orchestrator.streaming import StreamedModel

_CHUNK = 4 << 20
# The one reader of this process, if it ever had one.
_readers: list[threading.Thread] = []


def read_ahead(model: StreamedModel, block: int) -> None:
    """Has a thread read a block's weights, so that the system's page cache has them.

    Nothing of it is kept here: memory that others need is the cache's to give. Nothing happens
    where there is no such block, where the last reader is still at work, or on a processor, whose
    cores the thread would take from who computes. Files that are not on this node stay where they
    are until they are wanted.
    """
    if model.device.type == "cpu" or not 0 <= block < model.blocks:
        return
    if any(reader.is_alive() for reader in _readers):
        return
    spans = list(block_spans(model, block))
    _readers[:] = [threading.Thread(target=_read, args=(spans,), daemon=True)]
    _readers[0].start()


def block_spans(model: StreamedModel, block: int) -> Iterator[tuple[Path, int, int]]:
    """(file, first byte, one past the last) of every tensor of a block, each once."""
    layout, entries = model.layouts[block], model.checkpoint.entries()
    names = set(layout.kept.values())
    names |= {n for members in layout.tensors.values() for own in members.values() for n in own}
    for entry in sorted((entries[n] for n in names), key=lambda e: (e.file, e.begin)):
        yield entry.file, entry.begin, entry.begin + entry.nbytes


def _read(spans: list[tuple[Path, int, int]]) -> None:
    buffer = memoryview(bytearray(_CHUNK))
    with suppress(OSError):  # who wants the weights will meet it, and say so
        for file, begin, end in spans:
            with open(file, "rb", buffering=0) as stream:
                stream.seek(begin)
                while begin < end and (count := stream.readinto(buffer[: end - begin])):
                    begin += count
