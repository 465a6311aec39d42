"""Tiny checkpoints, each saved once per test run; servers and clusters."""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from mlflow.store.db import utils as mlflow_tables
from ray.cluster_utils import Cluster
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from moesaic.methods.base import Chain, Unit, reducers
from moesaic.methods.reduction import ExpertLayer, Reduction, reducer_module
from moesaic.orchestrator import machine, probes, solving
from moesaic.orchestrator.solving import Compressing
from moesaic.orchestrator.store import digest
from moesaic.orchestrator.walk import Walk
from tests.local_cluster import local_cluster
from tests.orchestrator.tiny import save_tiny

Tiny = Callable[..., Path]
MakeWalk = Callable[..., Walk]
# What measures the processor, by sizes, dtype and device.
PROBES = (
    "probe_matmul",
    "probe_gram",
    "probe_experts",
    "probe_reverse",
    "probe_attention",
    "probe_wide",
    "probe_head",
    "probe_sums",
    "probe_product",
    "probe_factor",
    "probe_add",
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """``tiny(model_type, dtype, **overrides)``: a folder that tests must not change."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    @cache
    def folder(model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
        return save_tiny(tmp_path_factory.mktemp(model_type), model_type, dtype, **overrides)

    return folder


@pytest.fixture(scope="session", autouse=True)
def measured_once() -> Iterator[None]:
    """Forecasts measure how fast this processor is with each size once per test run; the store's
    speed, which some tests change, is measured every time."""
    known: dict[tuple[Any, ...], Compressing] = {}
    probe_compress = solving.probe_compress

    def compress(
        chain: Chain, dtype: torch.dtype, device: str, units: Sequence[Unit]
    ) -> Compressing:
        shapes = {shape for unit in units for shape in unit.shapes.values()}
        key = (chain, dtype, device, frozenset(shapes))
        if key not in known:
            known[key] = probe_compress(chain, dtype, device, units)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "_SECONDS", 0.0)  # three times each
        patch.setattr(solving, "probe_compress", compress)
        for name in PROBES:
            patch.setattr(machine, name, cache(getattr(machine, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def tables_made_once(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Any], None]]:
    """MLflow makes its tables in a second or two, by all its migrations; later databases get a copy
    of the first one's. The value is what MLflow would do."""
    template = tmp_path_factory.mktemp("tables") / "mlflow.db"
    make = mlflow_tables._initialize_tables

    def tables(engine: Any) -> None:
        if not template.exists():
            make(engine)
            shutil.copyfile(engine.url.database, template)
            return
        with (
            closing(sqlite3.connect(template)) as known,
            closing(sqlite3.connect(engine.url.database)) as new,
        ):
            known.backup(new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_tables, "_initialize_tables", tables)
        yield make


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
    with local_cluster() as made:
        yield made


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
