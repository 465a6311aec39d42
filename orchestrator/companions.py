"""What a model folder has besides weights: configuration, tokenizer, templates."""

from collections.abc import Container
from pathlib import PurePosixPath

# Suffixes of files beside ``config.json``; as for models of the hub, no code.
COMPANIONS = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab"})
# What sentence-transformers keeps of an encoder's parts, such as ``1_Pooling/config.json``.
PARTS = "[0-9]*_*/config.json"


def is_companion(name: str, suffixes: Container[str] = COMPANIONS) -> bool:
    """Whether a file, by its name in the folder, belongs to the model; other folders in it may
    hold anything."""
    path = PurePosixPath(name)
    if len(path.parts) == 1:
        return path.suffix in suffixes
    return len(path.parts) == 2 and path.match(PARTS)
