"""Feed-forward layers whose linears are all of low rank, computed by one kernel.

A family says which linears read what a feed-forward layer is given and which one reads what comes
of them (the sites ``…:in`` and ``…:mid``), not what happens in between. That is found out by
trying (see :mod:`moesaic.orchestrator.probing`): it must be ``down(act(gate(x)) * up(x))`` or
``down(act(up(x)))``, with an activation that the kernel has, and nothing else. Other modules stay
as they are.

Every call decides anew between the kernel and the module's own forward (see
:mod:`moesaic.orchestrator.low_rank_modules`).
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        up, down, gate: paths of the linears within the module.
    """

    up: str
    down: str
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
        yield Place.within(common, group.linears, inner.linears[0])


def recognise(module: nn.Module, place: Place) -> Form:
    """What the module at ``place`` computes.

    Raises:
        NotUnderstood: nothing that the kernel computes.
    """
    if not place.path:
        raise NotUnderstood("their linears lie in several modules")
    biases = [getattr(module.get_submodule(name), "bias", None) for name in place.first]
    if len(place.first) > 1 and any(bias is not None for bias in biases):
        raise NotUnderstood("it takes no biases of gate and up")
    generator = torch.Generator().manual_seed(0)

    def known(size: int) -> Tensor:
        count = _TOKENS * size
        order = torch.randperm(count, generator=generator, device="cpu").double()
        return (order / count * 2 - 1).view(1, _TOKENS, size) * _LARGEST

    probe = probed(module, place, known)
    assert place.last is not None
    return _form(probe.result, probe.answers, place.last)


def _form(middle: Tensor, answers: Mapping[str, Tensor], down: str) -> Form:
    """What leads from the ``answers`` of the first linears to what the last one was given."""
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
    """Comes before the class of a module that was recognised as ``low_rank_form``."""

    low_rank_form: Form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As a whole where that is meant for this call and faster, else as the class behind."""
        if len(args) == 1 and not kwargs and not self.training and kernels_take(args[0]):
            (x,) = args
            kernel = _kernel()
            layer = None if kernel is None else self._layer(x, kernel)
            if kernel and layer:
                way = kernel.plan(x[..., 0].numel(), x.shape[-1], layer)
                if way != "linears":
                    return kernel.feed_forward(x, layer, way)
        return super().forward(*args, **kwargs)

    def _layer(self, x: Tensor, kernel: ModuleType) -> "Layer | None":
        """The layer as the kernel takes it; None where it is not meant for it together with x."""
        form = self.low_rank_form
        found: dict[str, Any] = {"activation": form.activation}
        for name, path in (("gate", form.gate), ("up", form.up), ("down", form.down)):
            if path is None:
                continue
            parts = operands(self.get_submodule(path), x)
            if parts is None:
                return None
            *pair, bias = parts
            found[name] = kernel.Factors(*pair)
            if name != "gate":
                found[f"{name}_bias"] = bias
        layer: Layer = kernel.Layer(**found)
        return layer


def _kernel() -> ModuleType | None:
    """The kernel's module; None where Triton is not installed."""
    try:
        from moesaic.kernels import _lowrank_mlp_triton
    except ModuleNotFoundError:
        return None
    return _lowrank_mlp_triton
