"""Mixtures of pieces: told, written and in memory they are the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator

from moesaic.kernels import dense
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import Spec, Unit
from moesaic.orchestrator import mixtures
from moesaic.orchestrator.mixtures import Mixture
from moesaic.orchestrator.pieces import (
    dense_members,
    piece_header,
    read_piece,
    write_cut,
    write_piece,
)
from tests.kernels.test_formats import EXAMPLES

SHAPES = {"gate": (5, 6, 12), "up": (5, 6, 12), "down": (5, 12, 6)}
BANK = Unit("bank", "bank", 0, "experts", SHAPES, dict.fromkeys(SHAPES, "site"))
FIRST, SECOND, THIRD = ((Spec(name, "{}"),) for name in "abc")
ROUTER = torch.randn(5, 12, generator=Generator().manual_seed(3))


def pieces(folder: Path, *formats: str) -> list[str]:
    """Files of pieces of the bank, each in a format, with a router."""
    folder.mkdir(exist_ok=True)
    paths = []
    for seed, name in enumerate(formats):
        generator = Generator().manual_seed(seed)
        members: dict[str, CompressedTensor] = {
            member: EXAMPLES[name](shape, torch.bfloat16, generator)
            for member, shape in SHAPES.items()
        }
        path = folder / f"{seed}{name}.safetensors"
        write_piece(path, {**members, "router_weight": dense.pack(ROUTER)}, {})
        paths.append(str(path))
    return paths


def mixed(one: str, other: str) -> Mixture:
    """Gates and ups by turns, all of down from the second."""
    chosen = {f"bank.{e}.{m}": SECOND if m == "down" else FIRST for e in range(5) for m in SHAPES}
    chosen |= {"bank.1.gate": SECOND, "bank.3.gate": SECOND, "bank.0.up": SECOND}
    return mixtures.mixture_of(BANK, {FIRST: Path(one), SECOND: Path(other)}, chosen)


def test_a_mixture_tells_every_expert_of_every_member_once(tmp_path: Path) -> None:
    assert mixed("one", "other") == [
        ("gate", "one", [0, 2, 4]),
        ("gate", "other", [1, 3]),
        ("up", "one", [1, 2, 3, 4]),
        ("up", "other", [0]),
        ("down", "other", [0, 1, 2, 3, 4]),
    ]


# A mosaic is what a mixture becomes, and banks have no channels of their own.
@pytest.mark.parametrize("other", ["int_group", "lowrank"])
@pytest.mark.parametrize("one", sorted(EXAMPLES.keys() - {"mosaic", "channels"}))
def test_told_written_and_in_memory_it_is_the_same(one: str, other: str, tmp_path: Path) -> None:
    mixture = mixed(*pieces(tmp_path, one, other))
    file = tmp_path / "written.safetensors"
    write_piece(file, mixtures.packed(mixture), {})
    written = piece_header(file)
    outlines = {path: mixtures.outline(path) for path in mixtures.sources(mixture)}
    told = mixtures.described(mixture, outlines.__getitem__)
    assert told.keys() == written.keys() == {*SHAPES, "router_weight"}
    for member, found in told.items():
        assert found.to_json() == written[member].to_json()
        sizes = {part: (s.dtype, s.shape) for part, s in found.parts.items()}
        assert sizes == {part: (s.dtype, s.shape) for part, s in written[member].parts.items()}

    whole = {path: dense_members({"": path})[""] for path in outlines}
    weights = mixtures.dense(mixture, whole.__getitem__)
    wanted = dense_members({"": str(file)})[""]
    assert weights.keys() == wanted.keys()
    for member, weight in wanted.items():
        assert weights[member].dtype == weight.dtype
        assert torch.equal(weights[member], weight)
    assert torch.equal(load_file(file)["router_weight.dense"], ROUTER)


def test_a_mixture_of_cuts_is_that_of_what_they_stand_for(tmp_path: Path) -> None:
    whole, other = pieces(tmp_path / "made", "lowrank", "int_group")
    store = tmp_path / "pieces"
    cut, uncut = (store / key[:2] / f"{key}.safetensors" for key in ("ab12", "cd34"))
    for path in (cut, uncut):
        path.parent.mkdir(parents=True)
    uncut.write_bytes(Path(whole).read_bytes())
    write_cut(cut, "cd34", dict.fromkeys(SHAPES, 2), {})
    written_out = tmp_path / "out.safetensors"
    write_piece(written_out, read_piece(cut), {})
    ranks = {m.parts["left_dense"].shape[-1] for m in (mixtures.outline(str(cut))["gate"],)}
    assert ranks == {2}
    files = []
    for source in (cut, written_out):
        files.append(tmp_path / f"{source.stem}-mixed.safetensors")
        write_piece(files[-1], mixtures.packed(mixed(str(source), other)), {})
    assert files[0].read_bytes() == files[1].read_bytes()
