"""A recipe made concrete: which units, which candidates, which tokens, how many bytes.

Nothing is computed here beyond reading headers and drawing tokens; whatever can be wrong with a
recipe is found out before any work starts.
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moesaic.methods.base import Chain, Unit, chain_text, method_module
from moesaic.orchestrator.assemble import header_bytes_bound
from moesaic.orchestrator.calibrate import Walk
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.choices import tied_choices
from moesaic.orchestrator.errors import RecipeError
from moesaic.orchestrator.evaluate import Judge
from moesaic.orchestrator.measure import Job, needs, piece_key
from moesaic.orchestrator.recipe import Recipe, Texts
from moesaic.orchestrator.store import Store
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.targets import allowed, ties
from moesaic.orchestrator.texts import Sequences, draw, load_tokenizer
from moesaic.search.base import Budget


def find_model(name: str) -> Path:
    """A local folder as it is; any other name is downloaded from the hub, or found in its cache.

    Raises:
        UserError: neither a folder nor a model that can be had.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise RecipeError(f"model: no folder {name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise RecipeError(
            f"model: {name} is no folder and cannot be downloaded: {reason}"
        ) from None


@dataclass(frozen=True)
class Size:
    """What a plan's bytes consist of.

    Attributes:
        fixed_bytes: every tensor that is no unit, or a unit that the recipe keeps, and the headers
            of the files (an upper bound: a few bytes per tensor).
        weights: number of weights in the units.
        smallest_bytes: of the smallest plan that the candidates allow.
        dense_bytes: of the original tensors.
    """

    fixed_bytes: int
    weights: int
    smallest_bytes: int
    dense_bytes: int


class Experiment:
    """Everything that follows from a recipe and its model before any work is done."""

    def __init__(self, recipe: Recipe, output: Path) -> None:
        self.recipe = recipe
        self.output = output
        self.folder = find_model(recipe.model)
        dtype = recipe.compute.dtype
        self.model = StreamedModel(
            Checkpoint(self.folder),
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=recipe.trust_remote_code,
        )
        self.units = [unit for unit in self.model.units() if not recipe.kept(unit.name)]
        if not self.units:
            raise RecipeError("keep: the patterns leave no unit to compress")
        self.store = Store(Path(recipe.store) if recipe.store else output.parent / "store")
        self.offers = self._offers()
        self.budget = self._budget()

    @cached_property
    def by_name(self) -> dict[str, Unit]:
        return {unit.name: unit for unit in self.units}

    @property
    def dtype(self) -> torch.dtype:
        """Of the original weights, and so of scales."""
        return self.model.checkpoint.dtype(self.model.fixed_names()[0])

    def _offers(self) -> dict[str, list[Chain]]:
        """Unit → chains that it is measured with.

        A candidate that the target cannot load on some unit is not offered there, and counted in
        ``unloadable``. Anything else that does not fit is the user's mistake.

        Raises:
            UserError: a chain does not fit a unit's shape (each chain once), a baseline cannot be
                loaded, or a unit has no candidate left.
        """
        problems: dict[str, str] = {}
        offers: dict[str, list[Chain]] = {}
        self.unloadable: dict[str, int] = {}
        for unit in self.units:
            offers[unit.name] = offered = []
            refusals = []
            for chain in self.recipe.chains():
                text = chain_text(chain)
                misfit = self._misfit(unit, chain)
                if misfit is not None:
                    problems.setdefault(text, f"{text} cannot be used on {unit.name}: {misfit}")
                    continue
                reason = allowed(unit, chain, self.recipe.serve, self.model.family)
                if reason is None:
                    offered.append(chain)
                elif chain in self.recipe.baselines.values():
                    problems.setdefault(text, f"baseline {text} on {unit.name}: {reason}")
                else:
                    self.unloadable[reason] = self.unloadable.get(reason, 0) + 1
                    refusals.append(reason)
            if not problems and not set(offered) & set(self.recipe.candidates):
                problems[unit.name] = f"{unit.name}: serve: {self.recipe.serve} can load none of"
                problems[unit.name] += f" the candidates here ({refusals[-1]})"
        if problems:
            advice = "change the candidates, or leave such units as they are with keep: [pattern]"
            raise RecipeError("\n".join([*problems.values(), advice]))
        return offers

    @staticmethod
    def _misfit(unit: Unit, chain: Chain) -> str | None:
        """Why a unit of this kind and shape cannot be compressed so."""
        for spec in chain:
            method = method_module(spec.method)
            if unit.kind not in method.SCOPE:
                return f"{spec.method} does not work on a {unit.kind}"
            reason = method.problem(unit.shapes, spec.parsed())
            if reason is not None:
                return reason
        return None

    @cached_property
    def size(self) -> Size:
        checkpoint = self.model.checkpoint
        fixed = sum(checkpoint.nbytes(name) for name in self.model.fixed_names())
        for unit in self.model.units():
            if unit.name not in self.by_name:
                fixed += self.dense_bytes(unit)
        fixed += header_bytes_bound(
            self.model, self.units, self.recipe.serve, len(self.recipe.candidates)
        )
        smallest = 0
        for unit in self.units:
            smallest += min(
                self.predicted_bytes(unit, chain)
                for chain in self.offers[unit.name]
                if chain in self.recipe.candidates
            )
        return Size(
            fixed_bytes=fixed,
            weights=sum(unit.parameters for unit in self.units),
            smallest_bytes=fixed + smallest,
            dense_bytes=checkpoint.total_bytes,
        )

    def dense_bytes(self, unit: Unit) -> int:
        """Bytes of the unit as the original holds it."""
        names = {name for group in self.model.unit_tensors(unit).values() for name in group}
        return sum(self.model.checkpoint.nbytes(name) for name in names)

    def predicted_bytes(self, unit: Unit, chain: Chain) -> int:
        """Bytes of the unit under a chain, before any work."""
        if not chain:
            return self.dense_bytes(unit)
        spec = chain[-1]
        first = next(iter(self.model.unit_tensors(unit).values()))[0]
        dtype = self.model.checkpoint.dtype(first)
        return method_module(spec.method).predict_bytes(unit.shapes, dtype, spec.parsed())

    def _budget(self) -> Budget:
        wanted, size = self.recipe.budget, self.size
        if wanted.bytes is not None:
            total = wanted.bytes
        else:
            assert wanted.bits_per_weight is not None
            total = size.fixed_bytes + int(wanted.bits_per_weight * size.weights / 8)
        if total < size.smallest_bytes:
            bits = (size.smallest_bytes - size.fixed_bytes) * 8 / size.weights
            bits = math.ceil(bits * 1000) / 1000  # rounded down it would be refused again
            raise RecipeError(
                f"budget: {total:,} bytes are too few: the smallest plan that these candidates"
                f" allow has {size.smallest_bytes:,} bytes ({bits:.3f} bits per weight);"
                f" {size.fixed_bytes:,} of them are parts that are not compressed"
            )
        if total >= size.dense_bytes:
            raise RecipeError(
                f"budget: {total:,} bytes hold the whole dense model ({size.dense_bytes:,} bytes):"
                " there is nothing to compress"
            )
        return Budget(total_bytes=total, fixed_bytes=size.fixed_bytes)

    @property
    def mixed_banks(self) -> bool:
        """Whether the target loads banks whose experts differ."""
        return self.recipe.serve == "moesaic"

    def ties(self) -> list[list[str]]:
        """Choices that must take the same chain so that the target can load the result."""
        return tied_choices(self.units, ties(self.units, self.recipe.serve), self.mixed_banks)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(str(self.folder), self.recipe.trust_remote_code)

    def _sequences(self, texts: Texts, what: str) -> Sequences:
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and texts.length > positions:
            raise RecipeError(
                f"{what}.length: {texts.length} tokens are more than the {positions} positions"
                " that the model knows"
            )
        return draw(texts, self.tokenizer, self.model.vocab_size, what)

    @cached_property
    def calibration(self) -> Sequences:
        return self._sequences(self.recipe.calibration, "calibration")

    @cached_property
    def evaluation(self) -> Sequences:
        return self._sequences(self.recipe.evaluation, "evaluation")

    def _ids_file(self, sequences: Sequences) -> str:
        key = sequences.digest
        entry = self.store.get("ids", key)
        if entry is None:
            tensors = {"ids": torch.from_numpy(sequences.ids.copy())}
            entry = self.store.put("ids", key, lambda p: save_file(tensors, p))
        return str(entry.path)

    @cached_property
    def walk(self) -> Walk:
        """The calibration walk over the dense model."""
        section = self.recipe.calibration
        shards = min(section.shards, section.sequences)
        per_shard = -(-min(section.gradient_sequences, section.sequences) // shards)
        return Walk(
            model=str(self.folder),
            dtype=self.recipe.compute.dtype,
            trust_remote_code=self.recipe.trust_remote_code,
            fingerprint=self.model.checkpoint.fingerprint,
            ids=self._ids_file(self.calibration),
            ids_digest=self.calibration.digest,
            sequences=section.sequences,
            shards=shards,
            batch=section.batch,
            needs=needs(self.recipe.chains()),
            experts=section.experts,
            gradients=per_shard,
            seed=section.seed,
            store=str(self.store.root),
        )

    @cached_property
    def judge(self) -> Judge:
        """The held-out text."""
        return Judge(
            model=str(self.folder),
            dtype=self.recipe.compute.dtype,
            trust_remote_code=self.recipe.trust_remote_code,
            fingerprint=self.model.checkpoint.fingerprint,
            ids=self._ids_file(self.evaluation),
            ids_digest=self.evaluation.digest,
            batch=self.recipe.evaluation.batch,
            store=str(self.store.root),
        )

    def gradient_tokens(self) -> int:
        """Tokens of the reverse pass."""
        walk = self.walk
        rows = [walk.shard_rows(shard) for shard in range(walk.shards)]
        return sum(min(walk.gradients, high - low) for low, high in rows) * (
            self.recipe.calibration.length
        )

    def entries(self) -> list[Path]:
        """Files of every entry that the recipe uses or will use, and folders of unfinished work."""
        walk, store = self.walk, self.store
        blocks = range(self.model.blocks)
        keys = [self.key(u, chain, walk) for u, chains in self.offers.items() for chain in chains]
        return [
            walk.scratch,
            Path(walk.ids),
            Path(self.judge.ids),
            *(store.path("stats", walk.stats_key(block)) for block in blocks),
            *(store.path("gradients", walk.gradients_key(block)) for block in blocks),
            *(store.path(kind, key) for kind in ("pieces", "errors") for key in keys),
        ]

    def key(self, unit: str, chain: Chain, walk: Walk) -> str:
        """Key of the piece of a unit under a chain with the statistics of a walk."""
        stats = walk.stats_key(self.by_name[unit].block)
        return piece_key(walk.fingerprint, unit, chain, stats)


def plain(value: Walk | Judge | Job) -> dict[str, Any]:
    """As keyword arguments for a worker."""
    return asdict(value)
