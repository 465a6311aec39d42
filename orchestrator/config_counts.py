"""Counts in a model's ``config.json`` that transformers loops over while it builds a model.

A number of a few digits can ask for a hundred million modules. All shapes of a configuration are
compared with those of the files, but only after the model was built without weights. What decides
how many modules and labels that makes is compared before.
"""

from typing import Any

from transformers import CONFIG_MAPPING

from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.family import Family
from moesaic.orchestrator.layout import check_naming, group_names

BLOCKS, HEADS, LABELS = "num_hidden_layers", "num_attention_heads", "num_labels"
# Far more than any model has. Each block takes transformers milliseconds, and each label has a
# name; StableLM can have a norm for each head of each block.
MOST_BLOCKS, MOST_HEADS_OF_ALL_BLOCKS, MOST_LABELS = 4096, 200_000, 100_000
# So many are built where the files have none at all: then it is told which tensors are missing.
_FEW_BLOCKS = 256
# Of a model of which only the configuration is there, whose experts have a tensor each.
MOST_PLANNED_EXPERTS = 1_000_000


def check_counts(checkpoint: Checkpoint, family: Family) -> None:
    """Raises a :class:`UserError` for a count that the model's files contradict, or an absurd one.

    Other types than numbers are left to transformers, which checks them.
    """
    file, config = checkpoint.path / "config.json", checkpoint.config
    if "configuration_files" in config:
        raise UserError(
            f"{file}: key configuration_files names other configurations, which are not read: put"
            " the one that fits this version of transformers into config.json itself"
        )
    asked: float = 0
    found, blocks = None, MOST_BLOCKS
    if checkpoint.names():
        names, others = group_names(family, checkpoint)
        check_naming(family, checkpoint, names, others)
        found = len(names)
        blocks = min(found or _FEW_BLOCKS, MOST_BLOCKS)
    for key, value in _counts(config, family, BLOCKS):
        asked = max(asked, value)
        if value > blocks:
            few = found is not None and found < value
            known = f"the files have {found}" if few else f"at most {MOST_BLOCKS}"
            raise UserError(f"{file}: asks for {value} blocks ({key}): {known}")
    limits = {HEADS: MOST_HEADS_OF_ALL_BLOCKS // max(int(asked), 1), LABELS: MOST_LABELS}
    if not checkpoint.names() and family.router is not None:
        limits[family.router.count] = MOST_PLANNED_EXPERTS // max(int(asked), 1)
    for usual, most in limits.items():
        for key, value in _counts(config, family, usual):
            if value > most:
                raise UserError(f"{file}: {key} is {value}: at most {most}")


def _counts(config: dict[str, Any], family: Family, usual: str) -> list[tuple[str, float]]:
    """What is said of a count, under its usual name and under the model type's own."""
    known = family.model_type in CONFIG_MAPPING  # a model with code of its own need not be
    own = CONFIG_MAPPING[family.model_type].attribute_map.get(usual) if known else None
    names = {usual, own or usual}
    found = [(name, config.get(name)) for name in sorted(names)]
    return [(name, value) for name, value in found if isinstance(value, (int, float))]
