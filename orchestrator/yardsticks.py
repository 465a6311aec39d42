"""What a model is judged by in the end: the figures of a score, and what they are called.

A language model is held against the text: perplexity, and the KL divergence from the dense model.
An encoder has no next token: the embedding that it gives to a sentence is held against the dense
model's. Whatever prints, draws or tracks a score asks here which figures there are; how they come
about is told in :mod:`moesaic.orchestrator.evaluate` and :mod:`moesaic.orchestrator.embeddings`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One number of a score.

    Attributes:
        key: in ``scores.json``.
        name: as people read it.
        about: what it says, for where there is room.
        decimals: shown of it; None shows a percentage.
        unit: of the number; empty where it has none.
        nullable: whether a ruined model has none.
        versus_dense: whether it compares with the dense model, which has a trivial one.
    """

    key: str
    name: str
    about: str
    decimals: int | None = 4
    unit: str = ""
    nullable: bool = True
    versus_dense: bool = True

    @property
    def heading(self) -> str:
        """``KL (nats/token)``."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def text(self, value: float | None) -> str:
        """The number, or a dash where there is none."""
        if value is None:
            return "–"
        return f"{value:.1%}" if self.decimals is None else f"{value:.{self.decimals}f}"


@dataclass(frozen=True)
class Yardstick:
    """The figures that models of a kind are judged by.

    Attributes:
        figures: in the order of tables.
        details: shown in the terminal and told to MLflow besides.
        loss: the figure that a search predicts and makes small, 0 for the dense model.
        outputs: what a reloaded checkpoint is compared by.
        task: what such a model is loaded as: the class of transformers.
    """

    figures: tuple[Figure, ...]
    details: tuple[Figure, ...]
    loss: Figure
    outputs: str
    task: str

    @property
    def everything(self) -> tuple[Figure, ...]:
        """Figures and details."""
        return (*self.figures, *self.details)

    @property
    def tiles(self) -> tuple[Figure, Figure]:
        """The two that come first, where there is room for two: the loss and the first other."""
        return self.loss, next(figure for figure in self.figures if figure != self.loss)

    @property
    def predicted(self) -> str:
        """Name of the column that holds predictions of the loss."""
        return f"predicted_{self.loss.key}"


_KL = Figure("kl", "KL", "KL to the dense model, nats per token", unit="nats/token")
LANGUAGE = Yardstick(
    figures=(Figure("perplexity", "perplexity", "perplexity", 3, versus_dense=False), _KL),
    details=(Figure("accuracy", "accuracy", "next token right", None, nullable=False),),
    loss=_KL,
    outputs="logits",
    task="AutoModelForCausalLM",
)

_DISTANCE = Figure(
    "distance", "1 − cosine", "1 − cosine to the dense model's embeddings, mean over sentences", 5
)
SENTENCES = Yardstick(
    figures=(
        Figure("cosine", "cosine", "cosine to the dense model's embeddings, mean over sentences"),
        Figure("cosine_low", "cosine, worst 5 %", "cosine that 19 of 20 sentences are above"),
        Figure("cosine_least", "least cosine", "cosine of the sentence that suffers most"),
        _DISTANCE,
    ),
    details=(),
    loss=_DISTANCE,
    outputs="last hidden states",
    task="AutoModel",
)


def yardstick_of(figures: Mapping[str, Any]) -> Yardstick:
    """The yardstick that a score, or a part of one, was made with.

    Raises:
        LookupError: none of them.
    """
    for yardstick in (LANGUAGE, SENTENCES):
        if yardstick.loss.key in figures:
            return yardstick
    raise LookupError(f"a score has none of {LANGUAGE.loss.key}, {SENTENCES.loss.key}")
