"""Two hosts for the tests of this folder, a tiny run on them, and the reason where they cannot be had."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import hosts
from tests.conftest import ROOT, missing

RUN_FILE = """
run: {{name: tiny}}
model: {{hidden_size: 32, num_hidden_layers: 1, pool_size: 64, pool_dim: 32, router_hidden_size: 16}}
data: {{dataset: {dataset}, sequence_length: 32}}
training: {{max_steps: 40, global_batch_size: 4, micro_batch_size: 1, log_interval_steps: 1, precision: fp32}}
checkpoint: {{interval_steps: 5}}
evaluation: {{split: null}}
tracking: {{enabled: false}}
deepspeed: {{config: {root}/ds_configs/zero3.json}}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Cluster]:
    reason = hosts.why_not()
    if reason:
        missing(*reason)
    with hosts.cluster(tmp_path_factory.mktemp("cluster"), 2) as cluster:
        yield cluster


@pytest.fixture
def run_file(tmp_path: Path, small_dataset: Path) -> Path:
    """A run of 40 steps, to be started by two ranks; everything it writes stays in its folder."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RUN_FILE.format(dataset=small_dataset, root=ROOT))
    return path


def launch(run_file: Path, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """`globallocal launch` in the folder of the run file; its output goes to `out` there."""
    with open(run_file.parent / "out", "wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "launch", "launch", "--config", str(run_file), *map(str, arguments)],
            cwd=run_file.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
        )


def output(run_file: Path) -> str:
    return (run_file.parent / "out").read_text(errors="replace")
