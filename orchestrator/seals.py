"""Seals: the JSON beside an entry, read within bounds and checked before it is believed.

A seal tells the size and digest of the entry's file, and what is known of the entry besides its
tensors. Whoever shares the store may have written it. So that nothing else has to doubt it, its
metadata must have the form that its kind of entry has; an entry with another seal counts as
damaged, and is made again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moesaic.orchestrator.console import stderr
from moesaic.orchestrator.foreign import parse_json, read_bounded, shown

# Bytes of a seal. The largest are those of statistics: a number for each expert.
MOST_BYTES = 1 << 20

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Figure = Annotated[float, Field(allow_inf_nan=False)]
_Seconds = Annotated[_Figure, Field(ge=0)]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True)


class _Event(_Form):
    """As :class:`moesaic.methods.base.Event`."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    message: str
    unit: str = ""
    value: float = 0.0


class _Piece(_Form):
    unit: str
    bytes: dict[str, _Count]  # of each member
    seconds: _Seconds
    events: list[_Event]
    cut_of: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] = ""


class _Reduction(_Form):
    unit: str
    seconds: _Seconds
    events: list[_Event]
    tokens: _Count = 0


class _Statistics(_Form):
    # Of each site: of all tokens, or of each expert.
    tokens: dict[str, _Figure | list[_Figure]]
    routed: dict[str, _Figure | list[_Figure]]


class _Basis(_Form):
    dropped: float
    events: list[_Event]


class _Routers(_Form):
    before: float
    after: float


# Kind of entry → what its metadata must have; of other kinds nothing is asked.
_FORMS: dict[str, type[_Form]] = {
    "pieces": _Piece,
    "reductions": _Reduction,
    "stats": _Statistics,
    "bases": _Basis,
    "routers": _Routers,
}


class UnfitError(ValueError):
    """A seal whose metadata is not that of its kind of entry."""


def parse_seal(raw: bytes) -> dict[str, Any]:
    """``size``, ``digest`` and ``metadata`` of a seal.

    Raises:
        ValueError: it is none.
    """
    found = parse_json(raw) if len(raw) <= MOST_BYTES else None
    if not isinstance(found, dict):
        raise ValueError("no seal")
    size, digest, metadata = map(found.get, ("size", "digest", "metadata"))
    if type(size) is not int or size < 0 or not isinstance(digest, str):
        raise ValueError("no seal")
    if not isinstance(metadata, dict):
        raise ValueError("no seal")
    return {"size": size, "digest": digest, "metadata": metadata}


def seal_text(size: int, digest: str, metadata: Mapping[str, Any]) -> str:
    """A seal, as :func:`parse_seal` reads it; raises ValueError where it would not."""
    text = json.dumps({"size": size, "digest": digest, "metadata": dict(metadata)}, sort_keys=True)
    if len(text) > MOST_BYTES:
        raise ValueError(f"metadata of {len(text):,} bytes, limit {MOST_BYTES:,} bytes")
    return text


def read_seal(file: Path | str) -> dict[str, Any]:
    """As :func:`parse_seal`, of a file; raises OSError as well."""
    return parse_seal(read_bounded(file, MOST_BYTES))


def check_metadata(kind: str, metadata: Mapping[str, Any]) -> None:
    """Raises UnfitError for metadata that an entry of a kind cannot have."""
    form = _FORMS.get(kind)
    if form is None:
        return
    try:
        form.model_validate(metadata)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UnfitError(shown(f"metadata.{where}: {first['msg']}")) from None


def tell_unfit(where: str, error: UnfitError) -> None:
    """One line on an entry that is removed."""
    stderr.print(f"{where}: {error}: the entry is removed and made again", markup=False)
