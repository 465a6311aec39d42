"""moesaic fits a language model into a byte budget.

Importing the package registers the quantizer plug-in, so that afterwards
``transformers.AutoModelForCausalLM.from_pretrained``, or ``AutoModel`` for encoders, loads folders
that moesaic wrote with ``serve: moesaic``.
"""

import importlib as _importlib
import importlib.abc as _abc
import importlib.machinery as _machinery
import importlib.util as _util
import sys as _sys
from collections.abc import Sequence as _Sequence
from pathlib import Path as _Path
from types import ModuleType as _ModuleType

__version__ = "0.1.0"

# In a wheel the four folders lie beside this file. In an editable install this file lies in
# orchestrator/package/ and they lie at the root of the checkout: look there as well.
_root = _Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").exists() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

# Importing transformers takes seconds, and most uses of moesaic's kernels and methods do without.
# So the plug-in is imported right after the module with transformers' table of quantizers is.
_QUANTIZERS = "transformers.quantizers.auto"
_PLUGIN = "moesaic.orchestrator.plugin"


class _RegisterAfterQuantizers(_abc.MetaPathFinder):
    """Finds one module as everybody else would, and has the plug-in imported after it."""

    def find_spec(
        self, name: str, path: _Sequence[str] | None, target: _ModuleType | None = None
    ) -> _machinery.ModuleSpec | None:
        if name != _QUANTIZERS:
            return None
        _sys.meta_path.remove(self)
        spec = _util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: _ModuleType) -> None:
            execute(module)
            _importlib.import_module(_PLUGIN)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _QUANTIZERS in _sys.modules:
    _importlib.import_module(_PLUGIN)
else:
    _sys.meta_path.insert(0, _RegisterAfterQuantizers())
