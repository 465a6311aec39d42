"""Modules that compute with packed weights, for models that transformers loads.

The parts of a weight are buffers under their names in the file, and stay packed in memory. Where
the format has a kernel for it (float16 or bfloat16 on a GPU, the dtype that the weight was
compressed in), the kernel multiplies; everywhere else the format's plain PyTorch reference does,
which unpacks the weight anew on every call: see ``dequantize`` for a model that is to run long on
a CPU.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.kernels import dense
from moesaic.kernels.tensor import CompressedTensor, format_module
from moesaic.methods.reduction import combined_gates
from moesaic.orchestrator.pieces import describe, parse
from moesaic.orchestrator.reshape import resize_experts

METHOD = "moesaic"  # what the folder's quantization_config calls itself
VERSION = 1
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)


def kernels_take(x: Tensor) -> bool:
    """Whether kernels are for such activations; their weights must be of the same dtype.

    A tensor that only stands for another has no memory that a kernel could read.
    """
    stands_for_another = isinstance(x, Tensor) and type(x) not in (Tensor, nn.Parameter)
    return x.is_cuda and x.dtype in _KERNEL_DTYPES and not stands_for_another


def multiply(x: Tensor, weight: CompressedTensor) -> Tensor:
    """``x [*, in] @ weightᵀ -> [*, out]`` by the kernel where its numbers are the reference's."""
    module = format_module(weight.format)
    if kernels_take(x) and x.dtype == weight.dtype:
        return module.matmul(x, weight)
    return module.matmul_reference(x, weight)


class Packed(nn.Module):
    """One member of a unit: a compressed weight whose parts are buffers.

    Args:
        described: format, shape, dtype and params as JSON (see :mod:`moesaic.orchestrator.pieces`).
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        super().__init__()
        self.described = parse(described)
        module = format_module(self.described["format"])
        shapes = module.part_shapes(
            self.described["shape"], self.described["dtype"], self.described["params"]
        )
        self.part_names = tuple(shapes)
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    @classmethod
    def of(cls, weight: Tensor) -> "Packed":
        """A dense weight in the same clothes."""
        packed = dense.pack(weight)
        described = describe(packed.format, packed.shape, packed.dtype, packed.params)
        module = cls(described)
        for name, part in packed.parts.items():
            module._buffers[name] = part
        return module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves the parts, but never converts them: they are what the file holds."""
        parts = {name: self.get_buffer(name) for name in self.part_names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in parts.items():
            if not part.is_meta:
                device = self.get_buffer(name).device
                self._buffers[name] = part.to(device)
        return self

    @property
    def tensor(self) -> CompressedTensor:
        """The weight; its parts are the buffers themselves."""
        parts = {name: self.get_buffer(name) for name in self.part_names}
        return CompressedTensor(parts=parts, **self.described)


class CompressedLinear(Packed):
    """A linear layer with a compressed weight ``[out, in]`` and, perhaps, a dense bias.

    Args:
        described: see :class:`Packed`.
        linear: the layer whose place it takes.
    """

    bias: nn.Parameter | None

    def __init__(self, described: Mapping[str, Any], linear: nn.Linear) -> None:
        super().__init__(described)
        if self.described["shape"] != tuple(linear.weight.shape):
            raise ValueError(
                f"compressed weight {self.described['shape']} for a layer "
                f"{tuple(linear.weight.shape)}"
            )
        self.out_features, self.in_features = linear.weight.shape
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = multiply(x, self.tensor)
        return y if self.bias is None else y + self.bias

    def dense(self) -> nn.Linear:
        """The same layer with a dense weight, in the dtype of the bias or of the weight."""
        weight = self.tensor.dense()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = self.bias
        return linear


class CompressedExperts(nn.Module):
    """An expert bank with compressed gate, up ``[E, I, H]`` and down ``[E, H, I]``.

    Every expert that some token was routed to is computed by itself; the activation is that of the
    experts it replaces, and so are the biases. Each member may have a scheme of its own.

    Args:
        members: ``gate``, ``up`` and ``down`` described as :class:`Packed` wants them.
        experts: the module whose place it takes; its activation is used, its weights are not.
        reduced: what a reduced bank says of its router (``rows``, ``mapped``, ``constants``).
    """

    expert_map: Tensor | None
    constants: Tensor | None

    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None
    _original: Any

    def __init__(
        self,
        members: Mapping[str, Mapping[str, Any]],
        experts: Any,
        reduced: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.gate, self.up, self.down = (Packed(members[name]) for name in ("gate", "up", "down"))
        count, width, hidden = self.gate.described["shape"]
        self.num_experts: int = count
        if reduced is not None:
            resize_experts(experts, count, width)
        mapped, constants = (reduced or {}).get("mapped"), (reduced or {}).get("constants", 0)
        rows = torch.empty((reduced or {}).get("rows", 0), dtype=torch.int64)
        self.register_buffer("expert_map", rows if mapped else None)
        dtype = self.gate.described["dtype"]
        empty = torch.empty(constants, hidden, dtype=dtype) if constants else None
        self.register_buffer("constants", empty)
        self.is_concatenated: bool = experts.is_concatenated
        self.is_transposed: bool = experts.is_transposed
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            bias = getattr(experts, name, None)
            self.register_parameter(name, bias)
            if bias is not None:
                del experts._parameters[name]
        for name in ("gate_up_proj", "down_proj"):
            del experts._parameters[name]
        # Not a submodule: it holds no tensors any more, and must not appear in the state.
        self.__dict__["_original"] = experts

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden [T, H]``, experts and their weights ``[T, k]`` -> ``[T, H]``."""
        out = torch.zeros_like(hidden)
        gate, up, down = self.gate.tensor, self.up.tensor, self.down.tensor
        if self.expert_map is not None:
            top_k_index, top_k_weights, out = self._stand_ins(top_k_index, top_k_weights, out)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:  # marks tokens of other devices
                continue
            token, slot = torch.where(top_k_index == expert)
            x = hidden[token]  # [t, H]
            gated = self._activate(multiply(x, gate[expert]), multiply(x, up[expert]), expert)
            y = multiply(gated, down[expert])
            if self.down_proj_bias is not None:
                y = y + self.down_proj_bias[expert]
            y = y * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _stand_ins(
        self, index: Tensor, weights: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Experts ``[T, M]`` that tokens reach through the map, their joint weights, and the output
        with the constants' part; an expert that is not reached is left out as M."""
        count = self.num_experts
        size = count + (0 if self.constants is None else len(self.constants))
        share, reached = combined_gates(index, weights, self.expert_map, size)
        if self.constants is not None:
            out = out + (share[:, count:] @ self.constants.to(share)).to(out.dtype)
        experts = torch.arange(count, device=index.device).expand(len(index), count)
        return experts.masked_fill(~reached[:, :count], count), share[:, :count], out

    def _activate(self, gate: Tensor, up: Tensor, expert: int) -> Tensor:
        """The original's activation, given gate and up in the order that it knows."""
        gate_up = torch.cat([gate, up], -1)
        if not self.is_concatenated:
            gate_up = torch.stack([gate, up], -1).flatten(-2)
        if self.gate_up_proj_bias is not None:
            gate_up = gate_up + self.gate_up_proj_bias[expert]
        activated: Tensor = self._original._apply_gate(gate_up)
        return activated

    def dense(self) -> nn.Module:
        """The original module with dense weights; where a map leads to the experts, which the
        original does not know, this one with dense weights."""
        if self.expert_map is not None:
            for name in ("gate", "up", "down"):
                setattr(self, name, Packed.of(getattr(self, name).tensor.dense()))
            return self
        gate, up, down = (m.tensor.dense() for m in (self.gate, self.up, self.down))
        gate_up = torch.cat([gate, up], 1)  # [E, 2I, H]
        if not self.is_concatenated:
            gate_up = torch.stack([gate, up], 2).flatten(1, 2)
        if self.is_transposed:
            gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
        original: nn.Module = self._original
        original.register_parameter("gate_up_proj", nn.Parameter(gate_up, requires_grad=False))
        original.register_parameter("down_proj", nn.Parameter(down, requires_grad=False))
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            if getattr(self, name) is not None:
                original.register_parameter(name, getattr(self, name))
        return original
