"""Formulas over features: a tree of unary and binary operators that can be printed and saved.

Inputs are arrays over pairs, none below 0, each in units of its own geometric mean, so that sums
and logarithms mean the same whatever an input is measured in. The mean is that of the compressed
pairs at hand: a formula is used as it was found on one model, on another one in that model's units.

    {"formula": ["mul", ["sqrt", "fisher_error"], "influence"], "text": "sqrt(fisher_error) * …"}

is what a file holds; other keys are for people.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# The name of an input, or an operator and what it is applied to.
Tree = str | tuple[Any, ...]

UNARY: Mapping[str, Callable[[Floats], Floats]] = {
    "sqrt": np.sqrt,
    "square": np.square,
    "log1p": np.log1p,
    "inverse": np.reciprocal,
}
BINARY: Mapping[str, Callable[[Floats, Floats], Floats]] = {
    "add": np.add,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}
_SIGNS = {"add": "+", "mul": "*", "div": "/"}
# Nodes of a formula in a file; those that are evolved have far fewer.
_MOST_NODES = 200
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Formula:
    """A formula.

    Attributes:
        tree: nested tuples, such as ``("mul", ("sqrt", "fisher_error"), "influence")``.
    """

    tree: Tree

    @property
    def inputs(self) -> frozenset[str]:
        """Names of its inputs."""
        return frozenset(node for node in nodes(self.tree) if isinstance(node, str))

    @property
    def size(self) -> int:
        """Number of inputs and operators in it."""
        return sum(1 for _ in nodes(self.tree))

    def losses(self, features: Mapping[str, Floats]) -> Floats:
        """Its values from features as they were measured."""
        return evaluate(self.tree, {name: in_units(features[name]) for name in self.inputs})

    def __str__(self) -> str:
        return _text(self.tree)

    def to_json(self) -> Any:
        return json.loads(json.dumps(self.tree))


def in_units(values: Floats) -> Floats:
    """Values in units of the geometric mean of those above 0."""
    above = values[np.isfinite(values) & (values > 0)]
    return values / np.exp(np.log(above).mean()) if len(above) else values


def evaluate(tree: Tree, inputs: Mapping[str, Floats]) -> Floats:
    """The value of a tree for inputs in their units; NaN and Inf where it has none."""
    with np.errstate(all="ignore"):
        return _value(tree, inputs)


def _value(tree: Tree, inputs: Mapping[str, Floats]) -> Floats:
    if isinstance(tree, str):
        return inputs[tree]
    arguments = [_value(part, inputs) for part in tree[1:]]
    return UNARY[tree[0]](*arguments) if len(arguments) == 1 else BINARY[tree[0]](*arguments)


def nodes(tree: Tree) -> Iterator[Tree]:
    """All subtrees, the whole one first."""
    yield tree
    if not isinstance(tree, str):
        for part in tree[1:]:
            yield from nodes(part)


def _text(tree: Tree) -> str:
    if isinstance(tree, str):
        return tree
    parts = [_text(part) for part in tree[1:]]
    sign = _SIGNS.get(tree[0])
    if sign is None:
        return f"{tree[0]}({', '.join(parts)})"
    inner = [
        f"({text})" if not isinstance(part, str) and part[0] in _SIGNS else text
        for part, text in zip(tree[1:], parts, strict=True)
    ]
    return f" {sign} ".join(inner)


def parse(value: Any, known: Mapping[str, Any]) -> Tree:
    """A tree from JSON.

    Args:
        known: names that inputs may have.

    Raises:
        ValueError: it is none, or has other names.
    """
    left = [_MOST_NODES]

    def node(value: Any) -> Tree:
        left[0] -= 1
        if left[0] < 0:
            raise ValueError(f"more than {_MOST_NODES} operators and inputs")
        if isinstance(value, str):
            if value not in known:
                raise ValueError(f"unknown input {value!r}: known are {', '.join(known)}")
            return value
        operator = value[0] if isinstance(value, list) and value else None
        if not isinstance(operator, str) or operator not in {**UNARY, **BINARY}:
            operators = ", ".join([*UNARY, *BINARY])
            raise ValueError(f"unknown operator {str(operator)[:40]!r}: known are {operators}")
        count = 1 if operator in UNARY else 2
        if len(value) != count + 1:
            raise ValueError(f"{operator} takes {count} argument(s), not {len(value) - 1}")
        return (operator, *map(node, value[1:]))

    return node(value)


def load_formula(file: Path, known: Mapping[str, Any]) -> Formula:
    """The formula that a file holds.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: is no JSON of at most {_MOST_BYTES:,} bytes") from None
    if not isinstance(document, dict) or "formula" not in document:
        raise ValueError(f"{file}: holds no formula: take emq.json of moesaic scores")
    try:
        return Formula(parse(document["formula"], known))
    except ValueError as error:
        raise ValueError(f"{file}: formula: {error}") from None
