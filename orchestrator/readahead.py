"""Reading the next block's weights while a GPU is busy with this one."""

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from moesaic.orchestrator.statistics import Node
from moesaic.orchestrator.streaming import StreamedModel

_CHUNK = 4 << 20
# Multiples of it, less whole numbers, lie evenly between 0 and 1, however many there are, and
# wherever one begins to count (Knuth, The Art of Computer Programming 3, section 6.4, theorem S).
_GOLDEN = (math.sqrt(5) - 1) / 2
# The one reader of this process, if it ever had one.
_readers: list[threading.Thread] = []


def read_ahead(model: StreamedModel, block: int, share: float = 0.0) -> None:
    """Has a thread read a block's weights, so that the system's page cache has them.

    Workers of one node share that cache. Each who walks begins at a place of its own and goes on to
    what the next one has begun with: together they fetch every byte about once, at the speed of
    all their readers.

    Nothing of it is kept here: memory that others need is the cache's to give. Nothing happens
    where there is no such block, where the last reader is still at work, or on a processor, whose
    cores the thread would take from who computes. Files that are not on this node stay where they
    are until they are wanted.

    Args:
        share: of the block's bytes that lie before where reading begins; it ends there.
    """
    if 0 <= block < model.blocks:
        _begin(model, from_share(list(block_spans(model, block)), share))


def read_files_ahead(model: StreamedModel, files: Iterable[Path]) -> None:
    """The same for whole files, in order; those that are not there are left out."""
    _begin(model, [(file, 0, file.stat().st_size) for file in files if file.is_file()])


def _begin(model: StreamedModel, spans: list[tuple[Path, int, int]]) -> None:
    if model.device.type == "cpu" or any(reader.is_alive() for reader in _readers):
        return
    _readers[:] = [threading.Thread(target=_read, args=(spans,), daemon=True)]
    _readers[0].start()


def own_share(span: Node) -> float:
    """Where who walks some shards begins to read: apart from those who walk the next ones."""
    return span[0] * _GOLDEN % 1.0


def block_spans(model: StreamedModel, block: int) -> Iterator[tuple[Path, int, int]]:
    """(file, first byte, one past the last) of every tensor of a block, each once."""
    layout, entries = model.layouts[block], model.checkpoint.entries()
    names = set(layout.kept.values())
    names |= {n for members in layout.tensors.values() for own in members.values() for n in own}
    for entry in sorted((entries[n] for n in names), key=lambda e: (e.file, e.begin)):
        yield entry.file, entry.begin, entry.begin + entry.nbytes


def from_share(spans: list[tuple[Path, int, int]], share: float) -> list[tuple[Path, int, int]]:
    """The same bytes in the same order, turned so that this share of them comes last."""
    before = int(share * sum(end - begin for _, begin, end in spans))
    first, last = [], []
    for file, begin, end in spans:
        cut = min(end, begin + before)
        before -= cut - begin
        last += [(file, begin, cut)] * (cut > begin)
        first += [(file, cut, end)] * (end > cut)
    return first + last


def _read(spans: list[tuple[Path, int, int]]) -> None:
    buffer = memoryview(bytearray(_CHUNK))
    with suppress(OSError):  # who wants the weights will meet it, and say so
        for file, begin, end in spans:
            with open(file, "rb", buffering=0) as stream:
                stream.seek(begin)
                while begin < end and (count := stream.readinto(buffer[: end - begin])):
                    begin += count
