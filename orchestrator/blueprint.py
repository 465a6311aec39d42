"""A model of which nothing is there but ``config.json``: what its files would hold.

Names, shapes and dtypes of all tensors follow from the configuration and the family, so that the
work on a model can be planned, counted and simulated before a byte of it was downloaded.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from moesaic.orchestrator.checkpoint import INDEX, SINGLE, Checkpoint, Entry, read_object
from moesaic.orchestrator.errors import RecipeError, UserError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.family import Family, load_family
from moesaic.orchestrator.recipe import Recipe
from moesaic.orchestrator.recipe_sections import Texts
from moesaic.orchestrator.skeleton import Skeleton, config_errors, read_config
from moesaic.orchestrator.store import file_digest
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.texts import Sequences

Shapes = dict[str, tuple[int, ...]]


class Blueprint(Checkpoint):
    """The headers of a model's files, from its configuration; nothing can be read.

    Args:
        path: a folder with ``config.json``.

    Raises:
        UserError: there is no configuration, or transformers cannot build the model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_object(path / "config.json")
        kind = self.config.get("model_type")
        if not isinstance(kind, str):
            raise UserError(f"{path / 'config.json'}: key model_type is missing")
        self.files = []
        self._entries = {}
        family = load_family(kind)
        config = read_config(self, family, False)
        dtype = getattr(config, "dtype", None) or torch.bfloat16
        with config_errors(path / "config.json"):
            skeleton = Skeleton(config, family, dtype, torch.device("cpu"), False)
        for name, (shape, stored) in _tensors(family, skeleton, dtype).items():
            size = torch.Size(shape).numel() * stored.itemsize
            self._entries[name] = Entry(path / SINGLE, 0, size, shape, stored)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the configuration: nothing else is known."""
        return file_digest(self.path / "config.json")

    @property
    def file_bytes(self) -> int:
        """Bytes of all tensors; how long headers will be is not known."""
        return self.total_bytes


def _tensors(
    family: Family, skeleton: Skeleton, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names on disk → shape and dtype."""
    found = {}
    state = skeleton.model.state_dict()
    tied = {f"{family.head}.weight"} if skeleton.config.tie_word_embeddings else set()
    for name, value in state.items():
        if name not in tied:
            found[family.on_disk(name)] = (tuple(value.shape), value.dtype)
    for index, block in enumerate(skeleton.prototypes):
        prefix = family.block.format(block=index)
        # Parameters are stored alike, whatever dtype transformers computes with.
        parameters = {module for module, _ in block.named_parameters()}
        for module, value in block.state_dict().items():
            stored = dtype if module in parameters else value.dtype
            for name, shape in _on_disk(family, module, tuple(value.shape)):
                found[f"{prefix}.{name}"] = (shape, stored)
    return found


def _on_disk(
    family: Family, module: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that make a parameter of a block's module, with their shapes."""
    bank = family.experts
    if bank is not None and module == f"{bank.module}.gate_up_proj":
        if bank.fused:
            yield bank.gate_up, shape
            return
        experts, rows, hidden = shape
        for template in (bank.gate, bank.up):
            for expert in range(experts):
                yield template.format(expert=expert), (rows // 2, hidden)
    elif bank is not None and module == f"{bank.module}.down_proj":
        if bank.fused:
            yield bank.down, shape
            return
        for expert in range(shape[0]):
            yield bank.down.format(expert=expert), shape[1:]
    else:
        names = {inner: outer for outer, inner in family.renames.items()}
        yield names.get(module, module), shape


def has_weights(folder: Path) -> bool:
    """Whether a model folder has more than its configuration."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


class PlannedExperiment(Experiment):
    """A recipe on machines that are not these, perhaps for a model that is not here.

    Where the model's folder has no weights, shapes come from its configuration alone, and tokens
    are only counted: no text is read.

    Args:
        gpus: whether the machines have GPUs, which compute in the checkpoint's own dtype.
    """

    def __init__(self, recipe: Recipe, output: Path, gpus: bool) -> None:
        self._gpus = gpus
        super().__init__(recipe, output)

    @property
    def weights_are_here(self) -> bool:
        return has_weights(self.folder)

    def _open(self) -> StreamedModel:
        if self.weights_are_here:
            return super()._open()
        if self.recipe.slice is not None:
            raise RecipeError("slice: needs the model's weights, the folder has only config.json")
        return self._streamed(Blueprint(self.folder))

    @cached_property
    def compute_dtype(self) -> str:
        """As in a run on those machines."""
        own = self.recipe.compute.dtype
        return own if self._gpus else super().compute_dtype

    @cached_property
    def calibration(self) -> Sequences:
        """The tokens, or as many zeros."""
        if self.weights_are_here:
            return super().calibration
        return _counted(self.recipe.calibration)

    @cached_property
    def evaluation(self) -> Sequences:
        """The tokens, or as many zeros."""
        if self.weights_are_here:
            return super().evaluation
        return _counted(self.recipe.evaluation)


def _counted(texts: Texts) -> Sequences:
    ids = np.zeros((texts.sequences, texts.length), np.int32)
    return Sequences(ids, np.zeros(texts.sequences, np.int32), ["text"])
