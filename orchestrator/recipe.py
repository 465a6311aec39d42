"""The user's YAML file: what to compress, into how many bytes, with what, judged on what."""

import itertools
import math
import os
import re
import reprlib
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from moesaic.kernels.discovery import UnknownName
from moesaic.methods.base import Chain, Spec, expand, options_of
from moesaic.methods.chains import order_problem
from moesaic.methods.router_calibration import Options as RouterOptions
from moesaic.methods.slicegpt import Options as SliceOptions
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.foreign import printable, shown
from moesaic.orchestrator.objects import check_url, is_url
from moesaic.orchestrator.shared import CachePlace
from moesaic.orchestrator.yamlfile import read_yaml
from moesaic.search.base import search_module
from moesaic.search.features import scores
from moesaic.search.refining import refiners
from moesaic.search.samplers import SAMPLERS, refusal

DEMO = Path(__file__).parent / "demo"
BUILTIN = "builtin:"
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {unit + "i": 1024**power for power, unit in enumerate("kmgt", start=1)}
_MOST_BYTES = 10**18
# Alternatives of one entry, all combinations of its lists together.
_MOST_CHOICES = 1000
# What a path may have on Linux, and a folder's name with room for what is put around it.
_PATH_CHARACTERS, _NAME_CHARACTERS = 4096, 100
_LINE_CHARACTERS = 1000
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 2, 80, 80


def _shown(value: Any) -> str:
    """A value of the user's in a message, cut where it is long."""
    try:
        return _repr.repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "a value that is too long to show"


def parse_bytes(value: Any) -> int:
    """``1.5 GB``, ``800 MiB`` or a number: bytes. Raises ValueError on anything else."""
    try:
        match = re.fullmatch(r"\s*([0-9.]+)\s*((?:[kmgt]i?)?)b?\s*", str(value).lower())
        number = float(match[1]) * _UNITS[match[2]] if match else 0.0
    except ValueError:
        number = 0.0
    if number < 1:
        raise ValueError(f"{_shown(value)} is not a size: write bytes, '800 MB' or '1.5 GiB'")
    if number > _MOST_BYTES:
        raise ValueError(f"{_shown(value)} is more than {_MOST_BYTES:,} bytes")
    return int(number)


def resolve(name: str, relative_to: Path) -> str:
    """``builtin:`` names and relative paths as absolute paths; other names unchanged."""
    if name.startswith(BUILTIN):
        inside = name.removeprefix(BUILTIN)
        path = DEMO / ("model" if inside == "demo" else f"text/{inside}")
        if not path.exists():
            known = ["demo", *sorted(p.name for p in (DEMO / "text").glob("*.txt"))]
            raise ValueError(f"no {name!r}: there are {', '.join(BUILTIN + k for k in known)}")
        return str(path)
    if is_url(name):
        return local_or_url(name)
    absolute = absolute_path(name, relative_to)
    try:
        return str(absolute.resolve()) if absolute.exists() else name
    except OSError as error:
        raise ValueError(f"{name[:80]!r} cannot be looked up: {error.strerror}") from None


def local_or_url(name: str) -> str:
    """A URL, checked; the path of one that begins with ``file://``."""
    check_url(name)
    if not name.startswith("file://"):
        return name.rstrip("/")
    path = unquote(name.removeprefix("file://"))
    if not path.startswith("/"):
        raise ValueError(f"{name[:80]!r}: file:// is followed by an absolute path")
    return str(Path(path).resolve())


def absolute_path(name: str, relative_to: Path) -> Path:
    """The path with ``~`` expanded; raises ValueError where there is no such home."""
    try:
        return relative_to / Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name[:80]!r}: {error}") from None


def portable(path: str) -> str:
    """The ``builtin:`` name of a path that belongs to the package; other names unchanged."""
    if Path(path) == DEMO / "model":
        return BUILTIN + "demo"
    return BUILTIN + Path(path).name if Path(path).parent == DEMO / "text" else path


def _known_search(name: str) -> str:
    try:
        search_module(name)
    except UnknownName as error:
        raise ValueError(str(error)) from None
    return name


def _writable(text: str) -> str:
    """Control characters and halves of surrogate pairs belong into no path and no name."""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise ValueError(f"holds the character {character!r}: take it out")
    return text


Text = Annotated[str, Field(max_length=_PATH_CHARACTERS), AfterValidator(_writable)]


def model_name(name: str) -> str:
    """A name that MLflow's registry takes; raises ValueError for another one."""
    if not name.strip() or set(name) & set("/:'"):
        raise ValueError(f"{name!r} is no name for a model (not empty, no / : ')")
    return name


def _share_of_a_gpu(count: float) -> float:
    if 0 < count < 1e-3:
        raise ValueError(f"{count:g} is less than 0.001 of a GPU: give 0, or 0.001 or more")
    return count


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# What a key may be that takes one value or a list: how mistakes in it are told apart.
_ONE, _LIST = "one value", "list of values"


def _one_or_list(value: Any) -> str:
    return _LIST if isinstance(value, list | tuple) else _ONE


_Size = Annotated[int, BeforeValidator(parse_bytes)]
_Bits = Annotated[float, Field(gt=0, le=32)]


class BudgetSection(Section):
    """A limit for the checkpoint: bytes of all tensors, or stored bits per compressible weight.

    A list of several makes a plan for each of them.
    """

    bytes: (
        Annotated[
            Annotated[_Size, Tag(_ONE)] | Annotated[tuple[_Size, ...], Tag(_LIST)],
            Discriminator(_one_or_list),
        ]
        | None
    ) = None
    bits_per_weight: (
        Annotated[
            Annotated[_Bits, Tag(_ONE)] | Annotated[tuple[_Bits, ...], Tag(_LIST)],
            Discriminator(_one_or_list),
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


def _publish(url: str) -> str:
    if not is_url(url) or url.startswith("file://"):
        raise ValueError(f"{url[:80]!r} is no URL of a server: --output names a folder")
    return local_or_url(url)


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
    _check_patterns(list(groups.values()))
    return groups


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
        prune: whether trials that fall behind are stopped before they have seen all of them.
        groups: name → regular expression over names of units; each group gets a weight.
        knobs: name → a value, which fixes it, or ``[low, high]`` or a list, which narrows it.
    """

    objectives: list[Literal["kl", "bytes", "latency"]] = Field(default=["kl"], min_length=1)
    constraints: Annotated[
        dict[Literal["kl", "bytes", "latency"], Annotated[float, Field(gt=0, allow_inf_nan=False)]],
        BeforeValidator(_constraints),
    ] = {}
    sampler: Annotated[str, AfterValidator(_sampler)] = "tpe"
    seed: int = Field(default=0, ge=0, lt=2**31)
    sequences: int = Field(default=64, ge=1, le=10**6)
    prune: bool = True
    groups: Annotated[dict[str, str], AfterValidator(_groups)] = {}
    knobs: dict[str, float | bool | str | list[float | bool | str]] = {}

    @model_validator(mode="after")
    def _possible(self) -> "Tune":
        if len(set(self.objectives)) < len(self.objectives) or "kl" not in self.objectives:
            raise ValueError("objectives are kl alone, or kl and bytes, latency or both")
        reason = refusal(self.sampler, len(self.objectives), len(self.constraints))
        if reason is not None:
            raise ValueError(reason)
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
    def timed(self) -> bool:
        """Whether plans are timed."""
        return "latency" in self.objectives or "latency" in self.constraints


def _refiners(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    known = refiners()
    for name in names if isinstance(names, list) else ():
        if name not in known:
            raise ValueError(f"no refiner {_shown(name)}: known are {', '.join(known)}")
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


def _chains(value: Any) -> list[Chain]:
    """One candidate entry: a method with its options, or a list of such that follow each other.

    Lists in options are alternatives.
    """
    links = value if isinstance(value, list) else [value]
    if not links:
        raise ValueError("a chain needs at least one method")
    specs = [_specs(link) for link in links]
    count = math.prod(map(len, specs))
    if count > _MOST_CHOICES:
        raise ValueError(f"{count:,} choices in one entry: at most {_MOST_CHOICES:,} are taken")
    chains = list(itertools.product(*specs))
    problem = order_problem(chains[0])
    if problem is not None:
        raise ValueError(problem)
    return chains


def _specs(link: Any) -> list[Spec]:
    if not isinstance(link, dict) or not isinstance(link.get("method"), str):
        raise ValueError("needs a mapping with the key method and its options")
    method, options = link["method"], {str(k): v for k, v in link.items() if k != "method"}
    if method == SliceOptions().method:
        raise ValueError(f"{method} is no candidate: it makes the whole model narrower, key slice")
    try:
        fields = options_of(method).model_fields
    except UnknownName as error:
        raise ValueError(str(error)) from None
    values = [value if isinstance(value, list) else [value] for value in options.values()]
    empty = [name for name, alternatives in zip(options, values, strict=True) if not alternatives]
    count = math.prod(map(len, values))
    if empty:
        raise ValueError(f"method {method}: option {empty[0]}: an empty list")
    if count > _MOST_CHOICES:
        raise ValueError(f"{count:,} choices in one entry: at most {_MOST_CHOICES:,} are taken")
    found, lines = [], []
    for combination in expand(options):
        try:
            found.append(Spec.of(method, combination))
        except ValidationError as error:
            lines += [_option_line(problem, fields) for problem in error.errors()]
    if lines:
        raise ValueError(f"method {method}: {'; '.join(dict.fromkeys(lines))}")
    return found


def _option_line(problem: Any, fields: Mapping[str, Any]) -> str:
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"unknown option {key!r} (allowed: {', '.join(fields)})"
    if problem["type"] == "value_error":
        return f"option {key}: {problem['ctx']['error']}"
    return f"option {key}: {problem['msg']}, got {_shown(problem['input'])}"


def _candidates(value: Any) -> list[Chain]:
    if not isinstance(value, list):
        raise ValueError("needs a list of candidates")
    found: list[Chain] = []
    problems = []
    for number, entry in enumerate(value, start=1):
        try:
            found += _chains(entry)
        except ValueError as error:
            problems.append(f"entry {number}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return list(dict.fromkeys(found))


def _baselines(value: Any) -> dict[str, Chain]:
    if not isinstance(value, dict):
        raise ValueError("baselines are a mapping: name → one spec")
    found = {}
    problems = []
    for name, entry in value.items():
        if name in ("dense", "sliced", "plan"):
            problems.append(
                f"{name!r} is no name for a baseline (dense, sliced and plan are taken)"
            )
        elif not re.fullmatch(r"[A-Za-z0-9_. -]+", str(name)):
            problems.append(f"{name!r} is no name for a baseline (letters, digits, _ . - only)")
        try:
            chains = _chains(entry)
        except ValueError as error:
            problems.append(f"{name!r}: {error}")
            continue
        if len(chains) != 1:
            problems.append(f"{name!r} must be a single choice, not {len(chains)}")
        found[str(name)] = chains[0]
    if problems:
        raise ValueError("; ".join(problems))
    return found


def _check_patterns(patterns: list[str]) -> list[str]:
    problems = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{pattern!r} is no regular expression: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return patterns


def _score(name: str) -> str:
    if not name.endswith(".json") and name not in scores():
        raise ValueError(
            f"unknown score {name!r}: known are {', '.join(scores())}, or a file emq.json that"
            " moesaic scores wrote"
        )
    return name


class Recipe(Section):
    """The whole recipe. Field names are the YAML keys."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$", max_length=_NAME_CHARACTERS)
    model: Text
    trust_remote_code: bool = False
    serve: Literal["vllm", "transformers", "moesaic"] = "moesaic"
    budget: BudgetSection
    slice: SliceOptions | None = None
    calibration: Calibration
    candidates: Annotated[list[Chain], BeforeValidator(_candidates)]
    baselines: Annotated[dict[str, Chain], BeforeValidator(_baselines)] = {}
    keep: Annotated[list[str], AfterValidator(_check_patterns)] = []
    search: Annotated[str, AfterValidator(_known_search)] = "knapsack"
    score: Annotated[Text, AfterValidator(_score)] | None = None
    tune: Tune | None = None
    refine: Refine | None = None
    propagate: bool = False
    router_calibration: RouterOptions | None = None
    evaluation: Texts
    compute: Compute = Compute()
    tracking: Tracking = Tracking()
    store: Text | None = None
    cache: CacheSection = CacheSection()
    publish: Annotated[Text, AfterValidator(_publish)] | None = None

    def folder(self, output: Path | None) -> Path:
        """Where a run leaves its files, if ``--output`` does not say."""
        return output or Path("runs") / self.name

    def store_beside(self, folder: Path) -> str:
        """Folder or URL of the store of a run that leaves its files in ``folder``."""
        return self.store or str(folder.parent / "store")

    @field_validator("candidates")
    @classmethod
    def _something_to_do(cls, candidates: list[Chain], known: ValidationInfo) -> list[Chain]:
        if not candidates and known.data.get("slice", True) is None:
            raise ValueError("needs a list with at least one candidate")
        return candidates

    @field_validator("baselines")
    @classmethod
    def _apart_from_budgets(
        cls, baselines: dict[str, Chain], known: ValidationInfo
    ) -> dict[str, Chain]:
        budget = known.data.get("budget")
        taken = set(baselines) & set(budget.each if budget is not None and budget.several else ())
        if taken:
            raise ValueError(f"{min(taken)!r} is no name for a baseline: a budget is called so")
        return baselines

    def of_budgets(self, store: str) -> dict[str, "Recipe"]:
        """One recipe for each budget of the list, by the budget's name.

        Args:
            store: folder or URL of that of all of them, whatever folders they are run into.
        """
        return {
            label: self.model_copy(
                update={
                    "name": f"{self.name}-{label}",
                    "budget": budget,
                    "store": store,
                    "publish": f"{self.publish}/{label}" if self.publish else None,
                }
            )
            for label, budget in self.budget.each.items()
        }

    def chains(self) -> list[Chain]:
        """Candidates and baselines: everything that is measured."""
        return list(dict.fromkeys([*self.candidates, *self.baselines.values()]))

    def kept(self, unit: str) -> bool:
        """Whether the recipe leaves a unit as it is."""
        return any(re.search(pattern, unit) for pattern in self.keep)

    def to_yaml(self) -> str:
        """The recipe as resolved, defaults written out; reads back as the same recipe."""
        plain = self.model_dump(mode="json", exclude={"candidates", "baselines"}, exclude_none=True)
        plain["model"] = portable(self.model)
        for section in ("calibration", "evaluation"):
            for source in plain[section]["texts"]:
                if "file" in source:
                    source["file"] = portable(source["file"])
        plain["candidates"] = [_entry(chain) for chain in self.candidates]
        plain["baselines"] = {name: _entry(chain) for name, chain in self.baselines.items()}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _entry(chain: Chain) -> Any:
    links = [
        {"method": spec.method, **spec.parsed().model_dump(mode="json", exclude_none=True)}
        for spec in chain
    ]
    return links if len(links) > 1 else links[0]


def _describe(error: ValidationError) -> Iterator[str]:
    """A line for each mistake: key, what is allowed."""
    for problem in error.errors():
        location = [str(part) for part in problem["loc"] if part not in (_ONE, _LIST)]
        key = shown(".".join(location)) or "the recipe"
        given = _shown(problem["input"])
        if problem["type"] == "extra_forbidden":
            allowed = ", ".join(_allowed(location[:-1]))
            yield f"{key}: unknown key (allowed here: {allowed})"
        elif problem["type"] == "missing":
            yield f"{key}: missing"
        elif problem["type"] == "model_type":
            allowed = ", ".join(_allowed(location))
            yield f"{key}: must be a mapping (keys: {allowed}), got {given}"
        elif problem["type"] == "value_error":
            yield f"{key}: {problem['ctx']['error']}"
        else:
            yield f"{key}: {problem['msg']}, got {given}"


_SECTIONS: Mapping[str, type[BaseModel]] = {
    "budget": BudgetSection,
    "calibration": Calibration,
    "evaluation": Texts,
    "compute": Compute,
    "tracking": Tracking,
    "cache": CacheSection,
    "router_calibration": RouterOptions,
    "slice": SliceOptions,
    "tune": Tune,
    "refine": Refine,
}


def _allowed(location: list[str]) -> list[str]:
    if not location:
        return list(Recipe.model_fields)
    if "texts" in location:
        return list(Source.model_fields)
    return list(_SECTIONS[location[0]].model_fields)


def load_recipe(file: Path) -> Recipe:
    """Reads and checks a recipe; relative paths are resolved against the recipe's folder.

    Raises:
        UserError: naming every mistake at once.
    """
    raw, problems = _read(file)
    base = file.resolve().parent
    recipe = None
    try:
        recipe = Recipe(**raw)
    except ValidationError as error:
        problems += _describe(error)
    problems += _missing(raw, base)
    if problems or recipe is None:
        lines = (printable(problem)[:_LINE_CHARACTERS] for problem in dict.fromkeys(problems))
        raise UserError("\n".join(f"{file}: {line}" for line in lines))
    return _resolved(recipe, base)


def _read(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys of the file, and those that are written twice, one line each."""
    raw, twice = read_yaml(file)
    if not isinstance(raw, dict):
        raise UserError(f"{file}: a recipe is a mapping of keys; see recipes/demo.yaml")
    return {str(key): value for key, value in raw.items()}, twice


def _missing(raw: Mapping[str, Any], base: Path) -> Iterator[str]:
    """A line for each text file or built-in name that is not there, and each path that is none.

    The recipe may be wrong in any other way.
    """
    named: dict[str, Any] = {key: raw.get(key) for key in ("model", "store")}
    cache = raw.get("cache")
    named["cache.folder"] = cache.get("folder") if isinstance(cache, dict) else None
    for name in ("calibration", "evaluation"):
        section = raw.get(name)
        texts = section.get("texts") if isinstance(section, dict) else None
        for index, source in enumerate(texts if isinstance(texts, list) else []):
            if isinstance(source, dict):
                named[f"{name}.texts.{index}.file"] = source.get("file")
    if str(raw.get("score")).endswith(".json"):
        named["score"] = raw["score"]
    for key, value in named.items():
        if not isinstance(value, str) or len(value) > _PATH_CHARACTERS or "\0" in value:
            continue  # told by the schema
        try:
            own = {"store": _store_path, "score": _store_path, "cache.folder": _folder_path}
            path = own.get(key, resolve)(value, base)
            if key.endswith(("file", "score")) and not Path(path).is_file():
                yield f"{key}: no file {path}"
        except ValueError as error:
            yield f"{key}: {error}"


def _store_path(name: str, base: Path) -> str:
    return local_or_url(name) if is_url(name) else _folder_path(name, base)


def _folder_path(name: str, base: Path) -> str:
    try:
        return str(absolute_path(name, base).resolve())
    except (OSError, RuntimeError) as error:  # too long, or links in a circle
        raise ValueError(f"{name[:80]!r} cannot be looked up: {error}"[:300]) from None


def _resolved(recipe: Recipe, base: Path) -> Recipe:
    sections = {}
    for name in ("calibration", "evaluation"):
        section: Texts = getattr(recipe, name)
        texts = [
            source.model_copy(update={"file": resolve(source.file, base) if source.file else None})
            for source in section.texts
        ]
        sections[name] = section.model_copy(update={"texts": texts})
    store = _store_path(recipe.store, base) if recipe.store else None
    cache = recipe.cache
    if cache.folder is not None:
        cache = cache.model_copy(update={"folder": _folder_path(cache.folder, base)})
    model = resolve(recipe.model, base)
    found = {"model": model, "store": store, "cache": cache, **sections}
    if recipe.score is not None and recipe.score.endswith(".json"):
        found["score"] = _store_path(recipe.score, base)
    return recipe.model_copy(update=found)
