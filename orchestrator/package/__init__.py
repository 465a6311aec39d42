"""moesaic fits a language model into a byte budget.

Importing the package registers the quantizer plug-in, so that afterwards
``transformers.AutoModelForCausalLM.from_pretrained`` loads folders that moesaic wrote with
``serve: moesaic``.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a wheel the four folders lie beside this file. In an editable install this file lies in
# orchestrator/package/ and they lie at the root of the checkout: look there as well.
_root = _Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").exists() and (_root / "kernels").is_dir():
    __path__.append(str(_root))
