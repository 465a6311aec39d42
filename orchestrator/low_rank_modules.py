"""Feed-forward layers whose linears are all of low rank, computed by one kernel.

A family says which linears read what a feed-forward layer is given and which one reads what comes
of them (the sites ``…:in`` and ``…:mid``), not what happens in between. That is found out by
trying (see :mod:`moesaic.orchestrator.trial`): it must be ``down(act(gate(x)) * up(x))`` or
``down(act(up(x)))``, with an activation that the kernel has, and nothing else. Other modules stay
as they are.

Every call decides anew between the kernel and the module's own forward. The kernel is for a GPU,
for the 16-bit dtype that the weights were compressed in, for shapes where it was the fastest way
when it was measured (see ``kernels/_plan.py``), and for as long as nobody has hooked the linears or
put something else in their places.
"""

import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.kernels import lowrank
from moesaic.orchestrator.compressed_modules import CompressedLinear, kernels_take
from moesaic.orchestrator.family import Family
from moesaic.orchestrator.trial import NotUnderstood, tried

if TYPE_CHECKING:
    from moesaic.kernels._lowrank_mlp_triton import Activation, Layer

_log = logging.getLogger(__name__)

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


def fuse(blocks: nn.Module, family: Family) -> None:
    """Lets the kernel compute those feed-forward layers of ``blocks`` that it can.

    Layers with a linear that is not of low rank are left as they are. So are those that are not
    understood; the log says how many, and why.
    """
    refused: dict[str, list[str]] = {}
    for (number, block), (path, reads, writes) in itertools.product(
        blocks.named_children(), feed_forwards(family)
    ):
        linears = [_submodule(block, f"{path}.{name}") for name in (*reads, writes)]
        if any(factors(linear) is None for linear in linears):
            continue
        module: Any = block.get_submodule(path)
        try:
            module.low_rank_form = recognise(module, reads, writes)
            module.__class__ = _fused(module.__class__)
        except NotUnderstood as error:
            refused.setdefault(str(error), []).append(f"{number}.{path}")
    for reason, places in refused.items():
        _log.warning(
            "%d feed-forward layers of low rank (from block %s on) go without the fused kernel: %s",
            len(places),
            places[0],
            reason,
        )


def feed_forwards(family: Family) -> Iterator[tuple[str, list[str], str]]:
    """Feed-forward layers of a block: the module's path, and within it those of the linears that
    read its inputs and of the one that reads what comes of them."""
    groups = {group.site: group for group in (*family.mlp, *family.shared_experts)}
    for site, group in groups.items():
        inner = groups.get(f"{site.removesuffix(':in')}:mid")
        if inner is None or inner is group or len(inner.linears) != 1:
            continue
        paths = [path.split(".") for path in (*group.linears, *inner.linears)]
        common = os.path.commonprefix([path[:-1] for path in paths])
        if common:
            *reads, writes = (".".join(path[len(common) :]) for path in paths)
            yield ".".join(common), reads, writes


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule; None if there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def factors(linear: nn.Module | None) -> tuple[Tensor, Tensor] | None:
    """Factors right ``[r, in]`` and left ``[out, r]`` of a linear of low rank.

    None where it is not, where its factors are not dense, and where somebody hooked it.
    """
    if not isinstance(linear, CompressedLinear) or linear.described["format"] != "lowrank":
        return None
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        return None
    left, right = lowrank.factors(linear.tensor)
    if {left.format, right.format} != {"dense"}:
        return None
    return right.dense(), left.dense()


def operands(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Both :func:`factors` and the bias, if a kernel can take them together with ``x``."""
    pair = factors(linear)
    if pair is None:
        return None
    bias: Tensor | None = getattr(linear, "bias", None)
    tensors = pair if bias is None else (*pair, bias)
    alike = all((each.dtype, each.device) == (x.dtype, x.device) for each in tensors)
    return (*pair, bias) if alike else None


def recognise(module: nn.Module, reads: Sequence[str], writes: str) -> Form:
    """What the module computes.

    Args:
        reads: paths of the linears that read what the module is given.
        writes: path of the one that reads what comes of them.

    Raises:
        NotUnderstood: nothing that the kernel computes.
    """
    biases = [getattr(module.get_submodule(name), "bias", None) for name in reads]
    if len(reads) > 1 and any(bias is not None for bias in biases):
        raise NotUnderstood("it takes no biases of gate and up")
    generator = torch.Generator().manual_seed(0)

    def known(size: int) -> Tensor:
        count = _TOKENS * size
        order = torch.randperm(count, generator=generator, device="cpu").double()
        return (order / count * 2 - 1).view(1, _TOKENS, size) * _LARGEST

    trial = tried(module, reads, writes, known)
    return _form(trial.result, trial.answers, writes)


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
        """By the kernel where it is meant for this call and faster, else as the class behind."""
        if len(args) == 1 and not kwargs and not self.training and kernels_take(args[0]):
            (x,) = args
            kernel = _kernel()
            layer = None if kernel is None else self._layer(x, kernel)
            if kernel and layer and kernel.plan(x[..., 0].numel(), x.shape[-1], layer) == "fused":
                return kernel.feed_forward(x, layer, "fused")
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


@cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind`` behind :class:`LowRankFeedForward`."""
    return type(f"LowRank{kind.__name__}", (LowRankFeedForward, kind), {})


def _kernel() -> ModuleType | None:
    """The kernel's module; None where Triton is not installed."""
    try:
        from moesaic.kernels import _lowrank_mlp_triton
    except ModuleNotFoundError:
        return None
    return _lowrank_mlp_triton
