"""The examples of docs/extending.md are plug-ins: put where they belong, they work."""

import importlib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from moesaic.kernels.discovery import plugin, plugins
from moesaic.kernels.tensor import CompressedTensor, format_module, formats
from moesaic.methods.base import Spec, method_module, methods, reducers
from moesaic.methods.reduction import mixture, reducer_module
from moesaic.orchestrator import family
from moesaic.search.base import (
    Budget,
    Infeasible,
    Measurement,
    Problem,
    search_module,
    searches,
)
from moesaic.search.features import rule_of, scores
from tests.methods.layers import make_layer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
# Path in the checkout → text, for every code block that opens with its path.
EXAMPLES = {
    found[2]: found[1]
    for found in re.finditer(r"```(?:python|yaml)\n(# (\S+)\n.*?)```", PAGE, re.S)
}


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts an example into the package it belongs to, for the time of a test."""
    added: list[str] = []

    def put(path: str) -> Path:
        file = tmp_path / Path(path).name
        file.write_text(EXAMPLES[path])
        package: ModuleType = importlib.import_module(
            f"moesaic.{Path(path).parent}".replace("/", ".")
        )
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        added.append(f"{package.__name__}.{file.stem}")
        plugins.cache_clear()
        plugin.cache_clear()
        return file

    yield put
    for name in added:
        sys.modules.pop(name, None)
    plugins.cache_clear()
    plugin.cache_clear()


def test_page_has_one_example_of_each_kind() -> None:
    folders = sorted(str(Path(path).parent) for path in EXAMPLES)
    # A method and a reducer live in one folder.
    expected = ["kernels", "methods", "methods", "orchestrator/families", "search", "search/scores"]
    assert folders == expected
    assert len(re.findall("```(?:python|yaml)", PAGE)) == len(EXAMPLES)


def test_links_and_test_folders_of_the_page_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert links and all((ROOT / "docs" / link).is_file() for link in links)
    suites = re.findall(r"`pytest (\S+)`", PAGE)
    assert len(suites) == 7
    for suite in suites:
        assert list((ROOT / suite).glob("test_*.py")), f"no tests in {suite}"


@pytest.mark.parametrize("shape", [(5, 12), (3, 7, 8)])
def test_method_example_compresses_to_signs_and_magnitudes(
    example: Any, shape: tuple[int, ...]
) -> None:
    file = example("methods/sign.py")
    assert "sign" in methods()
    method = method_module("sign")
    assert getattr(method, "__file__", None) == str(file)
    options = Spec.of("sign", {"group_size": 4}).parsed()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    (member,) = method.compress({"weight": weight}, {}, options).members.values()

    groups = weight.double().reshape(-1, 4)
    magnitude = groups.abs().mean(-1, keepdim=True)
    expected = torch.where(groups < 0, -magnitude, magnitude).reshape(shape)
    torch.testing.assert_close(member.dense().double(), expected, rtol=1e-6, atol=0)
    assert member.nbytes == method.predict_bytes({"weight": shape}, torch.float32, options)


def test_method_example_says_what_it_cannot_do(example: Any) -> None:
    example("methods/sign.py")
    method, options = method_module("sign"), Spec.of("sign", {"group_size": 8}).parsed()
    assert "8 does not divide 12" in (method.problem({"weight": (2, 12)}, options) or "")
    with pytest.raises(ValueError, match="NaN"):
        method.compress({"weight": torch.full((2, 8), torch.nan)}, {}, options)


@pytest.mark.parametrize("kind", ["softmax", "biased", "grouped"])
def test_reducer_example_keeps_the_experts_of_the_longest_rows(example: Any, kind: str) -> None:
    example("methods/row_norm.py")
    assert "row_norm" in reducers() and "row_norm" not in methods()
    module, layer = reducer_module("row_norm"), make_layer(kind=kind)
    for keep, count in ((4, 4), (0.75, 6), (1.0, 8)):
        options = Spec.of("row_norm", {"keep": keep}).parsed()
        reduction = module.reduce(layer, options)
        assert module.outline(layer.shape, options) == reduction.outline
        assert reduction.outline.experts == count
        kept = [expert for (expert,) in reduction.groups]
        length = layer.router["weight"].norm(dim=1)
        half = 8 // layer.shape.routing_groups
        for low in range(0, 8, half):
            own = [expert for expert in kept if low <= expert < low + half]
            order = length[low : low + half].argsort(descending=True)[: len(own)] + low
            assert sorted(order.tolist()) == own and len(own) == count * half // 8
        assert torch.equal(reduction.weights["up"], layer.weights["up"][kept])
        assert mixture(layer, reduction, layer.stats["sample"]).isfinite().all()
    with pytest.raises(ValueError, match="keep: 9"):
        module.outline(layer.shape, Spec.of("row_norm", {"keep": 9}).parsed())


@pytest.mark.parametrize("shape", [(5, 13), (3, 7, 9)])
def test_format_example_rounds_trips_and_multiplies(example: Any, shape: tuple[int, ...]) -> None:
    example("kernels/float8_row.py")
    assert "float8_row" in formats()
    module: Any = format_module("float8_row")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[..., 2, :] = 0

    tensor: CompressedTensor = module.pack(weight)

    # Three bits of mantissa: half a step is at most 2^-4 of a value, and of the least normal
    # value of a row (2^-6 in units of the scale) for those below it.
    bound = weight.abs().clamp(min=2**-6 * weight.abs().amax(-1, keepdim=True) / 448) / 16
    assert bool(((tensor.dense() - weight).abs() <= bound * 1.001).all())
    parts = {name: (tuple(p.shape), p.dtype) for name, p in tensor.parts.items()}
    assert parts == module.part_shapes(shape, torch.float32, {})

    x = torch.randn(*shape[:-2], 4, shape[-1], generator=torch.Generator().manual_seed(1))
    exact = x.double() @ tensor.dense().double().transpose(-1, -2)
    for multiply in (module.matmul_reference, module.matmul):
        torch.testing.assert_close(multiply(x, tensor).double(), exact, rtol=1e-5, atol=1e-5)


def test_family_example_names_every_parameter_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "helium.yaml").write_text(EXAMPLES["orchestrator/families/helium.yaml"])
    (tmp_path / "llama.yaml").write_text((family.FOLDER / "llama.yaml").read_text())
    monkeypatch.setattr(family, "FOLDER", tmp_path)
    assert family.families() == ["helium", "llama"]
    helium = family.load_family.__wrapped__("helium")

    config = transformers.HeliumConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    names = [helium.embed, helium.norm, helium.head]
    for block in range(2):
        prefix = helium.block.format(block=block)
        names += [f"{prefix}.{p}" for _, group in helium.parts() for p in group.linears]
        names += [f"{prefix}.{kept.removesuffix('.weight')}" for kept in helium.kept]
    model = transformers.HeliumForCausalLM(config)
    assert sorted(f"{name}.weight" for name in names) == sorted(
        n for n, _ in model.named_parameters()
    )


def problem_of(sizes: list[list[tuple[int, float]]], unit_bytes: int) -> Problem:
    """Unit i offers the (bytes, loss) of ``sizes[i]``; 10 bytes are fixed."""
    chains = [(), *((Spec("rtn", f'{{"bits": {b}}}'),) for b in range(2, 9))]
    choices = {
        f"u{i}": [
            Measurement(f"u{i}", chain, size, loss, None, 0.0)
            for chain, (size, loss) in zip(chains, offers, strict=False)
        ]
        for i, offers in enumerate(sizes)
    }
    return Problem(choices, [], Budget(unit_bytes + 10, 10))


def offers(random: Random) -> list[tuple[int, float]]:
    return [(random.randint(7, 20), random.uniform(0.01, 0.9)) for _ in range(3)]


def test_search_example_stays_in_the_budget_and_near_the_best_plan(example: Any) -> None:
    example("search/steepest.py")
    assert "steepest" in searches()
    steepest = search_module("steepest")
    random = Random(0)
    for unit_bytes in (30, 41, 53, 67):
        sizes = [[(random.randint(1, 6), 1.0), *offers(random)] for _ in range(5)]
        plan = steepest.search(problem_of(sizes, unit_bytes))
        assert plan.bytes <= unit_bytes + 10
        fitting = [
            sum(loss for _, loss in combination)
            for combination in itertools.product(*sizes)
            if sum(size for size, _ in combination) <= unit_bytes
        ]
        assert min(fitting) <= plan.loss <= 1.1 * min(fitting)


def test_search_example_says_how_large_the_smallest_plan_is(example: Any) -> None:
    example("search/steepest.py")
    with pytest.raises(Infeasible, match="smallest plan has 22 bytes, the budget is 21"):
        search_module("steepest").search(problem_of([[(5, 1.0)], [(7, 1.0), (9, 0.0)]], 11))


def test_score_example_is_the_relative_error_of_a_weight(example: Any) -> None:
    example("search/scores/relative_weight.py")
    assert "relative_weight" in scores()
    rule = rule_of("relative_weight")
    features = {"weight_error": np.array([0.0, 1.0, 3.0]), "weight_norm": np.array([2.0, 4.0, 6.0])}
    assert rule.needs == set(features) and not rule.wants_gradients
    np.testing.assert_allclose(rule.compute(features), [0, 0.25, 0.5])
