"""Evaluation on held-out text: what is lost against the dense model.

Of a language model that is perplexity and KL divergence, exact over the vocabulary. The dense side
is remembered as final hidden states, which are a hundred times smaller than logits; the output head
turns them into logits again, a few rows at a time. An encoder's embeddings are compared (see
:mod:`moesaic.orchestrator.embeddings`). Sequences are independent: a range of them goes through all
blocks in one task.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesaic.orchestrator.embeddings import Sentences, sentence_score
from moesaic.orchestrator.pieces import dense_members
from moesaic.orchestrator.shared import fetched, open_store
from moesaic.orchestrator.store import code_digest, digest
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.walk import read_ids
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes
from moesaic.orchestrator.yardsticks import LANGUAGE, SENTENCES, yardstick_of

# Natural logarithm of what is still a perplexity (1.8e308 is the largest float).
_LARGEST_LOG = 700.0
# Rows of logits in float32 at a time. On a processor fewer are faster: for small vocabularies they
# stay in a core's own cache, where the other workers do not reach.
_LOGIT_ROWS, _LOGIT_ROWS_ON_CPU = 512, 64


@dataclass(frozen=True)
class Judge:
    """The held-out text and the model that it is judged with; plain data for workers.

    Attributes:
        original: folder of the dense model where ``model`` is another one, sliced out of it.
        original_fingerprint: digest of its contents.
        pooling: of an encoder's hidden states; empty for a language model.
    """

    model: str
    dtype: str
    trust_remote_code: bool
    fingerprint: str
    ids: str
    ids_digest: str
    batch: int
    store: str
    original: str = ""
    original_fingerprint: str = ""
    pooling: str = ""

    def dense(self) -> "Judge":
        """The same text with the dense model, which all others are compared with."""
        if not self.original:
            return self
        return replace(
            self,
            model=self.original,
            fingerprint=self.original_fingerprint,
            original="",
            original_fingerprint="",
        )

    def key(self, pieces: Mapping[str, str]) -> str:
        """Digest of everything that a score depends on; ``pieces`` is unit → key of its piece."""
        return digest(
            {
                "model": self.fingerprint,
                "dtype": self.dtype,
                "ids": self.ids_digest,
                "batch": self.batch,
                "pieces": dict(pieces),
                **({"original": self.original_fingerprint} if self.original else {}),
                "pooling": self.pooling,
                "code": code_digest(
                    "orchestrator/evaluate.py",
                    "orchestrator/embeddings.py",
                    "orchestrator/streaming.py",
                ),
            }
        )

    def hidden_key(self, rows: Sequence[int]) -> str:
        """Key of the dense model's last hidden states."""
        return digest([self.dense().key({}), "hidden", list(rows)])

    @property
    def judging(self) -> "Judging":
        """How the model is judged."""
        return Sentences(self.pooling) if self.pooling else Language()


class Judging(Protocol):
    """How some sequences are run, and what is made of what comes out."""

    def batches(self, ids: Tensor, size: int) -> list[Tensor]:
        """What goes through the model together, ``[B, T]`` each, at most ``size`` sequences."""
        ...

    def result(self, ids: Tensor, size: int, hidden: Sequence[Tensor]) -> Tensor:
        """What is kept of the last hidden states of all batches, a row per sequence of ``ids``."""
        ...

    def figures(
        self,
        model: StreamedModel,
        reference: StreamedModel | None,
        result: Tensor,
        dense: Tensor,
        ids: Tensor,
    ) -> dict[str, Any]:
        """Numbers of the sequences.

        Args:
            reference: the model that ``dense``, its ``result``, comes from; None where it is this
                one.
        """
        ...


class Language:
    """Judges predictions of the next token."""

    def batches(self, ids: Tensor, size: int) -> list[Tensor]:
        return list(ids.split(size))

    def result(self, ids: Tensor, size: int, hidden: Sequence[Tensor]) -> Tensor:
        """Last hidden states ``[sequences, length, hidden]``."""
        return torch.cat(list(hidden))

    def figures(
        self,
        model: StreamedModel,
        reference: StreamedModel | None,
        result: Tensor,
        dense: Tensor,
        ids: Tensor,
    ) -> dict[str, Any]:
        """``nll`` and ``kl``: sums over each sequence in nats; ``tokens``: predicted tokens of a
        sequence; ``correct``: tokens whose most probable prediction was right."""
        sums = [
            sequence_sums(model, reference, *row) for row in zip(result, dense, ids, strict=True)
        ]
        return {
            "nll": [row[0] for row in sums],
            "kl": [row[1] for row in sums],
            "correct": [row[2] for row in sums],
            "tokens": ids.shape[1] - 1,
        }


@torch.no_grad()
def evaluate_rows(
    state: WorkerState, judge: dict[str, Any], rows: tuple[int, int], pieces: Mapping[str, str]
) -> dict[str, Any]:
    """Scores of the sequences ``rows`` under the model made of ``pieces`` (unit → file).

    With no pieces the model is the dense one, unless it was sliced out of that, and what came out
    of it is remembered for the comparison of the others.

    Returns:
        the numbers of :class:`Judging`, ``seconds`` spent in blocks, and ``peak_bytes``.
    """
    plan = Judge(**judge)
    model: StreamedModel = state.model(plan.model, plan.dtype, plan.trust_remote_code)
    ids = read_ids(plan.ids, *rows)
    judging = plan.judging
    hidden = [model.embed(part.to(model.device)) for part in judging.batches(ids, plan.batch)]
    block_of = {unit.name: unit.block for unit in model.units()}
    seconds = 0.0
    for index in range(model.blocks):
        own = {unit: path for unit, path in pieces.items() if block_of[unit] == index}
        module = model.load_block(index, replaced=dense_members(own))
        started = time.monotonic()
        hidden = [model.run_block(index, module, x) for x in hidden]
        seconds += time.monotonic() - started
    result = judging.result(ids, plan.batch, hidden)
    store = open_store(plan.store)
    same = not pieces and not plan.original
    if same:
        dense = result
        store.put("hidden", plan.hidden_key(rows), lambda p: save_file({"value": result.cpu()}, p))
    else:
        dense = dense_hidden(plan, rows).to(model.device)
    reference = None if same else dense_model(state, plan)
    return {
        **judging.figures(model, reference, result, dense, ids),
        "seconds": seconds,
        "peak_bytes": peak_memory_bytes(),
    }


def dense_hidden(judge: Judge, rows: Sequence[int]) -> Tensor:
    """What came out of the dense model, as it was evaluated before: of a language model its last
    hidden states ``[rows, length, H]``."""
    store = open_store(judge.store)
    path = fetched(store.path("hidden", judge.hidden_key(rows)))
    with safe_open(path, framework="pt") as file:
        value: Tensor = file.get_tensor("value")
        return value


def dense_model(state: WorkerState, judge: Judge) -> StreamedModel:
    """The dense model, whose norm and head the remembered hidden states belong to."""
    dense = judge.dense()
    opened = (dense.model, dense.dtype, dense.trust_remote_code)
    if not judge.original:
        model: StreamedModel = state.model(*opened)
        return model
    key = ("original", *opened)
    found: StreamedModel = state.take(key) or state.open(*opened)
    state.put(key, found)
    return found


def sequence_sums(
    model: StreamedModel,
    reference: StreamedModel | None,
    hidden: Tensor,
    dense: Tensor,
    ids: Tensor,
) -> tuple[float, float, int]:
    """(Σ −log p(next), Σ KL(dense ‖ this), correct predictions) of one sequence ``[length, H]``.

    Args:
        reference: the model that ``dense`` comes from; None where it is this one.
    """
    nll = kl = 0.0
    correct = 0
    targets = ids[1:].to(hidden.device)
    rows = _LOGIT_ROWS_ON_CPU if hidden.device.type == "cpu" else _LOGIT_ROWS
    for start in range(0, len(targets), rows):
        stop = min(start + rows, len(targets))
        log_q = model.logits(model.final_norm(hidden[None, start:stop]))[0].float().log_softmax(-1)
        wanted = targets[start:stop, None]
        nll -= float(log_q.gather(1, wanted).double().sum())
        correct += int((log_q.argmax(-1, keepdim=True) == wanted).sum())
        if reference is not None:
            normed = reference.final_norm(dense[None, start:stop])
            log_p = reference.logits(normed)[0].float().log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).double().sum())
    return nll, kl, correct


def score(
    parts: Sequence[Mapping[str, Any]], source: Sequence[int], labels: Sequence[str]
) -> dict[str, Any]:
    """One plan's score from the parts of all its sequences, in order."""
    return _SCORES[yardstick_of(parts[0])](parts, source, labels)


def _language_score(
    parts: Sequence[Mapping[str, Any]], source: Sequence[int], labels: Sequence[str]
) -> dict[str, Any]:
    """The score of a language model.

    Returns:
        ``perplexity``, ``kl`` (nats per token), ``accuracy`` (share of next tokens predicted
        right), ``tokens_per_second`` (of one worker, in the blocks), ``peak_memory_bytes`` and
        ``sources``: perplexity and kl of every text source. A perplexity or kl that is no finite
        number (a ruined model) is None, null in JSON, which has no infinity.
    """
    nll = [value for part in parts for value in part["nll"]]
    kl = [value for part in parts for value in part["kl"]]
    correct = sum(value for part in parts for value in part["correct"])
    tokens = parts[0]["tokens"]
    sources = {}
    for index, label in enumerate(labels):
        rows = [row for row, origin in enumerate(source) if origin == index]
        if rows:
            sources[label] = _means([nll[r] for r in rows], [kl[r] for r in rows], tokens)
    return {
        **_means(nll, kl, tokens),
        "accuracy": correct / (tokens * len(nll)),
        "tokens_per_second": (tokens + 1) * len(nll) / max(sum(p["seconds"] for p in parts), 1e-9),
        "peak_memory_bytes": max(part["peak_bytes"] for part in parts),
        "sources": sources,
    }


_SCORES = {LANGUAGE: _language_score, SENTENCES: sentence_score}


def _means(nll: Sequence[float], kl: Sequence[float], tokens: int) -> dict[str, float | None]:
    count = tokens * len(nll)
    mean, divergence = sum(nll) / count, sum(kl) / count
    # Plain sums say whether all are finite; fsum raises on what is not.
    return {
        "perplexity": math.exp(math.fsum(nll) / count) if mean < _LARGEST_LOG else None,
        "kl": math.fsum(kl) / count if math.isfinite(divergence) else None,
    }
