"""Timing of plans: the blocks that are timed compute what the pieces say."""

from pathlib import Path

import pytest
import torch

from moesaic.orchestrator import latency
from moesaic.orchestrator.compressed_modules import CompressedExperts, CompressedLinear
from moesaic.orchestrator.pieces import dense_members
from tests.orchestrator.planning import make_pieces, mixed, open_model
from tests.orchestrator.projects import make_model_folder


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama"])
def test_a_timed_block_computes_what_its_pieces_say(model_type: str, tmp_path: Path) -> None:
    model = open_model(make_model_folder(tmp_path / "model", model_type, dtype=torch.float32))
    made = make_pieces(model, mixed, tmp_path / "pieces")
    pieces = {unit: str(path) for unit, path in made.items() if path is not None}
    hidden = torch.randn(1, 5, model.hidden_size, generator=torch.Generator().manual_seed(1))
    kinds = set()
    for index in range(model.blocks):
        block = latency.compressed_block(model, index, pieces, {})
        kinds |= {type(m) for m in block.modules()} & {CompressedLinear, CompressedExperts}
        own = {
            u.name: pieces[u.name] for u in model.units() if u.block == index and u.name in pieces
        }
        dense = model.build_block(index, dense_members(own))
        with torch.no_grad():
            found, wanted = (model.run_block(index, m, hidden) for m in (block, dense))
        assert torch.allclose(found, wanted, atol=1e-5)
    assert CompressedLinear in kinds
    assert (CompressedExperts in kinds) == (model_type != "llama")
