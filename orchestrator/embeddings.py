"""Sentence embeddings: an encoder's hidden states pooled to one vector of length 1 per sentence.

How to pool is read where sentence-transformers keeps it, ``modules.json`` and what it names;
without that, the mean over all tokens is taken, as most encoders have it.

**Judging.** Sentences are of any length. Those of the same length are run together, so that there
is no padding and no mask, and every embedding is what the sentence alone would get. With unit
vectors e of the dense model and e′ of the compressed one, 1 − cos(e, e′) = ½‖e − e′‖².

**Gradients.** A search wants to know what an error Δy of a layer's output will cost. To first
order Δe = J Δy, so the cost is ½ Δyᵀ JᵀJ Δy (Gauss–Newton). Noise ε of unit variance is sent back
from the embedding instead of the gradient of a loss: g = Jᵀε has E[g gᵀ] = JᵀJ, so ½ E[(gᵀΔy)²] is
the cost, as it is the KL of a language model, whose labels are drawn from its own distribution for
the same reason. (A model that says e + ε has JᵀJ as its Fisher information.)

The estimate is diagonal over outputs, as for language models, but not over tokens: all of them make
one embedding, and one error of a weight makes all of theirs. So the squares that are summed are
those of the weights' gradients over whole sequences (:func:`statistics.pooled_squares`). Tokens
taken one by one do not do: measured on MiniLM, each of its 36 layers alone at half its bytes
(``svd_llm``), that was wrong by a factor of 3.4 either way (one standard deviation of the logarithm
of predicted over measured), ranks correlated with what was measured by 0.55; taken together it is
1.8 and 0.86.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.foreign import read_json, shown

MEAN, FIRST = "mean", "first"
# Key of sentence-transformers → how we pool. The last only scales, and lengths are made 1.
_POOLING = {
    "pooling_mode_mean_tokens": MEAN,
    "pooling_mode_cls_token": FIRST,
    "pooling_mode_mean_sqrt_len_tokens": MEAN,
}
_UNDERSTOOD = ("Transformer", "Pooling", "Normalize")
# Share of the sentences that may be worse than ``cosine_low``.
_LOW = 0.05


def read_pooling(folder: Path) -> str:
    """``mean`` or ``first``: how the model in a folder pools.

    Raises:
        UserError: in a way that is not known here, or its files are damaged.
    """
    listed = folder / "modules.json"
    if not listed.is_file():
        return MEAN
    try:
        modules = read_json(listed)
        kinds = {str(m["type"]).rpartition(".")[2]: folder / str(m["path"]) for m in modules}
        odd = next((kind for kind in kinds if kind not in _UNDERSTOOD), None)
        if odd is not None:
            raise UserError(
                f"{listed}: {shown(odd)}: embeddings are pooled and made unit vectors here, nothing"
                f" more (understood: {', '.join(_UNDERSTOOD)})"
            )
        if "Pooling" not in kinds:
            return MEAN
        file = kinds["Pooling"] / "config.json"
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{listed}: names {shown(file)}, outside the model folder")
        config = read_json(file)
        wanted = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = shown(f"{type(error).__name__}: {error}")
        raise UserError(f"{listed}: the pooling cannot be read from it: {reason}") from None
    if len(wanted) != 1 or wanted[0] not in _POOLING:
        raise UserError(
            f"{file}: {shown(', '.join(wanted)) or 'no pooling_mode is on'}: exactly one of"
            f" {', '.join(_POOLING)} is understood"
        )
    return _POOLING[wanted[0]]


def pool(hidden: Tensor, pooling: str) -> Tensor:
    """Embeddings of sentences of one length, ``[B, T, hidden] -> [B, hidden]``, float32."""
    wide = hidden.float()
    vector = wide.mean(1) if pooling == MEAN else wide[:, 0]
    return torch.nn.functional.normalize(vector, dim=-1)


def noise_gradients(hidden: Tensor, pooling: str, generator: torch.Generator, draws: int) -> Tensor:
    """Jᵀε for last hidden states: noise on the embeddings, taken back to them.

    Args:
        hidden: ``[sequences, length, hidden]``.
        draws: of noise, independent of each other.

    Returns:
        ``[draws, sequences, length, hidden]``, in the dtype of ``hidden``.
    """
    leaf = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        embedded = pool(leaf, pooling)  # [sequences, hidden]
    found = []
    for draw in range(draws):
        noise = torch.randn(embedded.shape, generator=generator).to(embedded)
        again = draw + 1 < draws
        found.append(torch.autograd.grad(embedded, leaf, noise, retain_graph=again)[0])
    return torch.stack(found)


class Sentences:
    """Judges embeddings; see :class:`moesaic.orchestrator.evaluate.Judging`.

    Args:
        pooling: ``mean`` or ``first``.
    """

    def __init__(self, pooling: str) -> None:
        self.pooling = pooling

    def batches(self, ids: Tensor, size: int) -> list[Tensor]:
        """Sentences of the same length together, without what is behind their ends."""
        return [ids[rows, :length] for length, rows in _by_length(ids, size)]

    def result(self, ids: Tensor, size: int, hidden: Sequence[Tensor]) -> Tensor:
        """Embeddings ``[sentences, hidden]``, in the order of ``ids``."""
        found = hidden[0].new_empty(len(ids), hidden[0].shape[-1], dtype=torch.float32)
        for (_, rows), part in zip(_by_length(ids, size), hidden, strict=True):
            found[rows.to(found.device)] = pool(part, self.pooling)
        return found

    def figures(
        self, model: object, reference: object, result: Tensor, dense: Tensor, ids: Tensor
    ) -> dict[str, Any]:
        """``distance`` of every sentence, and how many ``tokens`` they have in all."""
        distance = 0.5 * (result.double() - dense.double()).square().sum(-1)  # [sentences]
        return {"distance": distance.tolist(), "tokens": int((ids >= 0).sum())}


def _by_length(ids: Tensor, size: int) -> list[tuple[int, Tensor]]:
    """(length, rows): at most ``size`` sentences of one length, the shortest first."""
    lengths = (ids >= 0).sum(1)
    groups = []
    for length in lengths.unique().tolist():
        groups += [(length, rows) for rows in (lengths == length).nonzero()[:, 0].split(size)]
    return groups


def sentence_score(
    parts: Sequence[Mapping[str, Any]], source: Sequence[int], labels: Sequence[str]
) -> dict[str, Any]:
    """One plan's score from the parts of all its sentences, in order.

    Returns:
        ``cosine`` to the dense model's embeddings and ``distance`` (1 − cosine), means over the
        sentences, ``cosine_low``, which one sentence in twenty is below, ``cosine_least``,
        ``tokens_per_second`` (of one worker, in the blocks), ``peak_memory_bytes`` and
        ``sources``: the same cosines of every text source. A ruined model, whose embeddings are no
        finite numbers, has None for them.
    """
    distance = [value for part in parts for value in part["distance"]]
    sources = {}
    for index, label in enumerate(labels):
        own = [distance[row] for row, origin in enumerate(source) if origin == index]
        if own:
            sources[label] = _cosines(own)
    seconds = sum(part["seconds"] for part in parts)
    return {
        **_cosines(distance),
        "tokens_per_second": sum(part["tokens"] for part in parts) / max(seconds, 1e-9),
        "peak_memory_bytes": max(part["peak_bytes"] for part in parts),
        "sources": sources,
    }


def _cosines(distance: Sequence[float]) -> dict[str, float | None]:
    if not all(map(math.isfinite, distance)):
        return dict.fromkeys(("cosine", "cosine_low", "cosine_least", "distance"))
    mean = math.fsum(distance) / len(distance)
    worst_first = sorted(distance, reverse=True)
    return {
        "cosine": 1 - mean,
        "cosine_low": 1 - worst_first[int(_LOW * len(distance))],
        "cosine_least": 1 - worst_first[0],
        "distance": mean,
    }
