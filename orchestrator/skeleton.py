"""A causal language model, or an encoder, of transformers without its weights.

The model is built on the meta device. Its blocks are taken out as prototypes, and a recorder
stands in the place of each: running the model's own forward then tells what every block would
have been called with (masks, rotary embeddings), whatever the architecture.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig

from moesaic.orchestrator import experts
from moesaic.orchestrator.checkpoint import Checkpoint, read_object
from moesaic.orchestrator.config_counts import check_counts
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.family import Family
from moesaic.orchestrator.foreign import printable
from moesaic.orchestrator.shortcuts import CONFIG_KEY, put_shortcuts

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
# Of buffers that no file holds: rotary frequencies have some kilobytes, positions of BERT as well.
MOST_BUFFER_BYTES = 256 << 20


class Recorder(nn.Module):
    """Stands for a block: remembers its input and the rest of the call, and passes it on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Some models read an attribute of the block, such as its attention type, between blocks.
        self.attention_type = getattr(block, "attention_type", None)
        self.hidden: Tensor | None = None
        self.call: Call | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.call = hidden, (args, kwargs)
        return hidden

    def take(self) -> tuple[Tensor, Call]:
        """What was recorded, forgotten here."""
        if self.hidden is None or self.call is None:
            raise RuntimeError("the model's forward did not call its block")
        recorded = self.hidden, self.call
        self.hidden = self.call = None
        return recorded


class _Output(SimpleNamespace):
    """What the head reads of the body; whatever else it asks for (caches, logits of routers, and
    what later versions of transformers add) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class _Passthrough(nn.Module):
    """Stands for everything but the head: returns the embeddings as last hidden state."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> SimpleNamespace:
        return _Output(last_hidden_state=inputs_embeds)


_GENERATION = "generation_config.json"


def read_config(checkpoint: Checkpoint, family: Family, trust_remote_code: bool) -> Any:
    """The configuration as transformers understands it; UserError where it does not, or where a
    count in it is absurd."""
    check_counts(checkpoint, family)
    generation = checkpoint.path / _GENERATION
    if generation.is_file():  # whoever loads the result reads it, too
        read_object(generation)
    with config_errors(checkpoint.path / "config.json"):
        return AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)


@contextmanager
def config_errors(file: Path) -> Iterator[None]:
    """Whatever transformers raises over a configuration as a UserError that names the file."""
    try:
        yield
    except (UserError, RunError):
        raise
    except (ValueError, StrictDataclassError) as error:  # these speak for themselves
        text = " ".join(str(error).split())
        raise UserError(f"{file}: {printable(text[:300])}") from error
    except Exception as error:
        text = printable(" ".join(f"{type(error).__name__}: {error}".split())[:300])
        raise UserError(f"{file}: transformers cannot build this model: {text}") from error


class Skeleton:
    """The model around the blocks; weights are put in and taken out by the owner.

    Attributes:
        model: the causal LM or encoder with recorders for blocks.
        prototypes: its blocks, on the meta device.
    """

    def __init__(
        self, config: Any, family: Family, dtype: torch.dtype, device: torch.device, trust: bool
    ) -> None:
        with torch.device("meta"):
            model = model_class(family).from_config(
                config, dtype=dtype, experts_implementation=experts.NAME, trust_remote_code=trust
            )
        self.config = config
        self.model: Any = model.eval().requires_grad_(False)
        for path in family.unused_outside:
            if isinstance(getattr(self.model, path, None), nn.Module):
                setattr(self.model, path, None)
        holder, _, name = family.block.removesuffix(".{block}").rpartition(".")
        layers = self.model.get_submodule(f"{holder}.{name}")
        self.prototypes: list[nn.Module] = list(layers)
        if getattr(config, CONFIG_KEY, False):
            with torch.device("meta"):
                put_shortcuts(layers, family.shortcut_pairs(), config.hidden_size, dtype)
        self.recorders = [Recorder(block) for block in self.prototypes]
        setattr(self.model.get_submodule(holder), name, nn.ModuleList(self.recorders))
        fill_buffers(self.model, self.model, device)
        self._body = self.model.base_model
        self._head = None if family.is_encoder else _without_body(self.model)

    @torch.no_grad()
    def run(self, **inputs: Tensor) -> list[tuple[Tensor, Call]]:
        """Runs the model's forward around the blocks: hidden state and call of every block."""
        self._body(use_cache=False, **inputs)
        return [recorder.take() for recorder in self.recorders]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of normed hidden states, by the model's own forward."""
        assert self._head is not None, "an encoder has no head"
        logits: Tensor = self._head(inputs_embeds=hidden, use_cache=False).logits
        return logits

    def fp32_names(self, dtype: torch.dtype) -> tuple[str, ...]:
        """Parts of parameter names that transformers keeps in float32 at ``dtype``."""
        return tuple(self.model._get_dtype_plan(dtype))


def model_class(family: Family) -> Any:
    """The class of transformers that builds and loads such models."""
    return getattr(transformers, family.yardstick.task)


def _without_body(model: Any) -> Any:
    """The same head and forward over the same modules, but with nothing in front of them."""
    head = object.__new__(type(model))
    head.__dict__.update(model.__dict__)
    body = _Passthrough()
    for name, _ in model.base_model.named_children():
        body.add_module(name, _Passthrough())  # some call a part of the body instead of all of it
    head._modules = {**model._modules, model.base_model_prefix: body}
    return head


def fill_buffers(owner: Any, module: nn.Module, device: torch.device) -> None:
    """Gives ``module``'s meta buffers that no file holds (rotary frequencies …) their values.

    Parameters must still be on the meta device: transformers' initialisation, which computes the
    buffers, would overwrite them.

    Args:
        owner: the transformers model whose initialisation knows these buffers.

    Raises:
        UserError: the configuration makes them absurdly large, or nothing tells a value.
    """
    unknown = [
        buffer
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name in part._non_persistent_buffers_set
    ]
    if (size := sum(buffer.nbytes for buffer in unknown)) > MOST_BUFFER_BYTES:
        largest = list(max(unknown, key=lambda buffer: buffer.nbytes).shape)
        raise UserError(
            f"the configuration asks for buffers of {size} bytes that no file holds, one of shape"
            f" {largest}; at most {MOST_BUFFER_BYTES} bytes are made"
        )
    for part in module.modules():
        names = [
            name for name in part._non_persistent_buffers_set if part._buffers[name] is not None
        ]
        for name in names:
            buffer = part._buffers[name]
            assert buffer is not None
            part._buffers[name] = torch.full_like(buffer, _unset(buffer.dtype), device=device)
        if not names:
            continue
        owner._init_weights(part)
        for name in names:
            value = part._buffers[name]
            assert value is not None
            if bool(_is_unset(value).any()):
                kind = type(part).__name__
                raise UserError(f"buffer {name} of {kind} is in no file and has no known value")


def _unset(dtype: torch.dtype) -> float:
    """What no buffer is meant to hold; of truth values there is nothing of the kind."""
    if dtype.is_floating_point:
        return torch.nan
    return dtype == torch.bool or torch.iinfo(dtype).min


def _is_unset(value: Tensor) -> Tensor:
    if value.is_floating_point():
        return torch.isnan(value)
    return (value == _unset(value.dtype)) & (value.dtype != torch.bool)
