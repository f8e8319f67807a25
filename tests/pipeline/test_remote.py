"""Remote datasets: through the faults of real servers, once per node, checked, within the budget."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from data_prep import remote
from data_prep.errors import UserError
from pipeline.data.loader import BatchLayout, BatchLoader
from pipeline.data.mixture import MixtureSource
from pipeline.data.remote import RemoteDataset, open_location
from pipeline.data.samples import SampleSource
from pipeline.data.shard_cache import ShardCache
from pipeline.files import locked
from tests.pipeline.dataset_fixture import write_stream
from tests.pipeline.servers_fixture import http_server, s3_dataset, wait_until

TOKENS = 6001
SHARDS = 15  # of 4 chunks of 100 tokens, the last one of a single token
GIB = 1 << 30


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


def wait_until_cached(source: SampleSource, cache: Path, shards: set[int]) -> None:
    names = [source.stream.index.shard_sha256(shard) for shard in shards]
    wait_until(lambda: all((cache / name).exists() for name in names))


EVERY_START = list(range(0, TOKENS - 1, 10))


# ---- one file, through faults


def fetch(cache: ShardCache, url: str, dataset, shard: int) -> bytes:
    index = dataset.split("train")
    name = index.shard_name(shard)
    descriptor = cache.open(f"{url}/{name}", index.shard_sha256(shard), index.shard_bytes(shard))
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


@pytest.mark.parametrize(
    "faults", [[502, 502, 502, "cut"], ["cut", 500, 503, "cut", 429], ["garble"], [408, "garble", 502]]
)
@pytest.mark.parametrize("ranges", [True, False])
def test_faults_that_pass_leave_no_trace(tmp_path, folder, monkeypatch, faults, ranges):
    monkeypatch.setattr(remote, "PIECE_BYTES", 5000)  # a shard is fetched in several requests
    with http_server(folder, ranges) as server:
        dataset = open_location(server.url, tmp_path, GIB)
        assert isinstance(dataset, RemoteDataset)
        server.faults["train-000003.tar"] = list(faults)
        assert fetch(dataset.cache, server.url, dataset, 3) == (folder / "train-000003.tar").read_bytes()
        assert not server.faults["train-000003.tar"]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        (502, r"train-000003.tar: HTTP 502 .* after 8 tries; check the server", 8),
        ("empty", r"train-000003.tar: 0 bytes, expected [\d,]+ \(truncated or changed\), after 8 tries; check the", 8),
        (404, r"train-000003.tar: missing; restore the file, or prepare the dataset again", 1),
        (403, r"train-000003.tar: not allowed; check the credentials", 1),
        ("garble", r"train-000003.tar: sha256 [0-9a-f]{16}…, expected [0-9a-f]{16}… \(changed or damaged\)", 2),
    ],
)
def test_faults_that_stay_are_one_line_and_leave_nothing(tmp_path, server, fault, message, requests):
    dataset = open_location(server.url, tmp_path, GIB)
    assert isinstance(dataset, RemoteDataset)
    server.faults["train-000003.tar"] = [("always", fault)]
    with pytest.raises(UserError, match=message) as error:
        fetch(dataset.cache, server.url, dataset, 3)
    assert len(error.value.problems) == 1
    assert server.url in error.value.problems[0]
    assert server.requests["train-000003.tar"] == requests
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_a_shard_that_is_shorter_at_the_server_is_named_with_both_sizes(tmp_path, folder):
    dataset = write_stream(tmp_path / "origin", np.arange(2001, dtype=np.uint16), 100, 4)
    whole_bytes = dataset.split("train").shard_bytes(1)
    os.truncate(tmp_path / "origin" / "train-000001.tar", 3000)
    with http_server(tmp_path / "origin") as server:
        remote_dataset = open_location(server.url, tmp_path / "cache", GIB)
        assert isinstance(remote_dataset, RemoteDataset)
        with pytest.raises(UserError, match=rf"train-000001.tar: 3,000 bytes, expected {whole_bytes:,} \(truncated"):
            fetch(remote_dataset.cache, server.url, remote_dataset, 1)


def test_a_server_that_never_answers_is_given_up(tmp_path, server, monkeypatch):
    dataset = open_location(server.url, tmp_path, GIB)
    assert isinstance(dataset, RemoteDataset)
    monkeypatch.setattr(remote, "_TIMEOUT_SECONDS", 0.2)
    server.faults["train-000000.tar"] = [("always", "stall")]
    with pytest.raises(UserError, match=r"train-000000.tar: .*Timeout.* after 8 tries"):
        fetch(dataset.cache, server.url, dataset, 0)


def test_a_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/d/manifest.json: .* after 8 tries; check the server"):
        open_location("http://127.0.0.1:9/d", tmp_path, GIB)


def test_an_unknown_kind_of_url_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"nothing://d/manifest.json: Protocol not known: nothing"):
        open_location("nothing://d", tmp_path, GIB)


# ---- datasets


def test_a_remote_dataset_reads_as_the_local_one(tmp_path, folder, server):
    dataset = open_location(server.url + "/", tmp_path, GIB)
    local = open_location(folder)
    assert isinstance(dataset, RemoteDataset)
    assert not isinstance(local, RemoteDataset)
    assert dataset.dataset_id == local.dataset_id
    assert (dataset.tokenizer_folder / "tokenizer.model").read_bytes() == b"by hand"
    expected = SampleSource(local, "train", 10, 0).samples(np.arange(1000))
    source = SampleSource(dataset, "train", 10, 0)
    layout = BatchLayout(10, 5, 2)
    with contextlib.closing(source):
        for rank in range(2):
            with BatchLoader(source, layout, rank, 0) as loader:
                read = np.stack([next(loader) for _ in range(100)])
            assert (read == expected.reshape(100, 2, 5, 11)[:, rank]).all()
    shard_requests = {name: n for name, n in server.requests.items() if name.endswith(".tar")}
    assert set(shard_requests.values()) == {1}  # two ranks, 1.7 epochs, one download


def test_opening_again_downloads_only_the_manifest(tmp_path, server):
    for _ in range(3):
        open_location(server.url, tmp_path, GIB)
    assert server.requests.pop("manifest.json") == 3
    assert set(server.requests.values()) == {1}


def test_a_damaged_index_at_the_server_is_not_kept(tmp_path, server):
    server.faults["train.chunks.npy"] = ["garble"]
    with pytest.raises(UserError, match=r"train.chunks.npy: sha256 .*changed or damaged"):
        open_location(server.url, tmp_path, GIB)
    assert read_all(SampleSource(open_location(server.url, tmp_path, GIB), "train", 10, 0)) == EVERY_START


def test_the_ranks_of_a_node_download_each_shard_once(tmp_path, server):
    """Four processes, one cache, all starting at the same moment."""
    program = (
        "import sys, numpy as np\n"
        "from pipeline.data.samples import SampleSource\n"
        "from pipeline.data.remote import open_location\n"
        "source = SampleSource(open_location(sys.argv[1], sys.argv[2], 1 << 30), 'train', 10, int(sys.argv[3]))\n"
        "print(source.samples(np.arange(source.num_samples))[:, 0].sum())\n"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, server.url, str(tmp_path), str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(4)
    ]
    sums = {rank.communicate(timeout=120)[0].strip() for rank in ranks}
    assert sums == {str(sum(EVERY_START))}
    assert {n for name, n in server.requests.items() if name.endswith(".tar")} == {1}


def test_a_rank_killed_in_a_download_leaves_the_others_free_to_do_it(tmp_path, server):
    server.faults["train-000000.tar"] = ["stall"]
    program = (
        "import sys\n"
        "from pipeline.data.token_stream import TokenStream\n"
        "from pipeline.data.remote import open_location\n"
        "TokenStream(open_location(sys.argv[1], sys.argv[2], 1 << 30), 'train').read(0, 10)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", program, server.url, str(tmp_path)])
    wait_until(lambda: server.requests["train-000000.tar"] == 1)
    dataset = open_location(server.url, tmp_path, GIB)
    assert isinstance(dataset, RemoteDataset)
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(fetch(dataset.cache, server.url, dataset, 0)))
    waiting.start()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    waiting.join(timeout=60)
    assert len(answers) == 1
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_cached_file_is_downloaded_again(tmp_path, folder, server):
    dataset = open_location(server.url, tmp_path, GIB)
    assert isinstance(dataset, RemoteDataset)
    whole = fetch(dataset.cache, server.url, dataset, 2)
    os.truncate(tmp_path / dataset.split("train").shard_sha256(2), 100)
    assert fetch(dataset.cache, server.url, dataset, 2) == whole
    assert server.requests["train-000002.tar"] == 2


# ---- the budget


def test_the_budget_is_never_passed_and_the_least_recently_used_go(tmp_path, server):
    dataset = open_location(server.url, tmp_path, GIB)
    size = dataset.split("train").shard_bytes(0)
    cache = ShardCache(tmp_path, 3 * size + 100)
    order = [0, 1, 2, 0, 3, 0, 1]
    for use, shard in enumerate(order):
        fetch(cache, server.url, dataset, shard)
        os.utime(tmp_path / dataset.split("train").shard_sha256(shard), (use, use))  # uses a second apart
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


# ---- S3


@pytest.fixture(scope="module")
def s3(folder, tmp_path_factory):
    """The dataset in a bucket of a real S3 server."""
    with s3_dataset(tmp_path_factory.mktemp("s3"), folder, "corpus/wiki") as system:
        yield system


def test_a_dataset_in_s3_reads_as_the_local_one(tmp_path, folder, s3):
    dataset = open_location("s3://corpus/wiki", tmp_path, GIB)
    expected = SampleSource(open_location(folder), "train", 10, 0).samples(np.arange(600))
    source = SampleSource(dataset, "train", 10, 0)
    with contextlib.closing(source), BatchLoader(source, BatchLayout(8, 4, 2), 1, 8 * 20) as loader:
        assert (next(loader) == expected[164:168]).all()
    assert read_all(SampleSource(dataset, "train", 10, 0, window_tokens=800)) == EVERY_START
    assert len([path for path in tmp_path.iterdir() if len(path.name) == 64]) == SHARDS + 1


def test_a_shard_that_is_gone_or_changed_in_s3_is_named(tmp_path, s3):
    s3.copy("corpus/wiki", "corpus/broken", recursive=True)
    s3.rm("corpus/broken/train-000002.tar")
    content = bytearray(s3.cat_file("corpus/broken/train-000004.tar"))
    content[2000] ^= 1
    s3.pipe_file("corpus/broken/train-000004.tar", bytes(content))
    s3.pipe_file("corpus/broken/train-000005.tar", bytes(content[:2000]))
    stream = SampleSource(open_location("s3://corpus/broken", tmp_path, GIB), "train", 10, 0).stream
    with pytest.raises(UserError, match=r"s3://corpus/broken/train-000002.tar: missing"):
        stream.read(800, 10)
    with pytest.raises(UserError, match=r"s3://corpus/broken/train-000004.tar: sha256 .* damaged"):
        stream.read(1600, 10)
    with pytest.raises(UserError, match=r"s3://corpus/broken/train-000005.tar: 2,000 bytes, expected [\d,]+ \(trunc"):
        stream.read(2000, 10)


def test_a_bucket_that_is_not_there_is_named(tmp_path, s3):
    with pytest.raises(UserError, match=r"s3://nowhere/d/manifest.json: missing"):
        open_location("s3://nowhere/d", tmp_path, GIB)
