"""What the tests of remote datasets share: a dataset, a faulty server of it, looking into its cache."""

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest

from data_prep import remote
from pipeline.data.samples import SampleSource
from pipeline.data.shard_cache import ShardCache
from pipeline.files import locked
from tests.pipeline.dataset_fixture import write_stream
from tests.pipeline.servers_fixture import http_server

TOKENS = 6001
SHARDS = 15  # of 4 chunks of 100 tokens, the last one of a single token
GIB = 1 << 30
EVERY_START = list(range(0, TOKENS - 1, 10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("origin")
    dataset = write_stream(path, np.arange(TOKENS, dtype=np.uint16), chunk_tokens=100, chunks_per_shard=4)
    assert dataset.split("train").num_shards == SHARDS + 1
    return path


@pytest.fixture
def server(folder):
    with http_server(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)


def cached_bytes(cache: Path) -> int:
    """Of the files there at one moment: names and sizes change under this lock only."""
    with locked(cache / "budget.lock", wait=True):
        return sum(path.stat().st_size for path in cache.iterdir() if path.is_file())


def read_all(source: SampleSource) -> list[int]:
    with contextlib.closing(source):
        return sorted(source.samples(np.arange(source.num_samples))[:, 0])


def fetch(cache: ShardCache, url: str, dataset, shard: int) -> bytes:
    index = dataset.split("train")
    name = index.shard_name(shard)
    descriptor = cache.open(f"{url}/{name}", index.shard_digest(shard), index.shard_bytes(shard))
    with os.fdopen(descriptor, "rb") as file:
        return file.read()
