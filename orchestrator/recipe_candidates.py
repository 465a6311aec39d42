"""Candidates and baselines of a recipe: methods with options, lists of alternatives, chains."""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from moesaic.kernels.discovery import UnknownName
from moesaic.methods.base import Chain, Spec, expand, options_of
from moesaic.methods.chains import order_problem
from moesaic.methods.slicegpt import Options as SliceOptions
from moesaic.orchestrator.recipe_values import shown_value

# Alternatives of one entry, all combinations of its lists together.
MOST_CHOICES = 1000


def _chains(value: Any) -> list[Chain]:
    """One candidate entry: a method with its options, or a list of such that follow each other.

    Lists in options are alternatives.
    """
    links = value if isinstance(value, list) else [value]
    if not links:
        raise ValueError("a chain needs at least one method")
    specs = [_specs(link) for link in links]
    count = math.prod(map(len, specs))
    if count > MOST_CHOICES:
        raise ValueError(f"{count:,} choices in one entry: at most {MOST_CHOICES:,} are taken")
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
    if count > MOST_CHOICES:
        raise ValueError(f"{count:,} choices in one entry: at most {MOST_CHOICES:,} are taken")
    found, lines = [], []
    for combination in expand(options):
        try:
            found.append(Spec.of(method, combination))
        except ValidationError as error:
            lines += [option_line(problem, fields) for problem in error.errors()]
    if lines:
        raise ValueError(f"method {method}: {'; '.join(dict.fromkeys(lines))}")
    return found


def option_line(problem: Any, fields: Mapping[str, Any]) -> str:
    """What is wrong with an option, from pydantic's error."""
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"unknown option {key!r} (allowed: {', '.join(fields)})"
    if problem["type"] == "value_error":
        return f"option {key}: {problem['ctx']['error']}"
    return f"option {key}: {problem['msg']}, got {shown_value(problem['input'])}"


def candidates_of(value: Any) -> list[Chain]:
    """The key ``candidates`` as chains, each once; raises ValueError naming every mistake."""
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


def baselines_of(value: Any) -> dict[str, Chain]:
    """The key ``baselines``, a chain by its name; raises ValueError naming every mistake."""
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
