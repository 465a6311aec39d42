"""Attention over queries, keys and values of low rank: what it is given, and what it is.

The plain reference of the kernel in ``_lowrank_attention_triton``, and where that is slower, the
way to go. Each of the three is ``states @ leftᵀ + bias``: states ``[B, S, r]`` are what the right
factor made of the activations, left ``[heads·d, r]`` leads to the heads.

A head's features are kept as two halves: rotating (the convention of ``rotate_half``, as Llama has
it) pairs one with the other and needs no shuffling.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_HEAD_DIM = 256


class Lifted(NamedTuple):
    """Queries, keys or values: ``states [B, S, r] @ left [heads·d, r]ᵀ + bias [heads·d]``."""

    states: Tensor
    left: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.left.shape[1]


class Options(NamedTuple):
    """How to attend; see :func:`attention`."""

    head_dim: int
    causal: bool
    scale: float
    cos: Tensor | None = None
    sin: Tensor | None = None
    lengths: Tensor | None = None


def reference(q: Lifted, k: Lifted, v: Lifted, options: Options) -> Tensor:
    """The same with queries, keys and values in memory and PyTorch's own attention."""
    keys, queries = k.states.shape[1], q.states.shape[1]
    shown = visible(queries, keys, options, q.states.device)
    if options.lengths is not None:  # a weight of zero does not undo a NaN
        missing = torch.arange(keys, device=shown.device) >= options.lengths[:, None]  # [B, Sk]
        k, v = (
            each._replace(states=each.states.masked_fill(missing[:, :, None], 0)) for each in (k, v)
        )
    lifted = []
    for each, rotates in ((q, True), (k, True), (v, False)):
        features = F.linear(each.states, each.left, each.bias).unflatten(-1, (-1, options.head_dim))
        if rotates and options.cos is not None and options.sin is not None:
            features = rotated(features, options.cos[:keys], options.sin[:keys])
        lifted.append(features.transpose(1, 2))  # [B, heads, S, d]
    # Without a mask PyTorch has its fastest kernels.
    square = options.causal and queries == keys and options.lengths is None
    full = not options.causal and options.lengths is None
    result = F.scaled_dot_product_attention(
        lifted[0],
        lifted[1],
        lifted[2],
        attn_mask=None if square or full else shown,
        is_causal=square,
        scale=options.scale,
        enable_gqa=lifted[0].shape[1] != lifted[1].shape[1],
    )
    return result.masked_fill(~shown.any(-1, keepdim=True), 0).transpose(1, 2)


def visible(queries: int, keys: int, options: Options, device: torch.device) -> Tensor:
    """Which key a query sees: bool ``[B or 1, 1, Sq, Sk]``."""
    key = torch.arange(keys, device=device)
    shown = torch.ones((1, 1, queries, keys), dtype=torch.bool, device=device)
    if options.causal:
        shown = shown & (key <= key[keys - queries :, None])
    if options.lengths is not None:
        shown = shown & (key < options.lengths[:, None, None, None])
    return shown


def rotated(features: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[B, S, heads, d]`` rotated by tables ``[at least S, d/2]``, whose last S rows count."""
    cos, sin = (table[-features.shape[1] :, None].to(features.dtype) for table in (cos, sin))
    first, second = features.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def check_shapes(q: Lifted, k: Lifted, v: Lifted, options: Options) -> None:
    """Raises ValueError where shapes do not fit, or tables and lengths in dtype or device."""
    size = options.head_dim
    if size < 2 or size % 2 or size > MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {size}, it must be even and at most {MAX_HEAD_DIM}")
    parts = {"q": q, "k": k, "v": v}
    for name, part in parts.items():
        states, left, bias = part
        if states.ndim != 3 or left.ndim != 2 or states.shape[2] != left.shape[1] or not part.rank:
            raise ValueError(
                f"{name}: states are {tuple(states.shape)}, left is {tuple(left.shape)}: [B, S, r]"
                " and [heads·d, r] are needed, r at least 1"
            )
        if not len(left) or len(left) % size:
            raise ValueError(f"{name}: {len(left)} features are no heads of {size}")
        if bias is not None and tuple(bias.shape) != (len(left),):
            raise ValueError(f"{name}: bias is {tuple(bias.shape)}, not {(len(left),)}")
    if len(k.left) != len(v.left) or len(q.left) % len(k.left):
        heads = tuple(len(part.left) // size for part in parts.values())
        raise ValueError(f"heads of q, k, v are {heads}: k and v need equally many, a divisor of q")
    (batch, queries, _), keys = q.states.shape, k.states.shape[1]
    if k.states.shape[:2] != v.states.shape[:2] or len(k.states) != batch or queries > keys:
        tokens = tuple(tuple(part.states.shape[:2]) for part in parts.values())
        raise ValueError(f"q, k, v have {tokens} sequences and tokens: k and v as many, q no more")
    _check_tables(options, batch, keys, q.states.device)


def _check_tables(options: Options, batch: int, keys: int, device: torch.device) -> None:
    for name in ("cos", "sin"):
        table = getattr(options, name)
        if table is None:
            continue
        width = options.head_dim // 2
        if table.ndim != 2 or len(table) < keys or table.shape[1] != width:
            raise ValueError(f"{name} is {tuple(table.shape)}, at least {(keys, width)} is needed")
        if table.dtype != torch.float32 or table.device != device:
            raise ValueError(f"{name} is {table.dtype} on {table.device}: float32 on {device}")
    lengths = options.lengths
    if lengths is not None and (
        tuple(lengths.shape) != (batch,)
        or lengths.dtype not in (torch.int32, torch.int64)
        or lengths.device != device
    ):
        raise ValueError(
            f"lengths are {lengths.dtype} {tuple(lengths.shape)} on {lengths.device}: integers"
            f" {(batch,)} on {device}"
        )
