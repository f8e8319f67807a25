"""Preparation on a real Ray cluster of several nodes, one of which dies half-way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data_prep.errors import UserError
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.ray_engine import RayEngine
from tests.data_prep.conftest import folder_bytes, sentences, write_texts

ray = pytest.importorskip("ray", reason="--engine ray needs Ray: pip install ray")

TEXTS = sentences(31, 600)


@pytest.fixture
def cluster(monkeypatch):
    """A head without CPUs and two nodes of one CPU each, on this machine."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    memory = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    nodes = [cluster.add_node(num_cpus=1, **memory) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def test_a_cluster_gives_the_same_bytes_though_a_node_dies(cluster, tokenizer, tmp_path, monkeypatch):
    cluster, nodes = cluster
    monkeypatch.setattr("data_prep.sources.files.TASK_BYTES", 1000)  # many tasks
    source = write_texts(tmp_path / "texts", TEXTS)
    settings = PrepareSettings(source, tokenizer, tmp_path / "one", chunk_tokens=512, chunks_per_shard=4)
    prepare(settings)
    killed = []

    def progress(state):
        if state.documents > 60 and not killed:
            cluster.remove_node(nodes[1], allow_graceful=False)
            killed.append(state.documents)

    engine = RayEngine(cluster.address)
    prepare(replace(settings, output=tmp_path / "ray", engine=engine), progress)
    assert killed
    assert folder_bytes(tmp_path / "ray") == folder_bytes(tmp_path / "one")
    (tmp_path / "texts" / "part-000400.jsonl").write_text("broken\n")
    settings = PrepareSettings(source, tokenizer, tmp_path / "broken", engine=engine)
    with pytest.raises(UserError, match=r"part-000400.jsonl: line at byte 0: not JSON .*; repair the line"):
        prepare(settings)


def test_no_cluster_at_the_address(tokenizer, tmp_path):
    source = write_texts(tmp_path / "texts", TEXTS[:10])
    with pytest.raises(UserError, match=r"no Ray cluster at '127.0.0.1:1' .*; start one with `ray start --head`"):
        prepare(PrepareSettings(source, tokenizer, tmp_path / "dataset", engine=RayEngine("127.0.0.1:1")))
