"""The cache of remote datasets: never beyond its budget or the disk, filled ahead of the reader."""

import contextlib
import os
import subprocess
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from pipeline.data.loader import BatchLayout, BatchLoader
from pipeline.data.mixture import MixtureSource
from pipeline.data.remote import RemoteDataset, open_location
from pipeline.data.samples import SampleSource
from pipeline.data.shard_cache import ShardCache
from tests.pipeline.remote_fixtures import EVERY_START, GIB, SHARDS, cached_bytes, fetch, folder, server, short_delays
from tests.pipeline.servers_fixture import wait_until

__all__ = ["folder", "server", "short_delays"]


def wait_until_cached(source: SampleSource, cache: Path, shards: set[int]) -> None:
    names = [source.stream.index.shard_digest(shard).hex for shard in shards]
    wait_until(lambda: all((cache / name).exists() for name in names))


def test_the_budget_is_never_passed_and_the_least_recently_used_go(tmp_path, server):
    dataset = open_location(server.url, tmp_path, GIB)
    size = dataset.split("train").shard_bytes(0)
    cache = ShardCache(tmp_path, 3 * size + 100)
    order = [0, 1, 2, 0, 3, 0, 1]
    for use, shard in enumerate(order):
        fetch(cache, server.url, dataset, shard)
        os.utime(tmp_path / dataset.split("train").shard_digest(shard).hex, (use, use))  # uses a second apart
        assert cached_bytes(tmp_path) <= 3 * size + 100
    assert [server.requests[f"train-00000{shard}.tar"] for shard in range(4)] == [1, 2, 1, 1]


def test_what_a_dead_process_left_half_way_makes_room(tmp_path, server):
    dataset = open_location(server.url, tmp_path, GIB)
    size = dataset.split("train").shard_bytes(0)
    (tmp_path / f"{'a' * 64}.part").write_bytes(bytes(size))
    fetch(ShardCache(tmp_path, size), server.url, dataset, 0)
    assert cached_bytes(tmp_path) == size


def test_a_file_larger_than_the_budget_is_refused_with_both_numbers(tmp_path, server):
    dataset = open_location(server.url, tmp_path, GIB)
    size = dataset.split("train").shard_bytes(0)
    with pytest.raises(UserError, match=rf"budget 1,000 bytes, .* next one \({size:,} bytes\) need {size:,}; raise"):
        fetch(ShardCache(tmp_path, 1000), server.url, dataset, 0)
    assert cached_bytes(tmp_path) == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, of which the dataset's index takes a part."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_disk_smaller_than_the_budget_is_used_as_far_as_it_goes(small_disk, folder, server):
    dataset = open_location(server.url, small_disk / "c", GIB)
    assert isinstance(dataset, RemoteDataset)
    for shard in range(SHARDS):
        assert fetch(dataset.cache, server.url, dataset, shard) == (folder / f"train-{shard:06d}.tar").read_bytes()
    assert cached_bytes(small_disk / "c") > 0


def test_a_full_disk_is_one_line_and_leaves_nothing_half_way(small_disk, server):
    dataset = open_location(server.url, small_disk / "c", GIB)
    assert isinstance(dataset, RemoteDataset)
    with contextlib.suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(64 << 10))
    with pytest.raises(UserError, match=r"no room for [\d,]+ bytes \(No space left on device\); free some space"):
        fetch(dataset.cache, server.url, dataset, 0)
    assert cached_bytes(small_disk / "c") == 0


def test_the_global_order_needs_the_whole_split_in_the_cache(tmp_path, server):
    total = int(open_location(server.url, tmp_path, GIB).split("train").shards["bytes"].sum())
    SampleSource(open_location(server.url, tmp_path, total), "train", 10, 0).close()
    with pytest.raises(UserError) as error:
        SampleSource(open_location(server.url, tmp_path, total - 1), "train", 10, 0)
    assert str(error.value) == (
        f"{server.url} (train): needs a cache of {total:,} bytes, the budget of {tmp_path} is {total - 1:,}; "
        "raise data.cache_bytes, or set data.window_tokens or lower it: two windows must fit"
    )


def test_a_mixture_needs_a_cache_for_all_its_parts(tmp_path, server):
    total = int(open_location(server.url, tmp_path, GIB).split("train").shards["bytes"].sum())
    sources = [SampleSource(open_location(server.url, tmp_path, total), "train", 10, seed) for seed in range(2)]
    with pytest.raises(UserError, match=f"needs a cache of {2 * total:,} bytes"):
        MixtureSource(sources, [1, 1])
    for source in sources:
        source.close()


@pytest.mark.parametrize("window_tokens", [500, 800, 2000])
def test_windows_read_a_dataset_larger_than_the_cache_within_its_budget(tmp_path, server, window_tokens):
    """Each sample once, those at window borders too, and a shard is fetched again only for a later window.

    The downloads may come ahead, as they do when a step takes longer than a download.
    """
    probe = SampleSource(open_location(server.url, tmp_path, GIB), "train", 10, 0, window_tokens)
    probe.close()
    budget = probe.cache_bytes
    source = SampleSource(open_location(server.url, tmp_path, budget), "train", 10, 0, window_tokens)
    assert budget < int(source.stream.index.shards["bytes"].sum())
    shards = [set(source.window_shards(window)) for window in range(source.order.windows_per_epoch + 1)]
    positions = np.arange(source.num_samples)
    windows = np.array([source.order.window(position) for position in positions.tolist()])
    read = []
    with contextlib.closing(source):
        for window in range(source.order.windows_per_epoch):
            inside = positions[windows == window]
            source.ahead(int(inside[0]))
            wait_until_cached(source, tmp_path, shards[window] | shards[window + 1])
            requests = server.requests.total()
            for batch in np.array_split(inside, -(-len(inside) // 8)):
                read.extend(source.samples(batch)[:, 0].tolist())
                assert cached_bytes(tmp_path) <= budget
            assert server.requests.total() == requests
    assert sorted(read) == EVERY_START
    downloads = sum(n for name, n in server.requests.items() if name.endswith(".tar"))
    assert downloads <= sum(map(len, shards))


def test_a_reader_faster_than_the_network_waits_and_stays_within_the_budget(tmp_path, server):
    probe = SampleSource(open_location(server.url, tmp_path, GIB), "train", 10, 0, 800)
    probe.close()
    source = SampleSource(open_location(server.url, tmp_path, probe.cache_bytes), "train", 10, 0, 800)
    read = []
    with contextlib.closing(source), BatchLoader(source, BatchLayout(8, 8, 1), 0, 0) as loader:
        for _ in range(source.num_samples // 8):
            read.extend(next(loader)[:, 0].tolist())
            assert cached_bytes(tmp_path) <= probe.cache_bytes
    assert sorted(read) == EVERY_START


def test_the_next_window_is_there_before_it_is_read(tmp_path, server):
    source = SampleSource(open_location(server.url, tmp_path, GIB), "train", 10, 0, window_tokens=800)
    with contextlib.closing(source):
        source.ahead(0)
        wait_until_cached(source, tmp_path, {*source.window_shards(0), *source.window_shards(1)})
        requests = server.requests.total()
        source.samples(np.arange(100))
        assert source.order.window(99) == 1
        assert server.requests.total() == requests
        source.ahead(100)
        wait_until_cached(source, tmp_path, set(source.window_shards(2)))


def test_a_download_ahead_that_fails_is_the_readers_error(tmp_path, server):
    dataset = open_location(server.url, tmp_path, GIB)
    server.faults["train-000007.tar"] = [("always", 404)]
    source = SampleSource(dataset, "train", 10, 0)
    with (
        contextlib.closing(source),
        BatchLoader(source, BatchLayout(8, 8, 1), 0, 0) as loader,
        pytest.raises(UserError, match=r"train-000007.tar: missing"),
    ):
        deque(loader, maxlen=0)
