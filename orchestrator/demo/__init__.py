"""The bundled demo model: a Qwen3-MoE of two million parameters, its texts, and its training.

``model/`` and ``text/`` are package data. ``MODEL`` is what ``from_pretrained`` takes;
``text_path("heldout", "code")`` names one text file.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent
MODEL = ROOT / "model"
TEXT = ROOT / "text"
KINDS = ("prose", "code", "multilingual")
SPLITS = ("calibration", "heldout")


def text_path(split: str, kind: str) -> Path:
    """Return the text file of one split (``calibration``, ``heldout``) and one kind of text."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    return TEXT / f"{split}.{kind}.txt"
