"""Sliced models against transformers, and against a float64 model that is projected instead."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import RecipeError, UserError
from moesaic.orchestrator.family import Sublayer, families, load_family
from moesaic.orchestrator.slice_stage import Slicing
from moesaic.orchestrator.slice_walk import Passage
from moesaic.orchestrator.slicing import Cut, SlicedCheckpoint, dropped_share, slicing_events
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.walk import Walk
from tests.orchestrator.conftest import Tiny
from tests.orchestrator.inline import InlinePool, Killed

FULL = 48  # hidden size of the tiny models
SLICEABLE = [name for name in families() if load_family(name).sublayers]
IDS = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(0))

Make = Callable[..., "Sliced"]


class Sliced:
    """A tiny model and what is cut out of it; the same store for the same ``tmp_path``."""

    def __init__(
        self, folder: Path, tmp_path: Path, width: int, shortcuts: bool, ids: Tensor = IDS
    ) -> None:
        self.model = StreamedModel(Checkpoint(folder))
        tokens = tmp_path / "ids.safetensors"
        save_file({"ids": ids}, tokens)
        walk = Walk(
            model=str(folder),
            dtype="auto",
            trust_remote_code=False,
            fingerprint=self.model.checkpoint.fingerprint,
            ids=str(tokens),
            ids_digest="ids",
            sequences=len(ids),
            shards=min(3, len(ids)),
            batch=2,
            needs=(),
            experts="routed",
            gradients=0,
            seed=0,
            store=str(tmp_path / "store"),
        )
        sublayers = len(self.model.family.sublayers)
        self.cut = Cut(walk, width, shortcuts, self.model.blocks, sublayers)
        self.promised = SlicedCheckpoint(self.model, self.cut)

    def run(self, size: int = 1, kill_at: int | None = None) -> InlinePool:
        pool = InlinePool(size, kill_at)
        with View() as view:
            Slicing(self.cut, pool, view).run()
        return pool

    @torch.no_grad()
    def logits(self, ids: Tensor = IDS) -> Tensor:
        model = StreamedModel(Checkpoint(self.promised.path))
        hidden = model.embed(ids)
        for index in range(model.blocks):
            hidden = model.run_block(index, model.load_block(index), hidden)
        return model.logits(model.final_norm(hidden))

    def left(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.promised.path.iterdir()}


def dense_logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    )
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@contextmanager
def projected(
    model: Any, sliced: Sliced, basis: Mapping[int, Tensor], seen: dict[int, Tensor]
) -> Iterator[None]:
    """While this is open, the stream is projected at every place whose ``basis`` is given.

    The stream in front of every norm is put into ``seen``. Written for blocks of Llama's kind.
    """
    family, cut = sliced.model.family, sliced.cut
    norms = [
        (model.get_submodule(f"{family.block.format(block=block)}.{norm}"), module, block)
        for block in range(cut.blocks)
        for norm, module in family.shortcut_pairs()
    ]
    handles = []

    def enters(place: int) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Tensor, ...]) -> None:
            seen[place] = arguments[0].detach()

        return hook

    def cut_to(place: int, x: Tensor) -> Tensor:
        own = place if cut.shortcuts else 0
        return x @ basis[own] @ basis[own].mT if own in basis else x

    def leaves(place: int) -> Callable[..., Any]:
        def hook(module: Any, arguments: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            first = cut_to(place + 1, seen[place] + first) - seen[place]
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return hook

    embed = model.get_submodule(family.embed)
    handles.append(embed.register_forward_hook(lambda m, a, output: cut_to(0, output)))
    for place, (norm, module, block) in enumerate(norms):
        handles.append(norm.register_forward_pre_hook(enters(place)))
        own = model.get_submodule(f"{family.block.format(block=block)}.{module}")
        handles.append(own.register_forward_hook(leaves(place)))
    last = model.get_submodule(family.norm)
    handles.append(last.register_forward_pre_hook(enters(len(norms))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def axes(stream: Tensor, width: int) -> Tensor:
    """The projection on the principal axes of the normed stream, in float64."""
    rows = stream.double().flatten(0, -2)
    rows = rows / rows.square().mean(-1, keepdim=True).sqrt()
    basis = torch.linalg.svd(rows, full_matrices=False).Vh[:width].mT
    return basis


@pytest.mark.parametrize("shortcuts", [False, True])
@pytest.mark.parametrize("model_type", SLICEABLE)
def test_at_full_width_the_model_is_the_original(
    model_type: str, shortcuts: bool, tiny: Tiny, tmp_path: Path
) -> None:
    sliced = Sliced(tiny(model_type), tmp_path, FULL, shortcuts)
    sliced.run()
    found = sliced.logits()
    assert difference(found, dense_logits(tiny(model_type))) < 1e-5
    basis = sliced.cut.basis(0)
    assert (basis - torch.eye(FULL)).abs().max() > 0.1  # and yet everything was turned


@pytest.mark.parametrize("shortcuts", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen2_moe"])
def test_a_narrow_model_computes_what_the_projected_original_does(
    model_type: str, shortcuts: bool, tiny: Tiny, tmp_path: Path
) -> None:
    """Biases, tied embeddings, routers, shared experts and dense blocks among those of experts."""
    folder = tiny(model_type)
    sliced = Sliced(folder, tmp_path, 32, shortcuts)
    sliced.run()
    bases = {place: sliced.cut.basis(place) for place in range(sliced.cut.places)}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    with torch.no_grad(), projected(model, sliced, bases, {}):
        wanted = model(IDS).logits
    assert difference(sliced.logits().double(), wanted) < 1e-4
    assert difference(dense_logits(folder).double(), wanted) > 0.1


def test_axes_are_those_of_what_the_places_before_have_left(tiny: Tiny, tmp_path: Path) -> None:
    sliced = Sliced(tiny("llama"), tmp_path, 32, shortcuts=True)
    sliced.run(size=2)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float64)
    bases: dict[int, Tensor] = {}
    for place in range(sliced.cut.places):
        seen: dict[int, Tensor] = {}
        with torch.no_grad(), projected(model, sliced, bases, seen):
            model(IDS)
        bases[place] = wanted = axes(seen[place], 32)
        found = sliced.cut.basis(place)
        left = seen[place].flatten(0, -2)
        left = left / left.square().mean(-1, keepdim=True).sqrt()
        kept = [float((left @ basis).square().sum()) for basis in (found, wanted)]
        assert kept[0] == pytest.approx(kept[1], rel=1e-6)
        bases[place] = found  # what is arbitrary in both is the same for the next place


def test_shared_axes_are_those_of_all_places_together(tiny: Tiny, tmp_path: Path) -> None:
    sliced = Sliced(tiny("llama"), tmp_path, 32, shortcuts=False)
    sliced.run(size=2)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float64)
    seen: dict[int, Tensor] = {}
    with torch.no_grad(), projected(model, sliced, {}, seen):
        model(IDS)
    assert len(seen) == 5
    wanted = axes(
        torch.cat([own / own.square().mean(-1, True).sqrt() for own in seen.values()]), 32
    )
    found = sliced.cut.basis(0)
    assert (found @ found.mT - wanted @ wanted.mT).abs().max() < 1e-4


@pytest.mark.parametrize("shortcuts", [False, True])
def test_the_error_falls_with_the_width(shortcuts: bool, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3")
    dense = dense_logits(folder)
    errors, dropped = [], []
    for width in (16, 24, 32, 40, 48):
        sliced = Sliced(folder, tmp_path, width, shortcuts)
        sliced.run()
        errors.append(float((sliced.logits() - dense).norm() / dense.norm()))
        dropped.append(dropped_share(sliced.cut))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5
    assert dropped == sorted(dropped, reverse=True) and dropped[-1] == 0
    assert errors[0] > 0.3


def test_axes_of_their_own_lose_less_of_the_stream(tiny: Tiny, tmp_path: Path) -> None:
    shares = []
    for shortcuts in (True, False):
        sliced = Sliced(tiny("mistral"), tmp_path, 32, shortcuts)
        sliced.run()
        shares.append(dropped_share(sliced.cut))
    assert shares[0] < 0.5 * shares[1]


@pytest.mark.parametrize("model_type", ["qwen2", "mixtral"])
def test_shared_axes_leave_an_ordinary_checkpoint(
    model_type: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = tiny(model_type)
    sliced = Sliced(folder, tmp_path, 32, shortcuts=False)
    sliced.run()
    config = sliced.promised.config
    assert config["hidden_size"] == 32 and config["head_dim"] == 12
    assert config["model_type"] == model_type and not config["tie_word_embeddings"]
    before = Checkpoint(folder).config
    assert config["rms_norm_eps"] == before["rms_norm_eps"]
    assert not any("quantization" in key or "shortcut" in key for key in config)
    model, report = AutoModelForCausalLM.from_pretrained(
        sliced.promised.path, experts_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        assert difference(model(IDS).logits, sliced.logits()) < 1e-5
    norms = [tensor for name, tensor in model.named_parameters() if "layernorm" in name]
    assert norms and all(bool((norm == 1).all()) for norm in norms)


@pytest.mark.parametrize("shortcuts", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_what_is_promised_is_what_is_written(
    model_type: str, shortcuts: bool, tiny: Tiny, tmp_path: Path
) -> None:
    sliced = Sliced(tiny(model_type, dtype=torch.bfloat16), tmp_path, 40, shortcuts)
    promised = StreamedModel(sliced.promised)
    assert {unit.shapes["gate"][2] for unit in promised.units() if unit.kind == "bank"} == {40}
    sliced.run()
    written = Checkpoint(sliced.promised.path)
    assert sliced.promised.entries() == written.entries()
    assert sliced.promised.file_bytes == written.file_bytes
    assert sliced.promised.config == written.config
    turned = [name for name in written.names() if ".shortcuts." in name]
    assert len(turned) == (2 * sliced.cut.blocks if shortcuts else 0)
    assert all(written.shape(name) == (40, 40) for name in turned)
    assert {written.dtype(name) for name in written.names()} == {torch.bfloat16}


@pytest.mark.parametrize("shortcuts", [False, True])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    shortcuts: bool, tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole = Sliced(tiny("llama"), tmp_path / "one", 32, shortcuts)
    calls = whole.run(size=1).calls.total()
    other = Sliced(tiny("llama"), tmp_path / "two", 32, shortcuts)
    kills, done = 0, 0
    while True:
        try:
            done += other.run(size=3, kill_at=4).calls.total()
            break
        except Killed:
            kills, done = kills + 1, done + 3
    assert kills >= 2 and done < calls + 3 * kills + 20
    assert whole.left() == other.left()
    assert not other.cut.scratch.exists()
    assert other.run().calls.total() == 0


def test_only_what_is_damaged_or_gone_is_made_again(tiny: Tiny, tmp_path: Path) -> None:
    sliced = Sliced(tiny("llama"), tmp_path, 32, shortcuts=True)
    sliced.run()
    before = sliced.left()
    store = sliced.cut.store
    part = store.path("sliced", sliced.cut.part_key(1))
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    assert sliced.run().calls == {"slicing:write": 1}
    assert sliced.left() == before
    # Axes in the middle of the model: the text has to come there again.
    store.path("bases", sliced.cut.basis_key(3)).unlink()
    calls = sliced.run().calls
    assert calls["slice_walk:settle"] == 1 and "slicing:write" not in calls
    assert sliced.left() == before


def test_another_width_with_shared_axes_needs_no_other_passage(tiny: Tiny, tmp_path: Path) -> None:
    Sliced(tiny("llama"), tmp_path, 32, shortcuts=False).run()
    calls = Sliced(tiny("llama"), tmp_path, 40, shortcuts=False).run().calls
    assert calls == {"slice_walk:settle": 1, "slicing:write": 3}


@pytest.mark.parametrize("shortcuts", [False, True])
def test_few_tokens_are_told_and_leave_finite_weights(
    shortcuts: bool, tiny: Tiny, tmp_path: Path
) -> None:
    sliced = Sliced(tiny("llama"), tmp_path, 40, shortcuts, ids=IDS[:1, :7])
    sliced.run()
    kinds = {event.kind for event in slicing_events(sliced.cut)}
    assert kinds == {"few_tokens"}
    for file in sliced.promised.files:
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    assert sliced.logits().isfinite().all()


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("granitemoe", "is given something else than the sum"),
        ("phimoe", "LayerNorm is no RMSNorm"),
    ],
)
def test_a_block_that_does_something_else_is_noticed(
    model_type: str, said: str, tiny: Tiny
) -> None:
    """As where a family file takes over sublayers that are not so."""
    model = StreamedModel(Checkpoint(tiny(model_type)))
    mlp = "block_sparse_moe" if model_type == "granitemoe" else "mlp"
    names = [("input_layernorm", "self_attn"), ("post_attention_layernorm", mlp)]
    sublayers = [Sublayer(norm=n, module=m, reads=["-"], writes=["-"]) for n, m in names]
    family = model.family.model_copy(update={"sublayers": sublayers})
    block = model.load_block(0)
    passage = Passage(family, block, {}, lambda sublayer, x: None, None)
    with torch.no_grad(), passage, pytest.raises(RecipeError, match=said):
        passage.run(lambda x: model.run_block(0, block, x), model.embed(IDS))


def test_a_family_whose_sublayers_name_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesaic.orchestrator import family

    for name in ("llama", "mixtral"):
        (tmp_path / f"{name}.yaml").write_text((family.FOLDER / f"{name}.yaml").read_text())
    (tmp_path / "other.yaml").write_text("extends: llama\nmlp: []\nmlp_roles: {}\n")
    monkeypatch.setattr(family, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="sublayers name mlp:in"):
        load_family("other")
