"""The words that every compression method is written in.

A *unit* is what one choice applies to: a linear layer or a whole expert bank. Its weights are
*members*, each ``[*batch, out, in]``: one member ``weight`` for a linear, the members ``gate``,
``up`` and ``down`` with ``batch = (experts,)`` for a bank. Inputs are measured at *sites*: members
that read the same activations (query, key and value; gate and up) share one site and so one
:class:`Stats`.

A *method* is a module of this folder that defines

``SCOPE``    kinds of unit that it can compress, a frozenset of ``"linear"`` and ``"bank"``
``ROWWISE``  whether rows (output channels) are independent given the statistics, so that the units
             of one site may be compressed together
``NEEDS``    names of the statistics that it wants, a frozenset of keys of ``SITE_STATISTICS`` and
             ``OUTPUT_STATISTICS``; for the latter a unit is measured only after the reverse pass
``Options``  a :class:`MethodOptions`: each field with its default, description and candidates
``compress`` ``(weights, stats, options) -> Result``
``predict_bytes``, ``problem``  what can be told before any work (see :class:`Method`)
``RANKED``   only where it is true: the options have a ``rank``, and the result of a smaller one is
             that of a larger one, cut (see :meth:`CompressedTensor.cut`)
``WHOLE``    only where it is true: the experts of a bank share parts of what is stored, so that
             all of them take the method or none

A method that corrects what an earlier link of a chain left, a *repair*, defines ``repair`` instead
of ``compress`` (see :class:`Repair`).

Methods that change how many experts a layer has, or how wide they are, define ``reduce`` instead of
``compress`` (see :mod:`moesaic.methods.reduction`).
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moesaic.kernels.discovery import plugin, plugins
from moesaic.kernels.tensor import CompressedTensor

T = TypeVar("T")

# What calibration can keep of a site's inputs x (batch = () or (experts,)). All are plain sums.
SITE_STATISTICS: Mapping[str, str] = {
    "tokens": "number of tokens seen, int64 [*batch]",
    "hessian": "sum of x xᵀ, float32 [*batch, in, in]",
    "abs": "sum of |x|, float32 [*batch, in]",
}


def of_source(source: int) -> str:
    """Name of the ``hessian`` of one text source, where calibration keeps them apart as well."""
    return f"hessian/{source}"


def of_dense_model(name: str) -> str:
    """Name of a statistic over the inputs that the dense model gives, beside the one over what its
    compressed predecessors leave of them."""
    return f"{name}/dense"


# What the reverse pass can keep of a member's output gradient g = d(negative log-likelihood)/dy.
# The labels are drawn from the model's own distribution, for ``fisher`` they are the next tokens of
# the text; that one is collected only where a method needs it.
OUTPUT_STATISTICS: Mapping[str, str] = {
    "grad_tokens": "number of tokens seen, int64 [*batch]",
    "grad_sq": "sum of g², float32 [*batch, out]",
    "fisher": "sum over sequences and outputs of (sum over tokens of g xᵀ)², float32 [*batch, in]",
}


@dataclass(frozen=True)
class Unit:
    """What one choice applies to.

    Attributes:
        name: name of the weight in the checkpoint without ``.weight``, or of the expert bank.
        kind: ``linear`` or ``bank``.
        block: index of the transformer block.
        part: what a person would call it: ``attention``, ``mlp``, ``experts``, ``shared_experts``.
        shapes: member → shape, ``[*batch, out, in]``.
        sites: member → name of the site where its inputs are measured.
        fused: units of one non-empty label are one layer for engines that fuse (q, k, v).
    """

    name: str
    kind: str
    block: int
    part: str
    shapes: Mapping[str, tuple[int, ...]]
    sites: Mapping[str, str]
    fused: str = ""

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in self.shapes.values())


class Stats:
    """Additive sufficient statistics of one site (or one member's outputs).

    Everything in ``sums`` adds over shards, batches, workers and members of a merged group.
    ``derived`` remembers what is computed from them (a factorisation, say) for as long as the
    object lives; it is never stored.

    Args:
        first: number of the first expert, where these are some of a bank's; events count from it.
    """

    def __init__(self, sums: Mapping[str, Tensor], first: int = 0) -> None:
        self.sums = dict(sums)
        self.first = first
        self._derived: dict[Any, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sums:
            raise KeyError(f"statistic {name!r} was not collected (there are {sorted(self.sums)})")
        return self.sums[name]

    def __contains__(self, name: str) -> bool:
        return name in self.sums

    def __add__(self, other: "Stats") -> "Stats":
        if self.sums.keys() != other.sums.keys():
            raise ValueError(f"cannot add {sorted(self.sums)} and {sorted(other.sums)}")
        return Stats({name: value + other.sums[name] for name, value in self.sums.items()})

    def derived(self, key: Any, compute: Callable[[], T]) -> T:
        """``compute()``, once per key."""
        if key not in self._derived:
            self._derived[key] = compute()
        return cast(T, self._derived[key])

    @property
    def nbytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.sums.values())


@dataclass(frozen=True)
class Event:
    """Something that a person should know about: counted, shown, tracked.

    Attributes:
        kind: short name to count by, such as ``damping_grew`` or ``few_tokens``.
        message: one line with the value, the limit and the unit.
        unit: name of the unit or the member, filled in by the caller where the method cannot know.
        value: the figure in question.
    """

    kind: str
    message: str
    unit: str = ""
    value: float = 0.0


@dataclass
class Result:
    """What a method returns: a compressed tensor per member, and what happened on the way."""

    members: dict[str, CompressedTensor]
    events: list[Event] = field(default_factory=list)


def option(
    default: Any, description: str, candidates: Sequence[Any] | None = None, **limits: Any
) -> Any:
    """A field of a method's ``Options``: default, meaning, limits and what a search may try."""
    extra: dict[str, Any] = {
        "candidates": list(candidates if candidates is not None else [default])
    }
    return Field(default=default, description=description, json_schema_extra=extra, **limits)


class MethodOptions(BaseModel):
    """Base of every method's ``Options``: typed, immutable, unknown keys forbidden.

    ``SHOWN`` names the options that are shown even where they have their default.
    """

    SHOWN: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, order=True)
class Spec:
    """A method's name and its options, normalised: one link of a chain.

    ``options`` is canonical JSON of every option, defaults included, so that equal choices are
    equal strings whatever way they were written.
    """

    method: str
    options: str

    @classmethod
    def of(cls, method: str, options: Mapping[str, Any] | None = None) -> "Spec":
        """Checks ``options`` against the method's and fills in its defaults.

        Raises:
            UnknownName: no such method.
            pydantic.ValidationError: an unknown or illegal option.
        """
        parsed = options_of(method)(**(options or {}))
        return cls(method, json.dumps(parsed.model_dump(mode="json"), sort_keys=True))

    def parsed(self) -> MethodOptions:
        return options_of(self.method)(**json.loads(self.options))

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, "options": json.loads(self.options)}

    def __str__(self) -> str:
        """The options that matter: those a method always shows, and those that are no defaults."""
        options = self.parsed()
        shown = {
            key: value
            for key, value in options
            if key in options.SHOWN or value != type(options).model_fields[key].default
        }
        inner = ", ".join(f"{key}={value}" for key, value in shown.items())
        return f"{self.method}({inner})" if inner else self.method


# A chain is applied in order: expert merge → quantize → residual.
Chain = tuple[Spec, ...]


def chain_text(chain: Chain) -> str:
    """The chain as people read it; the empty chain leaves the unit as it is."""
    return " → ".join(map(str, chain)) or "dense"


class Method(Protocol):
    """What a method module defines; see the module's docstring."""

    SCOPE: frozenset[str]
    ROWWISE: bool
    NEEDS: frozenset[str]
    Options: type[MethodOptions]

    def compress(
        self, weights: Mapping[str, Tensor], stats: Mapping[str, Stats], options: Any
    ) -> Result:
        """Compresses the members of one unit; ``stats`` has the site of each member."""

    def predict_bytes(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, options: Any
    ) -> int:
        """``Result``'s bytes from the members' shapes alone, exactly."""

    def problem(self, shapes: Mapping[str, tuple[int, ...]], options: Any) -> str | None:
        """Why members of these shapes cannot be compressed so, in one line; None if they can."""


class Repair(Protocol):
    """What the module of a repair defines; all but these two are as in :class:`Method`."""

    SCOPE: frozenset[str]
    ROWWISE: bool
    NEEDS: frozenset[str]
    Options: type[MethodOptions]

    def repair(
        self,
        weights: Mapping[str, Tensor],
        compressed: Mapping[str, CompressedTensor],
        stats: Mapping[str, Stats],
        options: Any,
    ) -> Result:
        """Corrects ``compressed``, in whatever format, towards the dense ``weights``."""

    def predict_bytes(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, options: Any
    ) -> int:
        """What the repair adds to the bytes, from the members' shapes alone, exactly."""

    def problem(self, shapes: Mapping[str, tuple[int, ...]], options: Any) -> str | None:
        """Why members of these shapes cannot be repaired so, in one line; None if they can."""


# Functions that make a module of this folder a method.
_COMPRESS, _REDUCE, _REPAIR = "compress", "reduce", "repair"


def method_module(name: str) -> Method:
    """The method called ``name``; raises ``UnknownName`` with the list of known methods."""
    return cast(Method, plugin("moesaic.methods", (_COMPRESS,), name))


def repair_module(name: str) -> Repair:
    """The repair called ``name``; raises ``UnknownName`` with the list of known repairs."""
    return cast(Repair, plugin("moesaic.methods", (_REPAIR,), name))


def link_module(name: str) -> Method | Repair:
    """The method or repair called ``name``; raises ``UnknownName`` with the list of known ones."""
    return cast(Method | Repair, plugin("moesaic.methods", (_COMPRESS, _REPAIR), name))


def _any_module(name: str) -> Any:
    """The method, reducer or repair called ``name``; raises ``UnknownName`` with those known."""
    return plugin("moesaic.methods", (_COMPRESS, _REDUCE, _REPAIR), name)


def options_of(name: str) -> type[MethodOptions]:
    """The options of a method, reducer or repair; raises ``UnknownName`` with those known."""
    options: type[MethodOptions] = _any_module(name).Options
    return options


def is_reducer(name: str) -> bool:
    """Whether the method called ``name`` is a reducer."""
    return name in plugins("moesaic.methods", (_REDUCE,))


def is_repair(name: str) -> bool:
    """Whether the method called ``name`` is a repair."""
    return name in plugins("moesaic.methods", (_REPAIR,))


def is_ranked(name: str) -> bool:
    """Whether the results of a method or repair can be cut to smaller ranks."""
    return bool(getattr(_any_module(name), "RANKED", False))


def is_whole(name: str) -> bool:
    """Whether all experts of a bank must take a method or repair together."""
    return bool(getattr(_any_module(name), "WHOLE", False))


def reducers_of(chain: Chain) -> Chain:
    """The reducers that a chain begins with."""
    return tuple(itertools.takewhile(lambda spec: is_reducer(spec.method), chain))


def compressing(chain: Chain) -> Chain:
    """What comes after the reducers that a chain begins with."""
    return chain[len(reducers_of(chain)) :]


def reducing(chain: Chain) -> tuple[Chain, Chain]:
    """The links of a chain that reduce an expert layer, and those that come after them.

    None does where a repair follows the reducers at once: it corrects each of the old experts, so
    that the layer keeps all of them (:func:`merge_of`).
    """
    first, rest = reducers_of(chain), compressing(chain)
    if first and rest and is_repair(rest[0].method):
        return (), chain
    return first, rest


def merge_of(chain: Chain) -> Chain:
    """The reducers of a chain that reduce nothing: what they leave is corrected towards each of the
    old experts."""
    return () if reducing(chain)[0] else reducers_of(chain)


def reverse_needs(chain: Chain) -> frozenset[str]:
    """Statistics of the reverse pass that the links of a chain want."""
    wanted = frozenset().union(*(_any_module(spec.method).NEEDS for spec in chain))
    return wanted & OUTPUT_STATISTICS.keys()


def methods() -> list[str]:
    """Names of all methods that compress."""
    return list(plugins("moesaic.methods", (_COMPRESS,)))


def reducers() -> list[str]:
    """Names of all reducers."""
    return list(plugins("moesaic.methods", (_REDUCE,)))


def repairs() -> list[str]:
    """Names of all repairs."""
    return list(plugins("moesaic.methods", (_REPAIR,)))


def expand(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of options given as lists: ``bits: [2, 3]`` is two."""
    names = list(options)
    values = [value if isinstance(value, list) else [value] for value in options.values()]
    for combination in itertools.product(*values):
        yield dict(zip(names, combination, strict=True))
