"""Text sources → token sequences: weighted, seeded.

Calibration and the evaluation of language models take windows of running text, all of one length.
An encoder is judged on sentences, each of its own length.
"""

import gzip
import hashlib
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.orchestrator.errors import Mistakes, RecipeError, UserError
from moesaic.orchestrator.foreign import parse_json, printable, shown
from moesaic.orchestrator.recipe_sections import Source, Texts
from moesaic.orchestrator.redaction import redacted

# Enough text for any calibration set; a larger file is read only so far.
_FILE_CHARACTERS = 64_000_000
_LINE_CHARACTERS = 64_000_000
# A dataset is streamed: this many times the tokens that are needed, so that there is a choice.
_DATASET_OVERSAMPLING = 4
_PIECE_CHARACTERS = 100_000
# In a row of tokens, behind the end of a sentence.
NO_TOKEN = -1
# A sentence ends with its mark and what closes behind it, before a space and no small letter.
_SENTENCE = re.compile(r"\S.*?[.!?][\"')\]”’»]*(?=\s+[^a-z\s]|\s*$)", re.S)
_LEAST_WORDS = 5

# Makes rows of a source: how many there are, and the one with a number. Takes the section, the
# source, how many rows are wanted, the tokenizer, and the section's name for messages.
Cutter = Callable[[Texts, Source, int, Any, str], tuple[int, Callable[[int], list[int]]]]


@dataclass(frozen=True)
class Sequences:
    """Token sequences.

    Attributes:
        ids: int32 ``[sequences, length]``; behind the end of a shorter one stands -1.
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

    def beginning(self, sequences: int, length: int) -> NDArray[np.int32]:
        """First tokens of the first sequences, at most so many of either, and no end among them."""
        rows = self.ids[:sequences, :length]
        return rows[:, : int((rows != NO_TOKEN).sum(1).min())]


def load_tokenizer(model: str, trust_remote_code: bool) -> Any:
    """The model's tokenizer; raises UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare ones
        raise UserError(f"{model}: its tokenizer cannot be loaded: {_reason(error)}") from None
    # Without files, transformers gives an empty tokenizer of the model's class.
    if not _tokens(tokenizer, "a", model):
        raise UserError(f"{model}: no tokenizer: put its tokenizer.json into this folder")
    return tokenizer


def _reason(error: Exception) -> str:
    return printable(" ".join(str(error).split())[:200])


def _tokens(tokenizer: Any, text: str, where: str) -> list[int]:
    """Tokens of a text by themselves; raises UserError where the tokenizer cannot make any."""
    try:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # as above; of words that are unknown, for one
        raise UserError(f"{where}: the tokenizer fails on {text!r:.40}: {_reason(error)}") from None
    return found


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
            # A line without an end, or a small archive of a huge one, must not fill the memory.
            lines = iter(lambda: stream.readline(_LINE_CHARACTERS + 1), "")
            for number, line in enumerate(lines, start=1):
                if len(line) > _LINE_CHARACTERS:
                    raise UserError(
                        f"{source.file}, line {number}: has more than {_LINE_CHARACTERS:,}"
                        " characters: split the document"
                    )
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
        row = parse_json(line.encode())
    except ValueError as error:
        raise UserError(f"{where}: not a JSON object: {shown(error)}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object: {shown(line.strip()[:60])}")
    return _text(row, field, where)


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    """The text of a row; raises UserError where there is none."""
    if field not in row:
        raise UserError(f"{where}: no field {field!r} (there are: {shown(', '.join(row))})")
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is not text but {text!r:.60}")
    try:
        text.encode()  # JSON can hold halves of surrogate pairs, which no tokenizer takes
    except UnicodeEncodeError as error:
        wrong = ascii(text[error.start])
        raise UserError(f"{where}: field {field!r} is not text: it holds {wrong} alone") from None
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
        reason = " ".join(redacted(str(error)).split())[:200]
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
    """Tokens of the source, documents separated by the end-of-text token; blank ones are none."""
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    limit = wanted * _DATASET_OVERSAMPLING if source.file is None else None
    tokens: list[int] = []
    for document in documents(source):
        if not document or document.isspace():
            continue
        for start in range(0, len(document), _PIECE_CHARACTERS):
            piece = document[start : start + _PIECE_CHARACTERS]
            tokens += _tokens(tokenizer, piece, source.label)
        tokens += separator
        if limit is not None and len(tokens) >= limit:
            break
    return tokens


def _first_token(tokenizer: Any) -> list[int]:
    """The token that the tokenizer itself puts in front of every text, if it does."""
    ids: list[int] = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def draw(
    texts: Texts, tokenizer: Any, vocab_size: int, what: str, cut: Cutter | None = None
) -> Sequences:
    """Draws ``texts.sequences`` sequences of ``texts.length`` tokens from the sources.

    A seeded choice without replacement is made among the rows that each source is cut into; then
    all sources are shuffled together, so that every shard sees the mix. The same recipe gives the
    same sequences on every machine.

    Args:
        cut: how sources become rows: :func:`windows`, :func:`framed_windows`, :func:`sentences`.

    Raises:
        UserError: a source is empty or too short, or the tokenizer does not fit the model.
    """
    cut = cut or windows
    chosen: list[list[int]] = []
    origin: list[int] = []
    counts = allotment(texts.sequences, [source.weight for source in texts.texts])
    mistakes = Mistakes()
    for index, (source, count) in enumerate(zip(texts.texts, counts, strict=True)):
        rows = mistakes.attempt(
            partial(_rows, cut, texts, source, count, tokenizer, what), f"{what}.texts"
        )
        if rows is not None:
            known, row = rows
            numbers = random.Random(f"{texts.seed}/{index}").sample(range(known), count)
            chosen += [row(number) for number in numbers]
            origin += [index] * count
    if mistakes.found:
        raise mistakes.error()
    order = list(range(len(chosen)))
    random.Random(texts.seed).shuffle(order)
    width = max(map(len, chosen))
    padded = [row + [NO_TOKEN] * (width - len(row)) for row in chosen]
    ids = np.array([padded[i] for i in order], dtype=np.int32)
    if ids.max() >= vocab_size:
        raise RecipeError(f"model: {_misfit(int(ids.max()), vocab_size)}")
    source_index = np.array([origin[i] for i in order], dtype=np.int32)
    return Sequences(ids, source_index, [source.label for source in texts.texts])


def _rows(
    cut: Cutter, texts: Texts, source: Source, count: int, tokenizer: Any, what: str
) -> tuple[int, Callable[[int], list[int]]]:
    if count == 0:
        raise RecipeError(
            f"{what}.texts: {source.label} gets none of the {texts.sequences} sequences: its"
            f" weight {source.weight:g} is too small"
        )
    return cut(texts, source, count, tokenizer, what)


def windows(
    texts: Texts, source: Source, count: int, tokenizer: Any, what: str
) -> tuple[int, Callable[[int], list[int]]]:
    """Consecutive windows of the source's tokens, begun as the tokenizer begins a text."""
    return _windows(texts, source, count, tokenizer, what, _first_token(tokenizer), [])


def framed_windows(
    texts: Texts, source: Source, count: int, tokenizer: Any, what: str
) -> tuple[int, Callable[[int], list[int]]]:
    """The same between what the tokenizer puts before and behind every text."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    places = range(len(whole) - len(bare) + 1)
    start = next((p for p in places if whole[p : p + len(bare)] == bare), 0)
    before, behind = whole[:start], whole[start + len(bare) :]
    return _windows(texts, source, count, tokenizer, what, before, behind)


def _windows(
    texts: Texts,
    source: Source,
    count: int,
    tokenizer: Any,
    what: str,
    before: list[int],
    behind: list[int],
) -> tuple[int, Callable[[int], list[int]]]:
    body = texts.length - len(before) - len(behind)
    if body < 1:
        raise RecipeError(
            f"{what}.length: {texts.length} tokens leave none between those that the tokenizer puts"
            f" around a text: give {texts.length - body + 1} or more"
        )
    tokens = _token_stream(tokenizer, source, count * body)
    if all(token == tokenizer.eos_token_id for token in tokens):
        raise RecipeError(f"{what}.texts: {source.label} holds no text: give another file")
    if len(tokens) // body < count:
        raise RecipeError(
            f"{what}.texts: {source.label} has {len(tokens):,} tokens, but {count} sequences of"
            f" {texts.length} tokens need {count * body:,}: give more text, or lower"
            f" {what}.sequences"
        )

    def row(number: int) -> list[int]:
        return before + tokens[number * body : (number + 1) * body] + behind

    return len(tokens) // body, row


def sentences(
    texts: Texts, source: Source, count: int, tokenizer: Any, what: str
) -> tuple[int, Callable[[int], list[int]]]:
    """The source's different sentences as the tokenizer makes them ready for the model.

    They end with ``.``, ``!`` or ``?``, have at least five words, and are cut to ``texts.length``
    tokens. Headings, lists and code have no such marks and are left out.
    """
    wanted = count * _DATASET_OVERSAMPLING if source.file is None else None
    found: dict[str, None] = {}
    for document in documents(source):
        found.update(dict.fromkeys(_sentences(document)))
        if wanted is not None and len(found) >= wanted:
            break
    if len(found) < count:
        raise RecipeError(
            f"{what}.texts: {source.label} has {len(found):,} sentences of {_LEAST_WORDS} words or"
            f" more, but {count} are wanted: give more text, or lower {what}.sequences"
        )
    known = list(found)

    def row(number: int) -> list[int]:
        ids: list[int] = tokenizer(known[number], truncation=True, max_length=texts.length)[
            "input_ids"
        ]
        return ids

    return len(known), row


def _sentences(document: str) -> Iterator[str]:
    """Sentences of a text whose paragraphs stand between empty lines."""
    for paragraph in re.split(r"\n\s*\n", document):
        for match in _SENTENCE.finditer(paragraph):
            words = match[0].split()
            if len(words) >= _LEAST_WORDS:
                yield " ".join(words)
