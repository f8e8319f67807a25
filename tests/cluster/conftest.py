"""Hosts and a Slurm for the tests of this folder, a tiny run on them, and the reason where they cannot be had."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import hosts, slurm
from tests.cluster.jobs import STEPS, Run, run_in
from tests.conftest import missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def three_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Cluster]:
    reason = hosts.why_not()
    if reason:
        missing(*reason)
    with hosts.cluster(tmp_path_factory.mktemp("cluster"), 3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def two_slurm_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    reason = slurm.why_not()
    if reason:
        missing(*reason)
    with slurm.slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def run(tmp_path: Path, small_dataset: Path) -> Iterator[Run]:
    with run_in(tmp_path, small_dataset) as tiny:
        yield tiny


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> dict[int, str]:
    """Step → loss of the tiny run on two ranks of this machine, in one piece."""
    with run_in(tmp_path_factory.mktemp("unbroken"), small_dataset) as tiny:
        tiny.launch("--local", 2)
        tiny.finish()
        assert sorted(tiny.losses()) == list(range(1, STEPS + 1))
        return tiny.losses()
