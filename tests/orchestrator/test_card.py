"""The model card: names that others chose stay names."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from markdown_it import MarkdownIt

from moesaic.orchestrator.card import model_card
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.yardsticks import LANGUAGE
from moesaic.search.base import Plan
from tests.orchestrator.projects import make_recipe


def test_names_of_others_end_no_code_in_the_card(tmp_path: Path) -> None:
    folder = tmp_path / "x`<img src=x onerror=alert(1)> ```"
    folder.mkdir()
    recipe = load_recipe(make_recipe(tmp_path, folder, keep=["q_proj|\n```\n<b>", "````"]))
    # As much of an experiment as the card reads.
    experiment: Any = SimpleNamespace(
        recipe=recipe,
        model=SimpleNamespace(family=SimpleNamespace(yardstick=LANGUAGE)),
        sizes=SimpleNamespace(size=SimpleNamespace(dense_bytes=100)),
    )
    plan = Plan({}, loss=0.0, bytes=50)
    tokens = MarkdownIt("commonmark").parse(model_card(experiment, plan, None))
    children = [child for token in tokens for child in token.children or [token]]
    assert not [child for child in children if child.type.startswith("html")]
    code = [child.content for child in children if child.type == "code_inline"]
    assert code[0] == folder.name
    fences = [token.content for token in tokens if token.type == "fence"]
    assert fences[-1].rstrip() == recipe.to_yaml().rstrip() and len(fences) == 2
