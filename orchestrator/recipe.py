"""The user's YAML file: what to compress, into how many bytes, with what, judged on what."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from moesaic.kernels.discovery import UnknownName
from moesaic.methods.base import Chain
from moesaic.methods.router_calibration import Options as RouterOptions
from moesaic.methods.slicegpt import Options as SliceOptions
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.foreign import printable, shown
from moesaic.orchestrator.objects import is_url
from moesaic.orchestrator.recipe_candidates import baselines_of, candidates_of
from moesaic.orchestrator.recipe_sections import (
    BudgetSection,
    CacheSection,
    Calibration,
    Compute,
    Refine,
    Source,
    Texts,
    Tracking,
    Tune,
)
from moesaic.orchestrator.recipe_values import (
    LIST,
    NAME_CHARACTERS,
    ONE,
    PATH_CHARACTERS,
    Section,
    Text,
    absolute_path,
    check_patterns,
    local_or_url,
    portable,
    resolve,
    shown_value,
)
from moesaic.orchestrator.yamlfile import read_yaml
from moesaic.search.base import search_module
from moesaic.search.features import scores

_LINE_CHARACTERS = 1000


def _known_search(name: str) -> str:
    try:
        search_module(name)
    except UnknownName as error:
        raise ValueError(str(error)) from None
    return name


def _publish(url: str) -> str:
    if not is_url(url) or url.startswith("file://"):
        raise ValueError(f"{url[:80]!r} is no URL of a server: --output names a folder")
    return local_or_url(url)


def _score(name: str) -> str:
    if not name.endswith(".json") and name not in scores():
        raise ValueError(
            f"unknown score {name!r}: known are {', '.join(scores())}, or a file emq.json that"
            " moesaic scores wrote"
        )
    return name


class Recipe(Section):
    """The whole recipe. Field names are the YAML keys."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$", max_length=NAME_CHARACTERS)
    model: Text
    trust_remote_code: bool = False
    serve: Literal["vllm", "transformers", "moesaic"] = "moesaic"
    budget: BudgetSection
    slice: SliceOptions | None = None
    calibration: Calibration
    candidates: Annotated[list[Chain], BeforeValidator(candidates_of)]
    baselines: Annotated[dict[str, Chain], BeforeValidator(baselines_of)] = {}
    keep: Annotated[list[str], AfterValidator(check_patterns)] = []
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

    _added: dict[Chain, str] = PrivateAttr(default_factory=dict)

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

    @property
    def added(self) -> Mapping[Chain, str]:
        """Candidates that ``tune.knobs`` adds, with the knob that does."""
        return self._added

    def with_candidates(self, added: Mapping[Chain, str]) -> "Recipe":
        """The recipe with more candidates; see :mod:`moesaic.orchestrator.widening`."""
        found = self.model_copy(update={"candidates": [*self.candidates, *added]})
        found._added = {**self._added, **added}
        return found

    def key_of(self, chain: Chain) -> str:
        """The key of the recipe that a chain comes from."""
        if chain in self._added:
            return f"tune.knobs.{self._added[chain]}"
        return "candidates" if chain in self.candidates else "baselines"

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
        location = [str(part) for part in problem["loc"] if part not in (ONE, LIST)]
        key = shown(".".join(location)) or "the recipe"
        given = shown_value(problem["input"])
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
        if not isinstance(value, str) or len(value) > PATH_CHARACTERS or "\0" in value:
            continue  # told by the schema
        try:
            own = {"store": _store_path, "score": _store_path, "cache.folder": _folder_path}
            path = own.get(key, resolve)(value, base)
            # That of os.path says False of a path that is too long, too.
            if key.endswith(("file", "score")) and not os.path.isfile(path):
                yield f"{key}: no file {path}"
        except ValueError as error:
            yield f"{key}: {error}"


def _store_path(name: str, base: Path) -> str:
    return local_or_url(name) if is_url(name) else _folder_path(name, base)


def _folder_path(name: str, base: Path) -> str:
    try:
        return str(absolute_path(name, base).resolve())
    except (OSError, RuntimeError) as error:  # too long, or links in a circle
        raise ValueError(f"{name[:200]!r} cannot be looked up: {error}"[:300]) from None


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
