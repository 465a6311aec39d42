"""A recipe made concrete: which units, which candidates, which tokens, how many bytes.

Nothing is computed here beyond reading headers and drawing tokens; whatever can be wrong with a
recipe is found out before any work starts.
"""

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import save_file

from moesaic.methods import chains
from moesaic.methods.base import (
    Chain,
    Spec,
    Unit,
    is_reducer,
    reducers_of,
    reducing,
    reverse_needs,
)
from moesaic.methods.reduction import is_open
from moesaic.methods.slicegpt import Options as SliceOptions
from moesaic.orchestrator.allotment import Allotted, allotted
from moesaic.orchestrator.assemble import header_bytes_bound
from moesaic.orchestrator.calibrate import Walk
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.choices import Chosen, choices, member_choices, tied_choices
from moesaic.orchestrator.cluster import has_16_bit_products, processor_only
from moesaic.orchestrator.compression import CUT_OF
from moesaic.orchestrator.embeddings import read_pooling
from moesaic.orchestrator.errors import Mistakes, RecipeError, UserError
from moesaic.orchestrator.evaluate import Judge
from moesaic.orchestrator.gpu_shares import workers_per_gpu
from moesaic.orchestrator.measure import Job, needs, piece_key
from moesaic.orchestrator.objects import is_url
from moesaic.orchestrator.offers import Offering
from moesaic.orchestrator.publish import check_publish
from moesaic.orchestrator.recipe import Recipe
from moesaic.orchestrator.recipe_sections import BudgetSection, Texts
from moesaic.orchestrator.reductions import reduction_key
from moesaic.orchestrator.remote_model import copies_folder, open_checkpoint
from moesaic.orchestrator.score_features import features_key
from moesaic.orchestrator.shaping import Shaping
from moesaic.orchestrator.shared import CachePlace, exists, make_store
from moesaic.orchestrator.slicing import Cut, SlicedCheckpoint, sliced_width
from moesaic.orchestrator.store import Store
from moesaic.orchestrator.streaming import StreamedModel, dtype_named
from moesaic.orchestrator.targets import ties
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
from moesaic.search.base import Alternative, Budget, Measurement, Problem, smallest_bytes

# Folders that the Makefile fills.
_MADE = ("smollm2", "minilm")


def find_model(name: str, place: CachePlace) -> Path:
    """A local folder as it is; for a URL the folder that takes copies of what is read; any other
    name is downloaded from the hub, or found in its cache.

    Raises:
        UserError: neither a folder nor a model that can be had.
    """
    if is_url(name):
        return copies_folder(name, place)
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        made = path.parent.name == "build" and path.name in _MADE
        advice = f": `make {path.name}` makes it" if made else ""
        raise RecipeError(f"model: there is no folder {path.resolve()}{advice}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = shorten(str(error), 160, placeholder=" …").rstrip(".")
        raise RecipeError(
            f"model: {name} is no folder and cannot be downloaded: {reason}; check the name, or the"
            " network (HF_TOKEN for models that need a login), or give a folder"
        ) from None


@dataclass(frozen=True)
class Size:
    """What a plan's bytes consist of.

    Attributes:
        fixed_bytes: every tensor that is no unit, or a unit that the recipe keeps, and the headers
            of the files (an upper bound: a few bytes per tensor).
        header_bytes: of these, the bound on the headers.
        weights: number of weights in the units.
        smallest_bytes: of the smallest plan that candidates, target and search allow.
        dense_bytes: of the original files, headers included.
    """

    fixed_bytes: int
    header_bytes: int
    weights: int
    smallest_bytes: int
    dense_bytes: int


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
        self._allotted: Allotted = {}
        mistakes = Mistakes()
        if (url := recipe.publish) is not None:
            mistakes.attempt(lambda: check_publish(url))
        where = recipe.store_beside(output)
        store = mistakes.attempt(lambda: make_store(where, recipe.cache.place))
        self.folder = (
            mistakes.attempt(lambda: find_model(recipe.model, recipe.cache.place), "model")
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
        offers = budgets = None
        offering = Offering(recipe, model, self.shaping)
        if self.units:
            offers = mistakes.attempt(offering.offers)
        self.unloadable: Mapping[str, int] = offering.unloadable
        if offers is not None:
            self.offers = offers
            budgets = mistakes.attempt(self._budgets)
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
        found.budgets = found._budgets()
        return found

    @property
    def budget(self) -> Budget:
        """The limit, where there is only one."""
        (budget,) = self.budgets.values()
        return budget

    def _open(self) -> StreamedModel:
        return self._streamed(open_checkpoint(self.folder))

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

    @cached_property
    def by_name(self) -> dict[str, Unit]:
        return {unit.name: unit for unit in self.units}

    @property
    def dtype(self) -> torch.dtype:
        """Of the original weights, and so of scales."""
        return self.model.stored_dtype(self.model.units()[0])

    def open_specs(self) -> list[Spec]:
        """Reducers whose layers are still to share out how many experts each keeps."""
        found = [spec for chain in self.recipe.chains() for spec in reducers_of(chain)]
        return [spec for spec in dict.fromkeys(found) if is_open(spec.parsed())]

    def close(self) -> None:
        """Lets the layers share out their experts; all statistics are there."""
        banks = [unit for unit in self.units if unit.kind == "bank"]
        self._allotted = allotted(self.model, banks, self.walk, self.open_specs())
        for bank in banks:
            chains = [self.closed(bank.name, chain) for chain in self.offers[bank.name]]
            self.offers[bank.name] = list(dict.fromkeys(chains))

    def closed(self, unit: str, chain: Chain) -> Chain:
        """A chain of the recipe as it is for one unit."""
        return tuple(self._allotted.get((unit, spec), spec) for spec in chain)

    def candidates(self, unit: Unit) -> set[Chain]:
        """What a search may choose for a unit, besides leaving it as it is."""
        return {self.closed(unit.name, chain) for chain in self.recipe.candidates}

    def everywhere(self, chain: Chain) -> Chosen:
        """Names of choices → what they take when every unit takes ``chain``, as far as it can.

        The linears of a part are reduced together or not at all.
        """
        chosen: dict[str, Chain] = {}
        for unit in self.units:
            own = self.closed(unit.name, chain)
            together = self.shaping.units_of(self.shaping.owners.get(unit.name, ""))
            offered = [own, reducing(own)[1]]
            if not all(own in self.offers[other.name] for other in together):
                offered = offered[1:]
            own = next((chain for chain in offered if chain in self.offers[unit.name]), ())
            prefix = reducing(own)[0]
            names = (choice.name for choice in choices(self.shaping.reduced(unit, prefix)))
            chosen |= dict.fromkeys(names, own)
        return chosen

    @cached_property
    def size(self) -> Size:
        checkpoint = self.model.checkpoint
        fixed = sum(checkpoint.nbytes(name) for name in self.model.fixed_names())
        for unit in self.model.units():
            if unit.name not in self.by_name:
                fixed += self.dense_bytes(unit)
        serve, candidates = self.recipe.serve, self.recipe.candidates
        split = [reducing(chain) for chain in candidates] if serve == "moesaic" else []
        reduced = any(prefix for prefix, _ in split)
        chained = any(len(rest) > 1 or any(map(chains.has_rank, rest)) for _, rest in split)
        schemes = len(candidates)
        narrowed = reduced and bool(self.shaping.parts)
        headers = header_bytes_bound(
            self.model, self.units, serve, schemes, reduced, chained, narrowed
        )
        fixed += headers
        return Size(
            fixed_bytes=fixed,
            header_bytes=headers,
            weights=sum(unit.parameters for unit in self.units),
            smallest_bytes=self._smallest(fixed),
            dense_bytes=self.original.checkpoint.file_bytes,
        )

    def sized_problem(self, fixed_bytes: int) -> Problem:
        """What a search will be given, as far as it is known before any work: bytes, no losses.

        A choice is a member of a unit, ``UNIT.MEMBER``: all experts of a bank stand together here,
        because they are equally large. There is no budget.
        """
        members = {unit.name: [f"{unit.name}.{m}" for m in unit.shapes] for unit in self.units}
        offers: dict[str, list[Measurement]] = {}
        banks: dict[str, list[Alternative]] = {}
        owners = self.owners()
        for owner, units in owners.items():
            prefixes = self.prefixes(units)
            banks[owner] = [self._sized_alternative(units, prefix) for prefix in prefixes]
        for unit in self.units:
            if self.shaping.owners.get(unit.name) not in owners:
                (name,) = members[unit.name]
                offers[name] = self._sized_offers(unit, (), "weight", name)
        tied = ties(self.units, self.recipe.serve)
        if not self.mixed_banks:
            inside = {name for group in tied for name in group}
            tied += [[unit.name] for unit in self.units if unit.name not in inside]
        groups = [[name for unit in group for name in members[unit]] for group in tied]
        budget = Budget(0, fixed_bytes)
        return Problem(offers, groups, budget, banks, one_form=not self.mixed_banks)

    def _smallest(self, fixed_bytes: int) -> int:
        """Bytes of the smallest plan that the search can find.

        Raises:
            RecipeError: the candidates allow no plan at all.
        """
        try:
            return smallest_bytes(self.sized_problem(fixed_bytes), self.recipe.search)
        except ValueError as error:
            raise RecipeError(
                f"candidates: with search: {self.recipe.search} and serve: {self.recipe.serve}"
                f" there is no plan: {error}"
            ) from None

    def owners(self, candidates_only: bool = True) -> dict[str, list[Unit]]:
        """What can be reduced → its units: every bank, and parts where a reduction is offered."""
        found = {}
        known = (self.shaping.owners.get(unit.name) for unit in self.units)
        for owner in dict.fromkeys(name for name in known if name is not None):
            units = self.shaping.units_of(owner)
            if owner not in self.shaping.parts or any(self.prefixes(units, candidates_only)):
                found[owner] = units
        return found

    def prefixes(self, units: Sequence[Unit], candidates_only: bool = True) -> list[Chain]:
        """Ways to reduce a bank or part that a search may choose, to leave it as it is first."""
        found: list[Chain] | None = None
        for unit in units:
            offered = self.offers[unit.name]
            known = self.candidates(unit) if candidates_only else set(offered)
            own = [reducing(chain)[0] for chain in offered if chain in known]
            if unit.kind == "linear":
                own.append(())
            found = own if found is None else [prefix for prefix in found if prefix in own]
        assert found is not None, "there is at least one unit"
        whole = [()] if not found or not all(found) else []
        return list(dict.fromkeys([*whole, *found]))

    def _sized_alternative(self, units: Sequence[Unit], prefix: Chain) -> Alternative:
        choices = {
            name: self._sized_offers(unit, prefix, member, name)
            for unit in units
            for member in unit.shapes
            for name in [f"{unit.name}.{member}"]
        }
        size = sum(self.shaping.side_bytes(unit, prefix) for unit in units) if prefix else 0
        return Alternative(prefix, self.shaping.form(units[0], prefix), size, 0.0, choices)

    def _sized_offers(self, unit: Unit, prefix: Chain, member: str, name: str) -> list[Measurement]:
        """What a search may choose for a member of a unit, after a reduction; bytes only."""
        shape, dtype = (
            self.shaping.reduced(unit, prefix).shapes[member],
            self.model.stored_dtype(unit),
        )
        dense = math.prod(shape) * dtype.itemsize
        found, known = [], self.candidates(unit)
        for chain in self.offers[unit.name]:
            first, rest = reducing(chain)
            if first != prefix or chain not in known:
                continue
            size = dense
            if rest:
                count = self.shaping.stand_ins(unit, rest)
                size = chains.predict_bytes({member: shape}, dtype, rest, count)
            found.append(Measurement(name, rest, size, 0.0, None, 0.0))
        if not prefix and self.may_stay_dense(unit):
            found.append(Measurement(name, (), dense, 0.0, None, 0.0))
        return found

    def may_stay_dense(self, unit: Unit) -> bool:
        """Whether a search may leave a unit as it is.

        A bank can only be left as a whole. Where nothing ties its experts that is not offered,
        unless nothing else is.
        """
        return unit.kind != "bank" or not self.mixed_banks or not self.recipe.candidates

    def dense_bytes(self, unit: Unit) -> int:
        """Bytes of the unit before it is compressed."""
        return _held_bytes(self.model, unit)

    def original_bytes(self) -> dict[str, int]:
        """Unit → bytes as the original holds it, before it was sliced."""
        return {unit.name: _held_bytes(self.original, unit) for unit in self.units}

    def predicted_bytes(self, unit: Unit, chain: Chain) -> int:
        """Bytes of the unit under a chain, before any work."""
        prefix, rest = reducing(chain)
        if not self.shaping.meant(unit, prefix):
            prefix = ()
        if unit.kind == "linear" and chains.for_banks(chain):
            rest = ()
        size = self.shaping.side_bytes(unit, prefix) if prefix else 0
        shapes, dtype = self.shaping.reduced(unit, prefix).shapes, self.model.stored_dtype(unit)
        if not rest:
            dense = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
            return size + dense if prefix else self.dense_bytes(unit)
        count = self.shaping.stand_ins(unit, rest)
        return size + chains.predict_bytes(shapes, dtype, rest, count)

    def _budgets(self) -> dict[str, Budget]:
        """The limits by their names.

        Raises:
            RecipeError: naming every one that cannot be.
        """
        mistakes, found = Mistakes(), {}
        several = self.recipe.budget.several
        for label, wanted in self.recipe.budget.each.items():
            where = f"budget {label}" if several else "budget"
            limit = mistakes.attempt(partial(self._budget, wanted, where))
            if limit is not None:
                found[label] = limit
        if mistakes.found:
            raise mistakes.error()
        return found

    def _budget(self, wanted: BudgetSection, where: str) -> Budget:
        size = self.size
        if wanted.bytes is not None:
            total = wanted.bytes
        else:
            assert isinstance(wanted.bits_per_weight, float)
            # Rounded first: a product that is a whole number may come out a hair below it.
            total = size.fixed_bytes + int(round(wanted.bits_per_weight * size.weights / 8, 3))
        assert isinstance(total, int)
        if total < size.smallest_bytes:
            bits = (size.smallest_bytes - size.fixed_bytes) * 8 / size.weights
            bits = math.ceil(bits * 1000) / 1000  # rounded down it would be refused again
            raise RecipeError(
                f"{where}: {total:,} bytes are too few: the smallest plan that these candidates"
                f" allow has {size.smallest_bytes:,} bytes ({bits:.3f} bits per weight;"
                f" serve: {self.recipe.serve}, search: {self.recipe.search});"
                f" {size.fixed_bytes:,} of them are parts that are not compressed"
            )
        if total >= size.dense_bytes and self.cut is None:
            raise RecipeError(
                f"{where}: {total:,} bytes hold the whole dense model ({size.dense_bytes:,} bytes):"
                " there is nothing to compress, give less"
            )
        return Budget(total_bytes=total, fixed_bytes=size.fixed_bytes)

    @property
    def mixed_banks(self) -> bool:
        """Whether the target loads banks whose experts differ."""
        return self.recipe.serve == "moesaic"

    def ties(self) -> list[list[str]]:
        """Choices that must take the same chain so that the target can load the result."""
        tied = tied_choices(self.units, ties(self.units, self.recipe.serve), self.mixed_banks)
        inside = {name for group in tied for name in group}
        for unit in self.units:
            if any(map(chains.ties_experts, self.offers[unit.name])):
                by_member = member_choices(unit)
                tied += [group for group in by_member if inside.isdisjoint(group)]
        return tied

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
        if self.open_specs() and all(map(exists, stats)):
            self.close()
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
        block = self.by_name[unit].block
        # The reverse pass goes through the dense model, whatever the walk goes through.
        gradients = self.walk.gradients_key(block) if reverse_needs(chain) else ""
        return piece_key(walk.fingerprint, unit, chain, walk.stats_key(block), gradients)

    def features_key(self, unit: str, chain: Chain) -> str:
        """Key of the features of the piece of a unit under a chain, over the dense model."""
        walk = self.walk
        gradients = walk.gradients_key(self.by_name[unit].block) if walk.gradients else ""
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
        stats = walk.stats_key(self.by_name[unit].block)
        return reduction_key(walk.fingerprint, self.shaping.owners.get(unit, unit), prefix, stats)


def _held_bytes(model: StreamedModel, unit: Unit) -> int:
    """Bytes of a unit in a model's files."""
    names = {name for group in model.unit_tensors(unit).values() for name in group}
    return sum(model.checkpoint.nbytes(name) for name in names)


def plain(value: Walk | Judge | Job) -> dict[str, Any]:
    """As keyword arguments for a worker."""
    return asdict(value)
