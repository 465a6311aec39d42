"""Where the files of a model are, by the name that a recipe gives it."""

from pathlib import Path
from textwrap import shorten

from moesaic.orchestrator.errors import RecipeError
from moesaic.orchestrator.objects import is_url
from moesaic.orchestrator.remote_model import copies_folder
from moesaic.orchestrator.shared import CachePlace

# Folders that the Makefile fills.
_MADE = ("smollm2", "minilm")


def find_model(name: str, place: CachePlace) -> Path:
    """A local folder as it is; for a URL the folder that takes copies of what is read; any other
    name is downloaded from the hub, or found in its cache.

    Raises:
        UserError: neither a folder nor a model that can be had.
    """
    if is_url(name):
        return copies_folder(name, place)
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        made = path.parent.name == "build" and path.name in _MADE
        advice = f": `make {path.name}` makes it" if made else ""
        raise RecipeError(f"model: there is no folder {path.resolve()}{advice}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = shorten(str(error), 160, placeholder=" …").rstrip(".")
        raise RecipeError(
            f"model: {name} is no folder and cannot be downloaded: {reason}; check the name, or the"
            " network (HF_TOKEN for models that need a login), or give a folder"
        ) from None
