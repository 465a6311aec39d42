"""Does a written folder load as what was planned? Numbers decide, not names.

The reference is the original model, block by block, with every compressed unit's weight replaced by
what its piece stands for. Against it stand the logits of the folder: reloaded by transformers, for
``vllm`` decoded by the compressed-tensors package through the folder's own configuration (and
reloaded by transformers as well where it can). An encoder has no logits; its last hidden states
stand for them. Reloading takes the memory that the loaded model has
in use, and one block in float32.

Both sides compute in float32 with weights rounded alike, so that only the order of sums differs:
at most 5e-7 of the largest logit in tiny models of every family, and growing with depth. A unit
read with a wrong scheme gives 1e-2 and more. The tolerance lies between.
"""

import contextlib
import gc
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.kernels import channels
from moesaic.methods.base import Unit
from moesaic.orchestrator.bank import BIAS, ROUTER, is_reduced, split, split_biases
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.compressed_modules import Packed
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.export import PACKED, is_dense, replaced_names, schemes, unplaced
from moesaic.orchestrator.family import Family
from moesaic.orchestrator.pieces import piece_header, read_piece
from moesaic.orchestrator.skeleton import model_class
from moesaic.orchestrator.stated_dtype import loaded_dtype
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.targets import Serve, plan_problem
from moesaic.orchestrator.tensorfile import Stored, read_file

TOLERANCE = 1e-3
# Rows of the output head in float32 at a time.
_HEAD_ROWS = 8192

Weights = Mapping[str, Tensor]


def verify(
    folder: Path,
    checkpoint: Checkpoint,
    chosen: Mapping[str, Path | None],
    serve: Serve,
    ids: Tensor,
) -> float:
    """Largest difference of logits, relative to the largest logit.

    Args:
        folder: what ``assemble`` wrote.
        checkpoint: the original model.
        chosen: unit → its piece; None, or no entry, where the unit was left as it is.
        serve: who is to load the folder.
        ids: a few tokens ``[B, T]``.

    Raises:
        RunError: the folder does not load, has tensors too few or too many, or the difference is
            above :data:`TOLERANCE`.
    """
    exact = StreamedModel(checkpoint, dtype=torch.float32, rounded=loaded_dtype(folder))
    pieces = {name: path for name, path in chosen.items() if path is not None}

    def planned(unit: Unit) -> Weights:
        if unit.name not in pieces:
            return {}
        return {name: member.effective() for name, member in read_piece(pieces[unit.name]).items()}

    # Asked for when what stands against it is there: a loaded model is gone by then.
    reference = cache(lambda: _streamed(exact, planned, ids))

    def compared(reader: str, found: Tensor) -> float:
        return _compare(folder, reader, exact.family.yardstick.outputs, reference(), found)

    difference = 0.0
    if serve == "vllm":
        decoder = _Decoder(folder, exact, pieces)
        decoded = _streamed(exact, decoder.weights, ids)
        difference = compared("compressed-tensors", decoded)
    if serve != "vllm" or _transformers_loads(exact, pieces):
        reloaded = _reloaded(folder, serve, ids, exact)
        gc.collect()  # hooks hold the model, and it holds them
        difference = max(difference, compared("transformers", reloaded))
    return difference


def _compare(folder: Path, reader: str, what: str, reference: Tensor, found: Tensor) -> float:
    scale = reference.abs().max().item()
    low, high = found.sub_(reference).aminmax()
    difference = max(-low.item(), high.item()) / scale
    if not difference <= TOLERANCE:  # NaN, too
        raise RunError(
            f"{folder}: read by {reader}, its {what} differ from the planned model's by "
            f"{difference:.1e} of the largest, limit {TOLERANCE:.0e}"
        )
    return difference


@torch.no_grad()
def _streamed(model: StreamedModel, weights: Callable[[Unit], Weights], ids: Tensor) -> Tensor:
    """Outputs with each unit's ``weights``, where there are any; one block in memory."""
    hidden = model.embed(ids)
    for index, layout in enumerate(model.layouts):
        replaced = {unit.name: weights(unit) for unit in layout.units}
        hidden = model.run_block(index, model.load_block(index, replaced), hidden)
    outputs = model.outputs(hidden)
    model.drop_outer()
    return outputs


@torch.no_grad()
def _reloaded(folder: Path, serve: Serve, ids: Tensor, original: StreamedModel) -> Tensor:
    """Outputs in float32 of what plain transformers makes of the folder.

    The model is loaded in the folder's own dtype, so that weights are rounded as they will be in
    use, and one module at a time computes in float32. Compressed-tensors unpacks on the first call,
    which must find the packed weights as they were loaded.
    """
    with _quiet():
        try:
            model = _load(folder, original)
            if serve != "moesaic":
                model(ids[:1, :1])
            _put_constants(model, original)
            _compute_in_float32(model, original.family)
            found = model(ids)
        except (RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise RunError(f"{folder}: transformers cannot load it: {first}") from error
    outputs: Tensor = found.last_hidden_state if original.family.is_encoder else found.logits
    return outputs


def _put_constants(model: nn.Module, original: StreamedModel) -> None:
    """Gives a model the original's constants, which transformers makes in the files' dtype: how
    they are rounded (Gemma's scale of embeddings) is not what is verified."""
    known = dict(model.named_buffers())
    for name, value in original.constants().items():
        if name in known:  # in place: compressed-tensors copies what is assigned into the old dtype
            known[name].data = value.clone()


def _compute_in_float32(model: nn.Module, family: Family) -> None:
    """Makes the model compute in float32; only what is at work holds its weights so.

    Of the embedding these are the rows that are looked up, of the head a slice at a time.
    """
    blocks, _, _ = family.block.rpartition(".")
    for module in model.get_submodule(blocks).children():
        _widen_while_at_work(module)
    if family.is_encoder:
        holder, _, _ = blocks.partition(".")
        for name, module in model.named_children():
            if name != holder:
                _widen_while_at_work(module)
        return
    for path in (*family.beside, family.norm):
        _widen_while_at_work(model.get_submodule(path))
    _widen_rows(model.get_submodule(family.embed))
    head: Any = model.get_submodule(family.head)

    def logits(x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], len(head.weight))
        parts = zip(head.weight.split(_HEAD_ROWS), out.split(_HEAD_ROWS, -1), strict=True)
        for rows, part in parts:
            torch.matmul(x, rows.float().T, out=part)
        return out if head.bias is None else out.add_(head.bias)

    head.forward = logits


def _widen_while_at_work(module: nn.Module) -> None:
    """Parts of compressed weights stay what they are."""
    held: list[tuple[Tensor, Tensor]] = []

    def widen(*_: object) -> None:
        for child in module.modules():
            if isinstance(child, Packed):
                continue
            for tensor in (*child.parameters(recurse=False), *child.buffers(recurse=False)):
                if tensor.is_floating_point() and tensor.dtype != torch.float32:
                    held.append((tensor, tensor.data))
                    tensor.data = tensor.data.float()

    def narrow(*_: object) -> None:
        for tensor, data in held:
            tensor.data = data
        held.clear()

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(narrow)


def _widen_rows(embedding: Any) -> None:
    weight, forward = embedding.weight, embedding.forward

    def look_up(ids: Tensor) -> Tensor:
        rows, index = ids.unique(return_inverse=True)
        whole, padding = weight.data, embedding.padding_idx
        weight.data, embedding.padding_idx = whole[rows].float(), None
        try:
            found: Tensor = forward(index)
        finally:
            weight.data, embedding.padding_idx = whole, padding
        return found

    embedding.forward = look_up


def _load(folder: Path, original: StreamedModel) -> Any:
    family = original.family
    # The default implementation of experts demands widths that are multiples of 16 bytes.
    model, report = model_class(family).from_pretrained(
        folder,
        dtype="auto",
        experts_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, report[kind]))
        # What plays no part may lack in the original as well.
        names = [name for name in names if not family.is_unused_outside(name)]
        if names:
            raise RunError(f"{folder}: {len(names)} {kind.replace('_', ' ')}, such as {names[0]}")
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars of other packages off the screen; they know no option for it."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _transformers_loads(model: StreamedModel, pieces: Mapping[str, Path]) -> bool:
    """Whether transformers can read a plan that was written for vLLM.

    It cannot read dense experts beside anything compressed unless the configuration says so in a
    way that vLLM would not understand.
    """
    banks = [unit.name for unit in model.units() if unit.kind == "bank"]
    if pieces and any(name not in pieces for name in banks):
        return False
    headers = {name: unplaced(piece_header(path)) for name, path in pieces.items()}
    dense = [u for u in model.units() if u.name in pieces and is_dense(u, headers[u.name])]
    if dense and len(dense) < len(pieces):
        return False
    planned = schemes(model, headers)
    return plan_problem(model.units(), planned, "transformers", model.family) is None


class _Decoder:
    """Reads a compressed-tensors folder by its own configuration, without any engine.

    Raises:
        RunError: a tensor is missing, left over or not the original's, or the configuration does
            not give a layer exactly one scheme.
    """

    def __init__(self, folder: Path, model: StreamedModel, pieces: Mapping[str, Path]) -> None:
        from compressed_tensors.quantization import QuantizationConfig

        self.folder, self.model, self.pieces = folder, model, pieces
        self.headers = {name: unplaced(piece_header(path)) for name, path in pieces.items()}
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stated = config.get("quantization_config")
        self.config: Any = QuantizationConfig.model_validate(stated) if stated else None
        self.stored: dict[str, Stored] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.stored.update(read_file(file)[0])
        self._check_names()

    def weights(self, unit: Unit) -> Weights:
        """Members of a compressed unit, decoded."""
        if unit.name not in self.pieces:
            return {}
        piece = self.headers[unit.name]
        names = self._names(unit)
        side = self._side(unit) if is_reduced(piece) else {}
        if unit.kind == "bank" and is_dense(unit, piece) and self.model.bank.fused:
            fused = self._read(names["gate"][0]), self._read(names["down"][0])
            return {**split(*fused, self.model.bank), **side}
        read = self._read if is_dense(unit, piece) else self._decode
        members = {}
        for member, own in names.items():
            matrices = [read(name) for name in own]
            members[member] = matrices[0] if unit.kind == "linear" else torch.stack(matrices)
        if unit.kind == "linear" and members["weight"].shape != unit.shapes["weight"]:
            planned = read_piece(self.pieces[unit.name])["weight"]
            return {"weight": channels.placed(planned, members["weight"])}
        return {**members, **side}

    def _names(self, unit: Unit) -> dict[str, list[str]]:
        """Member → names of its weights in the original; of a reduced bank, those that are left."""
        names = self.model.unit_tensors(unit)
        if unit.kind == "linear" or self.model.bank.fused:
            return names
        return {m: own[: self.headers[unit.name][m].shape[0]] for m, own in names.items()}

    def _side(self, unit: Unit) -> dict[str, Tensor]:
        """Router and biases of a reduced bank."""
        kept, model = self.model.layouts[unit.block].kept, self.model
        router = model.router_names(unit.block)
        found = {f"{ROUTER}{role}": self._read(kept[name]) for role, name in router.items()}
        biases = [self._read(kept[name]) for name in model.bias_names(unit.block)]
        if biases:
            own = split_biases(biases[0], biases[1], model.bank)
            found |= {f"{BIAS}{name}": bias for name, bias in own.items()}
        return found

    def _decode(self, name: str) -> Tensor:
        from compressed_tensors.compressors import BaseCompressor

        layer = name.removesuffix(".weight")
        compressor = BaseCompressor.get_value_from_registry(PACKED)
        parts = {name.removeprefix(f"{layer}."): self._read(name) for name in self._parts(layer)}
        weight: Tensor = compressor.decompress(parts, self._scheme(layer))["weight"]
        return weight

    def _scheme(self, layer: str) -> Any:
        from compressed_tensors.utils.match import match_name

        found = [
            group
            for group in self.config.config_groups.values()
            if any(match_name(layer, target) for target in group.targets)
        ]
        ignored = any(match_name(layer, target) for target in self.config.ignore)
        if len(found) != 1 or ignored:
            raise RunError(
                f"{self.folder / 'config.json'}: {layer} has {len(found)} schemes instead of 1"
                + (" and is ignored" if ignored else "")
            )
        return found[0]

    def _parts(self, layer: str) -> list[str]:
        kinds = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        return [f"{layer}.{kind}" for kind in kinds if f"{layer}.{kind}" in self.stored]

    def _check_names(self) -> None:
        left = set(self.stored)
        original = set(self.model.checkpoint.names())
        for unit in self.model.units():
            if unit.name not in self.pieces:
                continue
            piece = self.headers[unit.name]
            replaced = replaced_names(self.model, unit, piece)
            original -= replaced
            if is_reduced(piece):
                left -= replaced - {n for own in self._all(unit) for n in own}
            for names in self._names(unit).values():
                for name in names:
                    layer = name.removesuffix(".weight")
                    left -= {name} if is_dense(unit, piece) else set(self._parts(layer))
        for name in original:
            if name not in self.stored:
                raise RunError(f"{self.folder}: no tensor {name}")
            left.discard(name)
            if not torch.equal(self._read(name), self.model.checkpoint.read(name)):
                raise RunError(f"{self.folder}: tensor {name} is not the original's")
        if left:
            raise RunError(f"{self.folder}: {len(left)} tensors too many, such as {min(left)}")

    def _all(self, unit: Unit) -> Iterable[list[str]]:
        return self.model.unit_tensors(unit).values()

    def _read(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.stored[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor
