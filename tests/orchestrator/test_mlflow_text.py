"""Names, params and addresses as MLflow allows them, judged by MLflow's own validation."""

import math
import random

import pytest
from mlflow.utils.validation import _validate_metric_name, _validate_param_name

from moesaic.orchestrator.mlflow_text import choice_name, legal_name, numbers, safe_params


@pytest.mark.parametrize("name", ["kl", "sources/wiki.train.txt/kl", "choice.gptq bits:3", "a-b_c"])
def test_legal_name_is_unchanged(name: str) -> None:
    assert legal_name(name) == name


def test_any_name_becomes_legal_and_stays_distinct() -> None:
    generator = random.Random(0)
    texts = {"", ".", "..", "a//b", "/a", "a/", "a/../b", "a/./b", "é", "è", "x" * 250, "x" * 251}
    texts |= {"x" * 252, *("".join(generator.choices("ab/.é(", k=7)) for _ in range(400))}
    legal = {text: legal_name(text) for text in texts}
    for name in legal.values():
        _validate_metric_name(name)
        _validate_param_name(name)
    assert len(set(legal.values())) == len(texts)


def test_choice_reads_without_brackets() -> None:
    assert choice_name("gptq(bits=3, clip=mse) → rtn") == "gptq bits:3 clip:mse / rtn"


def test_numbers_are_flat_and_other_leaves_left() -> None:
    score = {"kl": 1, "who": "me", "none": None, "sources": {"a": {"kl": math.inf, "list": [1]}}}
    assert numbers(score) == {"kl": 1.0, "sources/a/kl": math.inf}


def test_long_values_differ_where_their_texts_do() -> None:
    (values, texts), (others, _) = (safe_params({"a b": "x" * 7000 + end}) for end in "12")
    assert values["a b"] != others["a b"]
    (file,) = texts
    assert file in values["a b"] and file.startswith("params/a_b-") and " " not in file
