"""A recipe made concrete: which units, which candidates, which tokens, how many bytes.

Nothing is computed here beyond reading headers and drawing tokens; whatever can be wrong with a
recipe is found out before any work starts.
"""

import copy
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moesaic.methods.base import (
    Chain,
    is_reducer,
    reducers_of,
    reverse_needs,
)
from moesaic.methods.slicegpt import Options as SliceOptions
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.cluster import has_16_bit_products, processor_only
from moesaic.orchestrator.compression import CUT_OF
from moesaic.orchestrator.embeddings import read_pooling
from moesaic.orchestrator.errors import Mistakes, RecipeError, UserError
from moesaic.orchestrator.evaluate import Judge
from moesaic.orchestrator.gpu_shares import workers_per_gpu
from moesaic.orchestrator.measure import needs, piece_key
from moesaic.orchestrator.model_folder import find_model
from moesaic.orchestrator.plan_bytes import PlanBytes
from moesaic.orchestrator.publish import check_publish
from moesaic.orchestrator.recipe import Recipe
from moesaic.orchestrator.recipe_sections import Texts
from moesaic.orchestrator.reductions import reduction_key
from moesaic.orchestrator.remote_model import open_checkpoint
from moesaic.orchestrator.score_features import features_key
from moesaic.orchestrator.shaping import Shaping
from moesaic.orchestrator.shared import exists, make_store
from moesaic.orchestrator.slicing import Cut, SlicedCheckpoint, sliced_width
from moesaic.orchestrator.space import Space
from moesaic.orchestrator.store import Store
from moesaic.orchestrator.streaming import StreamedModel, dtype_named
from moesaic.orchestrator.texts import (
    Cutter,
    Sequences,
    check_vocabulary,
    draw,
    framed_windows,
    load_tokenizer,
    sentences,
    windows,
)
from moesaic.orchestrator.walk import Walk
from moesaic.search.base import Budget

# Names shown of what there is.
_EXAMPLES = 3


class Experiment:
    """Everything that follows from a recipe and its model before any work is done.

    Raises:
        RecipeError: all that is wrong with recipe, model folder, texts and store, as far as it can
            be told at once.
        RunError: the disk is full.
    """

    def __init__(self, recipe: Recipe, output: Path) -> None:
        self.recipe = recipe
        self.output = output
        mistakes = Mistakes()
        if (url := recipe.publish) is not None:
            mistakes.attempt(lambda: check_publish(url))
        where = recipe.store_beside(output)
        store = mistakes.attempt(lambda: make_store(where, recipe.cache.place))
        self.folder = (
            mistakes.attempt(
                lambda: find_model(recipe.model, recipe.cache.place, recipe.trust_remote_code),
                "model",
            )
            or Path()
        )
        model = mistakes.attempt(self._open, "model") if self.folder != Path() else None
        if model is None:
            raise mistakes.error()
        self.model = self.original = model
        self.cut: Cut | None = None
        if (options := recipe.slice) is not None:
            sliced = mistakes.attempt(lambda: self._sliced(store, options))
            if sliced is None:
                mistakes.attempt(lambda: self.evaluation)
                raise mistakes.error()
            self.model = model = sliced
        self.units = [unit for unit in model.units() if not recipe.kept(unit.name)]
        self.shaping = Shaping(model, self.units, recipe.serve)
        mistakes.attempt(self._check_keep)
        space = budgets = None
        if self.units:
            space = mistakes.attempt(lambda: Space(recipe, model, self.shaping))
        if space is not None:
            self.space, self.offers = space, space.offers
            self.sizes = PlanBytes(space, self.original)
            budgets = mistakes.attempt(lambda: self.sizes.budgets(recipe.budget))
        mistakes.attempt(lambda: self.pooling)
        mistakes.attempt(lambda: self.calibration)
        mistakes.attempt(lambda: self.evaluation)
        if mistakes.found or store is None or budgets is None:
            raise mistakes.error()
        self.store, self.budgets = store, budgets

    def under(self, recipe: Recipe, output: Path) -> "Experiment":
        """The same for one budget of the list; everything that is known already stays known.

        Args:
            recipe: as :meth:`Recipe.of_budgets` makes them.
        """
        found = copy.copy(self)
        found.recipe, found.output = recipe, output
        found.budgets = self.sizes.budgets(recipe.budget)
        return found

    @property
    def budget(self) -> Budget:
        """The limit, where there is only one."""
        (budget,) = self.budgets.values()
        return budget

    def _open(self) -> StreamedModel:
        code = self.recipe.trust_remote_code
        return self._streamed(open_checkpoint(self.folder, code=code))

    def _streamed(self, checkpoint: Checkpoint) -> StreamedModel:
        return StreamedModel(
            checkpoint,
            dtype=dtype_named(self.compute_dtype),
            trust_remote_code=self.recipe.trust_remote_code,
        )

    def _sliced(self, store: Store | None, options: SliceOptions) -> StreamedModel:
        """What is left of the model when it is sliced; its weights may be still to come."""
        section, serve = self.recipe.calibration, self.recipe.serve
        if options.shortcuts and serve != "moesaic":
            raise RecipeError(
                f"slice.shortcuts: serve: {serve} loads no shortcut matrices: shortcuts: false, or"
                " serve: moesaic"
            )
        width = sliced_width(self.original, options)
        if store is None:
            raise RecipeError("store: nowhere to put the sliced model")
        self.store = store
        walk = Walk(
            model=str(self.folder),
            dtype=self.compute_dtype,
            trust_remote_code=self.recipe.trust_remote_code,
            fingerprint=self.original.checkpoint.fingerprint,
            ids=self._ids_file(self.calibration),
            ids_digest=self.calibration.digest,
            sequences=section.sequences,
            shards=min(section.shards, section.sequences),
            batch=section.batch,
            needs=(),
            experts="routed",
            gradients=0,
            seed=0,
            store=str(store.root),
        )
        sublayers = len(self.original.family.sublayers)
        self.cut = Cut(walk, width, options.shortcuts, self.original.blocks, sublayers)
        return self._streamed(SlicedCheckpoint(self.original, self.cut))

    @cached_property
    def compute_dtype(self) -> str:
        """What the recipe says, or what ``auto`` means where only this processor works.

        One that multiplies numbers of 16 bits in software is several times slower in the
        checkpoint's own dtype than in float32. What a cluster's machines can do is not known here.
        """
        compute = self.recipe.compute
        if compute.dtype == "auto" and processor_only(compute) and not has_16_bit_products():
            return "float32"
        return compute.dtype

    def _check_keep(self) -> None:
        """Raises a RecipeError for patterns that match no unit, or all of them."""
        names = [unit.name for unit in self.model.units()]
        unmatched = [p for p in self.recipe.keep if not any(re.search(p, name) for name in names)]
        examples = ", ".join(names[:: max(1, len(names) // _EXAMPLES)][:_EXAMPLES])
        problems = [
            f"keep: {pattern!r} matches no unit: correct it, or take it out; units are called"
            f" {examples} …"
            for pattern in unmatched
        ]
        if not self.units:
            problems.append("keep: the patterns leave no unit to compress: take one out")
        if problems:
            raise RecipeError(*problems)

    @property
    def dtype(self) -> torch.dtype:
        """Of the original weights, and so of scales."""
        return self.model.stored_dtype(self.model.units()[0])

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            RecipeError: there is none, or it is another model's.
        """
        try:
            tokenizer = load_tokenizer(str(self.folder), self.recipe.trust_remote_code)
            check_vocabulary(tokenizer, self.model.vocab_size)
        except UserError as error:
            raise RecipeError(f"model: {error}") from error
        return tokenizer

    def _sequences(self, texts: Texts, what: str, cut: Cutter) -> Sequences:
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and texts.length > positions:
            raise RecipeError(
                f"{what}.length: {texts.length} tokens are more than the {positions} positions"
                f" that the model knows: give {positions} or fewer"
            )
        return draw(texts, self.tokenizer, self.model.vocab_size, what, cut)

    @cached_property
    def calibration(self) -> Sequences:
        cut = framed_windows if self.model.family.is_encoder else windows
        return self._sequences(self.recipe.calibration, "calibration", cut)

    @cached_property
    def evaluation(self) -> Sequences:
        cut = sentences if self.model.family.is_encoder else windows
        return self._sequences(self.recipe.evaluation, "evaluation", cut)

    @cached_property
    def pooling(self) -> str:
        """How an encoder's hidden states become embeddings; empty for a language model.

        Raises:
            RecipeError: its folder says so in a way that is not known, or it is to be served by
                an engine that was not tried with encoders.
        """
        if not self.model.family.is_encoder:
            return ""
        if self.recipe.serve == "vllm":
            raise RecipeError("serve: vllm: not for encoders: give moesaic or transformers")
        try:
            return read_pooling(self.folder)
        except UserError as error:
            raise RecipeError(f"model: {error}") from error

    def _ids_file(self, sequences: Sequences) -> str:
        key = sequences.digest
        entry = self.store.get("ids", key)
        if entry is None:
            tensors = {"ids": torch.from_numpy(sequences.ids.copy())}
            entry = self.store.put("ids", key, lambda p: save_file(tensors, p))
        return str(entry.path)

    @cached_property
    def workers_per_gpu(self) -> int:
        """Workers that one GPU has work for."""
        checkpoint = self.original.checkpoint
        weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
        return workers_per_gpu(self.original.units(), weights)

    @cached_property
    def walk(self) -> Walk:
        """The calibration walk over the dense model."""
        section = self.recipe.calibration
        shards = min(section.shards, section.sequences)
        reduced = any(is_reducer(s.method) for chain in self.recipe.chains() for s in chain)
        per_shard = -(-min(section.gradient_sequences, section.sequences) // shards)
        return Walk(
            model=str(self.model.checkpoint.path),
            dtype=self.compute_dtype,
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
            sampled=section.expert_tokens if reduced else 0,
            sources=tuple(self.calibration.source.tolist()) if reduced else (),
            by_source=tuple(self.calibration.source.tolist()) if section.per_source else (),
            fisher=any("fisher" in reverse_needs(chain) for chain in self.recipe.chains()),
            pooling=self.pooling,
        )

    @cached_property
    def judge(self) -> Judge:
        """The held-out text."""
        original = self.original.checkpoint
        return Judge(
            model=str(self.model.checkpoint.path),
            dtype=self.compute_dtype,
            trust_remote_code=self.recipe.trust_remote_code,
            fingerprint=self.model.checkpoint.fingerprint,
            ids=self._ids_file(self.evaluation),
            ids_digest=self.evaluation.digest,
            batch=self.recipe.evaluation.batch,
            store=str(self.store.root),
            original="" if self.cut is None else str(original.path),
            original_fingerprint="" if self.cut is None else original.fingerprint,
            pooling=self.pooling,
        )

    @cached_property
    def calibration_judge(self) -> Judge:
        """The calibration text in the judge's place: what routers are trained on."""
        return replace(
            self.judge,
            ids=self.walk.ids,
            ids_digest=self.walk.ids_digest,
            batch=self.recipe.calibration.batch,
        )

    def gradient_tokens(self) -> int:
        """Tokens of the reverse pass."""
        return self._gradient_sequences() * self.recipe.calibration.length

    def gradient_samples(self) -> int:
        """What predicted losses are means over: the tokens of the reverse pass, for an encoder its
        sequences."""
        encoder = self.model.family.is_encoder
        return self._gradient_sequences() if encoder else self.gradient_tokens()

    def _gradient_sequences(self) -> int:
        walk = self.walk
        rows = [walk.shard_rows(shard) for shard in range(walk.shards)]
        return sum(min(walk.gradients, high - low) for low, high in rows)

    def entries(self) -> list[Path]:
        """Files of every entry that the recipe uses or will use, and folders of unfinished work."""
        walk, store = self.walk, self.store
        blocks = range(self.model.blocks)
        stats = [store.path("stats", walk.stats_key(block)) for block in blocks]
        if self.space.open_specs() and all(map(exists, stats)):
            self.space.close(walk)
        pairs = [(unit, chain) for unit, offered in self.offers.items() for chain in offered]
        keys = {self.key(unit, chain, walk) for unit, chain in pairs}
        keys |= {k for u, c in pairs for _, k in self.stages(u, [(c, "")], walk)}
        pieces = [store.get("pieces", key) for key in keys]
        keys |= {p.metadata[CUT_OF] for p in pieces if p is not None and CUT_OF in p.metadata}
        reductions = [
            self.reduction_key(unit, prefix, walk)
            for unit, chains in self.offers.items()
            for prefix in filter(None, set(map(reducers_of, chains)))
        ]
        return [
            walk.scratch,
            *(self.cut.entries() if self.cut is not None else ()),
            Path(walk.ids),
            Path(self.judge.ids),
            *stats,
            *(store.path("gradients", walk.gradients_key(block)) for block in blocks),
            *(store.path(kind, key) for kind in ("pieces", "errors", "cuts") for key in keys),
            *(store.path("reductions", key) for key in reductions),
            *(store.path("features", self.features_key(unit, chain)) for unit, chain in pairs),
        ]

    def key(self, unit: str, chain: Chain, walk: Walk) -> str:
        """Key of the piece of a unit under a chain with the statistics of a walk."""
        block = self.space.by_name[unit].block
        # The reverse pass goes through the dense model, whatever the walk goes through.
        gradients = self.walk.gradients_key(block) if reverse_needs(chain) else ""
        return piece_key(walk.fingerprint, unit, chain, walk.stats_key(block), gradients)

    def features_key(self, unit: str, chain: Chain) -> str:
        """Key of the features of the piece of a unit under a chain, over the dense model."""
        walk = self.walk
        gradients = walk.gradients_key(self.space.by_name[unit].block) if walk.gradients else ""
        return features_key(self.key(unit, chain, walk), gradients)

    def stages(
        self, unit: str, pairs: Iterable[tuple[Chain, str]], walk: Walk
    ) -> list[tuple[Chain, str]]:
        """The shorter chains that chains of a unit start from, with their keys.

        What a merger leaves of a bank is no stage of a correction, but a reduction.
        """
        shorter = {
            chain[:length]: None
            for chain, _ in pairs
            for length in range(len(reducers_of(chain)) + 1, len(chain))
        }
        return [(chain, self.key(unit, chain, walk)) for chain in shorter]

    def reduction_key(self, unit: str, prefix: Chain, walk: Walk) -> str:
        """Key of what reducers make of a bank, or of a linear's part, with the statistics of a
        walk."""
        stats = walk.stats_key(self.space.by_name[unit].block)
        return reduction_key(walk.fingerprint, self.shaping.owners.get(unit, unit), prefix, stats)
