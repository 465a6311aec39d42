"""A Ray cluster on this machine, whose nodes are processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray._private import ray_constants
from ray.cluster_utils import Cluster

from tests.chaos import environment

_ROOT = str(Path(__file__).parents[1])


@contextmanager
def local_cluster() -> Iterator[Cluster]:
    """One node with one core, to which others can be added."""
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": _ROOT,
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
