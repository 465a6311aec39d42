"""Tiny checkpoints, each saved once per test run."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from tests.orchestrator.tiny import save_tiny

Tiny = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """``tiny(model_type, dtype, **overrides)``: a folder that tests must not change."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    @cache
    def folder(model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
        return save_tiny(tmp_path_factory.mktemp(model_type), model_type, dtype, **overrides)

    return folder
