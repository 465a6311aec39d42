"""Tiny checkpoints, each saved once per test run; servers and clusters."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import pytest
import ray
import torch
from ray._private import ray_constants
from ray.cluster_utils import Cluster
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from moesaic.methods.base import reducers
from moesaic.methods.reduction import ExpertLayer, Reduction, reducer_module
from moesaic.orchestrator.calibrate import Walk
from moesaic.orchestrator.store import digest
from tests.chaos import environment
from tests.orchestrator.tiny import save_tiny

Tiny = Callable[..., Path]
MakeWalk = Callable[..., Walk]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """``tiny(model_type, dtype, **overrides)``: a folder that tests must not change."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    @cache
    def folder(model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
        return save_tiny(tmp_path_factory.mktemp(model_type), model_type, dtype, **overrides)

    return folder


@pytest.fixture
def make_walk(request: pytest.FixtureRequest, tiny: Tiny, ids: Tensor, tmp_path: Path) -> MakeWalk:
    """``make_walk(model_type, **changes)`` over the module's ``ids``, as its ``WALK`` says."""
    save_file({"ids": ids.int()}, tmp_path / "ids.safetensors")

    def make(model_type: str = "qwen3_moe", **changes: Any) -> Walk:
        walk = Walk(
            model=str(tiny(model_type)),
            dtype="float32",
            trust_remote_code=False,
            fingerprint=model_type,
            ids=str(tmp_path / "ids.safetensors"),
            ids_digest=digest(ids.tolist()),
            sequences=len(ids),
            batch=3,
            experts="routed",
            seed=11,
            store=str(tmp_path / "store"),
            **request.module.WALK,
        )
        return replace(walk, **changes)

    return make


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One node with one core; tests add others."""
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    with environment(variables), pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, raising=False)
        head = {"num_cpus": 1, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Address of a server of S3's kind on the loopback interface."""
    from moto.server import ThreadedMotoServer

    made = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    yield f"http://{host}:{port}"
    made.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of an empty bucket."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    name = f"b{digest(str(tmp_path))[:20]}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The reducers that were called, in order."""
    calls: list[str] = []
    for name in reducers():
        module: Any = reducer_module(name)

        def counted(
            layer: ExpertLayer, options: Any, name: str = name, reduce: Any = module.reduce
        ) -> Reduction:
            calls.append(name)
            result: Reduction = reduce(layer, options)
            return result

        monkeypatch.setattr(module, "reduce", counted)
    yield calls
