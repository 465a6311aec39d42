"""Where the files of a model are, by the name that a recipe gives it."""

import glob
from pathlib import Path
from textwrap import shorten

from moesaic.orchestrator.checkpoint import INDEX, SINGLE
from moesaic.orchestrator.companions import COMPANIONS
from moesaic.orchestrator.errors import RecipeError
from moesaic.orchestrator.foreign import read_json
from moesaic.orchestrator.objects import is_url
from moesaic.orchestrator.redaction import redacted
from moesaic.orchestrator.remote_model import copies_folder
from moesaic.orchestrator.shared import CachePlace

# Folders that the Makefile fills.
_MADE = ("smollm2", "minilm")


def find_model(name: str, place: CachePlace, code: bool = False) -> Path:
    """A local folder as it is; for a URL the folder that takes copies of what is read; any other
    name is downloaded from the hub, or found in its cache.

    Args:
        code: whether the model's own code is wanted, too.

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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return _from_hub(name, code)
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = shorten(redacted(str(error)), 160, placeholder=" …").rstrip(".")
        raise RecipeError(
            f"model: {name} is no folder and cannot be downloaded: {reason}; check the name, or the"
            " network (HF_TOKEN for models that need a login), or give a folder"
        ) from None


def _from_hub(name: str, code: bool) -> Path:
    """The snapshot of a model: its companions, then the files of weights that these name.

    A repository may hold the weights several times: in folders, or in one file besides shards.
    """
    from huggingface_hub import snapshot_download

    suffixes = sorted(COMPANIONS | ({".py"} if code else set()))
    # Of the folders in it, only those of an encoder's parts, such as 1_Pooling.
    folder = Path(
        snapshot_download(
            name,
            allow_patterns=[f"*{suffix}" for suffix in suffixes],
            ignore_patterns=["[!0-9]*/*"],
        )
    )
    # A snapshot's folder is called by its commit: another one may come in between.
    wanted = [glob.escape(shard) for shard in _shards(folder)]
    return Path(snapshot_download(name, revision=folder.name, allow_patterns=wanted))


def _shards(folder: Path) -> list[str]:
    """Names of the files of weights of a model whose companions are there."""
    try:
        found = read_json(folder / INDEX)["weight_map"].values()
        return sorted({shard for shard in found if isinstance(shard, str)}) or [SINGLE]
    except FileNotFoundError:
        return [SINGLE]
    except (ValueError, LookupError, TypeError, AttributeError):
        return []  # whoever opens the model says what is wrong with its index
