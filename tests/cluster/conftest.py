"""Hosts and a Slurm for the tests of this folder, a tiny run on them, and the reason where they cannot be had."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import hosts, slurm
from tests.cluster.jobs import SECONDS, STEPS, TRAIN, Run, losses, run_in
from tests.conftest import missing
from tests.pipeline.ranks import outputs, start_ranks, wait


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(4 * SECONDS))


@pytest.fixture(scope="session")
def three_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Cluster]:
    reason = hosts.why_not()
    if reason:
        missing(*reason)
    if hosts.forbidden():
        pytest.skip(hosts.forbidden())
    with hosts.cluster(tmp_path_factory.mktemp("cluster"), 3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def whole_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    reason = slurm.why_not()
    if reason:
        missing(*reason)
    with slurm.slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def two_slurm_nodes(whole_slurm: slurm.Slurm) -> Iterator[slurm.Slurm]:
    """Two idle nodes."""
    whole_slurm.wait_for("idle idle")
    yield whole_slurm
    whole_slurm.empty_queue()


@pytest.fixture
def run(tmp_path: Path, small_dataset: Path) -> Iterator[Run]:
    with run_in(tmp_path, small_dataset) as tiny:
        yield tiny


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> dict[int, str]:
    """Step → loss of the tiny run on two ranks of this machine, in one piece, without any launcher."""
    tiny = Run(tmp_path_factory.mktemp("unbroken"), small_dataset)
    started = start_ranks([str(TRAIN), "--config", str(tiny.file), f"run.output_dir={tiny.run_folder}"], tiny.folder)
    assert wait(started, tiny.folder, SECONDS) == [0, 0], outputs(tiny.folder)
    found = losses((tiny.folder / "rank-0.out").read_text())
    assert sorted(found) == list(range(1, STEPS + 1))
    return found
