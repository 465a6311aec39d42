"""Text sources → token sequences: weighted, packed, seeded."""

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.orchestrator.errors import Mistakes, RecipeError, UserError
from moesaic.orchestrator.recipe import Source, Texts

# Enough text for any calibration set; a larger file is read only so far.
_FILE_CHARACTERS = 64_000_000
# A dataset is streamed: this many times the tokens that are needed, so that there is a choice.
_DATASET_OVERSAMPLING = 4
_PIECE_CHARACTERS = 100_000


@dataclass(frozen=True)
class Sequences:
    """Packed token sequences.

    Attributes:
        ids: int32 ``[sequences, length]``.
        source: index of each sequence's source in the recipe, int32 ``[sequences]``.
        labels: names of the sources.
    """

    ids: NDArray[np.int32]
    source: NDArray[np.int32]
    labels: list[str]

    @property
    def digest(self) -> str:
        """Digest of the tokens themselves: what results are named by, whatever made the tokens."""
        return hashlib.blake2b(self.ids.tobytes(), digest_size=20).hexdigest()


def load_tokenizer(model: str, trust_remote_code: bool) -> Any:
    """The model's tokenizer; raises UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare ones
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{model}: its tokenizer cannot be loaded: {reason}") from None
    # Without files, transformers gives an empty tokenizer of the model's class.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise UserError(f"{model}: no tokenizer: put its tokenizer.json into this folder")
    return tokenizer


def beyond_vocabulary(tokenizer: Any, vocab_size: int) -> dict[str, int]:
    """Entries of the tokenizer that the model has no embedding for, token → id."""
    if len(tokenizer) <= vocab_size:
        return {}
    return {token: n for token, n in tokenizer.get_vocab().items() if n >= vocab_size}


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises a UserError where ordinary text can give tokens that the model does not have.

    Tokens that were added to the vocabulary are no such mistake: they come out of a text only where
    they stand in it literally, and :func:`draw` would find that.
    """
    added = tokenizer.get_added_vocab()
    ordinary = [n for t, n in beyond_vocabulary(tokenizer, vocab_size).items() if t not in added]
    if ordinary:
        raise UserError(_misfit(max(ordinary), vocab_size))


def _misfit(token: int, vocab_size: int) -> str:
    return (
        f"its tokenizer gives token {token}, but the vocabulary ends at {vocab_size - 1}: they do"
        " not fit; put the tokenizer of this model into its folder"
    )


def documents(source: Source) -> Iterator[str]:
    """The documents of a source: a text file is one, JSONL and datasets have one per row."""
    if source.file is None:
        yield from _dataset_rows(source)
    elif source.file.endswith((".jsonl", ".jsonl.gz")):
        yield from _jsonl_rows(source)
    else:
        try:
            with open(source.file, encoding="utf-8", newline="") as stream:
                yield stream.read(_FILE_CHARACTERS)
        except UnicodeDecodeError as error:
            raise UserError(f"{source.file}: is not UTF-8 text: {error.reason}") from None


def _jsonl_rows(source: Source) -> Iterator[str]:
    assert source.file is not None
    opener = gzip.open if source.file.endswith(".gz") else open
    number = characters = 0
    try:
        with opener(source.file, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if characters >= _FILE_CHARACTERS:
                    return
                if line.strip():
                    text = _jsonl_text(line, source.field, f"{source.file}, line {number}")
                    characters += len(text)
                    yield text
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{source.file}: cannot be read after line {number}: {error}") from None


def _jsonl_text(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a JSON object: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object: {line.strip()[:60]}")
    return _text(row, field, where)


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    """The text of a row; raises UserError where there is none."""
    if field not in row:
        raise UserError(f"{where}: no field {field!r} (there are: {', '.join(map(str, row))})")
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is not text but {text!r:.60}")
    return text


def _dataset_rows(source: Source) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"dataset {source.dataset}: install moesaic[datasets] to read Hugging Face datasets"
        ) from None
    try:
        rows = load_dataset(source.dataset, source.config, split=source.split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _text(row, source.field, f"dataset {source.dataset}, row {number}")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"dataset {source.dataset}: cannot be read: {reason}") from None


def allotment(total: int, weights: list[float]) -> list[int]:
    """``total`` shared out by weight: largest remainders, sums exactly."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _token_stream(tokenizer: Any, source: Source, wanted: int) -> list[int]:
    """Tokens of the source, documents separated by the end-of-text token."""
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    limit = wanted * _DATASET_OVERSAMPLING if source.file is None else None
    tokens: list[int] = []
    for document in documents(source):
        for start in range(0, len(document), _PIECE_CHARACTERS):
            piece = document[start : start + _PIECE_CHARACTERS]
            tokens += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        tokens += separator
        if limit is not None and len(tokens) >= limit:
            break
    return tokens


def _first_token(tokenizer: Any) -> list[int]:
    """The token that the tokenizer itself puts in front of every text, if it does."""
    ids: list[int] = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def draw(texts: Texts, tokenizer: Any, vocab_size: int, what: str) -> Sequences:
    """Draws ``texts.sequences`` sequences of ``texts.length`` tokens from the sources.

    Each source is tokenized, cut into consecutive windows, and a seeded choice without replacement
    is made among them; then all sources are shuffled together, so that every shard sees the mix.
    The same recipe gives the same sequences on every machine.

    Raises:
        UserError: a source is empty or too short, or the tokenizer does not fit the model.
    """
    first = _first_token(tokenizer)
    body = texts.length - len(first)
    chosen: list[list[int]] = []
    origin: list[int] = []
    counts = allotment(texts.sequences, [source.weight for source in texts.texts])
    mistakes = Mistakes()
    for index, (source, count) in enumerate(zip(texts.texts, counts, strict=True)):
        tokens = mistakes.attempt(
            partial(_enough_tokens, texts, source, count, body, tokenizer, what), f"{what}.texts"
        )
        if tokens is not None:
            windows = range(len(tokens) // body)
            starts = random.Random(f"{texts.seed}/{index}").sample(windows, count)
            chosen += [first + tokens[s * body : (s + 1) * body] for s in starts]
            origin += [index] * count
    if mistakes.found:
        raise mistakes.error()
    order = list(range(len(chosen)))
    random.Random(texts.seed).shuffle(order)
    ids = np.array([chosen[i] for i in order], dtype=np.int32)
    if ids.max() >= vocab_size:
        raise RecipeError(f"model: {_misfit(int(ids.max()), vocab_size)}")
    source_index = np.array([origin[i] for i in order], dtype=np.int32)
    return Sequences(ids, source_index, [source.label for source in texts.texts])


def _enough_tokens(
    texts: Texts, source: Source, count: int, body: int, tokenizer: Any, what: str
) -> list[int]:
    """The source's tokens, enough for ``count`` windows of ``body``."""
    if count == 0:
        raise RecipeError(
            f"{what}.texts: {source.label} gets none of the {texts.sequences} sequences: its"
            f" weight {source.weight:g} is too small"
        )
    tokens = _token_stream(tokenizer, source, count * body)
    if len(tokens) // body < count:
        if set(tokens) <= {tokenizer.eos_token_id}:
            raise RecipeError(f"{what}.texts: {source.label} holds no text: give another file")
        raise RecipeError(
            f"{what}.texts: {source.label} has {len(tokens):,} tokens, but {count} sequences of"
            f" {texts.length} tokens need {count * body:,}: give more text, or lower"
            f" {what}.sequences"
        )
    return tokens
