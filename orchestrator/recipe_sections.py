"""The sections of a recipe: each key with what it may be and what it is by default."""

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from moesaic.orchestrator.recipe_values import (
    LIST,
    ONE,
    Section,
    Text,
    check_patterns,
    model_name,
    one_or_list,
    parse_bytes,
    shown_value,
)
from moesaic.orchestrator.shared import CachePlace
from moesaic.search.refining import refiners
from moesaic.search.samplers import SAMPLERS, refusal

_Size = Annotated[int, BeforeValidator(parse_bytes)]
_Bits = Annotated[float, Field(gt=0, le=32)]


def _share_of_a_gpu(count: float) -> float:
    if 0 < count < 1e-3:
        raise ValueError(f"{count:g} is less than 0.001 of a GPU: give 0, or 0.001 or more")
    return count


class BudgetSection(Section):
    """A limit for the checkpoint: bytes of all tensors, or stored bits per compressible weight.

    A list of several makes a plan for each of them.
    """

    bytes: (
        Annotated[
            Annotated[_Size, Tag(ONE)] | Annotated[tuple[_Size, ...], Tag(LIST)],
            Discriminator(one_or_list),
        ]
        | None
    ) = None
    bits_per_weight: (
        Annotated[
            Annotated[_Bits, Tag(ONE)] | Annotated[tuple[_Bits, ...], Tag(LIST)],
            Discriminator(one_or_list),
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _one(self) -> "BudgetSection":
        if (self.bytes is None) == (self.bits_per_weight is None):
            raise ValueError("give either bytes or bits_per_weight")
        if self.several and len(set(self._values)) < max(len(self._values), 1):
            raise ValueError("a list holds at least one budget, and none of them twice")
        if self.several:
            called: dict[str, float] = {}
            for value, label in zip(self._values, map(self._label, self._values), strict=True):
                if label in called:
                    raise ValueError(
                        f"{called[label]!r} and {value!r} are both called {label}: keep one of them"
                    )
                called[label] = value
        return self

    @property
    def _values(self) -> tuple[float, ...]:
        value = self.bytes if self.bytes is not None else self.bits_per_weight
        assert value is not None, "checked when it was made"
        return value if isinstance(value, tuple) else (value,)

    @property
    def several(self) -> bool:
        """Whether it is a list."""
        return isinstance(self.bytes, tuple) or isinstance(self.bits_per_weight, tuple)

    @property
    def each(self) -> dict[str, "BudgetSection"]:
        """The budgets one by one, by a name that a folder can have: ``2.5bpw``, ``1.1MB``."""
        if self.bits_per_weight is not None:
            return {self._label(v): BudgetSection(bits_per_weight=v) for v in self._values}
        return {self._label(v): BudgetSection(bytes=int(v)) for v in self._values}

    def _label(self, value: float) -> str:
        return f"{value:g}bpw" if self.bits_per_weight is not None else _size_name(int(value))


def _size_name(size: int) -> str:
    """``1.1MB``: exact, whatever the size."""
    power = min((len(str(size)) - 1) // 3, 4)
    whole, rest = divmod(size, 1000**power)
    digits = f"{rest:0{3 * power}d}".rstrip("0") if power else ""
    return f"{whole}{'.' if digits else ''}{digits}{['B', 'kB', 'MB', 'GB', 'TB'][power]}"


class Source(Section):
    """Text from a file, a JSONL file or a Hugging Face dataset."""

    file: Text | None = None
    dataset: Text | None = None
    config: Text | None = None
    split: Text = "train"
    field: Text = "text"
    weight: float = Field(default=1.0, gt=0, le=1e9)
    name: Text | None = None

    @model_validator(mode="after")
    def _one(self) -> "Source":
        if (self.file is None) == (self.dataset is None):
            raise ValueError("give either file or dataset")
        return self

    @property
    def label(self) -> str:
        return self.name or (Path(self.file).name if self.file else str(self.dataset))


class Texts(Section):
    """Token sequences drawn from weighted sources."""

    texts: list[Source] = Field(min_length=1)
    sequences: int = Field(default=128, ge=1, le=10**6)
    length: int = Field(default=512, ge=2, le=10**7)
    seed: int = Field(default=0, ge=0, lt=2**31)

    @field_validator("texts")
    @classmethod
    def _distinct(cls, texts: list[Source]) -> list[Source]:
        labels = [source.label for source in texts]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"several sources are called {', '.join(twice)}: give each a name")
        return texts

    @property
    def batch(self) -> int:
        """Sequences run at a time; fixed by the recipe, so that results do not depend on memory."""
        return max(1, 4096 // self.length)


class Calibration(Texts):
    """How the statistics are collected."""

    shards: int = Field(default=8, ge=1, le=10**5)
    experts: Literal["routed", "all"] = "routed"
    expert_tokens: int = Field(default=2048, ge=1, le=10**6)
    gradient_sequences: int = Field(default=16, ge=0, le=10**6)
    per_source: bool = False

    @model_validator(mode="after")
    def _several(self) -> "Calibration":
        if self.per_source and len(self.texts) < 2:
            raise ValueError("per_source: there is one text, and nothing to tell apart: false")
        return self


# Workers from which on the walk goes ahead by itself; see docs/benchmarks/simulation.md.
_AHEAD = 8


class Compute(Section):
    """How many workers, what each one takes, and how many share the walk over the blocks.

    Attributes:
        walk: whether a block's statistics are summed by who walks, or behind the walk; see
            :mod:`moesaic.orchestrator.walk_ahead`. By default the number of workers decides.
    """

    address: Text | None = None
    workers: int | None = Field(default=None, ge=1, le=10**5)
    walkers: int | None = Field(default=None, ge=1, le=10**5)
    walk: Literal["joint", "ahead"] | None = None
    cpus_per_worker: int = Field(default=1, ge=1, le=10**4)
    gpus_per_worker: Annotated[float, AfterValidator(_share_of_a_gpu)] | None = Field(
        default=None, ge=0, le=1000
    )
    memory_per_worker: Annotated[int, BeforeValidator(parse_bytes), Field(ge=1)] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def walking(self, workers: int) -> int:
        """How many of so many workers share the walk, where there are shards enough."""
        return min(workers, self.walkers or workers)

    def ahead(self, workers: int) -> bool:
        """Whether the walk of so many workers goes ahead of the statistics."""
        if self.walk is not None:
            return self.walk == "ahead"
        return workers >= _AHEAD


class CacheSection(Section):
    """Where every node keeps copies of what lies at URLs, and how many bytes of them.

    Attributes:
        folder: the same path on every node; each has its own files there. By default
            ``$XDG_CACHE_HOME/moesaic/copies``, or below ``~/.cache``.
        size: bytes; what was used longest ago leaves.
    """

    folder: Text | None = None
    size: Annotated[int, BeforeValidator(parse_bytes)] = 50 * 10**9

    @property
    def place(self) -> CachePlace:
        if self.folder is not None:
            return CachePlace(Path(self.folder), self.size)
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return CachePlace(Path(root).resolve() / "moesaic" / "copies", self.size)


class Tracking(Section):
    """Where MLflow keeps the record; by default sqlite beside the run's folder."""

    uri: Text | None = None
    experiment: Text = "moesaic"
    register_as: Annotated[Text, AfterValidator(model_name)] | None = None


def _sampler(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: known are {', '.join(SAMPLERS)}")
    return name


def _groups(groups: dict[str, str]) -> dict[str, str]:
    for name in groups:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"{name!r} is no name for a group (letters, digits, _ - only)")
    check_patterns(list(groups.values()))
    return groups


def _knob(value: Any) -> Any:
    """A value or a list of values, each as it was written: 32 is another option than 32.0."""
    for one in value if isinstance(value, list) else [value]:
        number = isinstance(one, int) or (isinstance(one, float) and math.isfinite(one))
        if not number and not isinstance(one, str):
            raise ValueError(f"{shown_value(one)} is no number, true, false or word")
    return value


def _constraints(value: Any) -> Any:
    """Sizes may be written as such."""
    if isinstance(value, dict) and "bytes" in value:
        return {**value, "bytes": parse_bytes(value["bytes"])}
    return value


class Tune(Section):
    """What ``moesaic tune`` explores.

    Attributes:
        objectives: what is to be small; with ``bytes`` the budget is a knob, too. ``latency`` is
            measured, in milliseconds per token.
        constraints: figure → the most that it may be: ``kl``, ``bytes`` or ``latency``.
        sampler: one of :mod:`moesaic.search.samplers`.
        seed: of the sampler.
        sequences: of the calibration text that a trial is judged on, at most.
        prune: whether trials that fall behind are stopped before they have seen all of them; by
            default where that can be, see :attr:`prunes`.
        groups: name → regular expression over names of units; each group gets a weight.
        knobs: name → a value, which fixes it, or ``[low, high]`` or a list, which narrows it, or
            adds that of an option (:mod:`moesaic.orchestrator.widening`).
    """

    objectives: list[Literal["kl", "bytes", "latency"]] = Field(default=["kl"], min_length=1)
    constraints: Annotated[
        dict[Literal["kl", "bytes", "latency"], Annotated[float, Field(gt=0, allow_inf_nan=False)]],
        BeforeValidator(_constraints),
    ] = {}
    sampler: Annotated[str, AfterValidator(_sampler)] = "tpe"
    seed: int = Field(default=0, ge=0, lt=2**31)
    sequences: int = Field(default=64, ge=1, le=10**6)
    prune: bool | None = None
    groups: Annotated[dict[str, str], AfterValidator(_groups)] = {}
    knobs: dict[str, Annotated[Any, AfterValidator(_knob)]] = {}

    @model_validator(mode="after")
    def _possible(self) -> "Tune":
        if len(set(self.objectives)) < len(self.objectives) or "kl" not in self.objectives:
            raise ValueError("objectives are kl alone, or kl and bytes, latency or both")
        reason = refusal(self.sampler, len(self.objectives), len(self.constraints))
        if reason is not None:
            raise ValueError(reason)
        if self.prune and not self._may_prune:
            raise ValueError(
                "prune: with several objectives or constraints no trial is given up early: leave it"
                " out, or false"
            )
        if "bytes" in self.constraints and "bytes" not in self.objectives:
            raise ValueError(
                "constraints.bytes: the budget is the limit: change it, or make bytes an objective"
            )
        if "kl" in self.constraints and len(self.objectives) == 1:
            raise ValueError(
                "constraints.kl: kl is the only objective, and made as small as can be: add bytes"
                " or latency to the objectives"
            )
        return self

    @property
    def _may_prune(self) -> bool:
        # Whether a trial keeps to its constraints is known when it is done.
        return len(self.objectives) == 1 and not self.constraints

    @property
    def prunes(self) -> bool:
        """Whether trials that fall behind are given up early."""
        return self._may_prune and self.prune is not False

    @property
    def timed(self) -> bool:
        """Whether plans are timed."""
        return "latency" in self.objectives or "latency" in self.constraints


def _refiners(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    known = refiners()
    for name in names if isinstance(names, list) else ():
        if name not in known:
            raise ValueError(f"no refiner {shown_value(name)}: known are {', '.join(known)}")
    return names


class Refine(Section):
    """How the plan that a search or a study found is refined by running others.

    Attributes:
        method: refiners (:mod:`moesaic.search.refining`), one after the other.
        sequences: of the calibration text that plans are judged on, at most.
        generations, offspring: of ``evolve``.
        steps, draws: of ``relax``, and plans drawn in each.
        passes: times that each refiner may run that text, at most; no limit if left out.
        seed: of what is drawn.
    """

    method: Annotated[list[str], BeforeValidator(_refiners)] = Field(
        default=["evolve"], min_length=1
    )
    sequences: int = Field(default=64, ge=1, le=10**6)
    generations: int = Field(default=20, ge=1, le=10**6)
    offspring: int = Field(default=16, ge=1, le=10**5)
    steps: int = Field(default=30, ge=1, le=10**6)
    draws: int = Field(default=2, ge=1, le=10**4)
    passes: float | None = Field(default=None, gt=0, le=1e9)
    seed: int = Field(default=0, ge=0, lt=2**31)
