"""What one walk over the blocks of a model is, and the files that it leaves on its way."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesaic.methods.base import Unit
from moesaic.orchestrator.damage import DamagedFile, damage_removed
from moesaic.orchestrator.experts import Experts
from moesaic.orchestrator.shared import fetched, write_shared
from moesaic.orchestrator.statistics import Node
from moesaic.orchestrator.store import code_digest, digest, scratch_folder
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.worker import WorkerState


@dataclass(frozen=True)
class Walk:
    """Everything that fixes the statistics of one walk over the blocks; plain data for workers.

    Attributes:
        model, dtype, trust_remote_code: what to open.
        fingerprint: digest of the checkpoint's contents.
        ids: file with the token ids ``[sequences, length]``.
        ids_digest: digest of the tokens.
        sequences, shards, batch: how the tokens are cut.
        needs: statistics that are wanted at every site.
        experts: ``routed`` or ``all``.
        gradients: sequences per shard for the reverse pass; 0 for none.
        seed: of the labels drawn in the reverse pass.
        fisher: whether the reverse pass also takes the next tokens as labels, for ``fisher``.
        pooling: of an encoder's hidden states, where the reverse pass begins with embeddings; empty
            for a language model.
        sampled: tokens that every expert is run on, where ``needs`` name expert statistics.
        sources: text source of every sequence; empty where no expert statistics are wanted.
        by_source: the same, where second moments are kept apart by source; else empty.
        store: root of the store.
        prefixes: with ``propagate``, for every block the digest of what the plan made of the blocks
            before it, "" where that is nothing; empty where inputs come from the dense model.
    """

    model: str
    dtype: str
    trust_remote_code: bool
    fingerprint: str
    ids: str
    ids_digest: str
    sequences: int
    shards: int
    batch: int
    needs: tuple[str, ...]
    experts: Experts
    gradients: int
    seed: int
    store: str
    sampled: int = 0
    sources: tuple[int, ...] = ()
    by_source: tuple[int, ...] = ()
    prefixes: tuple[str, ...] = ()
    fisher: bool = False
    pooling: str = ""

    @cached_property
    def key(self) -> str:
        """Digest of everything that fixes the hidden states and the statistics."""
        inputs = {
            "model": self.fingerprint,
            "dtype": self.dtype,
            "ids": self.ids_digest,
            "cut": [self.sequences, self.shards, self.batch],
            "needs": sorted(self.needs),
            "experts": self.experts,
            "layers": [self.sampled, self.sources],
            **({"by source": self.by_source} if self.by_source else {}),
            "code": code_digest(
                "orchestrator/walk.py",
                "orchestrator/calibrate.py",
                "orchestrator/sums.py",
                "orchestrator/parted.py",
                "orchestrator/bank_slices.py",
                "orchestrator/adding.py",
                "orchestrator/gradients.py",
                "orchestrator/embeddings.py",
                "orchestrator/statistics.py",
                "orchestrator/source_statistics.py",
                "orchestrator/expert_statistics.py",
                "orchestrator/streaming.py",
                "orchestrator/experts.py",
                "orchestrator/family.py",
                "orchestrator/skeleton.py",
                "orchestrator/layout.py",
                "orchestrator/bank.py",
            ),
        }
        return digest(inputs)

    def stats_key(self, block: int) -> str:
        return digest([self.key, "stats", block, *filter(None, self.prefixes[block : block + 1])])

    def gradients_key(self, block: int) -> str:
        return digest([self.key, "gradients", *self._reverse, block])

    @property
    def _reverse(self) -> list[Any]:
        """What fixes the reverse pass besides the hidden states."""
        more = [*(["fisher"] if self.fisher else []), *filter(None, [self.pooling])]
        return [self.gradients, self.seed, *more]

    def shard_rows(self, shard: int) -> tuple[int, int]:
        """First and one-past-last sequence of a shard."""
        return (
            shard * self.sequences // self.shards,
            (shard + 1) * self.sequences // self.shards,
        )

    @cached_property
    def scratch(self) -> Path:
        """Folder of unfinished work: hidden states, partial sums."""
        own = [self.key, self.prefixes, *self._reverse]
        return scratch_folder(Path(self.store), digest(own))


def opened(state: WorkerState, walk: Walk) -> StreamedModel:
    model: StreamedModel = state.model(walk.model, walk.dtype, walk.trust_remote_code)
    return model


def block_units(model: StreamedModel, block: int) -> list[Unit]:
    return [unit for unit in model.units() if unit.block == block]


def token_ids(walk: Walk, shard: int) -> Tensor:
    """``[sequences of the shard, length]``"""
    return read_ids(walk.ids, *walk.shard_rows(shard))


def read_ids(file: str, low: int, high: int) -> Tensor:
    """Tokens of the sequences ``low … high - 1``, int64 ``[sequences, length]``."""
    with safe_open(fetched(file), framework="pt") as opened:
        rows: Tensor = opened.get_slice("ids")[low:high].long()
        return rows


def load_tensor(path: Path) -> Tensor | None:
    """A tensor saved alone, copied so that the file is not kept mapped; None if not there.

    One that was damaged is removed, and not there either.
    """
    try:
        with damage_removed(path), safe_open(fetched(path), framework="pt") as file:
            value: Tensor = file.get_tensor("value").clone()
            return value
    except (FileNotFoundError, DamagedFile):
        return None


def save_tensor(path: Path, value: Tensor) -> None:
    def write(temporary: Path) -> None:
        save_file({"value": value.cpu().contiguous()}, temporary)

    write_shared(path, write)


def hidden_path(walk: Walk, block: int, shard: int) -> Path:
    return walk.scratch / f"hidden-{block:04d}-{shard:04d}.safetensors"


def boundary_path(walk: Walk, block: int, shard: int) -> Path:
    return walk.scratch / f"boundary-{block:04d}-{shard:04d}.safetensors"


def node_path(walk: Walk, what: str, block: int, node: Node) -> Path:
    return walk.scratch / f"{what}-{block:04d}-{node[0]:04d}-{node[1]:04d}.safetensors"
