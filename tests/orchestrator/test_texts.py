"""Texts to tokens: shares, choice, and everything that a text can be."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from moesaic.orchestrator import texts as module
from moesaic.orchestrator.errors import RecipeError, UserError
from moesaic.orchestrator.recipe_sections import Source, Texts
from moesaic.orchestrator.texts import (
    allotment,
    beyond_vocabulary,
    check_vocabulary,
    documents,
    draw,
    load_tokenizer,
)
from tests.orchestrator.projects import VOCABULARY, byte_tokenizer

TOKENIZER = byte_tokenizer()
# Without the time of day: it is part of a test's name.
CUT = gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9]


def section(*sources: Source, **changes: Any) -> Texts:
    return Texts(texts=list(sources), **{"sequences": 6, "length": 10, **changes})


def numbered(path: Path, count: int, letter: str = "x") -> Source:
    """A text without repeats: ``x00000x00001 …``, six characters a number."""
    path.write_text("".join(f"{letter}{i:05d}" for i in range(count)), encoding="utf-8")
    return Source(file=str(path))


def decoded(ids: np.ndarray[Any, Any]) -> list[str]:
    return [TOKENIZER.decode(row.tolist()) for row in ids]


@pytest.mark.parametrize("total", [0, 1, 7, 100])
@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [5.0, 3.0, 1.5, 0.25], [1e-6, 1e6]])
def test_allotment_sums_exactly_and_misses_no_share_by_one(
    total: int, weights: list[float]
) -> None:
    counts = allotment(total, weights)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1


def test_sources_get_sequences_by_weight(tmp_path: Path) -> None:
    a = numbered(tmp_path / "a", 200, "a").model_copy(update={"weight": 3.0})
    b = numbered(tmp_path / "b", 200, "b")
    found = draw(section(a, b, sequences=12), TOKENIZER, VOCABULARY, "calibration")
    assert Counter(found.source.tolist()) == {0: 9, 1: 3}
    assert found.labels == ["a", "b"]
    for text, source in zip(decoded(found.ids), found.source, strict=True):
        assert "ab"[source] in text and "ba"[source] not in text
    assert found.source.tolist() != sorted(found.source.tolist())  # the mix is shuffled


def test_sequences_are_pieces_of_the_text_that_do_not_overlap(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a", 100)
    text = (tmp_path / "a").read_text()
    found = draw(section(source, sequences=60), TOKENIZER, VOCABULARY, "calibration")
    assert found.ids.shape == (60, 10) and found.ids.dtype == np.int32
    starts = sorted(text.index(piece) for piece in decoded(found.ids))
    assert all(after - before >= 10 for before, after in zip(starts, starts[1:], strict=False))


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a", 300)
    one, two, other = (
        draw(section(source, seed=seed), TOKENIZER, VOCABULARY, "calibration") for seed in (0, 0, 1)
    )
    assert np.array_equal(one.ids, two.ids) and one.digest == two.digest
    assert not np.array_equal(one.ids, other.ids) and one.digest != other.digest


def test_documents_are_separated_by_the_end_of_text_token(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row{i}"}) + "\n\n" for i in range(9)))
    found = draw(section(Source(file=str(path)), sequences=9, length=5), TOKENIZER, VOCABULARY, "c")
    end = TOKENIZER.eos_token_id
    assert (found.ids[:, -1] == end).all()
    assert sorted(decoded(found.ids[:, :-1])) == [f"row{i}" for i in range(9)]


def test_every_sequence_begins_with_the_bos_token_when_the_tokenizer_puts_one(
    tmp_path: Path,
) -> None:
    source = numbered(tmp_path / "a", 100)
    text = (tmp_path / "a").read_text()
    found = draw(section(source), byte_tokenizer(bos=True), VOCABULARY, "calibration")
    assert found.ids.shape == (6, 10)
    assert (found.ids[:, 0] == 0).all()
    assert (found.ids[:, 1:] != 0).all()
    assert all(piece in text for piece in decoded(found.ids[:, 1:]))


def test_all_windows_of_a_text_can_be_drawn_but_not_one_more(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a", 10)  # 60 characters and the end of the text
    assert len(draw(section(source), TOKENIZER, VOCABULARY, "calibration").ids) == 6
    with pytest.raises(UserError) as error:
        draw(section(source, sequences=7), TOKENIZER, VOCABULARY, "calibration")
    message = str(error.value)
    assert message.startswith("calibration.texts: a has 61 tokens")
    assert "7 sequences of 10 tokens need 70" in message


def test_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.texts: a holds no text"):
        draw(section(numbered(tmp_path / "a", 0)), TOKENIZER, VOCABULARY, "evaluation")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b" \n\t" * 900), ("a.txt", b"<eos>" * 900), ("a.jsonl", b'{"text": " "}\n' * 900)],
)
def test_text_of_nothing_but_blanks_and_ends_is_refused(
    name: str, content: bytes, tmp_path: Path
) -> None:
    source = write_raw(tmp_path / name, content)
    with pytest.raises(UserError, match=rf"evaluation\.texts: {name} holds no text"):
        draw(section(source), TOKENIZER, VOCABULARY, "evaluation")


def test_blank_documents_between_others_leave_no_trace(tmp_path: Path) -> None:
    rows = [f'{{"text": "number {i} of many"}}\n' for i in range(40)]
    plain = write_raw(tmp_path / "a.jsonl", "".join(rows).encode())
    blank = write_raw(tmp_path / "b.jsonl", '{"text": "\\n "}\n'.join(rows).encode())
    first, second = (draw(section(s), TOKENIZER, VOCABULARY, "calibration") for s in (plain, blank))
    assert np.array_equal(first.ids, second.ids)


def test_a_tokenizer_that_fails_on_a_text_is_told(tmp_path: Path) -> None:
    def words(*known: str) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(known)}))
        tokenizer.pre_tokenizer = Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    source = write_raw(tmp_path / "a", b"number of pieces")
    with pytest.raises(UserError, match=r"texts: a: the tokenizer fails on 'number of pieces': W"):
        draw(section(source), words("a", "number", "of"), 3, "calibration")
    words("number", "of").save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="model: the tokenizer fails on 'a': WordLevel error"):
        load_tokenizer(str(tmp_path / "model"), False)


def test_a_source_that_would_get_no_sequence_is_refused(tmp_path: Path) -> None:
    a = numbered(tmp_path / "a", 100)
    b = numbered(tmp_path / "b", 100).model_copy(update={"weight": 0.001})
    with pytest.raises(UserError, match=r"b gets none of the 6 sequences: its weight 0\.001"):
        draw(section(a, b), TOKENIZER, VOCABULARY, "calibration")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocabulary ends at 19: they do not fit"):
        draw(section(numbered(tmp_path / "a", 50)), TOKENIZER, 20, "calibration")


def test_all_sources_that_fail_are_told_at_once(tmp_path: Path) -> None:
    empty, short = numbered(tmp_path / "a", 0), numbered(tmp_path / "b", 2)
    odd = write_raw(tmp_path / "c", b"caf\xe9")
    with pytest.raises(RecipeError) as error:
        draw(section(empty, short, odd), TOKENIZER, VOCABULARY, "calibration")
    first, second, third = str(error.value).splitlines()
    assert first.startswith("calibration.texts: a holds no text: give")
    assert second.startswith("calibration.texts: b has 13 tokens, but 2 sequences of 10 tokens")
    assert third.startswith(f"calibration.texts: {tmp_path}/c: is not UTF-8")


def test_only_added_tokens_may_be_beyond_the_vocabulary() -> None:
    tokenizer = byte_tokenizer()
    check_vocabulary(tokenizer, VOCABULARY)
    assert beyond_vocabulary(tokenizer, VOCABULARY) == {}
    tokenizer.add_tokens(["<one>", "<two>"])
    check_vocabulary(tokenizer, VOCABULARY)
    extra = beyond_vocabulary(tokenizer, VOCABULARY)
    assert extra == {"<one>": VOCABULARY, "<two>": VOCABULARY + 1}
    with pytest.raises(
        UserError, match="gives token 256, but .* ends at 255: they do not fit; put"
    ):
        check_vocabulary(tokenizer, VOCABULARY - 1)


def write_raw(path: Path, content: bytes) -> Source:
    path.write_bytes(content)
    return Source(file=str(path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"caf\xe9", ["a.txt", "not UTF-8"]),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', ["a.jsonl", "cannot be read", "utf-8"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b", "id": 3}\n', ["line 3", "'text'", "txt, id"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl, line 2", "not a JSON object"]),
        ("a.jsonl", b'["text"]\n', ["line 1", "not a JSON object"]),
        ("a.jsonl", b'"text"\n', ["line 1", "not a JSON object"]),
        ("a.jsonl", b'{"text": null}\n', ["line 1", "'text' is not text but None"]),
        ("a.jsonl", b'{"text": "a\\ud800b"}\n', ["line 1", "not text", "'\\ud800' alone"]),
        ("a.jsonl.gz", b"not gzip at all", ["a.jsonl.gz", "cannot be read"]),
        ("a.jsonl.gz", CUT, ["a.jsonl.gz", "cannot be"]),
    ],
)
def test_broken_files_are_refused_with_the_place(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    source = write_raw(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        list(documents(source))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_packed_rows_and_other_fields_are_read(tmp_path: Path) -> None:
    rows = [{"body": "one\ntwo", "n": 1}, {"body": "größe", "n": 2}]
    content = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    source = write_raw(tmp_path / "a.jsonl.gz", content).model_copy(update={"field": "body"})
    assert list(documents(source)) == ["one\ntwo", "größe"]


def test_only_so_much_of_a_large_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FILE_CHARACTERS", 10)
    rows = b'{"text": "abcd"}\n' * 50
    assert list(documents(write_raw(tmp_path / "a.jsonl", rows))) == ["abcd"] * 3
    assert list(documents(write_raw(tmp_path / "a.txt", b"x" * 50))) == ["x" * 10]


def hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]) -> list[tuple[Any, ...]]:
    """Lets ``answer`` stand for the hub; returns what it was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        return answer()

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_dataset_is_streamed_only_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def rows() -> Any:
        for number in range(10_000):
            taken.append(number)
            yield {"body": f"{number:05d}" * 4}

    asked = hub(monkeypatch, rows)
    source = Source(dataset="owner/words", config="en", split="test", field="body")
    found = draw(section(source), TOKENIZER, VOCABULARY, "calibration")
    assert asked == [("owner/words", "en", "test", True)]
    assert found.ids.shape == (6, 10) and found.labels == ["owner/words"]
    assert 60 <= 21 * len(taken) < 600


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"txt": "a"}, "owner/words, row 1: no field 'text' .there are: txt"),
        ({"text": 5}, "owner/words, row 1: field 'text' is not text but 5"),
    ],
)
def test_a_dataset_without_text_is_refused(
    monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], words: str
) -> None:
    hub(monkeypatch, lambda: [row])
    with pytest.raises(UserError, match=words):
        list(documents(Source(dataset="owner/words")))


def test_a_dataset_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist\non the Hub")

    hub(monkeypatch, missing)
    with pytest.raises(UserError, match="dataset owner/words: cannot be read: doesn't exist on"):
        list(documents(Source(dataset="owner/words")))


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its tokenizer cannot be loaded") as error:
        load_tokenizer(str(tmp_path), False)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_saved_tokenizer_is_loaded(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), False)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded("größe")["input_ids"] == TOKENIZER("größe")["input_ids"]


def test_long_documents_are_tokenized_in_pieces_without_losing_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = numbered(tmp_path / "a", 100)
    whole = draw(section(source), TOKENIZER, VOCABULARY, "calibration")
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 7)
    calls = []

    def counting(text: str, **options: Any) -> Any:
        calls.append(text)
        return TOKENIZER(text, **options)

    spy: Any = SimpleNamespace(eos_token_id=0, bos_token_id=None)
    spy = type("Spy", (), {**vars(spy), "__call__": lambda _, t, **o: counting(t, **o)})()
    pieces = draw(section(source), spy, VOCABULARY, "calibration")
    assert np.array_equal(pieces.ids, whole.ids)
    assert max(map(len, calls)) == 7
