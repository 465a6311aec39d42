"""What kernels for several linears of low rank at once want of each of them."""

from torch import Tensor, nn

from moesaic.kernels import lowrank
from moesaic.orchestrator.compressed_modules import CompressedLinear


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
