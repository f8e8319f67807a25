"""`verify` and `inspect` of a dataset behind S3 and HTTP servers: what they say of the folder, with URLs."""

from __future__ import annotations

import contextlib
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import remote
from data_prep.errors import UserError
from data_prep.manifest import opened
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.report import show_document
from data_prep.verify import verify_dataset
from launch.cli import main
from tests.data_prep.conftest import sentences, write_texts
from tests.pipeline.servers_fixture import http_server, s3_dataset

pytest.importorskip("s3fs", reason="s3:// needs the extra: pip install 'globallocal[s3]'")

TEXTS = sentences(31, 200)
URL = "s3://bucket/sets/one"


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("made")
    source = write_texts(root / "texts", TEXTS)
    prepare(PrepareSettings(source, tokenizer, root / "one", chunk_tokens=512, chunks_per_shard=3))
    return root / "one"


@pytest.fixture(scope="module")
def s3(folder, tmp_path_factory) -> Iterator[object]:
    """A real S3 server that has the dataset as `URL`."""
    with s3_dataset(tmp_path_factory.mktemp("s3"), folder, URL.removeprefix("s3://")) as system:
        yield system


@contextlib.contextmanager
def damaged(system, folder: Path, changes: dict[str, bytes | None]) -> Iterator[None]:
    """Objects written, or deleted (None), for as long; then they are as in the folder again."""
    key = URL.removeprefix("s3://")
    for name, content in changes.items():
        if content is None:
            system.rm_file(f"{key}/{name}")
        else:
            system.pipe_file(f"{key}/{name}", content)
    try:
        yield
    finally:
        for name in changes:
            if (folder / name).exists():
                system.pipe_file(f"{key}/{name}", (folder / name).read_bytes())
            else:
                system.rm_file(f"{key}/{name}")


def flipped(path: Path, offset: int) -> bytes:
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    return bytes(content)


def faults(folder: Path) -> dict[str, bytes | None]:
    shard = (folder / "train-000001.tar").read_bytes()
    return {
        "train-000000.tar": None,
        "train-000001.tar": shard[: 512 + 128 + 1024 + 384],
        "train-000002.tar": flipped(folder / "train-000002.tar", 700),
        "train-000003.ids.jsonl": flipped(folder / "train-000003.ids.jsonl", 3),
        "train-000077.tar": shard,
        "tokenizer/tokenizer.json": b"{}",
    }


def test_a_whole_dataset_on_s3_is_whole_at_any_depth(s3, folder):
    for depth in ("quick", "full", "deep"):
        report, local = verify_dataset(f"{URL}/", depth), verify_dataset(folder, depth)
        assert report.problems == []
        assert report.lines == [line.replace(str(folder), URL) for line in local.lines]


@pytest.mark.parametrize("depth", ["quick", "full", "deep"])
def test_every_fault_on_s3_is_named_in_one_run_as_in_a_folder(s3, folder, tmp_path, depth):
    """A shard missing, cut, changed, and one too many; an ids file and the tokenizer's twin changed."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name, content in faults(folder).items():
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
    with damaged(s3, folder, faults(folder)):
        problems = verify_dataset(URL, depth).problems
    assert problems == [problem.replace(str(copy), URL) for problem in verify_dataset(copy, depth).problems]
    assert len(problems) == (3 if depth == "quick" else 6)


def test_missing_tokenizer_hides_no_damaged_shard(s3, folder):
    with damaged(s3, folder, {"tokenizer/tokenizer.model": None, "train-000000.tar": None}):
        problems = verify_dataset(URL).problems
    assert problems == [
        f"{URL}/{name}: missing; restore the file, or prepare the dataset again"
        for name in ("tokenizer/tokenizer.model", "train-000000.tar")
    ]


def test_damaged_index_is_named_with_its_url(s3, folder):
    changes = {"train.chunks.npy": flipped(folder / "train.chunks.npy", 200), "train.shards.npy": None}
    with damaged(s3, folder, changes), pytest.raises(UserError) as error:
        verify_dataset(URL)
    assert [problem.partition(": ")[0] for problem in error.value.problems] == [
        f"{URL}/train.shards.npy",
        f"{URL}/train.chunks.npy",
    ]


def test_a_url_without_a_dataset_is_one_line(s3, capfd):
    for url in ("s3://bucket/nothing", "s3://nowhere/nothing"):
        assert main(["verify", url]) == 2
        assert capfd.readouterr().err == (
            f"error: {url}: no whole dataset (manifest.json is missing, and it is written last); check the URL, "
            "or run the same `globallocal prepare` command again, it goes on where it stopped\n"
        )


def test_inspect_on_s3_shows_what_it_shows_of_the_folder(s3, folder, tmp_path, capfd):
    for options in ([], ["--document", "12"], ["--sample", "3", "--sequence-length", "100"]):
        shown = []
        for place in (str(folder), URL):
            assert main(["inspect", place, *options]) == 0
            shown.append(capfd.readouterr().out)
        assert shown[0] == shown[1]
    pages = []
    for name, place in (("local", str(folder)), ("remote", URL)):
        assert main(["inspect", place, "--html", str(tmp_path / name)]) == 0
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_quick_downloads_no_shard_and_a_document_no_more_than_its_chunks(folder):
    with http_server(folder) as server:
        assert verify_dataset(server.url, "quick").problems == []
        assert not server.ranges_asked
        with opened(server.url) as dataset:
            lines = show_document(dataset, "train", 12)
            asked = server.ranges_asked
        assert lines == show_document_of(folder, 12)
        assert {name for name, _, _ in asked} == {"train-000000.tar"}
        assert all(stop - start <= 1024 for _, start, stop in asked)


@pytest.fixture
def short_delays(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)


def test_faults_that_pass_are_no_faults_of_the_dataset(folder, short_delays):
    with http_server(folder) as server:
        server.faults["train-000000.tar"] = [502, 502, 503, "cut"]
        server.faults["train.shards.npy"] = ["cut"]
        report = verify_dataset(server.url)
        assert report.problems == []
        assert report.lines[-1] == "extra files were not looked for: the server lists no files"


def test_a_server_that_stays_away_ends_the_check_after_what_was_found(folder, tmp_path, short_delays):
    shutil.copytree(folder, tmp_path / "one")
    (tmp_path / "one" / "train-000000.tar").unlink()
    with http_server(tmp_path / "one") as server:
        server.faults["train-000001.tar"] = [("always", 502)]
        problems = verify_dataset(server.url).problems
        assert server.requests["train-000002.tar"] == 0
    assert problems[0] == f"{server.url}/train-000000.tar: missing; restore the file, or prepare the dataset again"
    assert problems[1].startswith(f"{server.url}/train-000001.tar: HTTP 502")
    assert problems[1].endswith("what comes after it was not checked")
    assert len(problems) == 2


def test_an_http_server_that_lists_its_files_and_knows_no_ranges(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "one")
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/one"
        assert verify_dataset(url, "deep").lines[-1].startswith(f"{url}: whole (")
        with opened(url) as dataset:
            assert show_document(dataset, "train", 150) == show_document_of(folder, 150)
        shutil.copy(folder / "train-000000.tar", tmp_path / "one" / "train-000077.tar")
        assert verify_dataset(url, "quick").problems == [
            f"{url}/train-000077.tar: belongs to no split of the manifest; move it away"
        ]
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def show_document_of(folder: Path, number: int) -> list[str]:
    with opened(folder) as dataset:
        return show_document(dataset, "train", number)


def test_every_document_is_found_by_its_number(folder):
    with opened(folder) as dataset:
        for number, text in enumerate(TEXTS):
            lines = show_document(dataset, "train", number)
            assert "\n".join(lines[2:-2]) == text
        with pytest.raises(UserError, match="split 'train' has documents 0 to 199"):
            show_document(dataset, "train", 200)
