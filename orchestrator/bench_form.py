"""What a file of unit costs holds: the form that ``moesaic bench`` writes, and ``check`` reads."""

from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from moesaic.orchestrator.foreign import shown

_Speed = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
_Count = Annotated[int, Field(ge=1, strict=True)]
_Products = Annotated[list[tuple[str, _Count, _Count, _Speed]], Field(min_length=1)]
_Sums = Annotated[list[tuple[_Count, _Speed]], Field(min_length=1)]


class _Overheads(BaseModel):
    start: _Seconds
    calibrate: _Seconds
    gradients: _Seconds
    measure: _Seconds
    search: _Seconds
    evaluate: _Seconds
    assemble: _Seconds
    report: _Seconds


class _Host(BaseModel):
    call: _Seconds
    read: _Speed
    write: _Seconds
    entry: _Seconds
    save: _Speed
    digest: _Speed
    host_add: _Speed
    overheads: _Overheads


class _Solve(BaseModel):
    chain: str
    rows: list[tuple[Annotated[int, Field(ge=0, strict=True)], _Seconds]]
    bank: _Seconds
    dense: _Seconds
    cube: _Seconds


class _Device(BaseModel):
    kind: str
    matmul: _Products
    gram: _Products
    experts: _Products
    reverse: _Products
    attention: Annotated[list[tuple[str, _Count, _Seconds]], Field(min_length=1)]
    sums: _Sums
    product: _Sums
    wide: _Seconds
    factor: _Speed
    head: dict[str, _Seconds]
    copy_: Annotated[_Speed | None, Field(alias="copy")]
    solve: list[_Solve]


class _Bench(BaseModel):
    date: str
    machine: str
    host: _Host
    devices: dict[str, _Device]


def check_bench(found: Any) -> None:
    """Raises ValueError, which says what is wrong, for what ``moesaic bench`` did not write."""
    try:
        form = _Bench.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(f"{shown(where)}: {first['msg']}") from None
    if "cpu" not in form.devices:
        raise ValueError("devices.cpu: Field required")
