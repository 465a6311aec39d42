"""Attention whose queries, keys and values are of low rank, lifted tile by tile in one kernel.

A family says which linears they are. What the module makes of them is found out by trying: with
known queries, keys, values and rotary tables it must give what the kernel's reference gives. Norms
of heads, sinks, gates, tables for a part of a head or for neighbouring features give other numbers.

A cache holds keys and values lifted and rotated: where there is one they must be made anyway, and
the kernel, which never makes them, has nothing to offer. So it is for calls without a cache; and
without a mask (nothing is padded), through PyTorch's attention (``sdpa``), for which that means
causal or not, as the module was found to be.
"""

import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.kernels._lowrank_attention import MAX_HEAD_DIM, Lifted, Options, reference
from moesaic.orchestrator.compressed_modules import kernels_take
from moesaic.orchestrator.family import Family
from moesaic.orchestrator.low_rank_linears import operands
from moesaic.orchestrator.probing import NotUnderstood, Place, probed

_IMPLEMENTATION = "sdpa"
_TOKENS, _TOLERANCE = 5, 1e-6
# Arguments that tell a module nothing that the others do not.
_TOLD_ELSEWHERE = frozenset({"position_ids", "use_cache"})


@dataclass(frozen=True)
class Form:
    """``attention(query(x), key(x), value(x))``, which ``out`` reads if there is one.

    Attributes:
        query, key, value, out: paths of the linears within the module.
        rotates: whether queries and keys are turned by the tables that the module is given.
    """

    query: str
    key: str
    value: str
    out: str | None
    head_dim: int
    scale: float
    causal: bool
    rotates: bool


def attentions(family: Family) -> Iterator[Place]:
    """Attentions of a block whose queries, keys and values come from one linear each."""
    groups = {group.site: group for group in family.attention}
    for site, group in groups.items():
        behind = groups.get(f"{site.removesuffix(':in')}:out")
        if len(group.linears) == 3 and behind is not None and len(behind.linears) == 1:
            path = os.path.commonprefix([name.split(".")[:-1] for name in group.linears])
            yield Place.within(".".join(path), group.linears, behind.linears[0])


def recognise(module: Any, place: Place) -> Form:
    """What the module at ``place`` computes.

    Raises:
        NotUnderstood: nothing that the kernel computes.
    """
    config: Any = getattr(module, "config", None)
    if getattr(config, "_attn_implementation", None) != _IMPLEMENTATION:
        raise NotUnderstood(f"their implementation is not {_IMPLEMENTATION}")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size % 2 or size > MAX_HEAD_DIM:
        raise NotUnderstood(f"heads have {size} features")
    generator = torch.Generator().manual_seed(0)

    def known(features: int) -> Tensor:
        shape = (1, _TOKENS, features)
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    angles = known(size // 2)
    tables = tuple(torch.cat((table, table), -1) for table in (angles.cos(), angles.sin()))
    none = {"attention_mask": None, "cache": None}
    probe = probed(module, place, known, position_embeddings=tables, **none)
    scale = float(getattr(module, "scaling", size**-0.5))
    q, k, v = (
        Lifted(answer, torch.eye(answer.shape[-1], dtype=answer.dtype, device="cpu"))
        for answer in probe.answers.values()
    )
    for causal in (True, False):
        for rotary in ((angles[0].cos(), angles[0].sin()), (None, None)):
            options = Options(size, causal, scale, *rotary)
            try:
                expected = reference(q, k, v, options).flatten(2)  # [1, tokens, heads·d]
            except RuntimeError as error:
                raise NotUnderstood(f"their linears give no heads of {size} features") from error
            if expected.shape == probe.result.shape and torch.allclose(
                probe.result, expected, rtol=_TOLERANCE, atol=_TOLERANCE
            ):
                query, key, value = place.first
                rotates = rotary[0] is not None
                return Form(query, key, value, place.last, size, scale, causal, rotates)
    raise NotUnderstood("what they make of queries, keys and values is nothing that it can do")


class LowRankAttention(nn.Module):
    """Comes before the class of a module that was recognised as ``low_rank_form``."""

    low_rank_form: Form
    config: Any
    _halves_alike: bool | None = None  # whether both halves of the rotary tables are one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """By the kernel where it is meant for this call and faster, else as the class behind."""
        given = _signature(type(self).__bases__[1]).bind(self, *args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        x, tables = given.get("hidden_states"), given.get("position_embeddings")
        others = given.keys() - {"self", "kwargs", "hidden_states", "position_embeddings"}
        plain = all(given[name] is None for name in others - _TOLD_ELSEWHERE)
        sdpa = self.config._attn_implementation == _IMPLEMENTATION
        if plain and sdpa and not self.training and isinstance(x, Tensor) and kernels_take(x):
            found = self._by_kernel(x, tables)
            if found is not None:
                out = self.low_rank_form.out
                return found if out is None else self.get_submodule(out)(found), None
        return super().forward(*args, **kwargs)

    def _by_kernel(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """The attention ``[B, S, heads·d]``; None where the kernel is not meant for ``x``, or not
        the faster way."""
        form, kernel = self.low_rank_form, _kernel()
        linears = [self.get_submodule(name) for name in (form.query, form.key, form.value)]
        found = [operands(linear, x) for linear in linears]
        if kernel is None or x.ndim != 3 or any(parts is None for parts in found):
            return None
        rotary = None
        if form.rotates:
            shape = (1, x.shape[1], form.head_dim)
            if tables is None or any(table.shape != shape for table in tables):
                return None  # sequences at positions of their own
            rotary = tuple(table[0, :, : form.head_dim // 2].float() for table in tables)
        options = Options(form.head_dim, form.causal, form.scale, *(rotary or ()))
        parts = [each for each in found if each is not None]
        sizes = [
            Lifted(x.new_empty((*x.shape[:2], len(right))), left, bias)
            for right, left, bias in parts
        ]
        if kernel.plan(*sizes, options) != "fused" or not self._tables_fit(tables):
            return None
        lifted = [Lifted(F.linear(x, right), left, bias) for right, left, bias in parts]
        attended: Tensor = kernel.attention(
            *lifted,
            form.head_dim,
            causal=form.causal,
            rotary=rotary,
            scale=form.scale,
            path="fused",
        )
        return attended.flatten(2)

    def _tables_fit(self, tables: tuple[Tensor, Tensor] | None) -> bool:
        """Whether a feature and its partner turn by one angle, as the kernel has it.

        Looked up once: it is how the model makes its tables, and looking waits for the GPU.
        """
        if not self.low_rank_form.rotates or tables is None:
            return True
        if self._halves_alike is None:
            self._halves_alike = all(torch.equal(*table.chunk(2, -1)) for table in tables)
        return self._halves_alike


@cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    """Of the forward of a class."""
    return inspect.signature(kind.forward)


def _kernel() -> ModuleType | None:
    """The kernel's module; None where Triton is not installed."""
    try:
        from moesaic.kernels import _lowrank_attention_triton
    except ModuleNotFoundError:
        return None
    return _lowrank_attention_triton
