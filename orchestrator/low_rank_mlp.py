"""Feed-forward layers whose linears are all of low rank, computed by one kernel.

A family says which linears read what a feed-forward layer is given and which one reads what comes
of them (the sites ``…:in`` and ``…:mid``), not what happens in between. That is found out by
trying (see :mod:`moesaic.orchestrator.probing`): it must be ``down(act(gate(x)) * up(x))`` or
``down(act(up(x)))``, with an activation that the kernel has, and nothing else. Other modules stay
as they are.

Where the last linear lies in another module (BERT's ``intermediate`` and ``output``), the first one
must return ``act(up(x))``. It then returns a :class:`Pending` tensor instead, which is computed
when anything looks at it; if that is the last linear, by the kernel and as a whole.

Every call decides anew between the kernel and the module's own forward (see
:mod:`moesaic.orchestrator.low_rank_modules`).
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from moesaic.orchestrator.compressed_modules import kernels_take
from moesaic.orchestrator.family import Family
from moesaic.orchestrator.low_rank_linears import operands
from moesaic.orchestrator.probing import NotUnderstood, Place, probed

if TYPE_CHECKING:
    from moesaic.kernels._lowrank_mlp_triton import Activation, Layer

ACTIVATIONS: Mapping["Activation", Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
# Linears answer for so many tokens, with values up to so much. The two GELUs differ by 5e-4.
_TOKENS, _LARGEST, _TOLERANCE = 16, 30.0, 1e-6


@dataclass(frozen=True)
class Form:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate.

    Attributes:
        up, down, gate: paths of the linears within the module; ``down`` is None where it lies in
            another one.
    """

    up: str
    down: str | None
    gate: str | None
    activation: "Activation"


def feed_forwards(family: Family) -> Iterator[Place]:
    """Feed-forward layers of a block."""
    groups = {group.site: group for group in (*family.mlp, *family.shared_experts)}
    for site, group in groups.items():
        inner = groups.get(f"{site.removesuffix(':in')}:mid")
        if inner is None or inner is group or len(inner.linears) != 1:
            continue
        paths = [path.split(".")[:-1] for path in (*group.linears, *inner.linears)]
        common = ".".join(os.path.commonprefix(paths))
        first = ".".join(os.path.commonprefix(paths[:-1]))
        if first and not common:
            names = tuple(path.removeprefix(f"{first}.") for path in group.linears)
            yield Place(first, names, None, after=inner.linears[0])
        else:
            yield Place.within(common, group.linears, inner.linears[0])


def recognise(module: nn.Module, place: Place) -> Form:
    """What the module at ``place`` computes.

    Raises:
        NotUnderstood: nothing that the kernel computes.
    """
    if not place.path:
        raise NotUnderstood("their linears lie in the block itself")
    biases = [getattr(module.get_submodule(name), "bias", None) for name in place.first]
    if len(place.first) > 1 and any(bias is not None for bias in biases):
        raise NotUnderstood("it takes no biases of gate and up")
    generator = torch.Generator().manual_seed(0)

    def known(size: int) -> Tensor:
        count = _TOKENS * size
        order = torch.randperm(count, generator=generator, device="cpu").double()
        return (order / count * 2 - 1).view(1, _TOKENS, size) * _LARGEST

    probe = probed(module, place, known)
    return _form(probe.result, probe.answers, place.last)


def _form(middle: Tensor, answers: Mapping[str, Tensor], down: str | None) -> Form:
    """What leads from the ``answers`` of the first linears to what the last one is given."""
    for names in itertools.permutations(answers):
        for activation, act in ACTIVATIONS.items():
            expected = act(answers[names[0]])
            expected = math.prod((answers[name] for name in names[1:]), start=expected)
            if expected.shape == middle.shape and torch.allclose(
                middle, expected, rtol=_TOLERANCE, atol=_TOLERANCE
            ):
                return Form(names[-1], down, names[0] if len(names) > 1 else None, activation)
    raise NotUnderstood("what they compute between their linears is nothing that it can do")


class LowRankFeedForward(nn.Module):
    """Comes before the class of a module that was recognised as ``low_rank_form``.

    Attributes:
        low_rank_after: the last linear where it lies in another module, which is not a part of
            this one: in a tuple.
    """

    low_rank_form: Form
    low_rank_after: "tuple[LowRankAfter, ...]" = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As a whole where that is meant for this call and faster, else as the class behind."""
        behind = super().forward
        if len(args) == 1 and not kwargs and not self.training and kernels_take(args[0]):
            (x,) = args
            kernel = _kernel()
            layer = None if kernel is None else self._layer(x, kernel)
            if kernel and layer:
                way = kernel.plan(x[..., 0].numel(), x.shape[-1], layer)
                if way != "linears":
                    whole = partial(kernel.feed_forward, x, layer, way)
                    if not self.low_rank_after:
                        return whole()
                    up: Any = self.get_submodule(self.low_rank_form.up)
                    value = partial(behind, x)
                    return Pending(x, up.out_features, value, whole, *self.low_rank_after)
        return behind(*args, **kwargs)

    def _layer(self, x: Tensor, kernel: ModuleType) -> "Layer | None":
        """The layer as the kernel takes it; None where it is not meant for it together with x."""
        form = self.low_rank_form
        linears: dict[str, nn.Module] = {"up": self.get_submodule(form.up)}
        if form.gate is not None:
            linears["gate"] = self.get_submodule(form.gate)
        linears["down"] = self.get_submodule(form.down) if form.down else self.low_rank_after[0]
        found: dict[str, Any] = {"activation": form.activation}
        for name, linear in linears.items():
            parts = operands(linear, x)
            if parts is None:
                return None
            *pair, bias = parts
            found[name] = kernel.Factors(*pair)
            if name != "gate":
                found[f"{name}_bias"] = bias
        layer: Layer = kernel.Layer(**found)
        return layer


class LowRankAfter(nn.Module):
    """Comes before the class of a linear that reads what a feed-forward module returns."""

    def forward(self, x: Tensor) -> Tensor:
        """The whole layer's outputs where they are meant to come from here."""
        if isinstance(x, Pending):
            if x.low_rank_after is self:
                return x.low_rank_whole()
            x = x.low_rank_value
        found: Tensor = super().forward(x)
        return found


class Pending(Tensor):
    """What the first module of a feed-forward layer returns, not computed yet.

    Whatever is done with it, but by the layer's last linear, is done with its value.

    Args:
        x: what the module was given, ``[*, in]``.
        width: of its outputs.
        value: computes them, ``[*, width]``.
        whole: computes what the last linear makes of them, ``[*, out]``.
        after: the last linear.
    """

    # Results are tensors of their own.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, x: Tensor, width: int, *_: Any) -> "Pending":
        shape = (*x.shape[:-1], width)
        made: Pending = Tensor._make_wrapper_subclass(cls, shape, dtype=x.dtype, device=x.device)  # type: ignore[attr-defined]
        return made

    def __init__(
        self,
        x: Tensor,
        width: int,
        value: Callable[[], Tensor],
        whole: Callable[[], Tensor],
        after: LowRankAfter,
    ) -> None:
        self.low_rank_whole, self.low_rank_after, self._value = whole, after, value

    @cached_property
    def low_rank_value(self) -> Tensor:
        return self._value()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, lambda own: own.low_rank_value, (args, kwargs or {}))
        return func(*args, **kwargs)


def _kernel() -> ModuleType | None:
    """The kernel's module; None where Triton is not installed."""
    try:
        from moesaic.kernels import _lowrank_mlp_triton
    except ModuleNotFoundError:
        return None
    return _lowrank_mlp_triton
