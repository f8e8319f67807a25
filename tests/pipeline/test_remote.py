"""Remote datasets: through the faults of real servers, once per node, checked."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from data_prep import remote
from data_prep.errors import UserError
from pipeline.data.loader import BatchLayout, BatchLoader
from pipeline.data.remote import RemoteDataset, open_location
from pipeline.data.samples import SampleSource
from tests.forks import start
from tests.pipeline.dataset_fixture import write_stream
from tests.pipeline.remote_fixtures import EVERY_START, GIB, fetch, folder, read_all, server, short_delays
from tests.pipeline.servers_fixture import http_server, wait_until

__all__ = ["folder", "server", "short_delays"]


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
    (tmp_path / "rank.py").write_text(program)
    words = [str(tmp_path / "rank.py"), server.url, str(tmp_path / "cache")]
    outputs = [tmp_path / f"rank-{rank}.out" for rank in range(4)]
    ranks = [start([*words, str(rank)], dict(os.environ), output) for rank, output in enumerate(outputs)]
    assert [rank.wait(120) for rank in ranks] == [0] * 4, [output.read_text() for output in outputs]
    assert {output.read_text().strip() for output in outputs} == {str(sum(EVERY_START))}
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
    os.truncate(tmp_path / dataset.split("train").shard_digest(2).hex, 100)
    assert fetch(dataset.cache, server.url, dataset, 2) == whole
    assert server.requests["train-000002.tar"] == 2
