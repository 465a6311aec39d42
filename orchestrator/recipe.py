"""The user's YAML file: what to compress, into how many bytes, with what, judged on what."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from moesaic.kernels.discovery import UnknownName
from moesaic.methods.base import Chain, Spec, expand, method_module
from moesaic.orchestrator.errors import UserError
from moesaic.search.base import search_module

DEMO = Path(__file__).parent / "demo"
BUILTIN = "builtin:"
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {unit + "i": 1024**power for power, unit in enumerate("kmgt", start=1)}


def parse_bytes(value: Any) -> int:
    """``1.5 GB``, ``800 MiB`` or a number: bytes. Raises ValueError on anything else."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*((?:[kmgt]i?)?)b?\s*", str(value).lower())
    try:
        number = float(match[1]) * _UNITS[match[2]] if match else 0.0
    except ValueError:
        number = 0.0
    if number < 1:
        raise ValueError(f"{value!r} is not a size: write bytes, '800 MB' or '1.5 GiB'")
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
    path = Path(name).expanduser()
    absolute = path if path.is_absolute() else relative_to / path
    return str(absolute.resolve()) if absolute.exists() else name


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


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BudgetSection(Section):
    """A limit for the checkpoint: bytes of all tensors, or stored bits per compressible weight."""

    bytes: Annotated[int, BeforeValidator(parse_bytes)] | None = None
    bits_per_weight: float | None = Field(default=None, gt=0, le=32)

    @model_validator(mode="after")
    def _one(self) -> "BudgetSection":
        if (self.bytes is None) == (self.bits_per_weight is None):
            raise ValueError("give either bytes or bits_per_weight")
        return self


class Source(Section):
    """Text from a file, a JSONL file or a Hugging Face dataset."""

    file: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    field: str = "text"
    weight: float = Field(default=1.0, gt=0, le=1e9)
    name: str | None = None

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
    sequences: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=2)
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

    shards: int = Field(default=8, ge=1)
    experts: Literal["routed", "all"] = "routed"
    gradient_sequences: int = Field(default=16, ge=0)


class Compute(Section):
    """How many workers, and what each one takes."""

    address: str | None = None
    workers: int | None = Field(default=None, ge=1)
    cpus_per_worker: int = Field(default=1, ge=1)
    gpus_per_worker: float | None = Field(default=None, ge=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class Tracking(Section):
    """Where MLflow keeps the record; by default sqlite beside the run's folder."""

    uri: str | None = None
    experiment: str = "moesaic"
    register_as: str | None = None


def _chains(value: Any) -> list[Chain]:
    """One candidate entry: a method with its options; lists in options are alternatives."""
    return [(spec,) for spec in _specs(value)]


def _specs(link: Any) -> Iterator[Spec]:
    if not isinstance(link, dict) or not isinstance(link.get("method"), str):
        raise ValueError("needs a mapping with the key method and its options")
    options = {key: value for key, value in link.items() if key != "method"}
    try:
        fields = method_module(link["method"]).Options.model_fields
        yield from expand(link["method"], options)
    except UnknownName as error:
        raise ValueError(str(error)) from None
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown option {key!r} (allowed: {', '.join(fields)})")
            elif problem["type"] == "value_error":
                lines.append(f"option {key}: {problem['ctx']['error']}")
            else:
                lines.append(f"option {key}: {problem['msg']}, got {problem['input']!r}")
        raise ValueError(f"method {link['method']}: {'; '.join(dict.fromkeys(lines))}") from None


def _candidates(value: Any) -> list[Chain]:
    if not isinstance(value, list) or not value:
        raise ValueError("needs a list with at least one candidate")
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
        if name in ("dense", "plan"):
            problems.append(f"{name!r} is no name for a baseline (dense and plan are taken)")
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


class Recipe(Section):
    """The whole recipe. Field names are the YAML keys."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")
    model: str
    trust_remote_code: bool = False
    serve: Literal["vllm", "transformers", "moesaic"] = "moesaic"
    budget: BudgetSection
    calibration: Calibration
    candidates: Annotated[list[Chain], BeforeValidator(_candidates)]
    baselines: Annotated[dict[str, Chain], BeforeValidator(_baselines)] = {}
    keep: Annotated[list[str], AfterValidator(_check_patterns)] = []
    search: Annotated[str, AfterValidator(_known_search)] = "knapsack"
    propagate: bool = False
    evaluation: Texts
    compute: Compute = Compute()
    tracking: Tracking = Tracking()
    store: str | None = None

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


def _entry(chain: Chain) -> dict[str, Any]:
    (spec,) = chain
    return {"method": spec.method, **spec.parsed().model_dump(mode="json", exclude_none=True)}


def _describe(error: ValidationError, file: Path) -> str:
    """Every mistake on a line of its own: file, key, what is allowed."""
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        key = ".".join(location) or "the recipe"
        if problem["type"] == "extra_forbidden":
            allowed = ", ".join(_allowed(location[:-1]))
            lines.append(f"{file}: {key}: unknown key (allowed here: {allowed})")
        elif problem["type"] == "missing":
            lines.append(f"{file}: {key}: missing")
        elif problem["type"] == "model_type":
            allowed = ", ".join(_allowed(location))
            lines.append(
                f"{file}: {key}: must be a mapping (keys: {allowed}), got {problem['input']!r}"
            )
        elif problem["type"] == "value_error":
            lines.append(f"{file}: {key}: {problem['ctx']['error']}")
        else:
            lines.append(f"{file}: {key}: {problem['msg']}, got {problem['input']!r}")
    return "\n".join(dict.fromkeys(lines))


_SECTIONS: Mapping[str, type[BaseModel]] = {
    "budget": BudgetSection,
    "calibration": Calibration,
    "evaluation": Texts,
    "compute": Compute,
    "tracking": Tracking,
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
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        raise UserError(f"{file}: not valid YAML: {text}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file}: a recipe is a mapping of keys; see recipes/demo.yaml")
    try:
        recipe = Recipe(**{str(key): value for key, value in raw.items()})
    except ValidationError as error:
        raise UserError(_describe(error, file)) from None
    return _resolved(recipe, file)


def _resolved(recipe: Recipe, file: Path) -> Recipe:
    base = file.resolve().parent
    problems: list[str] = []

    def found(key: str, name: str) -> str:
        try:
            return resolve(name, base)
        except ValueError as error:
            problems.append(f"{file}: {key}: {error}")
            return name

    model = found("model", recipe.model)
    sections = {}
    for name in ("calibration", "evaluation"):
        section: Texts = getattr(recipe, name)
        texts = []
        for index, source in enumerate(section.texts):
            key = f"{name}.texts.{index}.file"
            path = found(key, source.file) if source.file else None
            if path is not None and not path.startswith(BUILTIN) and not Path(path).is_file():
                problems.append(f"{file}: {key}: no file {path}")
            texts.append(source.model_copy(update={"file": path}))
        sections[name] = section.model_copy(update={"texts": texts})
    if problems:
        raise UserError("\n".join(problems))
    store = str((base / recipe.store).resolve()) if recipe.store else None
    return recipe.model_copy(update={"model": model, "store": store, **sections})
