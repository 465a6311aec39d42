"""YAML that people wrote, or others for them: plain data, within bounds, mistakes by line.

Only the plain tags of YAML are understood, so that no file can make Python objects. A file may name
a part of itself by an alias; what it then amounts to, written out, is limited ("billion laughs"),
and so are its size and the digits of its numbers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.foreign import read_bounded, shown

_MOST_BYTES = 1 << 20
# Values of the whole file, those behind aliases counted wherever they are used.
_MOST_VALUES = 100_000
# Python writes out no number of more than 4,300 decimal digits; hexadecimal ones count for more.
_MOST_DIGITS = 3500
_BYTES = "tag:yaml.org,2002:binary"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def read_yaml(file: Path, what: str = "recipe") -> tuple[Any, list[str]]:
    """What the file holds, and a line for each key that a mapping has twice.

    Args:
        what: it is, for messages.

    Raises:
        UserError: it cannot be read, is no YAML, or more than it may be.
    """
    try:
        text = read_bounded(file, _MOST_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{file}: no such {what}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{str(file)[:200]}: cannot be read: {reason}") from None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None, []
        _values(root, {})
        twice = list(_twice(root, set()))
        return loader.construct_document(root), twice
    # A date of no calendar, a list as a key, and the like.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{file}: not valid YAML: {' '.join(reason.split())[:300]}") from None


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node amounts to with its aliases written out.

    Args:
        known: of other nodes, by identity; 0 while they are being counted.

    Raises:
        ValueError: too many, a part that holds itself, bytes, or a number of too many digits.
    """
    if isinstance(node, yaml.ScalarNode):
        line = node.start_mark.line + 1
        if node.tag == _BYTES:  # would pass for a text, and be read as one only afterwards
            raise ValueError(f"line {line}: bytes (!!binary): write a text")
        if node.tag in _NUMBERS and len(node.value) > _MOST_DIGITS:
            raise ValueError(f"line {line}: a number of {len(node.value)} characters")
        return 1
    count = known.get(id(node))
    if count == 0:
        raise ValueError(f"line {node.start_mark.line + 1}: an alias of what it stands in")
    if count is None:
        known[id(node)] = 0
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(n,) for n in node.value]
        count = 1
        for inner in pairs:
            count += sum(_values(part, known) for part in inner)
            if count > _MOST_VALUES:
                line = node.start_mark.line + 1
                raise ValueError(f"line {line}: more than {_MOST_VALUES:,} values")
        known[id(node)] = count
    return count


def _twice(node: yaml.Node, seen: set[int]) -> Iterator[str]:
    """A line for each key that a mapping of the YAML tree has already."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    name, first = shown(key.value[:80]), lines[key.value]
                    yield f"{name}: written twice, in lines {first} and {line}: take one out"
                lines[key.value] = line
            yield from _twice(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _twice(item, seen)
