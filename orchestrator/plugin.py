"""The plug-in that lets transformers load folders written for ``serve: moesaic``.

``import moesaic`` sees to it that this module is imported right after transformers' table of
quantizers is there; from then on plain ``AutoModelForCausalLM.from_pretrained(folder)`` works, and
``AutoModel`` likewise for encoders.
``quantization_config=MoesaicConfig(dequantize=True)`` unpacks all weights once, after loading: the
model then takes the memory of a dense one and runs as fast as one, on a CPU as well.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moesaic.orchestrator.compressed_modules import (
    METHOD,
    VERSION,
    CompressedExperts,
    CompressedLinear,
)
from moesaic.orchestrator.family import families, load_family
from moesaic.orchestrator.low_rank_modules import fuse
from moesaic.orchestrator.reshape import resize_router
from moesaic.orchestrator.shortcuts import put_shortcuts


@auto.register_quantization_config(METHOD)
class MoesaicConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``config.json`` says of the compressed modules.

    Args:
        version: of the layout on disk.
        modules: module → kind (``linear`` or ``bank``) and its members' descriptions.
        shortcuts: where the blocks are, and the paths of each norm and the module behind it in
            them, if the residual stream is turned there.
        dequantize: unpack all weights after loading.

    Raises:
        ValueError: the folder was written by a later version.
    """

    def __init__(
        self,
        version: int = VERSION,
        modules: Mapping[str, Any] | None = None,
        shortcuts: Mapping[str, Any] | None = None,
        dequantize: bool = False,
        **kwargs: Any,
    ) -> None:
        if version != VERSION:
            raise ValueError(
                f"the model's quantization_config has version {version}, this moesaic reads "
                f"version {VERSION}: update moesaic"
            )
        self.quant_method = METHOD
        self.version = version
        self.modules = dict(modules or {})
        self.shortcuts = shortcuts
        self.dequantize = dequantize

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a configuration passed to ``from_pretrained`` may change about the folder's."""
        return {"dequantize": self.dequantize}


# Only configurations in this tuple have their loading attributes heeded by from_pretrained.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (MoesaicConfig,)


@auto.register_quantizer(METHOD)
class MoesaicQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts compressed modules in the places of dense ones before the weights are loaded.

    Names on disk are those of the modules' buffers, so that transformers' own renaming and merging
    of expert weights, which still has to work for the units left dense, finds nothing to change.
    """

    requires_calibration = True
    quantization_config: MoesaicConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        shortcuts = self.quantization_config.shortcuts
        with torch.device("meta"):
            if shortcuts is not None:
                blocks = model.get_submodule(_path(model, shortcuts["blocks"]))
                width = model.config.get_text_config().hidden_size
                put_shortcuts(blocks.children(), shortcuts["pairs"], width, model.dtype)
            for name, described in self.quantization_config.modules.items():
                path = _path(model, name)
                dense = model.get_submodule(path)
                members = described["members"]
                compressed: nn.Module
                if described["kind"] == "linear":
                    compressed = CompressedLinear(members["weight"], dense)
                else:
                    reduced = described.get("reduced")
                    if reduced is not None:
                        router = model.get_submodule(_path(model, reduced["router"]))
                        resize_router(router, reduced["rows"])
                    compressed = CompressedExperts(members, dense, reduced)
                model.set_submodule(path, compressed)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.quantization_config.dequantize:
            self._dequantize(model)
        elif model.config.model_type in families():
            family = load_family(model.config.model_type)
            path, _, _ = family.block.rpartition(".")
            fuse(model.get_submodule(_path(model, path)), family)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Puts dense modules back, in ``dtype`` (by default the model's).

        Also what ``model.dequantize()`` calls, with the dtype as the configuration names it.
        """
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        kinds = (CompressedLinear, CompressedExperts)
        found = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
        for name, module in found:
            model.set_submodule(name, module.dense().to(wanted))
        return model

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return True


def _path(model: Any, name: str) -> str:
    """Where a module of the checkpoint lies in ``model``: with its head the name has a prefix."""
    prefix = f"{model.base_model_prefix}."
    bare = name.removeprefix(prefix)
    return f"{prefix}{bare}" if hasattr(model, model.base_model_prefix) else bare
